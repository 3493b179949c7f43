//! When backups are due: cron's five fields, in a time zone, and when nothing is begun.

use std::time::Duration;

use croner::Cron;
use croner::parser::{CronParser, Seconds, Year};
use jiff::tz::TimeZone;
use model::Timestamp;

use crate::blackout::{Blackout, first_free};
use crate::calendar::{moment, zoned};
use crate::error::PolicyError;

/// No window is longer, in any schedule.
const WINDOW_MAX: Duration = Duration::from_secs(7 * 24 * 3600);

/// When backups are due. A time of the day that a clock set forward leaves out is due right after the gap; one that comes
/// twice is due once (`croner` follows the Open Cron Pattern Specification).
#[derive(Debug, Clone)]
pub struct Schedule {
    crons: Vec<Cron>,
    zone: TimeZone,
    window: Option<Duration>,
    blackouts: Vec<Blackout>,
}

impl Schedule {
    /// Each of these patterns, in this zone. A backup is tried no longer than `window` after it was due.
    pub fn new(
        patterns: &[String],
        zone: TimeZone,
        window: Option<Duration>,
        blackouts: Vec<Blackout>,
    ) -> Result<Self, PolicyError> {
        let parser = CronParser::builder().seconds(Seconds::Disallowed).year(Year::Disallowed).build();
        let crons = patterns.iter().map(|text| {
            let refuse = |why: String| PolicyError::Schedule { text: text.clone(), why };
            let cron = parser.parse(text).map_err(|error| refuse(error.to_string()))?;
            let some_day = zoned(Timestamp(1_700_000_000_000_000), &zone);
            let comes = cron.find_next_occurrence(&some_day, true);
            comes.map_err(|_| refuse("there is no such day".into())).map(|_| cron)
        });
        Ok(Self { crons: crons.collect::<Result<_, _>>()?, zone, window, blackouts })
    }

    /// The last moment up to and with `now` at which a backup was due.
    #[must_use]
    pub fn latest_start(&self, now: Timestamp) -> Option<Timestamp> {
        let now = zoned(now, &self.zone);
        self.crons
            .iter()
            .filter_map(|cron| cron.find_previous_occurrence(&now, true).ok())
            .max()
            .map(|at| moment(&at))
    }

    /// The first moment after `after` at which a backup is due.
    #[must_use]
    pub fn next_start(&self, after: Timestamp) -> Option<Timestamp> {
        let after = zoned(after, &self.zone);
        self.crons
            .iter()
            .filter_map(|cron| cron.find_next_occurrence(&after, false).ok())
            .min()
            .map(|at| moment(&at))
    }

    /// Until when a backup is tried that is begun for `start` at `now`: for the length of the window after it was due
    /// (where it is caught up, after now), and not beyond the next one.
    #[must_use]
    pub fn deadline(&self, start: Timestamp, now: Timestamp) -> Timestamp {
        let next = self.next_start(now.max(start));
        let from = if self.is_in_window(start, now) { start } else { now };
        let end = from.plus(self.window.unwrap_or(WINDOW_MAX).min(WINDOW_MAX));
        next.map_or(end, |next| next.min(end))
    }

    /// Whether `now` is in the window of what was due at `start`.
    #[must_use]
    pub fn is_in_window(&self, start: Timestamp, now: Timestamp) -> bool {
        self.window.is_none_or(|window| now < start.plus(window))
    }

    /// The first moment from `at` on at which an attempt may begin; none if there is none within two weeks.
    #[must_use]
    pub fn allowed_from(&self, at: Timestamp) -> Option<Timestamp> {
        first_free(&self.blackouts, &self.zone, at)
    }

    /// Its time zone.
    #[must_use]
    pub fn zone(&self) -> &TimeZone {
        &self.zone
    }
}

#[cfg(test)]
mod tests {
    use jiff::Zoned;

    use super::*;

    fn at(text: &str) -> Timestamp {
        moment(&format!("{text}[Europe/Berlin]").parse::<Zoned>().unwrap())
    }

    fn schedule(patterns: &[&str], window_h: Option<u64>) -> Result<Schedule, PolicyError> {
        let patterns: Vec<String> = patterns.iter().map(|&text| text.to_owned()).collect();
        let zone = TimeZone::get("Europe/Berlin").unwrap();
        Schedule::new(&patterns, zone, window_h.map(|hours| Duration::from_secs(hours * 3600)), Vec::new())
    }

    #[test]
    fn a_night_is_found_from_both_sides() {
        let nightly = schedule(&["0 22 * * *"], Some(8)).unwrap();
        assert_eq!(nightly.latest_start(at("2026-11-28T21:59")), Some(at("2026-11-27T22:00")));
        assert_eq!(nightly.latest_start(at("2026-11-28T22:00")), Some(at("2026-11-28T22:00")));
        assert_eq!(nightly.next_start(at("2026-11-28T22:00")), Some(at("2026-11-29T22:00")));
        let (start, now) = (at("2026-11-28T22:00"), at("2026-11-28T23:00"));
        assert_eq!(nightly.deadline(start, now), at("2026-11-29T06:00"));
        // The site was off all night: the same length from now on.
        assert_eq!(nightly.deadline(start, at("2026-11-29T09:00")), at("2026-11-29T17:00"));
        assert_eq!(nightly.deadline(start, at("2026-11-29T20:00")), at("2026-11-29T22:00"));
    }

    #[test]
    fn several_patterns_are_due_whenever_one_is() {
        let both = schedule(&["0 22 * * Mon-Fri", "0 6 * * Sat,Sun"], None).unwrap();
        // A Friday, and the Saturday after it.
        assert_eq!(both.next_start(at("2026-11-27T12:00")), Some(at("2026-11-27T22:00")));
        assert_eq!(both.next_start(at("2026-11-27T22:00")), Some(at("2026-11-28T06:00")));
        assert_eq!(both.deadline(at("2026-11-27T22:00"), at("2026-11-27T22:00")), at("2026-11-28T06:00"));
    }

    #[test]
    fn clocks_that_are_set_neither_lose_a_night_nor_double_it() {
        let nightly = schedule(&["30 2 * * *"], None).unwrap();
        let starts = |from: &str| {
            let first = nightly.next_start(at(from)).unwrap();
            let second = nightly.next_start(first).unwrap();
            [first, second].map(|start| zoned(start, nightly.zone()).strftime("%d %H:%M %:z").to_string())
        };
        assert_eq!(starts("2027-03-27T12:00"), ["28 03:00 +02:00", "29 02:30 +02:00"]);
        assert_eq!(starts("2026-10-24T12:00"), ["25 02:30 +02:00", "26 02:30 +01:00"]);
    }

    #[test]
    fn what_is_no_schedule_or_never_comes_is_told() {
        for text in ["", "0 22 * *", "0 0 22 * * *", "61 * * * *", "0 0 30 2 *", "every night"] {
            let error = schedule(&[text], None).unwrap_err().to_string();
            assert!(error.contains("minute, hour"), "{text}: {error}");
        }
    }
}
