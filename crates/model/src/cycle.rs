//! What the primary may do next: the rules of a cycle, as values.
//!
//! A relationship's primary remembers, durably, the newest log that it knows to be durable on the
//! replica ([`Shipped::acked`]) and which dirty bitmap holds every change since that log's moment
//! ([`Shipped::tracking`]). Before it asks the replica to make a log durable it writes down which one
//! ([`LogAttempt`]), so that after any loss of an answer it can tell "our log arrived" from "this chain
//! is not ours".

use serde::{Deserialize, Serialize};

use crate::{LogId, LogNumber, Phase, Progress, Purpose, ResyncReason};

/// The newest log of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// Its number; [`LogNumber::ZERO`] for an empty chain.
    pub number: LogNumber,
    /// Its id; [`LogId::NONE`] for an empty chain.
    pub id: LogId,
}

impl Head {
    /// The head of an empty chain.
    pub const EMPTY: Self = Self { number: LogNumber::ZERO, id: LogId::NONE };
}

/// A log that the replica was asked to make durable, written down before it was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogAttempt {
    /// The log.
    pub head: Head,
    /// The bitmap with the changes since that log's moment.
    pub tracking: LogNumber,
    /// Whether it is the last log of its cycle: only then do its predecessor's changes end with it.
    pub ends_cycle: bool,
    /// Where the relationship stands once it is durable.
    pub progress: Option<Progress>,
}

/// What the primary remembers of its chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shipped {
    /// The newest log known to be durable on the replica.
    pub acked: Head,
    /// The number of the bitmap that holds every change since the moment of the last whole cycle.
    pub tracking: LogNumber,
    /// The log whose fate is not known.
    pub attempt: Option<LogAttempt>,
}

impl Shipped {
    /// Nothing shipped yet.
    pub const NOTHING: Self = Self { acked: Head::EMPTY, tracking: LogNumber::ZERO, attempt: None };

    /// What is remembered once `attempt` is known to be durable.
    #[must_use]
    pub fn with_acked(self, attempt: LogAttempt) -> Self {
        let tracking = if attempt.ends_cycle { attempt.tracking } else { self.tracking };
        Self { acked: attempt.head, tracking, attempt: None }
    }

    /// Squares what is remembered with the newest log that the replica has.
    pub fn reconcile(self, durable: Head) -> Result<Reconciled, ResyncReason> {
        match self.attempt {
            _ if durable == self.acked => {
                Ok(Reconciled { shipped: Self { attempt: None, ..self }, arrived: None })
            }
            Some(attempt) if durable == attempt.head => {
                Ok(Reconciled { shipped: self.with_acked(attempt), arrived: Some(attempt) })
            }
            _ => Err(ResyncReason::ChainBroken(format!(
                "its newest log is number {} ({}), ours is number {} ({})",
                durable.number, durable.id, self.acked.number, self.acked.id
            ))),
        }
    }
}

/// The outcome of [`Shipped::reconcile`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reconciled {
    /// What is true now.
    pub shipped: Shipped,
    /// The attempt that turned out to have arrived.
    pub arrived: Option<LogAttempt>,
}

/// What QEMU has of our bitmaps, over all disks together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tracking {
    /// The bitmap asked for is there on every disk and records.
    Intact,
    /// It is not; the reason says why.
    Broken(ResyncReason),
}

/// What one cycle does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CyclePlan {
    /// What its logs are made for.
    pub purpose: Purpose,
    /// The bitmap that holds the changes of what is already covered; none at the start of a pass.
    pub base: Option<LogNumber>,
    /// The number of its first log, and of the bitmap that takes over at its moment.
    pub next: LogNumber,
    /// The predecessor of its first log.
    pub predecessor: LogId,
    /// How much of the disks the base bitmap speaks for. All of it in a cycle of changes.
    pub covered_bytes: u64,
}

/// Decides what the next cycle does, or why both sides must be compared first.
pub fn plan_cycle(
    phase: &Phase,
    shipped: &Shipped,
    tracking: &Tracking,
    total_bytes: u64,
) -> Result<CyclePlan, ResyncReason> {
    let (purpose, covered_bytes) = match phase {
        Phase::InitialReplication { progress } => (Purpose::Initial, progress.covered_bytes),
        Phase::Resynchronizing { progress } => (Purpose::Resync, progress.covered_bytes),
        Phase::ResyncRequired { .. } => (Purpose::Resync, 0),
        Phase::Replicating | Phase::Failover { .. } | Phase::FailedOver => (Purpose::Changes, total_bytes),
    };
    let starts_a_pass = covered_bytes == 0 && purpose != Purpose::Changes;
    let base = match tracking {
        _ if starts_a_pass => None,
        Tracking::Intact => Some(shipped.tracking),
        Tracking::Broken(why) => return Err(why.clone()),
    };
    Ok(CyclePlan {
        purpose,
        base,
        next: shipped.acked.number.next(),
        predecessor: shipped.acked.id,
        covered_bytes,
    })
}

/// Where a relationship stands after a log of `purpose` with `progress` became durable. The replica
/// derives its phase by the same rule from the log itself. A large cycle's parts change nothing.
#[must_use]
pub fn phase_after(purpose: Purpose, makes_point: bool, progress: Progress, before: &Phase) -> Phase {
    match (purpose, makes_point) {
        (Purpose::Initial, false) => Phase::InitialReplication { progress },
        (Purpose::Resync, false) => Phase::Resynchronizing { progress },
        (Purpose::Changes, false) => before.clone(),
        (_, true) => Phase::Replicating,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(number: u64, byte: u8) -> Head {
        Head { number: LogNumber(number), id: LogId::from_bytes([byte; 16]) }
    }

    fn attempt(head: Head, ends_cycle: bool) -> LogAttempt {
        LogAttempt { head, tracking: LogNumber(8), ends_cycle, progress: None }
    }

    const fn shipped(acked: Head, attempt: Option<LogAttempt>) -> Shipped {
        Shipped { acked, tracking: LogNumber(7), attempt }
    }

    #[test]
    fn an_answer_that_was_lost_is_found_again() {
        let tried = attempt(head(8, 8), true);
        let reconciled = shipped(head(7, 7), Some(tried)).reconcile(head(8, 8)).unwrap();
        assert_eq!(reconciled.arrived, Some(tried));
        assert_eq!(reconciled.shipped, Shipped { acked: head(8, 8), tracking: LogNumber(8), attempt: None });
    }

    #[test]
    fn a_log_that_did_not_arrive_leaves_everything_to_the_next() {
        let reconciled = shipped(head(7, 7), Some(attempt(head(8, 8), true))).reconcile(head(7, 7)).unwrap();
        assert_eq!(reconciled.shipped, shipped(head(7, 7), None));
        assert_eq!(reconciled.arrived, None);
    }

    #[test]
    fn a_part_of_a_cycle_does_not_end_what_the_bitmap_remembers() {
        let part = attempt(head(8, 8), false);
        let reconciled = shipped(head(7, 7), Some(part)).reconcile(head(8, 8)).unwrap();
        assert_eq!(reconciled.shipped.acked, head(8, 8));
        assert_eq!(reconciled.shipped.tracking, LogNumber(7));
    }

    #[test]
    fn a_chain_that_is_not_ours_is_never_continued() {
        for durable in [head(6, 6), head(7, 9), head(8, 9), head(9, 9), Head::EMPTY] {
            let outcome = shipped(head(7, 7), Some(attempt(head(8, 8), true))).reconcile(durable);
            assert!(matches!(outcome, Err(ResyncReason::ChainBroken(_))), "{durable:?}");
        }
    }

    #[test]
    fn a_pass_starts_without_a_bitmap_and_goes_on_only_with_one() {
        let lost = Tracking::Broken(ResyncReason::BitmapLost("vda".into()));
        let progress = |covered_bytes| Progress { covered_bytes, total_bytes: 100 };
        let plan =
            |phase: &Phase, tracking: &Tracking| plan_cycle(phase, &shipped(head(7, 7), None), tracking, 100);
        let initial = |covered| Phase::InitialReplication { progress: progress(covered) };
        assert_eq!(plan(&initial(0), &lost).unwrap().base, None);
        assert_eq!(plan(&initial(50), &Tracking::Intact).unwrap().base, Some(LogNumber(7)));
        assert!(plan(&initial(50), &lost).is_err());
        assert!(plan(&Phase::Replicating, &lost).is_err());
        let required = Phase::ResyncRequired { why: ResyncReason::Requested };
        assert_eq!(
            plan(&required, &lost).unwrap(),
            CyclePlan {
                purpose: Purpose::Resync,
                base: None,
                next: LogNumber(8),
                predecessor: LogId::from_bytes([7; 16]),
                covered_bytes: 0,
            }
        );
    }
}
