//! The words and rules of Afterimage, and nothing else.
//!
//! Ids and units, the phases of a relationship, its health, the gate with its eight conditions,
//! what a peer may do, how several VMs come to one moment, retry and backoff, when a base moves, consistency and intervals. Everything here is a value or a pure function:
//! no clock is read, no file or socket opened, no task started. Time comes in as a [`Timestamp`],
//! chance as a number, and decisions come out as values. So each rule can be tested, and a world of
//! a hundred thousand VMs simulated, without waiting a second.
//!
//! Invariants kept by type:
//! * only [`gate::admit`] makes an [`gate::Admission`], and without one no backup can be taken;
//! * a [`VmName`] or [`DiskName`] can always be used as one path component.
//!
//! What it does not do: I/O, persistence, choosing bytes (that is `chain`).

pub mod authorization;
mod backoff;
pub mod backup;
mod base;
pub mod bitmaps;
mod change;
mod consistency;
mod cycle;
mod expiry;
pub mod gate;
pub mod group;
mod health;
mod ids;
pub mod job;
mod measure;
mod phase;
mod points;
mod resync;
mod retry;
mod time;

pub use backoff::CycleBackoff;
pub use base::BaseState;
pub use change::Change;
pub use consistency::{Consistency, LogClass, NoSuchPoint, PointInfo, Wanted, choose_point};
pub use cycle::{CyclePlan, Head, LogAttempt, Reconciled, Shipped, Tracking, phase_after, plan_cycle};
pub use expiry::{EXPIRY_WARNING, Expiry, expiry};
pub use health::{Assessment, Health, HealthInput, HealthThresholds, Lately, assess};
pub use ids::{
    DiskName, GroupName, IdError, LogId, LogNumber, MediaId, MomentId, NameError, PointName, PolicyName,
    VmId, VmName,
};
pub use measure::{
    CycleTally, LastError, Owed, ReplicaTally, Sum, Tally, WINDOW_HOURS_MAX, Window, tally_ms,
};
pub use phase::{ApplyState, Phase, Progress, Purpose, ResyncReason, Side, TRANSITIONS, Transition};
pub use points::{PinnedPoint, PointRef, TravellingPin, UnknownPoint, find_point};
pub use resync::{
    DailyWindow, INITIAL_AHEAD_MAX, InitialStart, MayRun, PolicyError, ResyncPolicy, ResyncWord,
    check_initial_start, may_run,
};
pub use retry::{Attempt, GiveUp, RetryDecision, RetryPolicy, Setback};
pub use time::{Timestamp, human_duration};

/// Changes are tracked in blocks of this many bytes: 64 KiB ships up to 16 times more on small
/// random writes (measured; see `docs/decisions/0001-granularity.md`).
pub const BLOCK_BYTES: u64 = 4096;

/// The largest disk that is replicated, in bytes: what is kept for a disk grows with its size, whatever is on it.
pub const DISK_BYTES_MAX: u64 = 64 << 40;
/// All disks of a VM together, in bytes.
pub const VM_BYTES_MAX: u64 = 256 << 40;

/// The shortest and the longest interval between two cycles, and the default, in seconds.
pub const INTERVAL_SECONDS: std::ops::RangeInclusive<u64> = 5..=900;
/// The interval of a relationship for which none was given, in seconds.
pub const INTERVAL_DEFAULT_SECONDS: u64 = 30;
/// The most hourly recovery points that a relationship can keep beside the latest one.
pub const POINTS_MAX: u8 = 24;
