//! What a relationship touches, as traits: the VM that it protects, the way to the replica, the clock
//! and chance.
//!
//! ```text
//!                 Ports ── now, random_id
//!                   │
//!        ┌──────────┴──────────┐
//!    connect(VM)           remote(peer)
//!        ▼                     ▼
//!      Guest ──▶ Capture     Remote ──▶ Upload
//!                   ▼
//!              DiskReader
//! ```
//!
//! The cycle is written over these, so that the very same code runs against QEMU and a link ([`crate::Real`])
//! and against a simulated VM and a simulated link. What it relies on is said at each function.
//!
//! * Every failure comes as a [`Failure`]: its code and whether it is transient is what the cycle judges by.
//! * Any future may be dropped before it is ready: a cycle can be stopped, and a process killed, anywhere.
//! * Nothing here may need a thread of its own: on one thread, with tokio's clock paused, a cycle is
//!   deterministic if its ports are.

use std::future::Future;
use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
pub use model::group::{Door, GroupMoment};
use model::{Consistency, DiskName, Head, LogNumber, Timestamp, Tracking, TravellingPin, VmId, VmName};
use nbd::DirtyExtent;
pub use qemu::{AgentAddress, Seat};
use serde_json::Value;
pub use wire::{
    Announced, DigestRequest, HandOver, HandedOver, HandedOverDisk, InStep, Offer, OfferedDisk, OfferedMedia,
    RateLimiter, RelationshipStatus, Relocate, RelocateStep, Relocation, Report, TakenOver,
};

use crate::error::{Failure, FailureCode};
use crate::read::RecordSink;
use crate::rows::{KnownDisk, Settings};

/// Where a relationship's VM, its replica, the time and chance come from.
pub trait Ports: Send + Sync + 'static {
    /// A VM that is connected.
    type Guest: Guest;
    /// The way to a replica's site.
    type Remote: Remote;

    /// Whether a relationship with these settings is one of these ports': a site may have several kinds.
    fn serves(settings: &Settings) -> bool {
        settings.monitor != qemu::Monitor::Replica
    }

    /// Connects to the VM where its settings say that it is.
    fn connect(
        &self,
        vm: VmId,
        settings: &Settings,
    ) -> impl Future<Output = Result<Self::Guest, Failure>> + Send;

    /// Whether the VM is off for certain: nobody is there to answer. A monitor that is busy is somebody's.
    fn is_off(&self, settings: &Settings) -> impl Future<Output = bool> + Send;

    /// The way to the peer of this name; none if there is no such peer (any more). Asked anew for every use, so
    /// that a peer may come, go and move.
    fn remote(&self, peer: &str) -> Option<Self::Remote>;

    /// The time of day. Spans of time are measured by tokio's clock instead, which a test can pause.
    fn now(&self) -> Timestamp;

    /// Sixteen random bytes, for an id that nobody else has.
    fn random_id(&self) -> Result<[u8; 16], Failure>;
}

/// A VM's monitor: its disks, its dirty bitmaps, and moments fixed over them.
///
/// Bitmap *k* holds every change since the moment of log *k*. Over any failure the bitmaps that exist hold
/// at least the changes since the last moment that was committed, or [`Guest::inspect`] says that they do not.
pub trait Guest: Send + Sync + 'static {
    /// A disk as the VM has it now; good as long as this connection.
    type Disk: Disk;
    /// A fixed moment.
    type Capture: Capture;
    /// Its disks as they are.
    type Ahead: Ahead;

    /// Whether the connection still stands, as far as is known.
    fn is_alive(&self) -> bool;

    /// Every writable disk.
    fn disks(&self) -> impl Future<Output = Result<Vec<Self::Disk>, Failure>> + Send;

    /// The disks of these nodes, in this order; a failure if one is missing.
    fn resolve(&self, nodes: &[String]) -> impl Future<Output = Result<Vec<Self::Disk>, Failure>> + Send;

    /// What is needed to run the VM elsewhere.
    fn definition(&self) -> impl Future<Output = Result<Value, Failure>> + Send;

    /// Whether its processors stand still: it was shut down, paused, or not started yet.
    fn is_quiet(&self) -> impl Future<Output = Result<bool, Failure>> + Send;

    /// Asks the guest to shut down, and has QEMU stay when it has: with it would go what it knows of changes.
    fn power_down(&self) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Ends QEMU.
    fn quit(&self) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Whether bitmap `since` is on all disks and records.
    fn inspect(
        &self,
        disks: &[Self::Disk],
        since: LogNumber,
    ) -> impl Future<Output = Result<Tracking, Failure>> + Send;

    /// Whether there is a moment to fix that is newer than that of log `since`. A VM that runs always has one.
    fn has_news(&self, _since: LogNumber) -> impl Future<Output = Result<bool, Failure>> + Send {
        std::future::ready(Ok(true))
    }

    /// Whether moments newer than that of log `since` wait to be passed on one by one, whatever the interval.
    fn has_backlog(&self, _since: LogNumber) -> impl Future<Output = bool> + Send {
        std::future::ready(false)
    }

    /// The points that the replica is to pin once it has them.
    fn pins(&self) -> impl Future<Output = Vec<TravellingPin>> + Send {
        std::future::ready(Vec::new())
    }

    /// Bytes changed since the moment of log `since`, as far as its bitmaps are there.
    fn pending_bytes(
        &self,
        disks: &[Self::Disk],
        since: LogNumber,
    ) -> impl Future<Output = Result<u64, Failure>> + Send;

    /// Shows what has changed since the moment of log `base`, on disks that go on changing, and begins to note what
    /// changes from now on. Whatever becomes of it, the bitmaps are as if it had not been.
    fn begin_ahead(
        &self,
        disks: &[Self::Disk],
        base: LogNumber,
    ) -> impl Future<Output = Result<Self::Ahead, Failure>> + Send;

    /// Ends it; what it notes is for the capture that follows with [`CaptureRequest::again`], and is gone with the
    /// next commit, giving back or cleaning up.
    fn end_ahead(&self, ahead: Self::Ahead) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Fixes one moment over all disks: bitmap `next` begins at it, and `base`, if there is one, ends at it and
    /// can be read with the data. On failure nothing of it stays, and `base` records as before.
    fn begin_capture(
        &self,
        request: CaptureRequest<'_, Self::Disk>,
    ) -> impl Future<Output = Result<Self::Capture, Failure>> + Send;

    /// The same with the guest's file systems brought to rest by the agent there. Where they cannot be,
    /// the moment is fixed all the same, and the second value says why it is only crash-consistent.
    fn begin_capture_frozen(
        &self,
        request: CaptureRequest<'_, Self::Disk>,
        agent: &AgentAddress,
    ) -> impl Future<Output = Result<(Self::Capture, Result<(), String>), Failure>> + Send;

    /// Ends a fixed moment; the bitmaps stay. Goes on to its end even if it is dropped.
    fn end_reading(&self, capture: Self::Capture) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Drops bitmap `base`: the log with its changes is durable. What was dropped already is no failure.
    fn commit(
        &self,
        disks: &[Self::Disk],
        base: Option<LogNumber>,
        next: LogNumber,
    ) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Gives the changes of a cycle that failed back: `next` is merged into `base`, which records again.
    /// Without a `base` everything stays: the log may have arrived after all, and then `next` is what is needed.
    fn give_back(
        &self,
        disks: &[Self::Disk],
        base: Option<LogNumber>,
    ) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Removes every leftover of an earlier run, wherever it was cut off, and makes bitmap `since` the only one:
    /// newer ones are merged into it, older ones go. Where there is only one older that records, it becomes
    /// `since`: a cycle was given up and its log has arrived, and what changed since an older moment holds what
    /// changed since a newer one. Where that cannot be had either, none stays and [`Guest::inspect`] says so.
    /// `None` leaves the bitmaps as they are.
    fn cleanup(
        &self,
        disks: &[Self::Disk],
        since: Option<LogNumber>,
    ) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Removes all bitmaps of ours.
    fn stop_tracking(&self, disks: &[Self::Disk]) -> impl Future<Output = Result<(), Failure>> + Send;
}

/// A disk of a VM.
pub trait Disk: Clone + Send + Sync + 'static {
    /// How to find it again, what to call it, and its size now.
    fn known(&self) -> KnownDisk;
}

impl Disk for KnownDisk {
    fn known(&self) -> KnownDisk {
        self.clone()
    }
}

/// What is to be fixed.
#[derive(Debug)]
pub struct CaptureRequest<'a, D> {
    /// The disks, all at one moment.
    pub disks: &'a [D],
    /// The places of those that no `base` is needed of: nothing of them has been read yet.
    pub fresh: &'a [usize],
    /// The bitmap that says what changed; none at the start of a pass.
    pub base: Option<LogNumber>,
    /// The bitmap that begins at the moment.
    pub next: LogNumber,
    /// It is a moment of a pass that is not complete.
    pub in_pass: bool,
    /// Changes were read ahead: what was noted of the time since ends at the moment too, and can be read.
    pub again: bool,
    /// Where the moment is to be one with those of other VMs: whoever can waits for them, and says in
    /// [`Capture::shared`] what came of it.
    pub seat: Option<Seat>,
}

/// Disks that are read ahead of a moment. [`Guest::end_ahead`] ends it; so does dropping it, a little later.
pub trait Ahead: Send + Sync + 'static {
    /// Reads one of its disks.
    type Reader: DiskReader;

    /// Readers of its disks, in the order they were asked for.
    fn readers(&self) -> impl Future<Output = Result<Vec<Self::Reader>, Failure>> + Send;
}

/// A moment that is fixed: its disks read as they were then, whatever the guest writes.
/// [`Guest::end_reading`] ends it; so does dropping it, a little later.
pub trait Capture: Send + Sync + 'static {
    /// Reads one of its disks.
    type Reader: DiskReader;

    /// The moment: every write that the guest knew to be done before it is in.
    fn moment(&self) -> Timestamp;

    /// The moment of other VMs that it is too; see [`CaptureRequest::seat`].
    fn shared(&self) -> Option<GroupMoment> {
        None
    }

    /// What a point that is made of it comes to.
    fn consistency(&self) -> Consistency {
        Consistency::Crash
    }

    /// Gives all that changed since the moment of `base` as records that are made already. False if it has to be read;
    /// then none was given.
    fn records(&self, _to: &RecordSink) -> impl Future<Output = Result<bool, Failure>> + Send {
        std::future::ready(Ok(false))
    }

    /// Readers of its disks, in the order of the request.
    fn readers(&self) -> impl Future<Output = Result<Vec<Self::Reader>, Failure>> + Send;

    /// Waits until the moment must be given up, and says why. Never returns while all is well.
    fn watch(&self) -> impl Future<Output = Failure> + Send;
}

/// A disk as it was at the moment. Clones share its connections.
pub trait DiskReader: Clone + Send + Sync + 'static {
    /// What people call it.
    fn name(&self) -> &DiskName;

    /// Its size in bytes.
    fn size_bytes(&self) -> u64;

    /// The extents of `range` that changed since the moment of `base`, those that read as zeros marked; with
    /// [`Which::Data`], those that hold data. Sorted, disjoint, within `range`, never empty.
    fn extents(
        &self,
        range: Range<u64>,
        which: Which,
    ) -> impl Future<Output = Result<Vec<DirtyExtent>, Failure>> + Send;

    /// So many bytes from `offset`: all of them, or a failure. Several are asked for at a time.
    fn read(&self, offset: u64, len: u64) -> impl Future<Output = Result<Bytes, Failure>> + Send;
}

/// Which extents of a disk are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// What the bitmap `base` names.
    Changed,
    /// What has changed since reading ahead began.
    Again,
    /// Everything that does not read as zeros.
    Data,
}

/// The way to the replica's site. Clones go the same way.
pub trait Remote: Clone + Send + Sync + 'static {
    /// A log on its way.
    type Upload: Upload;

    /// Offers a relationship, or says again what it is, and hears what the replica has.
    fn offer(&self, offer: &Offer) -> impl Future<Output = Result<RelationshipStatus, Failure>> + Send;

    /// Tells where this site stands with the VM.
    fn report(&self, vm: VmId, report: &Report) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Tells that the VM is no longer protected from here.
    fn withdraw(&self, vm: VmId) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Gives a VM that is off, and of which the replica has everything, to the replica's site. Asked again, the answer
    /// is the same.
    fn hand_over(
        &self,
        vm: VmId,
        newest: &HandOver,
    ) -> impl Future<Output = Result<HandedOver, Failure>> + Send;

    /// Has the replica moved from there to another site, step by step. Asked again, the answer is the same.
    fn relocate(
        &self,
        _vm: VmId,
        _wanted: &Relocate,
    ) -> impl Future<Output = Result<Relocation, Failure>> + Send {
        std::future::ready(Err(cannot_be_moved()))
    }

    /// Becomes the primary of a VM whose replica was moved there. Asked again, the answer is the same.
    fn take_over(
        &self,
        _name: &VmName,
        _in_step: InStep,
    ) -> impl Future<Output = Result<TakenOver, Failure>> + Send {
        std::future::ready(Err(cannot_be_moved()))
    }

    /// The digests of the blocks of a stretch of a disk, in the replica's newest state; as many as
    /// [`DigestRequest::digests`] says.
    fn digests(
        &self,
        vm: VmId,
        request: &DigestRequest,
    ) -> impl Future<Output = Result<Vec<[u8; 16]>, Failure>> + Send;

    /// Begins to upload a log. Nothing of it need reach the replica before [`Upload::finish`].
    fn upload(&self, log: LogUpload<'_>) -> Self::Upload;
}

fn cannot_be_moved() -> Failure {
    Failure::lasting(FailureCode::ReplicaRefused, "replicas there cannot be moved")
}

/// A log that is to be uploaded.
#[derive(Debug)]
pub struct LogUpload<'a> {
    /// Whose log.
    pub vm: VmId,
    /// Its number and id.
    pub head: Head,
    /// How long a broken link is tried again before the upload fails.
    pub patience: Duration,
    /// The relationship's bandwidth limit.
    pub limiter: Option<&'a RateLimiter>,
}

/// A log on its way. Dropped before its end, what the replica has of it makes no log.
pub trait Upload: Send {
    /// Takes the next bytes of the log. After a failure, or dropped before it is ready, the upload is of no
    /// more use.
    fn write(&mut self, bytes: Bytes) -> impl Future<Output = Result<(), Failure>> + Send;

    /// Sends the rest; done once the replica has said that the whole log is durable there. When it fails, or is
    /// dropped, the log may be durable all the same.
    fn finish(self) -> impl Future<Output = Result<(), Failure>> + Send;
}
