//! When a refused backup is tried again. The attempts are persisted by the caller; this decides.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::Timestamp;
use crate::gate::Condition;

/// How a backup that is refused comes home.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RetryPolicy {
    /// The bound of the first delay.
    pub first_delay: Duration,
    /// Each bound is this many times the one before.
    pub factor: u32,
    /// No bound is longer than this.
    pub delay_max: Duration,
    /// No more attempts than this, the first one counted.
    pub attempts_max: u32,
    /// After this many collisions with an apply in a row, the job asks for a barrier.
    pub barrier_after: u32,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            first_delay: Duration::from_secs(2),
            factor: 2,
            delay_max: Duration::from_secs(15 * 60),
            attempts_max: 16,
            barrier_after: 3,
        }
    }
}

/// One attempt that came to nothing, and left another one worth making.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// When.
    pub at: Timestamp,
    /// By what.
    pub refused: Setback,
}

/// What an attempt came to nothing by. It is written as its stable code.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Setback {
    /// The gate refused, by this condition.
    Gate(Condition),
    /// It failed by something that passes, as a repository that could not be reached; the code of that failure.
    Failure(String),
}

impl Setback {
    /// Whether it met an apply: only against that the barrier helps.
    #[must_use]
    pub fn is_collision(&self) -> bool {
        *self == Self::Gate(Condition::ApplyInProgress)
    }
}

impl From<Condition> for Setback {
    fn from(condition: Condition) -> Self {
        Self::Gate(condition)
    }
}

impl fmt::Display for Setback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gate(condition) => condition.fmt(f),
            Self::Failure(code) => f.write_str(code),
        }
    }
}

/// What to do after a refusal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RetryDecision {
    /// Try again then; with the barrier, the running apply ends first and no further one starts.
    Again {
        /// When.
        at: Timestamp,
        /// Ask for the barrier.
        barrier: bool,
    },
    /// No further attempt.
    GiveUp(GiveUp),
}

/// Why no further attempt is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GiveUp {
    /// All attempts are used.
    Attempts,
    /// The window has ended, or would before the next attempt.
    Deadline,
}

impl RetryPolicy {
    /// Decides after the refused attempts so far (at least one). `retry_after` is how long the cause of the last one
    /// lasts at the least, as far as is known.
    ///
    /// `chance` is uniform in 0..1: exponential backoff with full jitter, so that a thousand VMs
    /// refused at one moment do not come back at one moment. A delay is never shorter than a tenth
    /// of its bound, or chance could burn all attempts within one apply. All delays from there on are equally
    /// likely: a preferred one (a tenth of 15 min is three cycles of 30 s) would meet the same apply again.
    #[must_use]
    pub fn decide(
        &self,
        refused: &[Attempt],
        retry_after: Duration,
        deadline: Option<Timestamp>,
        now: Timestamp,
        chance: f64,
    ) -> RetryDecision {
        let attempts = u32::try_from(refused.len()).unwrap_or(u32::MAX);
        if attempts >= self.attempts_max {
            return RetryDecision::GiveUp(GiveUp::Attempts);
        }
        let collisions = refused.iter().rev().take_while(|attempt| attempt.refused.is_collision()).count();
        let barrier = collisions > 0 && u32::try_from(collisions).unwrap_or(u32::MAX) >= self.barrier_after;
        // An apply is over soon; a resynchronization, or a server that is down, takes longer: what is known of it is
        // the least bound.
        let hint = if collisions > 0 { Duration::ZERO } else { retry_after };
        let at = if barrier { now } else { now.plus(self.delay(attempts, hint, chance)) };
        if deadline.is_some_and(|deadline| at > deadline) {
            return RetryDecision::GiveUp(GiveUp::Deadline);
        }
        RetryDecision::Again { at, barrier }
    }

    fn delay(&self, attempts: u32, hint: Duration, chance: f64) -> Duration {
        let growth = self.factor.checked_pow(attempts.saturating_sub(1)).unwrap_or(u32::MAX);
        let bound = self.first_delay.saturating_mul(growth);
        bound.max(hint).min(self.delay_max).mul_f64(0.1 + 0.9 * chance.clamp(0.0, 1.0))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn attempts(n: usize, refused: Condition) -> Vec<Attempt> {
        vec![Attempt { at: Timestamp(0), refused: refused.into() }; n]
    }

    #[test]
    fn after_a_few_collisions_the_barrier_is_asked_for_at_once() {
        let policy = RetryPolicy::default();
        let decide = |n| {
            policy.decide(
                &attempts(n, Condition::ApplyInProgress),
                Condition::ApplyInProgress.retry_after(),
                None,
                Timestamp(0),
                1.0,
            )
        };
        assert_eq!(decide(1), RetryDecision::Again { at: Timestamp(2_000_000), barrier: false });
        assert_eq!(decide(2), RetryDecision::Again { at: Timestamp(4_000_000), barrier: false });
        assert_eq!(decide(3), RetryDecision::Again { at: Timestamp(0), barrier: true });
    }

    #[test]
    fn the_window_ends_the_attempts() {
        let policy = RetryPolicy::default();
        let refused = attempts(1, Condition::Resync);
        let decide = |deadline| {
            policy.decide(&refused, Condition::Resync.retry_after(), Some(deadline), Timestamp(0), 1.0)
        };
        assert_eq!(decide(Timestamp(59_999_999)), RetryDecision::GiveUp(GiveUp::Deadline));
        assert_eq!(
            decide(Timestamp(60_000_000)),
            RetryDecision::Again { at: Timestamp(60_000_000), barrier: false }
        );
    }

    #[test]
    fn no_delay_is_likelier_than_another() {
        let policy = RetryPolicy { attempts_max: u32::MAX, ..RetryPolicy::default() };
        let refused = attempts(30, Condition::Resync);
        let delay = |chance| match policy.decide(
            &refused,
            Condition::Resync.retry_after(),
            None,
            Timestamp(0),
            chance,
        ) {
            RetryDecision::Again { at, .. } => at.0,
            RetryDecision::GiveUp(why) => panic!("gave up: {why:?}"),
        };
        let delays: Vec<i64> = (0..=10).map(|tenths| delay(f64::from(tenths) / 10.0)).collect();
        assert_eq!((delays[0], delays[10]), (90_000_000, 900_000_000));
        assert!(delays.windows(2).all(|pair| pair[1] - pair[0] == 81_000_000), "{delays:?}");
    }

    #[test]
    fn a_failure_that_passes_waits_as_long_as_it_lasts_and_breaks_a_row_of_collisions() {
        let policy = RetryPolicy::default();
        let mut refused = attempts(5, Condition::ApplyInProgress);
        refused.push(Attempt { at: Timestamp(0), refused: Setback::Failure("repository".into()) });
        let minutes = |minutes: u64| Duration::from_secs(minutes * 60);
        let decided = policy.decide(&refused, minutes(3), None, Timestamp(0), 1.0);
        assert_eq!(decided, RetryDecision::Again { at: Timestamp(0).plus(minutes(3)), barrier: false });
    }

    proptest! {
        #[test]
        fn retries_end_and_no_delay_exceeds_its_bound(n in 1_usize..40, which in 0_usize..8, chance in 0.0_f64..1.0) {
            let policy = RetryPolicy::default();
            let condition = Condition::ALL[which];
            match policy.decide(&attempts(n, condition), condition.retry_after(), None, Timestamp(0), chance) {
                RetryDecision::Again { at, .. } => {
                    prop_assert!(n < 16);
                    prop_assert!(at.since(Timestamp(0)) <= policy.delay_max);
                }
                RetryDecision::GiveUp(why) => {
                    prop_assert!(n >= 16);
                    prop_assert_eq!(why, GiveUp::Attempts);
                }
            }
        }
    }
}
