//! Whether a VM is to be backed up now.

use model::Timestamp;

use crate::schedule::Schedule;

/// A backup that is due, and until when it is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// What it was due for.
    pub start: Timestamp,
    /// When its first attempt may begin: now, or after a blackout.
    pub begin: Timestamp,
    /// When no further attempt begins.
    pub deadline: Timestamp,
    /// Its own window had ended: the site was off, or the backup before went on so long.
    pub caught_up: bool,
}

/// What a schedule asks for at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    /// A backup.
    Now(Window),
    /// Nothing before this moment; ever, if there is none.
    NotBefore(Option<Timestamp>),
}

/// Whether a backup is due of a VM of which `done` is the last start that was seen to: the one of its last backup, or
/// the moment from which on it is selected. However many starts lie between, it is due once.
#[must_use]
pub fn due(schedule: &Schedule, done: Timestamp, now: Timestamp) -> Due {
    let start = schedule.latest_start(now).filter(|start| *start > done);
    let Some(start) = start else {
        return Due::NotBefore(schedule.next_start(now));
    };
    let deadline = schedule.deadline(start, now);
    match schedule.allowed_from(now) {
        Some(begin) if begin < deadline => {
            Due::Now(Window { start, begin, deadline, caught_up: !schedule.is_in_window(start, now) })
        }
        // It is still due when the blackout is over, as one that is caught up.
        free => Due::NotBefore(free),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use jiff::tz::TimeZone;
    use proptest::prelude::*;

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn hours(count: u64) -> Timestamp {
        // 2023-11-13 00:00 UTC, a Monday.
        Timestamp(1_699_833_600_000_000).plus(HOUR * u32::try_from(count).unwrap())
    }

    fn nightly(blackouts: &[&str]) -> Schedule {
        let blackouts = blackouts.iter().map(|text| text.parse().unwrap()).collect();
        Schedule::new(&["0 22 * * *".into()], TimeZone::UTC, Some(HOUR * 8), blackouts).unwrap()
    }

    #[test]
    fn a_night_is_due_once() {
        let schedule = nightly(&[]);
        assert_eq!(due(&schedule, hours(10), hours(21)), Due::NotBefore(Some(hours(22))));
        let window = Window { start: hours(22), begin: hours(22), deadline: hours(30), caught_up: false };
        assert_eq!(due(&schedule, hours(10), hours(22)), Due::Now(window));
        assert_eq!(due(&schedule, window.start, hours(23)), Due::NotBefore(Some(hours(46))));
    }

    #[test]
    fn nights_that_were_missed_are_caught_up_once() {
        let schedule = nightly(&[]);
        // Off from the first evening until the fourth morning.
        let window = Window { start: hours(70), begin: hours(82), deadline: hours(90), caught_up: true };
        assert_eq!(due(&schedule, hours(0), hours(82)), Due::Now(window));
        assert_eq!(due(&schedule, window.start, hours(83)), Due::NotBefore(Some(hours(94))));
    }

    #[test]
    fn nothing_begins_in_a_blackout_and_nothing_is_lost_to_it() {
        let schedule = nightly(&["21:00-23:00"]);
        let Due::Now(window) = due(&schedule, hours(0), hours(22)) else { panic!("due") };
        assert_eq!((window.begin, window.deadline), (hours(23), hours(30)));
        let all_night = nightly(&["21:00-07:00"]);
        assert_eq!(due(&all_night, hours(0), hours(22)), Due::NotBefore(Some(hours(31))));
        let Due::Now(window) = due(&all_night, hours(0), hours(31)) else { panic!("due") };
        assert!(window.caught_up);
    }

    proptest! {
        /// Whenever it is looked, and whatever was off meanwhile: each start is seen to at most once, in order, and after
        /// any look nothing is left due.
        #[test]
        fn each_start_at_most_once(looks in prop::collection::vec(1_u64..200, 1..40)) {
            let schedule = nightly(&["Mon 00:00-24:00", "03:00-04:00"]);
            let (mut done, mut at) = (hours(0), 0);
            for step in looks {
                at += step;
                let now = hours(at);
                if let Due::Now(window) = due(&schedule, done, now) {
                    prop_assert!(window.start > done && window.start <= now);
                    prop_assert!(now <= window.begin && window.begin < window.deadline);
                    done = window.start;
                    prop_assert!(matches!(due(&schedule, done, now), Due::NotBefore(Some(next)) if next > now));
                }
            }
        }
    }
}
