//! When a pass over all disks may run: a resynchronization by its policy and by a person's word, an initial
//! replication at its time.
//!
//! ```text
//!                        asked for ──────────────────────────────▶ now, whatever the policy says, to its end
//!  resynchronization ─┬─ automatic ──────────────────────────────▶ now
//!                     ├─ daily 22:00-06:00 ──▶ within: now · outside: it rests until it opens, and goes on where it was
//!                     └─ manual ─────────────────────────────────▶ when it is asked for
//!                        cancelled ──▶ daily: in the next window that opens · else: when it is asked for
//!  initial replication ── at a time ─────────────────────────────▶ from then on
//! ```
//!
//! Times of day are UTC: one that does not exist, or comes twice, when clocks are changed, is none to keep a window by.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{Phase, Timestamp};

/// An initial replication may begin at most so much later.
pub const INITIAL_AHEAD_MAX: Duration = Duration::from_secs(7 * 24 * 3600);

const MINUTE: i64 = 60_000_000;
const DAY: i64 = 24 * 60 * MINUTE;

/// When a relationship compares its two sides without being asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ResyncPolicy {
    /// As soon as it is required.
    #[default]
    Automatic,
    /// Never: a person starts it.
    Manual,
    /// Only within a window of each day.
    Daily(DailyWindow),
}

/// A window of each day, in UTC; it may reach over midnight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DailyWindow {
    from_min: u16,
    until_min: u16,
}

/// A policy that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no policy; use auto, manual or a daily window such as 22:00-06:00 (UTC)")]
pub struct PolicyError(String);

/// What a person has said of the resynchronization that is required or under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "word")]
pub enum ResyncWord {
    /// Nothing: the policy decides.
    #[default]
    None,
    /// It is to run now.
    Asked,
    /// It is to end.
    Cancelled {
        /// When that was said.
        at: Timestamp,
    },
}

/// How an initial replication is to begin.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "start")]
pub enum InitialStart {
    /// At once.
    #[default]
    Now,
    /// At a time.
    At {
        /// When.
        at: Timestamp,
    },
    /// Once the replica's site has images of the disks; only what differs is sent.
    Seed,
    /// At once, and onto media that are carried to the replica's site.
    Media {
        /// An empty folder on them.
        dir: PathBuf,
    },
}

/// Whether the next step of a pass may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "may-run", content = "at")]
pub enum MayRun {
    /// Now.
    Now,
    /// From this moment on.
    From(Timestamp),
    /// When a person asks for it.
    WhenAsked,
}

/// Whether the next cycle may run now, as far as passes are concerned; cycles of changes always may.
#[must_use]
pub fn may_run(
    phase: &Phase,
    policy: ResyncPolicy,
    word: ResyncWord,
    initial: &InitialStart,
    now: Timestamp,
) -> MayRun {
    let has_begun = match phase {
        Phase::InitialReplication { progress } => progress.covered_bytes > 0,
        Phase::ResyncRequired { .. } => false, // the first compare of a replica that begins with images
        _ => true,
    };
    match (phase, initial) {
        (_, InitialStart::At { at }) if *at > now && !has_begun => MayRun::From(*at),
        (Phase::ResyncRequired { .. } | Phase::Resynchronizing { .. }, _) => may_resync(policy, word, now),
        _ => MayRun::Now,
    }
}

fn may_resync(policy: ResyncPolicy, word: ResyncWord, now: Timestamp) -> MayRun {
    match (word, policy) {
        (ResyncWord::Asked, _) | (ResyncWord::None, ResyncPolicy::Automatic) => MayRun::Now,
        (_, ResyncPolicy::Manual) | (ResyncWord::Cancelled { .. }, ResyncPolicy::Automatic) => {
            MayRun::WhenAsked
        }
        (ResyncWord::None, ResyncPolicy::Daily(window)) => window.not_before(now, now),
        (ResyncWord::Cancelled { at }, ResyncPolicy::Daily(window)) => {
            window.not_before(window.opens_after(at), now)
        }
    }
}

/// Whether an initial replication may be set to begin then.
pub fn check_initial_start(at: Timestamp, now: Timestamp) -> Result<(), String> {
    if at <= now {
        return Err(
            "the initial replication cannot begin in the past; leave --initial out to begin now".into()
        );
    }
    if at.since(now) > INITIAL_AHEAD_MAX {
        return Err("the initial replication can begin at most 7 days ahead".into());
    }
    Ok(())
}

impl DailyWindow {
    /// From and until so many minutes after midnight UTC; none if one of them is no time of day, or both are the same.
    #[must_use]
    pub fn new(from_min: u16, until_min: u16) -> Option<Self> {
        let is_time = |minutes| minutes < 24 * 60;
        (is_time(from_min) && is_time(until_min) && from_min != until_min)
            .then_some(Self { from_min, until_min })
    }

    /// Whether it is open then. It opens with its first minute, and its last one is no part of it.
    #[must_use]
    pub fn is_open(self, at: Timestamp) -> bool {
        let minute = at.0.rem_euclid(DAY) / MINUTE;
        let (from, until) = (i64::from(self.from_min), i64::from(self.until_min));
        if from < until { (from..until).contains(&minute) } else { minute >= from || minute < until }
    }

    /// When it opens next, after that moment.
    #[must_use]
    pub fn opens_after(self, at: Timestamp) -> Timestamp {
        let today = at.0 - at.0.rem_euclid(DAY) + i64::from(self.from_min) * MINUTE;
        Timestamp(if today > at.0 { today } else { today.saturating_add(DAY) })
    }

    /// When it opens, as people write it.
    #[must_use]
    pub fn opens(self) -> impl fmt::Display {
        Minutes(self.from_min)
    }

    fn not_before(self, earliest: Timestamp, now: Timestamp) -> MayRun {
        match earliest.max(now) {
            at if at > now && self.is_open(at) => MayRun::From(at),
            at if self.is_open(at) => MayRun::Now,
            at => MayRun::From(self.opens_after(at)),
        }
    }
}

struct Minutes(u16);

impl fmt::Display for Minutes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02}:{:02}", self.0 / 60, self.0 % 60)
    }
}

impl fmt::Display for ResyncPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Automatic => f.write_str("auto"),
            Self::Manual => f.write_str("manual"),
            Self::Daily(DailyWindow { from_min, until_min }) => {
                write!(f, "{}-{}", Minutes(*from_min), Minutes(*until_min))
            }
        }
    }
}

impl FromStr for ResyncPolicy {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Self, PolicyError> {
        match text {
            "auto" => Ok(Self::Automatic),
            "manual" => Ok(Self::Manual),
            _ => window(text).map(Self::Daily).ok_or_else(|| PolicyError(text.to_owned())),
        }
    }
}

fn window(text: &str) -> Option<DailyWindow> {
    let (from, until) = text.split_once('-')?;
    DailyWindow::new(minutes(from)?, minutes(until)?)
}

/// `HH:MM`, and nothing else.
fn minutes(text: &str) -> Option<u16> {
    let (hours, minutes) = text.split_once(':')?;
    let number = |text: &str| {
        let is_plain = text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_digit());
        is_plain.then(|| text.parse::<u16>().ok()).flatten()
    };
    let (hours, minutes) = (number(hours)?, number(minutes)?);
    (hours < 24 && minutes < 60).then_some(hours * 60 + minutes)
}

impl TryFrom<String> for ResyncPolicy {
    type Error = PolicyError;

    fn try_from(text: String) -> Result<Self, PolicyError> {
        text.parse()
    }
}

impl From<ResyncPolicy> for String {
    fn from(policy: ResyncPolicy) -> Self {
        policy.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Progress, ResyncReason};

    /// A moment of the day `days` after 1970-01-01.
    fn at(days: i64, time: &str) -> Timestamp {
        Timestamp(days * DAY + i64::from(minutes(time).unwrap()) * MINUTE)
    }

    fn policy(text: &str) -> ResyncPolicy {
        text.parse().unwrap()
    }

    fn resync(policy: ResyncPolicy, word: ResyncWord, now: Timestamp) -> MayRun {
        let under_way = Phase::Resynchronizing { progress: Progress { covered_bytes: 1, total_bytes: 2 } };
        let required = Phase::ResyncRequired { why: ResyncReason::Requested };
        let [of_both, again] =
            [under_way, required].map(|phase| may_run(&phase, policy, word, &InitialStart::Now, now));
        assert_eq!(of_both, again, "a pass rests and goes on by the rule that it begins by");
        of_both
    }

    #[test]
    fn a_policy_reads_as_it_is_written_and_nothing_else_is_one() {
        for text in ["auto", "manual", "22:00-06:00", "00:00-23:59"] {
            assert_eq!(policy(text).to_string(), text);
            let json = serde_json::to_string(&policy(text)).unwrap();
            assert_eq!(serde_json::from_str::<ResyncPolicy>(&json).unwrap(), policy(text));
        }
        for bad in [
            "",
            "always",
            "22:00",
            "22-06",
            "22:00-22:00",
            "24:00-06:00",
            "22:60-06:00",
            "+2:00-06:00",
            "2:00-6:00",
        ] {
            assert!(bad.parse::<ResyncPolicy>().is_err(), "{bad}");
        }
        assert!(serde_json::from_str::<ResyncPolicy>("\"25:00-06:00\"").is_err());
    }

    #[test]
    fn a_window_over_midnight_is_open_on_both_sides_of_it() {
        let night = policy("22:00-06:00");
        for (now, expected) in [
            (at(9, "21:59"), MayRun::From(at(9, "22:00"))),
            (at(9, "22:00"), MayRun::Now),
            (at(10, "00:00"), MayRun::Now),
            (at(10, "05:59"), MayRun::Now),
            (at(10, "06:00"), MayRun::From(at(10, "22:00"))),
        ] {
            assert_eq!(resync(night, ResyncWord::None, now), expected, "{now:?}");
        }
        let last = Timestamp(at(10, "06:00").0 - 1);
        assert_eq!(resync(night, ResyncWord::None, last), MayRun::Now, "to the last microsecond");
    }

    #[test]
    fn a_window_within_a_day_opens_again_the_day_after() {
        let noon = policy("12:00-13:30");
        assert_eq!(resync(noon, ResyncWord::None, at(9, "11:00")), MayRun::From(at(9, "12:00")));
        assert_eq!(resync(noon, ResyncWord::None, at(9, "13:29")), MayRun::Now);
        assert_eq!(resync(noon, ResyncWord::None, at(9, "13:30")), MayRun::From(at(10, "12:00")));
        let before_time_began = Timestamp(at(-1, "13:30").0);
        assert_eq!(resync(noon, ResyncWord::None, before_time_began), MayRun::From(at(0, "12:00")));
    }

    #[test]
    fn what_a_person_asks_for_runs_whatever_the_policy_says() {
        for text in ["auto", "manual", "22:00-06:00"] {
            assert_eq!(resync(policy(text), ResyncWord::Asked, at(9, "12:00")), MayRun::Now, "{text}");
        }
        assert_eq!(resync(policy("manual"), ResyncWord::None, at(9, "12:00")), MayRun::WhenAsked);
        assert_eq!(resync(policy("auto"), ResyncWord::None, at(9, "12:00")), MayRun::Now);
    }

    #[test]
    fn what_was_cancelled_waits_for_a_person_or_the_next_window() {
        let cancelled = ResyncWord::Cancelled { at: at(9, "23:00") };
        for text in ["auto", "manual"] {
            assert_eq!(resync(policy(text), cancelled, at(20, "23:00")), MayRun::WhenAsked, "{text}");
        }
        let night = policy("22:00-06:00");
        let next = at(10, "22:00");
        for now in [at(9, "23:00"), at(10, "05:00"), at(10, "12:00")] {
            assert_eq!(
                resync(night, cancelled, now),
                MayRun::From(next),
                "not in the window it was cancelled in"
            );
        }
        assert_eq!(resync(night, cancelled, next), MayRun::Now);
        assert_eq!(resync(night, cancelled, at(12, "12:00")), MayRun::From(at(12, "22:00")));
    }

    #[test]
    fn an_initial_replication_begins_at_its_time_and_changes_always_go() {
        let begin = at(9, "22:00");
        let start = InitialStart::At { at: begin };
        let initial = |covered| Phase::InitialReplication {
            progress: Progress { covered_bytes: covered, total_bytes: 9 },
        };
        let may = |phase: &Phase, now| may_run(phase, ResyncPolicy::Manual, ResyncWord::None, &start, now);
        assert_eq!(may(&initial(0), at(9, "21:59")), MayRun::From(begin));
        assert_eq!(may(&initial(0), begin), MayRun::Now);
        assert_eq!(may(&initial(1), at(9, "21:59")), MayRun::Now, "what has begun goes on");
        assert_eq!(may(&Phase::Replicating, at(9, "21:59")), MayRun::Now);
        let week = begin.plus(INITIAL_AHEAD_MAX);
        assert!(check_initial_start(week, begin).is_ok());
        assert!(check_initial_start(week.plus(Duration::from_secs(1)), begin).is_err());
        assert!(check_initial_start(begin, begin).is_err());
    }
}
