//! What becomes of a backup job after each attempt. The caller writes it down before anything waits.
//!
//! ```text
//!  asked for ──▶ waiting ──at its time──▶ running ──▶ done
//!                  ▲                        │ refused: again later, or with the barrier
//!                  └────────────────────────┤
//!                                           └──▶ ended (refused for good, attempts or window used up, an error)
//! ```

use crate::gate::Refusal;
use crate::{Attempt, GiveUp, RetryDecision, RetryPolicy, Timestamp};

/// What bounds a job.
#[derive(Debug, Clone, Copy)]
pub struct Bounds<'a> {
    /// How it comes home.
    pub policy: &'a RetryPolicy,
    /// When its window ends.
    pub deadline: Timestamp,
    /// A refusal is its end.
    pub no_retry: bool,
}

/// What one attempt came to.
#[derive(Debug)]
pub enum Outcome<R, F> {
    /// There is a backup.
    Done(R),
    /// The gate refused.
    Refused(Refusal),
    /// It failed, and another attempt would too.
    Failed(F),
}

/// What a job does next.
#[derive(Debug)]
pub enum Next<R, F> {
    /// It is at its end, with a backup.
    Done(R),
    /// It is at its end: it failed.
    Failed(F),
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

/// Settles an attempt; a refusal is added to the `refused` ones. `chance` is uniform in 0..1.
pub fn settle<R, F>(
    refused: &mut Vec<Attempt>,
    outcome: Outcome<R, F>,
    bounds: Bounds<'_>,
    now: Timestamp,
    chance: f64,
) -> Next<R, F> {
    let refusal = match outcome {
        Outcome::Done(report) => return Next::Done(report),
        Outcome::Failed(failure) => return Next::Failed(failure),
        Outcome::Refused(refusal) => refusal,
    };
    refused.push(Attempt { at: now, refused: refusal.condition });
    if bounds.no_retry {
        return Next::Refused(refusal, None);
    }
    match bounds.policy.decide(refused, &refusal, Some(bounds.deadline), now, chance) {
        RetryDecision::Again { at, barrier } => Next::Again { at, barrier },
        RetryDecision::GiveUp(why) => Next::Refused(refusal, Some(why)),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

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
        let bounds = Bounds { policy: &policy, deadline: Timestamp(i64::MAX), no_retry: false };
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
        let bounds = Bounds { policy: &policy, deadline: Timestamp(i64::MAX), no_retry: true };
        let mut refused = Vec::new();
        let next = settle::<(), ()>(&mut refused, Outcome::Refused(refusal()), bounds, Timestamp(5), 0.5);
        assert!(matches!(next, Next::Refused(_, None)));
        assert_eq!(refused, [Attempt { at: Timestamp(5), refused: Condition::Resync }]);
    }
}
