//! What becomes of a backup job after each attempt. The caller writes it down before anything waits.
//!
//! ```text
//!  asked for ──▶ waiting ──at its time──▶ running ──▶ done
//!                  ▲                        │ refused: again later, or with the barrier
//!                  └────────────────────────┤
//!                                           └──▶ ended (refused for good, attempts or window used up, an error)
//!
//! An attempt that fails by something that passes (a repository that cannot be reached) is tried again like one that is refused.
//! ```

use std::time::Duration;

use crate::gate::Refusal;
use crate::{Attempt, GiveUp, RetryDecision, RetryPolicy, Setback, Timestamp};

/// What bounds a job.
#[derive(Clone, Copy)]
pub struct Bounds<'a> {
    /// How it comes home.
    pub policy: &'a RetryPolicy,
    /// When its window ends.
    pub deadline: Timestamp,
    /// A refusal is its end.
    pub no_retry: bool,
    /// The first moment from another on at which an attempt may begin, if there is one: there are hours in which none may.
    pub allowed_from: &'a dyn Fn(Timestamp) -> Option<Timestamp>,
}

/// What one attempt came to.
#[derive(Debug)]
pub enum Outcome<R, F> {
    /// There is a backup.
    Done(R),
    /// The gate refused.
    Refused(Refusal),
    /// It failed, by something that passes.
    Faltered {
        /// How.
        failure: F,
        /// The failure's code.
        code: String,
        /// How long it lasts at the least, as far as is known.
        retry_after: Duration,
    },
    /// It failed, and another attempt would too.
    Failed(F),
}

/// What a job does next.
#[derive(Debug)]
pub enum Next<R, F> {
    /// It is at its end, with a backup.
    Done(R),
    /// It is at its end: it failed, and is not tried again; where it could have been, why not.
    Failed(F, Option<GiveUp>),
    /// It is at its end: it was refused, and is not tried again.
    Refused(Refusal, Option<GiveUp>),
    /// It is tried again at this moment; with the barrier, applies are held off for it.
    Again {
        /// When.
        at: Timestamp,
        /// Whether with the barrier.
        barrier: bool,
    },
}

/// A job that was running when its site died: a backup that was cut off leaves nothing, so it is begun anew.
#[must_use]
pub fn after_restart<R, F>(now: Timestamp) -> Next<R, F> {
    Next::Again { at: now, barrier: false }
}

/// What a job does whose turn has come: it may have waited long for others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// An attempt begins.
    Begin,
    /// None may begin before this moment.
    Wait(Timestamp),
    /// Its window has ended, or does before one may begin.
    TooLate,
}

/// Decides that.
#[must_use]
pub fn turn(bounds: Bounds<'_>, now: Timestamp) -> Turn {
    match (bounds.allowed_from)(now) {
        Some(at) if at > bounds.deadline => Turn::TooLate,
        Some(at) if at > now => Turn::Wait(at),
        Some(_) => Turn::Begin,
        None => Turn::TooLate,
    }
}

/// Settles an attempt; one that is worth another is added to the `refused` ones. `chance` is uniform in 0..1.
pub fn settle<R, F>(
    refused: &mut Vec<Attempt>,
    outcome: Outcome<R, F>,
    bounds: Bounds<'_>,
    now: Timestamp,
    chance: f64,
) -> Next<R, F> {
    let mut again = |by: Setback, retry_after| {
        refused.push(Attempt { at: now, refused: by });
        decide(refused, retry_after, bounds, now, chance)
    };
    match outcome {
        Outcome::Done(report) => Next::Done(report),
        Outcome::Failed(failure) => Next::Failed(failure, None),
        Outcome::Refused(refusal) => match again(refusal.condition.into(), refusal.retry_after) {
            Ok((at, barrier)) => Next::Again { at, barrier },
            Err(why) => Next::Refused(refusal, why),
        },
        Outcome::Faltered { failure, code, retry_after } => {
            match again(Setback::Failure(code), retry_after) {
                Ok((at, barrier)) => Next::Again { at, barrier },
                Err(why) => Next::Failed(failure, why),
            }
        }
    }
}

/// When the next attempt is, and whether with the barrier; or why there is none.
fn decide(
    refused: &[Attempt],
    retry_after: Duration,
    bounds: Bounds<'_>,
    now: Timestamp,
    chance: f64,
) -> Result<(Timestamp, bool), Option<GiveUp>> {
    if bounds.no_retry {
        return Err(None);
    }
    match bounds.policy.decide(refused, retry_after, Some(bounds.deadline), now, chance) {
        RetryDecision::GiveUp(why) => Err(Some(why)),
        RetryDecision::Again { at, barrier } => match (bounds.allowed_from)(at) {
            Some(at) if at <= bounds.deadline => Ok((at, barrier)),
            _ => Err(Some(GiveUp::Deadline)),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gate::Condition;

    fn refusal() -> Refusal {
        Refusal {
            condition: Condition::Resync,
            transient: true,
            since: Timestamp(0),
            retry_after: Duration::from_secs(60),
            message: String::new(),
        }
    }

    #[test]
    fn every_refusal_counts_and_the_last_one_ends_the_job() {
        let policy = RetryPolicy::default();
        let bounds =
            Bounds { policy: &policy, deadline: Timestamp(i64::MAX), no_retry: false, allowed_from: &Some };
        let mut refused = Vec::new();
        let mut now = Timestamp(0);
        loop {
            match settle::<(), ()>(&mut refused, Outcome::Refused(refusal()), bounds, now, 0.5) {
                Next::Again { at, .. } => now = at,
                Next::Refused(_, why) => break assert_eq!(why, Some(GiveUp::Attempts)),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(refused.len(), policy.attempts_max as usize);
    }

    #[test]
    fn what_is_not_to_be_tried_again_is_not() {
        let policy = RetryPolicy::default();
        let bounds =
            Bounds { policy: &policy, deadline: Timestamp(i64::MAX), no_retry: true, allowed_from: &Some };
        let mut refused = Vec::new();
        let next = settle::<(), ()>(&mut refused, Outcome::Refused(refusal()), bounds, Timestamp(5), 0.5);
        assert!(matches!(next, Next::Refused(_, None)));
        assert_eq!(refused, [Attempt { at: Timestamp(5), refused: Condition::Resync.into() }]);
    }

    #[test]
    fn what_passes_is_tried_again_and_no_attempt_begins_when_none_may() {
        let policy = RetryPolicy::default();
        let later = |at: Timestamp| Some(at.max(Timestamp(3_600_000_000)));
        let bounds =
            Bounds { policy: &policy, deadline: Timestamp(i64::MAX), no_retry: false, allowed_from: &later };
        let faltered = || {
            let (code, retry_after) = ("repository".to_owned(), Duration::from_secs(60));
            Outcome::<(), _>::Faltered { failure: "no route", code, retry_after }
        };
        let mut refused = Vec::new();
        let next = settle(&mut refused, faltered(), bounds, Timestamp(0), 0.5);
        assert!(matches!(next, Next::Again { at: Timestamp(3_600_000_000), barrier: false }), "{next:?}");
        assert_eq!(refused[0].refused, Setback::Failure("repository".into()));
        let ends = Bounds { deadline: Timestamp(3_599_999_999), ..bounds };
        let next = settle(&mut refused, faltered(), ends, Timestamp(0), 0.5);
        assert!(matches!(next, Next::Failed("no route", Some(GiveUp::Deadline))), "{next:?}");
    }

    #[test]
    fn whose_turn_comes_late_begins_nothing_after_the_window() {
        let policy = RetryPolicy::default();
        let later = |at: Timestamp| Some(if at < Timestamp(20) { at } else { at.max(Timestamp(40)) });
        let bounds =
            Bounds { policy: &policy, deadline: Timestamp(50), no_retry: false, allowed_from: &later };
        assert_eq!(turn(bounds, Timestamp(10)), Turn::Begin);
        assert_eq!(turn(bounds, Timestamp(30)), Turn::Wait(Timestamp(40)));
        assert_eq!(turn(bounds, Timestamp(50)), Turn::Begin);
        assert_eq!(turn(bounds, Timestamp(51)), Turn::TooLate);
        assert_eq!(turn(Bounds { allowed_from: &|_| None, ..bounds }, Timestamp(10)), Turn::TooLate);
    }
}
