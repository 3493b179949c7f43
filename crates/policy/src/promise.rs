//! Whether a promise is kept: "a backup at most so old".

use std::time::Duration;

use model::{Timestamp, human_duration};
use serde::Serialize;

/// How a promise stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "standing", content = "why")]
pub enum Standing {
    /// It is kept, and the next backup will be in time.
    Kept,
    /// It is kept yet, and will not be if things go on like this.
    AtRisk(String),
    /// It is broken.
    Broken(String),
}

/// How long it can still be kept without another backup; zero once it is broken. `newest` is the moment of the newest
/// backup's point; a VM without one counts from `since`, when it was first selected.
#[must_use]
pub fn time_left(promise: Duration, newest: Option<Timestamp>, since: Timestamp, now: Timestamp) -> Duration {
    newest.unwrap_or(since).plus(promise).since(now)
}

/// How a promise stands. `expected` is when the next backup is due to be there at the latest: the end of the window that is
/// open or comes next; `failed` is why the last one failed, if it did.
#[must_use]
pub fn standing(
    promise: Duration,
    newest: Option<Timestamp>,
    since: Timestamp,
    expected: Option<Timestamp>,
    failed: Option<&str>,
    now: Timestamp,
) -> Standing {
    let left = time_left(promise, newest, since, now);
    let age = || match newest {
        Some(newest) => format!("the newest backup is {} old", human_duration(now.since(newest))),
        None => format!("there is no backup, after {}", human_duration(now.since(since))),
    };
    let failed = failed.map(|why| format!("; the last one failed: {why}")).unwrap_or_default();
    if left.is_zero() {
        return Standing::Broken(format!("{}, {} is promised{failed}", age(), human_duration(promise)));
    }
    match expected {
        None => Standing::AtRisk(format!("{}, and none is planned{failed}", age())),
        Some(expected) if expected > now.plus(left) => {
            let late = expected.since(now.plus(left));
            Standing::AtRisk(format!("the next backup may come {} too late{failed}", human_duration(late)))
        }
        Some(_) if !failed.is_empty() => Standing::AtRisk(format!("{}{failed}", age())),
        Some(_) => Standing::Kept,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn at(hours: u32) -> Timestamp {
        Timestamp(0).plus(HOUR * hours)
    }

    #[test]
    fn a_promise_is_kept_then_at_risk_then_broken() {
        let stands = |newest, expected, failed| standing(HOUR * 26, newest, at(0), expected, failed, at(30));
        assert_eq!(stands(Some(at(22)), Some(at(46)), None), Standing::Kept);
        assert!(
            matches!(stands(Some(at(22)), Some(at(46)), Some("disk full")), Standing::AtRisk(why) if why.contains("disk full"))
        );
        assert!(
            matches!(stands(Some(at(22)), Some(at(49)), None), Standing::AtRisk(why) if why.contains("1 h too late"))
        );
        assert!(
            matches!(stands(Some(at(22)), None, None), Standing::AtRisk(why) if why.contains("none is planned"))
        );
        assert!(
            matches!(stands(Some(at(4)), Some(at(46)), None), Standing::Broken(why) if why.contains("1 d 2 h old"))
        );
        assert!(
            matches!(stands(None, Some(at(46)), None), Standing::Broken(why) if why.contains("no backup"))
        );
    }

    #[test]
    fn a_new_vm_has_the_whole_time_for_its_first_backup() {
        let stands = |now| standing(HOUR * 26, None, at(100), Some(at(118)), None, now);
        assert_eq!(stands(at(101)), Standing::Kept);
        assert_eq!(time_left(HOUR * 26, None, at(100), at(101)), HOUR * 25);
        assert!(matches!(stands(at(126)), Standing::Broken(_)));
    }
}
