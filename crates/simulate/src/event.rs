//! What happens in a world: plain values, so that a schedule can be shown, replayed and shrunk.
//!
//! Every number in an event is taken modulo what there is when it happens: an event means something whatever
//! happened before it, and goes on meaning it when others are taken away.

use model::gate::Access;

use crate::disk::{Class, Loss};
use crate::ports::Trust;

/// One of the two sites.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Where the VMs run.
    Primary,
    /// Where their replicas are.
    Replica,
}

/// What a person asks of a relationship.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// A cycle, now.
    Cycle,
    /// Cycles until there is a point.
    Sync,
    /// No further cycles.
    Pause,
    /// Cycles again.
    Resume,
    /// Compare both sides.
    Resync,
}

/// A log that does not belong where it is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stray {
    /// It follows another log than the newest one.
    Predecessor,
    /// It is of another VM.
    Vm,
    /// It leaves numbers out.
    Number,
    /// Some of its bytes are not what its maker wrote.
    Bytes,
    /// Another peer sends it.
    Peer,
    /// It is of a kind that cannot go on from where the chain is.
    Purpose,
}

impl Stray {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Predecessor, Self::Vm, Self::Number, Self::Bytes, Self::Peer, Self::Purpose];
}

/// What a person asks of a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wish {
    /// How it reads.
    pub access: Access,
    /// Only an application-consistent point will do.
    pub application: bool,
    /// A refusal is its end.
    pub no_retry: bool,
}

/// What happens.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "an event's line says what its numbers are")]
pub enum Event {
    /// A guest writes some sectors.
    Write { vm: u64, disk: u64, sector: u64, count: u64, zeros: bool },
    /// A disk gets another size.
    Resize { vm: u64, disk: u64, blocks: u64 },
    /// Time passes.
    Pass { seconds: u64 },
    /// A site's clock is set forward or back.
    Jump { side: Side, seconds: i64 },
    /// A person or the schedule asks something of a relationship.
    Order { vm: u64, order: Order },
    /// What runs beside everything else goes on for some turns.
    Turns { turns: u64 },
    /// What runs for a VM goes on to its end.
    Finish { vm: u64 },
    /// A replica is kept in shape for some steps; what is being read is looked at at this many of its writes.
    Maintain { vm: u64, steps: u64, looks: u64 },
    /// A failed apply is tried again.
    Mend { vm: u64 },
    /// Calls that were late arrive.
    Late,
    /// The line between the sites is cut, or mended.
    Line { down: bool },
    /// Of a hundred calls, so many go wrong; pieces of logs are at most so long.
    Trouble { percent: u64, segment_bytes: u64 },
    /// What the sites think of each other.
    Trust { trust: Trust },
    /// A site dies at the so-many-eth durable step from now, before it or after it.
    Cut { side: Side, steps: u64, after: bool },
    /// A site that is dead is started; so much of what it had not synced is lost.
    Boot { side: Side, loss: Loss },
    /// So many calls of a kind go well on the replica's disk, then so many fail.
    Disk { class: Class, skip: u64, count: u64 },
    /// So many commits of a site's catalog go well, then so many fail; with `kept` the next process finds the
    /// last of them all the same.
    Commits { side: Side, skip: u64, count: u64, kept: bool },
    /// The replica's disk has no space left.
    Full { full: bool },
    /// The replica's disk is well again.
    Heal,
    /// A bit of a log file rots.
    Rot { file: u64, at: u64 },
    /// A VM's process dies and is started again.
    Restart { vm: u64 },
    /// So many commands to a VM's process fail.
    Deaf { vm: u64, commands: u32 },
    /// The scratch may keep so many blocks.
    Scratch { vm: u64, blocks: u64 },
    /// Whether a guest can be brought to rest.
    Agent { vm: u64, well: bool },
    /// Somebody opens a view of a point.
    OpenView { vm: u64, point: u64, strict: bool },
    /// All open views and holds are looked at.
    Look,
    /// A view is closed.
    CloseView { which: u64 },
    /// Somebody holds the flat files.
    OpenHold { vm: u64, seconds: u64 },
    /// A hold is given back.
    Release { which: u64 },
    /// A backup is asked for.
    Backup { vm: u64, wish: Wish },
    /// Backups that are due are tried; meanwhile other things happen.
    Jobs { meanwhile: Vec<Event> },
    /// A log that does not belong there is sent.
    Stray { vm: u64, stray: Stray },
    /// A replica's files are moved.
    Migrate { vm: u64 },
    /// A VM is failed over to a point.
    Failover { vm: u64, point: u64 },
    /// That is taken back.
    CancelFailover { vm: u64 },
}
