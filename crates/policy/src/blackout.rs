//! When nothing is begun: hours of days of the week.

use std::str::FromStr;

use jiff::civil::{DateTime, Time, Weekday};
use jiff::tz::TimeZone;
use jiff::{ToSpan, Zoned};
use model::Timestamp;

use crate::calendar::{moment, zoned};
use crate::error::PolicyError;

/// Hours of some days of the week, in a policy's time zone: from one time of the day up to, and not with, another; where
/// that is earlier or the same, of the day after.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blackout {
    /// By days since Monday.
    days: [bool; 7],
    from: Time,
    to: Time,
}

impl Blackout {
    /// When it is over that holds at this moment; none if it does not hold.
    fn end_at(&self, now: &Zoned) -> Option<Zoned> {
        let local = now.datetime();
        [local.date(), local.date().yesterday().ok()?].into_iter().find_map(|day| {
            if !self.days[days_since_monday(day.weekday())] {
                return None;
            }
            let last = if self.to > self.from { day } else { day.tomorrow().ok()? };
            let (begin, end) = (DateTime::from_parts(day, self.from), DateTime::from_parts(last, self.to));
            let end = (begin <= local && local < end).then_some(end)?;
            end.to_zoned(now.time_zone().clone()).ok()
        })
    }
}

fn days_since_monday(day: Weekday) -> usize {
    usize::try_from(day.to_monday_zero_offset()).unwrap_or_default()
}

/// The first moment from `at` on at which none of these holds; none if there is none within two weeks.
pub(crate) fn first_free(blackouts: &[Blackout], zone: &TimeZone, at: Timestamp) -> Option<Timestamp> {
    let begin = zoned(at, zone);
    let beyond = begin.checked_add(15.days()).ok()?;
    let mut free = begin;
    while free < beyond {
        match blackouts.iter().find_map(|blackout| blackout.end_at(&free)) {
            None => return Some(moment(&free).max(at)),
            // A clock that is set back may show an end that was before.
            Some(end) if end <= free => free = free.checked_add(1.hour()).ok()?,
            Some(end) => free = end,
        }
    }
    None
}

impl FromStr for Blackout {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Self, PolicyError> {
        let refuse = |why| PolicyError::Blackout { text: text.to_owned(), why };
        let mut parts = text.split_whitespace();
        let (days, hours) = match (parts.next(), parts.next(), parts.next()) {
            (Some(hours), None, None) => ([true; 7], hours),
            (Some(days), Some(hours), None) => {
                (self::days(days).ok_or_else(|| refuse("its days cannot be read"))?, hours)
            }
            _ => return Err(refuse("it has too many parts, or none")),
        };
        let (from, to) = hours.split_once('-').ok_or_else(|| refuse("its times cannot be read"))?;
        let time = |text: &str| match text {
            "24:00" => Some(Time::midnight()),
            text => text.parse().ok(),
        };
        match (time(from), time(to)) {
            (Some(from), Some(to)) => Ok(Self { days, from, to }),
            _ => Err(refuse("its times cannot be read")),
        }
    }
}

const DAYS: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];

/// "Mon", "Mon-Fri", "Sat,Sun", "Fri-Mon".
fn days(text: &str) -> Option<[bool; 7]> {
    let day = |text: &str| DAYS.iter().position(|day| text.eq_ignore_ascii_case(day));
    let mut days = [false; 7];
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (day(first)?, day(last)?);
        let length = (last + 7 - first) % 7;
        (first..=first + length).for_each(|day| days[day % 7] = true);
    }
    Some(days)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn free(blackouts: &[&str], at: &str) -> String {
        let blackouts: Vec<Blackout> = blackouts.iter().map(|text| text.parse().unwrap()).collect();
        let at: Zoned = at.parse().unwrap();
        let free = first_free(&blackouts, at.time_zone(), moment(&at));
        free.map_or("never".into(), |free| zoned(free, at.time_zone()).strftime("%a %H:%M").to_string())
    }

    #[test]
    fn what_falls_into_a_blackout_waits_for_its_end() {
        let work = "Mon-Fri 08:00-18:00";
        // 2026-11-27 is a Friday.
        assert_eq!(free(&[work], "2026-11-27T07:59[Europe/Berlin]"), "Fri 07:59");
        assert_eq!(free(&[work], "2026-11-27T08:00[Europe/Berlin]"), "Fri 18:00");
        assert_eq!(free(&[work], "2026-11-28T12:00[Europe/Berlin]"), "Sat 12:00");
        assert_eq!(free(&[work, "18:00-20:00"], "2026-11-27T12:00[Europe/Berlin]"), "Fri 20:00");
        assert_eq!(free(&["Fri 22:00-06:00"], "2026-11-28T05:00[Europe/Berlin]"), "Sat 06:00");
        assert_eq!(free(&["Fri-Mon 22:00-06:00"], "2026-12-01T05:00[Europe/Berlin]"), "Tue 06:00");
        assert_eq!(free(&["Sat,Sun 00:00-24:00"], "2026-11-28T00:00[Europe/Berlin]"), "Mon 00:00");
        assert_eq!(free(&["00:00-24:00"], "2026-11-28T00:00[Europe/Berlin]"), "never");
    }

    #[test]
    fn an_hour_that_comes_twice_or_never_ends_a_blackout_too() {
        // Clocks go back from 03:00 to 02:00 on 2026-10-25, and on from 02:00 to 03:00 on 2027-03-28.
        assert_eq!(free(&["00:00-02:30"], "2026-10-25T01:00[Europe/Berlin]"), "Sun 02:30");
        assert_eq!(free(&["00:00-02:30"], "2027-03-28T01:00[Europe/Berlin]"), "Sun 03:30");
    }

    #[test]
    fn what_cannot_be_read_is_told() {
        for text in
            ["", "Mon", "Mon-Fri", "Mon 8-18", "Moon 08:00-18:00", "Mon 08:00-25:00", "Mon 08:00-18:00 x"]
        {
            let error = text.parse::<Blackout>().unwrap_err().to_string();
            assert!(error.contains("Mon-Fri 08:00-18:00"), "{error}");
        }
    }
}
