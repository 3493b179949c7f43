//! Where a relationship stands. Both sides keep a [`Phase`]; the replica derives its own from the
//! logs it receives, so that a lost catalog can be rebuilt from them.
//!
//! ```text
//!                    partial logs              last one: a point
//!  protect ──▶ InitialReplication ──────────────────▶ Replicating ◀──────────────┐
//!                    │                                   │                       │ last log: a point
//!                    │ bitmap lost, chain broken,        │                       │
//!                    ▼ disk resized, ...                 ▼                       │
//!               ResyncRequired ◀───────────────── (any of these)         Resynchronizing
//!                    ▲  └───────── first partial log of the compare ─────────────▶│
//!                    └────────── cancelled: it waits for a person or a window ────┘
//!
//!  with a seed at the replica's site, InitialReplication becomes ResyncRequired (seeded) before anything is sent;
//!  when a pass may begin, and when it rests in between: `may_run`
//!
//!  replica:  any of these with a point ──failover──▶ Failover ──cancel──▶ back
//!                                                       └──complete──▶ no replica any more: the VM runs here
//!  primary:  Replicating ──planned failover──▶ FailedOver ──reverse at the other site──▶ no primary any more
//!  reverse:  where the VM runs now: ResyncRequired (reversed) ─▶ Resynchronizing ─▶ Replicating
//! ```

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{LogNumber, Timestamp};

/// How much of a pass over all disks is done, in bytes of disk (not of network).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Progress {
    /// Bytes of disk covered so far, over all disks in their order.
    pub covered_bytes: u64,
    /// Bytes of all disks.
    pub total_bytes: u64,
}

/// Why a relationship must compare its two sides before it goes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "reason", content = "detail")]
pub enum ResyncReason {
    /// QEMU no longer has the dirty bitmap: it was restarted, or the disk was replaced.
    BitmapLost(String),
    /// QEMU marks the bitmap inconsistent.
    BitmapInconsistent(String),
    /// A disk has another size than before.
    DiskResized(String),
    /// A disk was added, removed or renamed.
    DisksChanged(String),
    /// The replica's last log is not one that this primary has shipped.
    ChainBroken(String),
    /// A person asked for it.
    Requested,
    /// The VM was failed over, and what was its primary is to become its replica.
    Reversed,
    /// The replica begins with images that its site had.
    Seeded,
    /// Backups were restored over its disks, behind QEMU's back.
    Restored(String),
}

impl fmt::Display for ResyncReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BitmapLost(what) => write!(f, "QEMU has lost the dirty bitmap ({what})"),
            Self::BitmapInconsistent(what) => write!(f, "the dirty bitmap is inconsistent ({what})"),
            Self::DiskResized(what) => write!(f, "a disk was resized ({what})"),
            Self::DisksChanged(what) => write!(f, "the set of disks has changed ({what})"),
            Self::ChainBroken(what) => write!(f, "the replica's chain does not continue ours ({what})"),
            Self::Requested => f.write_str("it was asked for"),
            Self::Reversed => f.write_str("the VM was failed over, and is replicated the other way now"),
            Self::Seeded => f.write_str("the replica begins with images that its site had"),
            Self::Restored(what) => write!(f, "a backup was restored over its disks ({what})"),
        }
    }
}

/// Where a relationship stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "phase")]
pub enum Phase {
    /// Everything allocated is being sent for the first time.
    InitialReplication {
        /// How far it is.
        progress: Progress,
    },
    /// Changes are sent cycle by cycle.
    Replicating,
    /// Both sides must be compared before cycles can go on.
    ResyncRequired {
        /// What happened.
        why: ResyncReason,
    },
    /// Both sides are being compared; only differing blocks travel.
    Resynchronizing {
        /// How far it is.
        progress: Progress,
    },
    /// The replica is being, or has been, started in place of the primary; logs are refused.
    Failover {
        /// The point that it was failed over to.
        point: LogNumber,
    },
    /// On the primary: the VM runs at its replica's site now, and nothing is sent from here any more.
    FailedOver,
}

/// Which side of a relationship.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Side {
    /// Where the VM runs.
    Primary,
    /// Where its copy is.
    Replica,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Primary => "primary",
            Self::Replica => "replica",
        })
    }
}

/// A change from one phase to another, by their names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Transition {
    /// The side that changes.
    pub side: Side,
    /// The phase that it leaves.
    pub from: &'static str,
    /// The phase that it enters.
    pub to: &'static str,
}

impl fmt::Display for Transition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} -> {}", self.side, self.from, self.to)
    }
}

/// All changes of phase that there are; the diagram above draws them.
pub const TRANSITIONS: &[Transition] = {
    const INITIAL: &str = "initial-replication";
    const REPLICATING: &str = "replicating";
    const REQUIRED: &str = "resynchronization-required";
    const RESYNCHRONIZING: &str = "resynchronizing";
    const FAILOVER: &str = "failover";
    const fn primary(from: &'static str, to: &'static str) -> Transition {
        Transition { side: Side::Primary, from, to }
    }
    const fn replica(from: &'static str, to: &'static str) -> Transition {
        Transition { side: Side::Replica, from, to }
    }
    &[
        primary(INITIAL, REPLICATING),
        primary(INITIAL, REQUIRED),
        primary(REPLICATING, REQUIRED),
        primary(REQUIRED, RESYNCHRONIZING),
        // A pass that fits into one log.
        primary(REQUIRED, REPLICATING),
        primary(RESYNCHRONIZING, REPLICATING),
        primary(RESYNCHRONIZING, REQUIRED),
        primary(REPLICATING, "failed-over"),
        replica(INITIAL, REPLICATING),
        replica(INITIAL, REQUIRED),
        replica(REPLICATING, REQUIRED),
        replica(REQUIRED, RESYNCHRONIZING),
        replica(REQUIRED, REPLICATING),
        replica(RESYNCHRONIZING, REPLICATING),
        replica(RESYNCHRONIZING, REQUIRED),
        replica(REPLICATING, FAILOVER),
        replica(REQUIRED, FAILOVER),
        replica(RESYNCHRONIZING, FAILOVER),
        replica(FAILOVER, REPLICATING),
        replica(FAILOVER, REQUIRED),
        replica(FAILOVER, RESYNCHRONIZING),
    ]
};

impl Phase {
    /// What one side's entering of another phase is; none where it is the same one, further on.
    ///
    /// Panics in a build with debug assertions if there is no such transition: whoever makes one has made a mistake.
    #[must_use]
    pub fn transition(&self, next: &Self, side: Side) -> Option<Transition> {
        let change = Transition { side, from: self.name(), to: next.name() };
        if change.from == change.to {
            return None;
        }
        debug_assert!(TRANSITIONS.contains(&change), "there is no change of phase {change}");
        Some(change)
    }

    /// The phase's name as commands show it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::InitialReplication { .. } => "initial-replication",
            Self::Replicating => "replicating",
            Self::ResyncRequired { .. } => "resynchronization-required",
            Self::Resynchronizing { .. } => "resynchronizing",
            Self::Failover { .. } => "failover",
            Self::FailedOver => "failed-over",
        }
    }
}

/// What a log was made for; the replica learns its phase from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Purpose {
    /// A part of the initial replication.
    Initial,
    /// The changes of one cycle.
    Changes,
    /// A part of a resynchronization.
    Resync,
}

/// What the last apply on a replica came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "apply")]
pub enum ApplyState {
    /// None runs, the last one ended well.
    Idle,
    /// One runs.
    Running {
        /// Since when.
        since: Timestamp,
    },
    /// One was cut off (a kill, a crash, a cancellation) and has not been run again to its end.
    Interrupted {
        /// Since when it is known.
        since: Timestamp,
    },
    /// The last one failed.
    Failed {
        /// Since when.
        since: Timestamp,
        /// What went wrong, with the file.
        error: String,
    },
}
