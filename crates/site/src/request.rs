//! What a running site can be asked, over its control socket: one type for both ends.

use std::path::PathBuf;

use boot::SignOfLife;
use model::gate::Access;
use model::group::GroupMember;
use model::{
    DiskName, GroupName, InitialStart, PointName, PointRef, PolicyName, ResyncPolicy, VmName, Wanted,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::entry::EntryChange;
use crate::failure::Failure;

/// A command to a running site.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "command")]
pub enum Request {
    /// Makes an invite for a site that this one will call `name`.
    PeerInvite {
        /// What the peer will be called here.
        name: VmName,
        /// What it may do here, where that is not what a new peer may.
        #[serde(flatten)]
        change: EntryChange,
        /// A trusted peer of this name is to be replaced.
        #[serde(default)]
        replace: bool,
    },
    /// Accepts an invite of another site.
    PeerAccept {
        /// The line.
        invite: String,
        /// What the site that has made it may do here, where that is not what a new peer may.
        #[serde(flatten)]
        change: EntryChange,
        /// A trusted peer of its name is to be replaced.
        #[serde(default)]
        replace: bool,
    },
    /// Lists the peers.
    PeerList,
    /// Everything about one peer.
    PeerShow {
        /// Its name.
        name: String,
    },
    /// Changes what a peer may do here.
    PeerAllow {
        /// Its name.
        name: String,
        /// What changes.
        #[serde(flatten)]
        change: EntryChange,
    },
    /// Takes back all that a peer may do here; its entry and its replicas stay.
    PeerRevoke {
        /// Its name.
        name: String,
    },
    /// Everything about this site's certificate.
    Identity,
    /// Makes a new certificate for this site.
    IdentityRenew {
        /// For another key, which the peers are told of first.
        new_key: bool,
        /// Whoever cannot be told is left to be invited anew.
        force: bool,
    },
    /// Has this site show a certificate that people have, or trust their CA.
    IdentityUse {
        /// The certificate, those between it and the CA after it, and its key.
        pair: Option<(PathBuf, PathBuf)>,
        /// The CA.
        ca: Option<PathBuf>,
        /// Whoever cannot be told is left to be invited anew.
        force: bool,
    },
    /// Ends the trust in a peer.
    PeerRemove {
        /// Its name.
        name: String,
    },
    /// Starts to protect a VM.
    Protect(Box<Protect>),
    /// The relationships of this site, or one of them.
    Status {
        /// The VM.
        vm: Option<VmName>,
    },
    /// The recovery points of a replica.
    Points {
        /// The VM.
        vm: VmName,
        /// Show what retention would do now instead.
        #[serde(default)]
        plan: bool,
    },
    /// Keeps a point whatever retention says.
    Pin {
        /// The VM.
        vm: VmName,
        /// The point.
        point: PointRef,
        /// What it is to be called.
        name: Option<PointName>,
    },
    /// Lets a pinned point go.
    Unpin {
        /// The VM.
        vm: VmName,
        /// The point.
        point: PointRef,
    },
    /// Stops cycles.
    Pause {
        /// The VM.
        vm: VmName,
    },
    /// Lets cycles run again; on the replica's site, lets a failed apply run again.
    Resume {
        /// The VM.
        vm: VmName,
    },
    /// Compares both sides, now.
    Resync {
        /// The VM.
        vm: VmName,
        /// End it instead.
        #[serde(default)]
        cancel: bool,
    },
    /// Changes how a VM is protected.
    Configure {
        /// The VM.
        vm: VmName,
        /// What is to be otherwise.
        changes: Box<primary::Changes>,
    },
    /// At the replica's site: images that the replica of a VM is to begin with.
    Seed(SeedRequest),
    /// At the replica's site: media with the initial replication of a VM.
    Import {
        /// The folder.
        dir: PathBuf,
    },
    /// Runs a cycle now and waits for it.
    Sync {
        /// The VM.
        vm: VmName,
    },
    /// Begins to replicate more disks of a VM.
    AddDisks {
        /// The VM.
        vm: VmName,
        /// Their block nodes, or targets of the domain.
        nodes: Vec<String>,
    },
    /// Ends the replication of some disks of a VM.
    RemoveDisks {
        /// The VM.
        vm: VmName,
        /// Their names.
        disks: Vec<DiskName>,
    },
    /// Ends a protection; on the replica's site, removes the replica of a VM that is not protected any more.
    Unprotect {
        /// The VM.
        vm: VmName,
    },
    /// Begins to pass a replica on to a third site.
    Extend(Extend),
    /// Ends that.
    Unextend {
        /// The VM.
        vm: VmName,
    },
    /// Backs up a replica and waits for the outcome.
    Backup(BackupRequest),
    /// The backup jobs that are not at their end, and the newest that are.
    Jobs,
    /// Gives the flat files of a replica.
    Hold {
        /// The VM.
        vm: VmName,
        /// For how long, in seconds.
        for_s: u64,
    },
    /// Ends a hold.
    Release {
        /// The hold.
        hold: String,
    },
    /// Shows disks over NBD.
    Export(Export),
    /// Backups are about to be restored over what is at these places.
    Overwriting {
        /// Files and devices, in full.
        places: Vec<PathBuf>,
    },
    /// Ends an export.
    Unexport {
        /// The export.
        export: String,
    },
    /// Boots a point or a backup, isolated, and waits for a sign of life.
    Check(Check),
    /// The newest boot checks.
    Checks {
        /// Of one VM only.
        vm: Option<VmName>,
    },
    /// Failover.
    Failover(FailoverRequest),
    /// VMs that run from backups.
    Recover(RecoverRequest),
    /// Groups of VMs.
    Group(GroupRequest),
    /// About policies.
    Policy(PolicyRequest),
    /// Who has the backups that are promised, and what came of the jobs of so many days.
    BackupReport {
        /// How many.
        days: u32,
    },
    /// Moves a replica's storage to another folder.
    Migrate {
        /// The VM.
        vm: VmName,
        /// The new folder.
        storage: PathBuf,
    },
    /// At the primary's site: moves a replica to another site.
    Relocate {
        /// The VM.
        vm: VmName,
        /// The peer that it is moved to; none ends a move.
        to: Option<String>,
    },
    /// What the monitoring windows come to.
    Measurements {
        /// Of one VM only.
        vm: Option<VmName>,
        /// Begin new windows; the answer has what the old ones came to.
        reset: bool,
    },
    /// The newest events.
    Events {
        /// How many.
        count: u32,
    },
}

/// What to do in a failover.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailoverRequest {
    /// Begins a test failover, beside everything else.
    Test {
        /// The VM.
        vm: VmName,
        /// The point; the newest if none is given.
        point: Option<PointRef>,
        /// A VM is started from it.
        start: bool,
    },
    /// Ends a test failover.
    EndTest {
        /// The test.
        test: String,
    },
    /// The test failovers there are.
    Tests {
        /// Of one VM only.
        vm: Option<VmName>,
    },
    /// At the primary's site: gives a VM that is off to its replica's site, with everything.
    Planned {
        /// The VM.
        vm: VmName,
        /// The guest is asked to shut down, and waited for so many seconds.
        shut_down_s: Option<u64>,
    },
    /// Starts from the replica without the primary.
    Unplanned {
        /// The VM.
        vm: VmName,
        /// The point; the newest if none is given.
        point: Option<PointRef>,
        /// The VM is started from it here.
        #[serde(default)]
        start: bool,
    },
    /// Starts a VM that is failed over to this site.
    Start {
        /// The VM.
        vm: VmName,
        /// Nothing is started; how it would be is told.
        only_show: bool,
    },
    /// Stops a VM that was started here.
    Stop {
        /// The VM.
        vm: VmName,
        /// The guest is waited for so many seconds; without it the plug is pulled.
        within_s: Option<u64>,
    },
    /// Goes back to replicating; what was written since is dropped.
    Cancel {
        /// The VM.
        vm: VmName,
    },
    /// Makes it final.
    Complete {
        /// The VM.
        vm: VmName,
        /// The monitor of the QEMU that runs it here.
        qmp: Option<PathBuf>,
    },
    /// Replicates the other way.
    Reverse(Box<Reverse>),
    /// The VMs of a group, together.
    Group {
        /// The group.
        group: GroupName,
        /// What to do with them.
        what: GroupFailover,
    },
}

/// What is asked of VMs that run from backups.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RecoverRequest {
    /// Starts one.
    Start(Recover),
    /// Stops one.
    Stop {
        /// The VM.
        vm: VmName,
        /// The guest is waited for so many seconds; without it the plug is pulled.
        within_s: Option<u64>,
    },
    /// Moves its disks to files of their own.
    Move {
        /// The VM.
        vm: VmName,
        /// The folder.
        to: PathBuf,
    },
    /// Ends it, and drops what it has written.
    Drop {
        /// The VM.
        vm: VmName,
    },
    /// Those there are.
    List,
}

/// A VM that is to be started from a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recover {
    /// The VM.
    pub vm: VmName,
    /// The backup, or `latest`; none to start one again that was recovered before.
    pub backup: Option<String>,
    /// The repository's name.
    pub repository: String,
    /// Its network cards get their cables.
    pub connect: bool,
    /// Nothing is started; how it would be is told.
    pub only_show: bool,
}

/// What to do with the VMs of a group in a failover.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GroupFailover {
    /// Begins a test failover of each, all of one moment, in their order and with their delays.
    Test {
        /// The moment; the newest that all have if none is given.
        point: Option<PointRef>,
        /// VMs are started from it.
        start: bool,
    },
    /// Ends all test failovers that were begun so.
    EndTests,
    /// At the primary's site: gives them, switched off, to their replicas' site.
    Planned {
        /// Each guest is asked to shut down, and waited for so many seconds.
        shut_down_s: Option<u64>,
    },
    /// Starts from the replicas, all of one moment.
    Unplanned {
        /// The moment; the newest that all have if none is given.
        point: Option<PointRef>,
    },
    /// Goes back to replicating.
    Cancel,
    /// Makes it final.
    Complete,
}

/// What is asked of groups.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GroupRequest {
    /// At the primary's site: makes one.
    Create {
        /// Its name.
        group: GroupName,
        /// Its VMs, in the order in which they are started.
        members: Vec<GroupMember>,
        /// The interval in seconds; the shortest of its VMs' if none is given.
        every_s: Option<u64>,
    },
    /// Those there are, on either side.
    List,
    /// One of them.
    Show {
        /// Its name.
        group: GroupName,
    },
    /// At the primary's site: ends one; its VMs stay protected.
    Remove {
        /// Its name.
        group: GroupName,
    },
    /// At the replicas' site: its moments, and who has a point of each.
    Points {
        /// Its name.
        group: GroupName,
    },
    /// At the primary's site: fixes a moment now, and waits until its points are at the replicas' site.
    Sync {
        /// Its name.
        group: GroupName,
    },
    /// At the replicas' site: backs all up, at one moment.
    Backup {
        /// Its name.
        group: GroupName,
        /// The moment; the newest that all have if none is given.
        point: Option<PointRef>,
        /// The repository's name.
        repository: String,
        /// Give up at the first refusal.
        no_retry: bool,
    },
}

/// A VM that was failed over to this site is to be replicated from here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reverse {
    /// The VM.
    pub vm: VmName,
    /// The monitor of the QEMU that runs it here; the one that the site started it with if none is named.
    pub qmp: Option<PathBuf>,
    /// The socket of an NBD server that QEMU has already.
    pub nbd: Option<PathBuf>,
    /// The peer; the one that it was replicated from if none is named.
    pub to: Option<String>,
    /// The interval in seconds; as before if none is given.
    pub every_s: Option<u64>,
    /// The guest agent's socket.
    pub guest_agent: Option<PathBuf>,
}

/// How a VM is to be protected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Protect {
    /// The VM.
    pub vm: VmName,
    /// How its QEMU is reached.
    pub by: By,
    /// The socket of an NBD server that QEMU has already.
    pub nbd: Option<PathBuf>,
    /// The peer.
    pub to: String,
    /// The interval in seconds.
    pub every_s: u64,
    /// The block nodes, or targets of the domain; all writable ones if empty.
    pub disks: Vec<String>,
    /// Hourly points beside the latest.
    pub points: u8,
    /// Seconds between application-consistent points.
    pub app_every_s: Option<u64>,
    /// The guest agent's socket.
    pub guest_agent: Option<PathBuf>,
    /// The bandwidth limit in bytes per second.
    pub bandwidth_bytes_per_s: Option<u64>,
    /// What shows that the VM has booted, for boot checks of its replica.
    #[serde(default)]
    pub sign_of_life: Option<SignOfLife>,
    /// Where all writable disks are meant: all but these.
    #[serde(default)]
    pub excluded: Vec<String>,
    /// When both sides are compared without being asked.
    #[serde(default)]
    pub resync: ResyncPolicy,
    /// How the initial replication is to begin.
    #[serde(default)]
    pub initial: InitialStart,
    /// The VM was moved here from another site of the same trust group: its replica stays, and is compared with it.
    #[serde(default)]
    pub take_over: bool,
}

/// How a replica is to be passed on to a third site.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extend {
    /// The VM.
    pub vm: VmName,
    /// The third site.
    pub to: String,
    /// The interval in seconds; that of the replica if none is given.
    pub every_s: Option<u64>,
    /// Hourly points beside the latest, there; as many as here if nothing is given.
    pub points: Option<u8>,
    /// The bandwidth limit in bytes per second.
    pub bandwidth_bytes_per_s: Option<u64>,
}

/// Images that a replica is to begin with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeedRequest {
    /// The VM.
    pub vm: VmName,
    /// The disks and their images.
    pub disks: Vec<(DiskName, PathBuf)>,
    /// The images' format, in QEMU's words.
    pub format: String,
}

/// How a VM's QEMU is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum By {
    /// By a QMP socket.
    Qmp(PathBuf),
    /// Through libvirt, which runs it.
    Libvirt {
        /// Libvirt's URI.
        uri: String,
        /// What the VM is called there.
        domain: String,
    },
}

/// What is asked of policies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PolicyRequest {
    /// Those there are.
    List,
    /// One, and its VMs.
    Show {
        /// Its name.
        policy: PolicyName,
    },
    /// Which backups its retention would keep and forget.
    Plan {
        /// Its name.
        policy: PolicyName,
        /// Of one VM only.
        vm: Option<VmName>,
    },
    /// Backs its VMs up now.
    Run {
        /// Its name.
        policy: PolicyName,
        /// One VM only.
        vm: Option<VmName>,
    },
}

/// A wish for a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupRequest {
    /// The VM.
    pub vm: VmName,
    /// A certain point.
    pub point: Option<PointRef>,
    /// The consistency wanted; the site's `prefer-application` if none is given.
    pub consistency: Option<Wanted>,
    /// What is read.
    pub view: Access,
    /// The repository's name.
    pub repository: String,
    /// Give up at the first refusal.
    pub no_retry: bool,
    /// Replication is paused while an attempt runs.
    #[serde(default)]
    pub pause: bool,
}

/// What to show over NBD.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Export {
    /// What is shown.
    pub what: Exported,
    /// It can be written to; what is written is gone with the export.
    pub writable: bool,
}

/// A boot check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// The VM.
    pub vm: VmName,
    /// What is booted.
    pub what: Exported,
    /// What it waits for; what the relationship names if nothing is given.
    pub sign: Option<SignOfLife>,
    /// How long at the most, in seconds; the site's `boot.within-s` if nothing is given.
    pub within_s: Option<u64>,
}

/// What an export shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Exported {
    /// A recovery point of a replica.
    Point {
        /// The VM.
        vm: VmName,
        /// The point; the newest if none is named.
        point: Option<PointRef>,
    },
    /// A backup.
    Backup {
        /// Its id.
        backup: String,
        /// The repository's name.
        repository: String,
    },
}

/// One line of the answer to a [`Request`]; the last one is a result or an error.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Line {
    /// How far it is.
    Progress(Progress),
    /// It is done.
    Result(Value),
    /// It is refused, or failed.
    Error(Failure),
}

/// How far a command is, for a person who waits.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Progress {
    /// What is going on.
    pub message: String,
    /// Bytes done.
    pub done_bytes: u64,
    /// Bytes in all; 0 if that is not known.
    pub total_bytes: u64,
}
