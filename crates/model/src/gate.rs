//! The gate: the one door to a consistent read of a replica.
//!
//! [`admit`] looks at the facts of a relationship and either gives an [`Admission`] or refuses with
//! one of eight [`Condition`]s. An `Admission` has no other constructor, and every way to hand disk
//! bytes to a backup asks for one; so what was not admitted cannot be backed up.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{ApplyState, Health, LogNumber, Phase, Timestamp, VmId, human_duration};

/// A condition under which a replica's disks could be inconsistent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Condition {
    /// Logs are being applied to the replica.
    ApplyInProgress,
    /// The last apply was cancelled or interrupted.
    ApplyInterrupted,
    /// The last apply failed.
    ApplyFailed,
    /// Replication health is Critical.
    HealthCritical,
    /// Resynchronization is required or in progress.
    Resync,
    /// The replica's storage is being moved.
    Migration,
    /// Initial replication is pending or in progress.
    InitialReplication,
    /// A failover is in progress.
    Failover,
}

impl Condition {
    /// All eight, in the order in which they are looked at: what explains the others comes first.
    pub const ALL: [Self; 8] = [
        Self::InitialReplication,
        Self::Failover,
        Self::Migration,
        Self::Resync,
        Self::ApplyFailed,
        Self::ApplyInterrupted,
        Self::HealthCritical,
        Self::ApplyInProgress,
    ];

    /// The stable code, for scripts.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::ApplyInProgress => "apply-in-progress",
            Self::ApplyInterrupted => "apply-interrupted",
            Self::ApplyFailed => "apply-failed",
            Self::HealthCritical => "health-critical",
            Self::Resync => "resync",
            Self::Migration => "migration",
            Self::InitialReplication => "initial-replication",
            Self::Failover => "failover",
        }
    }

    /// Whether it clears without a repair. Every one is worth another try, but only these end by themselves.
    #[must_use]
    pub const fn clears_by_itself(self) -> bool {
        !matches!(self, Self::ApplyFailed)
    }

    /// When another try makes sense, if nothing better is known.
    #[must_use]
    pub const fn retry_after(self) -> Duration {
        Duration::from_secs(match self {
            Self::ApplyInProgress => 2,
            Self::ApplyInterrupted => 10,
            Self::HealthCritical | Self::Resync | Self::Migration => 60,
            Self::ApplyFailed | Self::InitialReplication | Self::Failover => 300,
        })
    }
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code())
    }
}

/// What a request wants to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Access {
    /// A view of a pinned recovery point, through the chain; not affected by a running apply.
    Pinned,
    /// The same, refused while logs are applied, for policies that demand it.
    Strict,
    /// The flat base files, quiet and equal to one point.
    Hold,
}

/// What the gate looks at: the facts of one replica at one moment.
#[derive(Debug, Clone)]
pub struct Facts<'a> {
    /// Which VM.
    pub vm: VmId,
    /// Where the relationship stands.
    pub phase: &'a Phase,
    /// Since when it stands there.
    pub phase_since: Timestamp,
    /// What the last apply came to.
    pub apply: &'a ApplyState,
    /// Its health.
    pub health: Health,
    /// Since when it has that health.
    pub health_since: Timestamp,
    /// Since when the replica's storage is being moved, if it is.
    pub migrating_since: Option<Timestamp>,
}

/// A refusal: why, whether it is worth waiting, since when it holds and when to come again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// The condition.
    pub condition: Condition,
    /// Whether the condition clears without a repair.
    pub transient: bool,
    /// Since when it holds.
    pub since: Timestamp,
    /// How long to wait before the next try.
    pub retry_after: Duration,
    /// One sentence for a person.
    pub message: String,
}

/// The right to read one recovery point of one VM, given by [`admit`] alone. It cannot be copied:
/// whoever consumes it makes exactly one view or hold.
#[derive(Debug)]
pub struct Admission {
    vm: VmId,
    point: LogNumber,
    access: Access,
}

impl Admission {
    /// The VM that may be read.
    #[must_use]
    pub fn vm(&self) -> VmId {
        self.vm
    }
    /// The point that may be read.
    #[must_use]
    pub fn point(&self) -> LogNumber {
        self.point
    }
    /// The way in which it may be read.
    #[must_use]
    pub fn access(&self) -> Access {
        self.access
    }
}

/// Decides whether `point` may be read by `access`.
pub fn admit(
    facts: &Facts<'_>,
    access: Access,
    point: LogNumber,
    now: Timestamp,
) -> Result<Admission, Refusal> {
    match Condition::ALL.into_iter().find_map(|condition| Some((condition, holds(condition, facts, access)?)))
    {
        None => Ok(Admission { vm: facts.vm, point, access }),
        Some((condition, since)) => Err(Refusal {
            condition,
            transient: condition.clears_by_itself(),
            since,
            retry_after: condition.retry_after(),
            message: sentence(condition, facts, now.since(since)),
        }),
    }
}

/// Since when `condition` refuses `access`; none if it does not.
fn holds(condition: Condition, facts: &Facts<'_>, access: Access) -> Option<Timestamp> {
    let in_phase = |yes: bool| yes.then_some(facts.phase_since);
    match condition {
        Condition::InitialReplication => in_phase(matches!(facts.phase, Phase::InitialReplication { .. })),
        Condition::Failover => in_phase(matches!(facts.phase, Phase::Failover { .. })),
        Condition::Resync => {
            in_phase(matches!(facts.phase, Phase::ResyncRequired { .. } | Phase::Resynchronizing { .. }))
        }
        Condition::Migration => facts.migrating_since,
        Condition::HealthCritical => (facts.health == Health::Critical).then_some(facts.health_since),
        Condition::ApplyFailed => match facts.apply {
            ApplyState::Failed { since, .. } => Some(*since),
            _ => None,
        },
        Condition::ApplyInterrupted => match facts.apply {
            ApplyState::Interrupted { since } => Some(*since),
            _ => None,
        },
        // A view outranks the base with the very logs that are being applied: it is not affected.
        Condition::ApplyInProgress => match (facts.apply, access) {
            (ApplyState::Running { since }, Access::Strict | Access::Hold) => Some(*since),
            _ => None,
        },
    }
}

fn sentence(condition: Condition, facts: &Facts<'_>, for_how_long: Duration) -> String {
    let age = human_duration(for_how_long);
    match condition {
        Condition::ApplyInProgress => {
            format!(
                "logs are being applied to the replica (for {age}); try again in a few seconds, or read a pinned view"
            )
        }
        Condition::ApplyInterrupted => {
            format!("the last apply was interrupted ({age} ago) and is being run again; try again shortly")
        }
        Condition::ApplyFailed => {
            let error = match facts.apply {
                ApplyState::Failed { error, .. } => error.as_str(),
                _ => "unknown",
            };
            format!("the last apply failed {age} ago: {error}; mend the cause, then run 'afterimage resume'")
        }
        Condition::HealthCritical => {
            format!("replication health has been Critical for {age}; 'afterimage status' says why")
        }
        Condition::Resync => match facts.phase {
            Phase::ResyncRequired { why } => format!("resynchronization has been required for {age}: {why}"),
            _ => format!("resynchronization has been running for {age}; wait until it is complete"),
        },
        Condition::Migration => {
            format!("the replica's storage has been moving for {age}; wait until it is complete")
        }
        Condition::InitialReplication => {
            format!(
                "initial replication is not complete (begun {age} ago); there is nothing consistent to read yet"
            )
        }
        Condition::Failover => {
            format!("a failover has been in progress for {age}; complete or cancel it first")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Progress, ResyncReason};

    const VM: VmId = VmId::from_bytes([7; 16]);

    fn facts<'a>(phase: &'a Phase, apply: &'a ApplyState) -> Facts<'a> {
        Facts {
            vm: VM,
            phase,
            phase_since: Timestamp(1_000_000),
            apply,
            health: Health::Normal,
            health_since: Timestamp(0),
            migrating_since: None,
        }
    }

    fn refused(facts: &Facts<'_>, access: Access) -> Option<Condition> {
        admit(facts, access, LogNumber(3), Timestamp(5_000_000)).err().map(|refusal| refusal.condition)
    }

    /// The design's table, row by row: (condition, refused for hold, strict, pinned).
    #[test]
    fn the_table_of_the_design() {
        use ApplyState::{Failed, Idle, Interrupted, Running};
        let since = Timestamp(2_000_000);
        let progress = Progress::default();
        let required = Phase::ResyncRequired { why: ResyncReason::Requested };
        let failed = Failed { since, error: "input/output error".into() };
        let moving = Facts { migrating_since: Some(since), ..facts(&Phase::Replicating, &Idle) };
        let (running, interrupted) = (Running { since }, Interrupted { since });
        let (initial, resync) = (Phase::InitialReplication { progress }, Phase::Resynchronizing { progress });
        let failover = Phase::Failover { point: LogNumber(1) };
        let critical = Facts { health: Health::Critical, ..facts(&Phase::Replicating, &Idle) };
        let table = [
            (Condition::ApplyInProgress, facts(&Phase::Replicating, &running), [true, true, false]),
            (Condition::ApplyInterrupted, facts(&Phase::Replicating, &interrupted), [true; 3]),
            (Condition::ApplyFailed, facts(&Phase::Replicating, &failed), [true; 3]),
            (Condition::HealthCritical, critical, [true; 3]),
            (Condition::Resync, facts(&required, &Idle), [true; 3]),
            (Condition::Resync, facts(&resync, &Idle), [true; 3]),
            (Condition::Migration, moving, [true; 3]),
            (Condition::InitialReplication, facts(&initial, &Idle), [true; 3]),
            (Condition::Failover, facts(&failover, &Idle), [true; 3]),
        ];
        for (condition, facts, expected) in table {
            let got = [Access::Hold, Access::Strict, Access::Pinned].map(|access| refused(&facts, access));
            assert_eq!(got, expected.map(|yes| yes.then_some(condition)), "{condition}");
        }
        let quiet = facts(&Phase::Replicating, &Idle);
        for access in [Access::Hold, Access::Strict, Access::Pinned] {
            assert_eq!(refused(&quiet, access), None);
        }
    }

    #[test]
    fn a_refusal_says_since_when_and_when_to_come_again() {
        let running = ApplyState::Running { since: Timestamp(2_000_000) };
        let refusal =
            admit(&facts(&Phase::Replicating, &running), Access::Hold, LogNumber(1), Timestamp(5_000_000))
                .unwrap_err();
        assert_eq!(refusal.since, Timestamp(2_000_000));
        assert_eq!(refusal.retry_after, Duration::from_secs(2));
        assert!(refusal.transient);
        assert!(refusal.message.contains("for 3 s"), "{refusal}");
    }

    #[test]
    fn codes_are_the_serialized_names() {
        for condition in Condition::ALL {
            let json = serde_json::to_string(&condition).unwrap();
            assert_eq!(json, format!("\"{}\"", condition.code()));
        }
    }
}
