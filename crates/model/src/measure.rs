//! What a relationship has come to lately: sums by the hour over a window that slides, in bounded space, and the
//! count of cycles that should have been and were not.

use std::collections::VecDeque;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::Timestamp;

/// The longest window, in hours.
pub const WINDOW_HOURS_MAX: u64 = 7 * 24;

const HOUR: Duration = Duration::from_secs(3600);

/// What can be summed.
pub trait Tally: Default + Clone {
    /// Takes another one's sums in.
    fn add(&mut self, other: &Self);
}

/// Sums by the hour. The newest `length` hours count, the one that has begun among them; no more are kept.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Window<T> {
    since: Timestamp,
    /// Full hours since 1970, ascending.
    hours: VecDeque<(i64, T)>,
}

/// The sums of a window.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Sum<T> {
    /// Since when it counts.
    pub since: Timestamp,
    /// What has come to be since then.
    pub sum: T,
}

impl<T: Tally> Window<T> {
    /// A window that begins now.
    #[must_use]
    pub fn beginning(now: Timestamp) -> Self {
        Self { since: now, hours: VecDeque::new() }
    }

    /// Notes what has just happened.
    pub fn note(&mut self, tally: &T, now: Timestamp, length: Duration) {
        let hour = hour(now);
        let mut current = tally.clone();
        // Hours to come are those of a clock that was set back since: what they have was counted just before.
        while let Some((_, latest)) = self.hours.pop_back_if(|(at, _)| *at >= hour) {
            current.add(&latest);
        }
        self.hours.push_back((hour, current));
        let oldest = oldest_hour(now, length);
        while self.hours.pop_front_if(|(at, _)| *at < oldest).is_some() {}
    }

    /// What the window comes to now.
    #[must_use]
    pub fn sum(&self, now: Timestamp, length: Duration) -> Sum<T> {
        let oldest = oldest_hour(now, length);
        let mut sum = T::default();
        for (_, tally) in self.hours.iter().filter(|(at, _)| *at >= oldest) {
            sum.add(tally);
        }
        let begun = Timestamp(oldest.saturating_mul(micros(HOUR)));
        Sum { since: self.since.max(begun).min(now), sum }
    }
}

fn hour(moment: Timestamp) -> i64 {
    moment.0.div_euclid(micros(HOUR))
}

fn oldest_hour(now: Timestamp, length: Duration) -> i64 {
    let hours = (length.as_secs() / HOUR.as_secs()).clamp(1, WINDOW_HOURS_MAX);
    hour(now).saturating_sub(i64::try_from(hours).unwrap_or(i64::MAX) - 1)
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

/// A tally is stored as the list of its numbers: a window is written with every cycle, and is small so. What an
/// older program has not written is zero.
macro_rules! tally {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $how:ident),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
        #[serde(from = "Vec<u64>", into = "Vec<u64>")]
        pub struct $name { $($(#[$field_doc])* pub $field: u64),+ }

        impl Tally for $name {
            fn add(&mut self, other: &Self) {
                $(self.$field = $how(self.$field, other.$field);)+
            }
        }

        impl From<Vec<u64>> for $name {
            fn from(numbers: Vec<u64>) -> Self {
                let mut numbers = numbers.into_iter();
                Self { $($field: numbers.next().unwrap_or(0)),+ }
            }
        }

        impl From<$name> for Vec<u64> {
            fn from(tally: $name) -> Self {
                vec![$(tally.$field),+]
            }
        }
    };
}

const fn plus(one: u64, other: u64) -> u64 {
    one.saturating_add(other)
}

fn larger(one: u64, other: u64) -> u64 {
    one.max(other)
}

tally! {
    /// The cycles of a primary. Sizes and latencies are those of cycles of changes.
    CycleTally {
        /// Cycles of changes that ended well.
        done: plus,
        /// Cycles that should have been: each interval that went by without one.
        missed: plus,
        /// Cycles that failed.
        failed: plus,
        /// Cycles of passes (initial replication, resynchronization) that ended well.
        passes: plus,
        /// Bytes of the logs.
        log_bytes: plus,
        /// Bytes of the largest cycle's.
        log_bytes_max: larger,
        /// From the moment to the durable acknowledgement, in milliseconds, over all cycles.
        latency_ms: plus,
        /// The same of the longest.
        latency_ms_max: larger,
    }
}

tally! {
    /// What a replica has received and done.
    ReplicaTally {
        /// Logs received.
        logs: plus,
        /// Their bytes.
        log_bytes: plus,
        /// The bytes of the largest.
        log_bytes_max: larger,
        /// The longest time between the moments of two neighbouring points, in milliseconds.
        gap_ms_max: larger,
        /// Applies that ended well.
        applies: plus,
        /// Applies that failed.
        applies_failed: plus,
    }
}

impl CycleTally {
    /// All cycles that there should have been.
    #[must_use]
    pub const fn cycles(&self) -> u64 {
        self.done.saturating_add(self.missed)
    }

    /// Bytes of the average cycle; none if there was none.
    #[must_use]
    pub const fn log_bytes_avg(&self) -> Option<u64> {
        self.log_bytes.checked_div(self.done)
    }

    /// The average latency; none if there was no cycle.
    #[must_use]
    pub fn latency_avg(&self) -> Option<Duration> {
        self.latency_ms.checked_div(self.done).map(Duration::from_millis)
    }
}

/// Whole milliseconds, for a tally.
#[must_use]
pub fn tally_ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The last error of a window.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastError {
    /// When it was.
    pub at: Timestamp,
    /// What it said.
    pub message: String,
}

/// The next cycle that is owed: what counts those that were missed.
///
/// Only time in which cycles should run counts. Whoever stops them on purpose (a pause, the end of the site) begins
/// a new count when they run again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owed {
    due: Timestamp,
}

impl Owed {
    /// From this moment on a cycle is owed.
    #[must_use]
    pub const fn from(due: Timestamp) -> Self {
        Self { due }
    }

    /// A cycle has ended well, and the next one is due at `next`. How many were missed: one for each whole interval
    /// that went by since it was owed. What it has taken of the interval that has begun is no reason to owe the next
    /// one earlier.
    pub fn done(&mut self, now: Timestamp, interval: Duration, next: Timestamp) -> u64 {
        let missed = self.failed(now, interval);
        self.due = self.due.plus(interval).min(now.plus(interval)).max(next);
        missed
    }

    /// A cycle has failed. How many are missed by now: one for each whole interval since it was owed. One that is
    /// made good within its interval is none.
    pub fn failed(&mut self, now: Timestamp, interval: Duration) -> u64 {
        let missed = intervals(now.since(self.due), interval);
        let times = u32::try_from(missed).unwrap_or(u32::MAX);
        self.due = self.due.plus(interval.saturating_mul(times));
        missed
    }
}

fn intervals(time: Duration, interval: Duration) -> u64 {
    u64::try_from(time.as_millis() / interval.as_millis().max(1)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DAY: Duration = Duration::from_secs(24 * 3600);

    fn at(seconds: u64) -> Timestamp {
        Timestamp(1_700_000_000_000_000).plus(Duration::from_secs(seconds))
    }

    fn done(log_bytes: u64) -> CycleTally {
        CycleTally { done: 1, log_bytes, log_bytes_max: log_bytes, ..CycleTally::default() }
    }

    proptest! {
        #[test]
        fn a_window_is_the_naive_sum_of_its_hours_in_bounded_space(
            steps in prop::collection::vec((0_u64..5000, 0_u64..100), 1..200),
            hours in 1_u64..30,
        ) {
            let length = HOUR * u32::try_from(hours).unwrap();
            let mut window = Window::beginning(at(0));
            let (mut now, mut all) = (0, Vec::new());
            for (later, bytes) in steps {
                now += later;
                window.note(&done(bytes), at(now), length);
                all.push((hour(at(now)), bytes));
                let counted: Vec<u64> =
                    all.iter().filter(|(at_hour, _)| at_hour + hours as i64 > hour(at(now))).map(|(_, b)| *b).collect();
                let Sum { since, sum } = window.sum(at(now), length);
                prop_assert_eq!(sum.done, counted.len() as u64);
                prop_assert_eq!(sum.log_bytes, counted.iter().sum::<u64>());
                prop_assert_eq!(sum.log_bytes_max, counted.iter().copied().max().unwrap_or(0));
                prop_assert!(at(now).since(since) <= length && since >= at(0));
                prop_assert!(window.hours.len() as u64 <= hours);
            }
            let stored = serde_json::to_string(&window).unwrap();
            prop_assert_eq!(serde_json::from_str::<Window<CycleTally>>(&stored).unwrap(), window);
        }

        /// Whatever fails and however long it takes, no more is missed than the time has room for, and nothing where
        /// each cycle ends well within its interval.
        #[test]
        fn no_more_cycles_are_missed_than_the_time_has_room_for(
            steps in prop::collection::vec((0_u64..200, any::<bool>(), 0_u64..100), 1..60),
            well in any::<bool>(),
        ) {
            const INTERVAL: Duration = Duration::from_secs(30);
            let mut owed = Owed::from(at(0));
            let (mut now, mut next, mut missed) = (0, 0, 0);
            for (takes, ends_well, wait) in steps {
                let takes = if well { takes % 30 } else { takes };
                let begun = now.max(next);
                now = begun + takes;
                if well || ends_well {
                    next = now.max(begun + 30);
                    missed += owed.done(at(now), INTERVAL, at(next));
                } else {
                    next = now + wait;
                    missed += owed.failed(at(now), INTERVAL);
                }
                prop_assert!(missed * 30 <= now, "{} in {} s", missed, now);
            }
            prop_assert!(!well || missed == 0);
        }
    }

    #[test]
    fn a_clock_that_was_set_back_loses_nothing_and_stops_nothing() {
        let mut window = Window::beginning(at(0));
        window.note(&done(1), at(0), DAY);
        window.note(&done(2), at(400 * 86_400), DAY);
        window.note(&done(3), at(3600), DAY);
        let Sum { since, sum } = window.sum(at(3600), DAY);
        assert_eq!((sum.done, sum.log_bytes_max), (2, 3));
        assert!(since <= at(3600));
        assert_eq!(window.sum(at(3 * 86_400), DAY).sum.done, 0, "it goes on sliding");
    }

    #[test]
    fn a_day_of_cycles_takes_little_room() {
        let mut window = Window::beginning(at(0));
        for cycle in 0..2880 * 3 {
            window.note(&done(cycle << 20), at(cycle * 30), DAY);
        }
        let stored = serde_json::to_string(&window).unwrap();
        assert!(stored.len() < 2048, "{} bytes", stored.len());
        assert!((2760..=2880).contains(&window.sum(at(2880 * 3 * 30 - 30), DAY).sum.done));
    }

    #[test]
    fn each_whole_interval_without_a_cycle_is_one_missed() {
        let interval = Duration::from_secs(30);
        let mut owed = Owed::from(at(0));
        assert_eq!(owed.done(at(29), interval, at(30)), 0);
        assert_eq!(owed.done(at(95), interval, at(95)), 2, "65 s after it was due");
        assert_eq!(owed.failed(at(96), interval), 0);
        assert_eq!(owed.done(at(100), interval, at(126)), 0, "it was made good within its interval");
        assert_eq!(owed.failed(at(151), interval), 0);
        assert_eq!(owed.done(at(130 + 1800), interval, at(2000)), 60, "the wait of half an hour");
    }

    #[test]
    fn cycles_that_always_take_a_little_too_long_miss_few() {
        let interval = Duration::from_secs(30);
        let (mut owed, mut missed) = (Owed::from(at(0)), 0);
        for cycle in 1..=60 {
            missed += owed.done(at(35 * cycle), interval, at(35 * cycle));
        }
        assert_eq!(missed, 11, "2100 s have room for 70 cycles");
    }

    #[test]
    fn what_an_older_program_has_not_written_is_zero() {
        let tally: CycleTally = serde_json::from_str("[7,1]").unwrap();
        assert_eq!((tally.done, tally.missed, tally.failed), (7, 1, 0));
    }
}
