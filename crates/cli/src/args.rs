//! The command line, as `docs` of the project promise it: stable, scripts depend on it.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use boot::SignOfLife;
use clap::{Args, Parser, Subcommand, ValueEnum};
use model::group::GroupMember;
use model::{DiskName, GroupName, InitialStart, PointName, PointRef, ResyncPolicy, VmName};

use crate::repository_args::RepositoryCommand;
use crate::{groups, when};

pub use crate::configure::Configure;
pub use crate::peer_args::{Entry, Identity, Peer};
pub use crate::policies::{BackupCommand, Policy};

/// Keeps a replica of every running QEMU/KVM virtual machine at another site, and backs up the replica.
#[derive(Debug, Parser)]
#[command(name = "afterimage", version, about, max_term_width = 100)]
pub struct Arguments {
    /// The site's folder.
    #[arg(
        long,
        global = true,
        env = "AFTERIMAGE_DIR",
        default_value = "/var/lib/afterimage",
        value_name = "DIR"
    )]
    pub dir: PathBuf,
    /// One JSON document on standard output.
    #[arg(long, global = true)]
    pub json: bool,
    /// Nothing on standard error but errors.
    #[arg(long, global = true)]
    pub quiet: bool,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a site in DIR: identity, config, catalog, a local repository.
    Init {
        /// What the site is called.
        #[arg(long)]
        name: String,
        /// Where it listens, as ADDRESS:PORT.
        #[arg(long, value_name = "ADDR")]
        listen: SocketAddr,
    },
    /// Run the site until SIGTERM.
    Serve,
    /// Sites that trust each other.
    #[command(subcommand)]
    Peer(Peer),
    /// This site's certificate: what it is, make it anew, or use one of your own CA.
    #[command(subcommand)]
    Identity(Identity),
    /// Start to protect a VM: its initial replication begins.
    Protect(Protect),
    /// The relationships of this site.
    Status {
        /// One VM only.
        vm: Option<VmName>,
    },
    /// The recovery points of a replica.
    Points {
        #[command(flatten)]
        target: Target,
        /// Show instead what retention would do now: which points go, why each other one stays, which logs are applied
        /// or merged.
        #[arg(long, conflicts_with = "group")]
        plan: bool,
    },
    /// Keep a recovery point, whatever retention says, until it is unpinned.
    Pin {
        vm: VmName,
        /// The recovery point: its id, the first digits of it, its name, or `latest`; `points` lists them.
        #[arg(value_name = "ID")]
        point: PointRef,
        /// What it is to be called: wherever an id is taken, the name is too.
        #[arg(long, value_parser = point_name)]
        name: Option<PointName>,
    },
    /// Let a pinned recovery point go when retention says so.
    Unpin {
        vm: VmName,
        /// The recovery point: its id, the first digits of it, or its name.
        #[arg(value_name = "ID")]
        point: PointRef,
    },
    /// Stop replicating a VM; changes are remembered.
    Pause { vm: VmName },
    /// Replicate again, at once; on the replica's site: apply again after a failure was mended.
    Resume { vm: VmName },
    /// Compare both sides and send what differs, now, whatever --resync says; a pass that rests goes on.
    Resync {
        vm: VmName,
        /// End the pass instead: nothing is replicated until the next one, which a person or the next window starts.
        #[arg(long)]
        cancel: bool,
    },
    /// Change how a VM is protected; at a replica's site, how that is passed on. What is not named stays as it is.
    Configure(Configure),
    /// At the replica's site: what its replicas are made of.
    #[command(subcommand)]
    Replica(Replica),
    /// Run a cycle now and wait until its point is at the replica.
    Sync {
        #[command(flatten)]
        target: Target,
    },
    /// VMs that are fixed at one moment, share recovery points and are failed over together.
    #[command(subcommand)]
    Group(Group),
    /// Disks of a VM that come and go while it is protected.
    #[command(subcommand)]
    Disk(Disk),
    /// Stop protecting a VM; on the replica's site: remove its replica (its backups stay).
    Unprotect { vm: VmName },
    /// Pass a replica on to a third site: a relationship of its own, which costs the primary nothing.
    Extend(Extend),
    /// End that; the third site keeps what it has.
    Unextend { vm: VmName },
    /// Back up a replica.
    Backup(Backup),
    /// When which VMs are backed up, how long backups are kept, and what is promised.
    #[command(subcommand)]
    Policy(Policy),
    /// Backup jobs that wait or run, and the newest that have ended.
    Jobs,
    /// The backups there are.
    Backups {
        /// Of one VM only.
        vm: Option<VmName>,
        #[command(flatten)]
        repository: RepositoryArgument,
    },
    /// Write the disks of a backup to files.
    Restore(Restore),
    /// Look into the disks of a backup or a recovery point: list, find and fetch single files.
    #[command(subcommand)]
    Files(Files),
    /// Read backups and compare them with their checksums.
    Verify {
        /// Of one VM only.
        vm: Option<VmName>,
        /// One backup only.
        #[arg(long, value_name = "ID")]
        backup: Option<String>,
        #[command(flatten)]
        repository: RepositoryArgument,
    },
    /// Repositories: where they are, check, prune, copies, passwords and keys, locks.
    #[command(subcommand)]
    Repository(RepositoryCommand),
    /// Keep the flat files of a replica quiet, for another backup product.
    Hold {
        vm: VmName,
        /// For how long at the most.
        #[arg(long = "for", default_value = "10m", value_parser = humantime::parse_duration, value_name = "TIME")]
        lease: Duration,
    },
    /// End a hold.
    Release { hold: String },
    /// Show the disks of a recovery point or of a backup over NBD, on a unix socket.
    Export(Export),
    /// End an export.
    Unexport { export: String },
    /// Boot a recovery point or a backup, isolated, and wait for a sign of life; the replica stays as it is.
    Check(Check),
    /// The newest boot checks.
    Checks {
        /// Of one VM only.
        vm: Option<VmName>,
    },
    /// Start a VM from its replica, or go back.
    #[command(subcommand)]
    Failover(Failover),
    /// Run a VM straight from a backup, and move it to files of its own while it runs.
    #[command(subcommand)]
    Recover(Recover),
    /// Move a replica: its storage to another folder, or all of it to another site.
    Migrate(Migrate),
    /// How cycles went in the monitoring window: done, missed and failed, sizes and latencies, the last error.
    Measurements {
        /// Of one VM only.
        vm: Option<VmName>,
        /// Begin a new window; what the old one came to is shown once more.
        #[arg(long)]
        reset: bool,
        /// Comma-separated values, for a spreadsheet.
        #[arg(long)]
        csv: bool,
    },
    /// What happened: refused peers, failed cycles, backups given up.
    Events {
        /// How many, newest first.
        #[arg(long, default_value_t = 50)]
        count: u32,
    },
    /// Show everything on this machine in about a minute: two sites, a VM under load, backups, a restore.
    Demo {
        /// Leave both sites running at the end, and say how to look at them.
        #[arg(long)]
        keep: bool,
    },
}

#[derive(Debug, Args)]
pub struct Migrate {
    pub vm: VmName,
    /// At the replica's site: the folder that its storage is moved to; it is made if it is not there.
    #[arg(long, value_name = "DIR", required_unless_present_any = ["to_site", "cancel"])]
    pub storage: Option<PathBuf>,
    /// Where the VM runs: the peer that is to have the replica from now on. It goes there from the site that has it.
    #[arg(long, value_name = "PEER", conflicts_with_all = ["storage", "cancel"])]
    pub to_site: Option<String>,
    /// End a move to another site: the replica stays where it is.
    #[arg(long, conflicts_with = "storage")]
    pub cancel: bool,
}

#[derive(Debug, Args)]
pub struct Extend {
    /// The VM, of which there is a replica here.
    pub vm: VmName,
    /// The peer that is to have a replica too.
    #[arg(long, value_name = "PEER")]
    pub to: String,
    /// The time between cycles, no shorter than the replica's own; without it, the same.
    #[arg(long, value_parser = humantime::parse_duration, value_name = "TIME")]
    pub every: Option<Duration>,
    /// Hourly recovery points beside the latest one, there; without it, as many as here.
    #[arg(long, value_name = "N")]
    pub points: Option<u8>,
    /// The most that is sent, in bytes per second (500k, 2M, 1G).
    #[arg(long, value_parser = bytes_per_second, value_name = "RATE")]
    pub bandwidth: Option<u64>,
}

#[derive(Debug, Args)]
pub struct Protect {
    /// What the VM is to be called here and at the replica.
    pub vm: VmName,
    /// Its QMP socket; Afterimage needs one for itself.
    #[arg(long, value_name = "SOCKET", required_unless_present = "libvirt")]
    pub qmp: Option<PathBuf>,
    /// Instead of a QMP socket: libvirt, which runs it (qemu:///system, qemu:///session?socket=PATH).
    #[arg(long, value_name = "URI", conflicts_with = "qmp")]
    pub libvirt: Option<String>,
    /// What it is called there, if not VM.
    #[arg(long, value_name = "NAME", requires = "libvirt", conflicts_with = "qmp")]
    pub domain: Option<String>,
    /// The socket of QEMU's NBD server, where it has one already.
    #[arg(long, value_name = "SOCKET", conflicts_with = "libvirt")]
    pub nbd: Option<PathBuf>,
    /// The peer that keeps the replica.
    #[arg(long, value_name = "PEER")]
    pub to: String,
    /// The time between two cycles, 5s to 15min.
    #[arg(long, default_value = "30s", value_parser = humantime::parse_duration, value_name = "TIME")]
    pub every: Duration,
    /// A block node (with --libvirt: a target such as vda) to protect; repeat it for more. All writable disks if none
    /// is named.
    #[arg(long = "disk", value_name = "NODE")]
    pub disks: Vec<String>,
    /// A block node (with --libvirt: a target) not to protect, among all writable disks; repeat it for more.
    #[arg(long = "exclude", value_name = "NODE", conflicts_with = "disks")]
    pub excluded: Vec<String>,
    /// Hourly recovery points to keep beside the latest, 0 to 24.
    #[arg(long, default_value_t = 0)]
    pub points: u8,
    /// The time between application-consistent points; needs --guest-agent, or --libvirt and an agent that it knows.
    #[arg(long, value_parser = humantime::parse_duration, value_name = "TIME")]
    pub app_every: Option<Duration>,
    /// The guest agent's socket; with --libvirt the agent is found.
    #[arg(long, value_name = "SOCKET")]
    pub guest_agent: Option<PathBuf>,
    /// The most that this relationship may send, in bytes per second (500k, 2M, 1G).
    #[arg(long, value_parser = bytes_per_second, value_name = "RATE")]
    pub bandwidth: Option<u64>,
    /// What shows that the VM has booted, for boot checks of its replica: agent, console:TEXT, tcp:PORT or runs:30s.
    #[arg(long, value_name = "SIGN")]
    pub sign_of_life: Option<SignOfLife>,
    /// The VM was moved here from another site of the same trust group: take its replica over, and send what differs.
    #[arg(long)]
    pub take_over: bool,
    #[command(flatten)]
    pub passes: PassArguments,
}

#[derive(Debug, Args)]
#[group(id = "passes", multiple = true)]
pub struct PassArguments {
    /// When both sides are compared once that is required: auto, manual, or a daily window in UTC such as 22:00-06:00.
    #[arg(long, value_name = "WHEN")]
    pub resync: Option<ResyncPolicy>,
    /// How the initial replication begins: now, at:TIME (RFC 3339 or +3h, at most 7 days ahead), seed (with images that
    /// the replica's site is given by 'replica seed'), or media:DIR (it is written to an empty folder on a removable disk,
    /// which 'replica import' reads at the replica's site).
    #[arg(long, value_parser = when::initial, value_name = "HOW")]
    pub initial: Option<InitialStart>,
}

#[derive(Debug, Subcommand)]
pub enum Replica {
    /// Have the replica of a VM begin with images that are here: only what differs from them travels.
    Seed {
        vm: VmName,
        /// A disk and its image (an older replica, a restored backup); repeat it for more. The image is copied.
        #[arg(long = "disk", value_name = "NAME=FILE", value_parser = when::seed_disk, required = true)]
        disks: Vec<(DiskName, PathBuf)>,
        /// The images' format.
        #[arg(long, value_enum, default_value_t = SeedFormat::Raw)]
        format: SeedFormat,
    },
    /// Import the initial replication of a VM from the media that 'protect --initial media:DIR' has written.
    Import {
        /// The folder with the set. What was cut off goes on where it stopped.
        #[arg(value_name = "DIR")]
        from: PathBuf,
    },
}

/// Never guessed: a guest can write to a raw disk what makes it look like another format.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum SeedFormat {
    Raw,
    Qcow2,
    Vhdx,
    Vmdk,
}

#[derive(Debug, Subcommand)]
pub enum Disk {
    /// Replicate more disks. The others go on; a new one is in the points once it has been copied.
    Add {
        vm: VmName,
        /// Their block nodes (under libvirt: their targets).
        #[arg(required = true, value_name = "NODE")]
        nodes: Vec<String>,
    },
    /// Replicate some disks no more. The points that have them keep them.
    Remove {
        vm: VmName,
        /// Their names; `status VM` shows them.
        #[arg(required = true, value_name = "DISK")]
        disks: Vec<DiskName>,
    },
}

/// A VM, or those of a group.
#[derive(Debug, Args)]
#[group(id = "target", required = true, multiple = false)]
pub struct Target {
    /// The VM.
    pub vm: Option<VmName>,
    /// Instead of a VM: those of this group, together.
    #[arg(long, value_name = "NAME")]
    pub group: Option<GroupName>,
}

#[derive(Debug, Subcommand)]
pub enum Group {
    /// At the site where the VMs run: have them fixed at one moment from now on.
    Create {
        name: GroupName,
        /// The VMs in the order in which they are started; with a delay (db web:30s), so long after the one before.
        #[arg(required = true, value_name = "VM[:DELAY]", value_parser = groups::member)]
        members: Vec<GroupMember>,
        /// The time between two moments, 5s to 15min; the shortest of the VMs' own, if nothing is given.
        #[arg(long, value_parser = humantime::parse_duration, value_name = "TIME")]
        every: Option<Duration>,
    },
    /// The groups there are, on either side.
    List,
    /// One group: its VMs in their order, and its newest moment.
    Show { name: GroupName },
    /// At the site where the VMs run: end it; they stay protected, each by itself.
    Remove { name: GroupName },
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Backup {
    #[command(subcommand)]
    pub command: Option<BackupCommand>,
    #[command(flatten)]
    pub target: Target,
    /// A certain recovery point, by id or name (of a group: a moment, by id); `points` lists them.
    #[arg(long, value_name = "ID")]
    pub point: Option<PointRef>,
    /// How consistent the point must be.
    #[arg(long, value_enum, default_value_t = ConsistencyWanted::PreferApplication, conflicts_with = "group")]
    pub consistency: ConsistencyWanted,
    /// What is read: a pinned view, the same but refused while logs are applied, or the flat files.
    #[arg(long, value_enum, default_value_t = View::Pinned, conflicts_with = "group")]
    pub view: View,
    #[command(flatten)]
    pub repository: RepositoryArgument,
    /// Exit with 75 at the first refusal.
    #[arg(long)]
    pub no_retry: bool,
    /// Take no changes from the VM's site meanwhile; they wait there, and nothing is lost.
    #[arg(long, conflicts_with = "group")]
    pub pause: bool,
}

#[derive(Debug, Clone, Args)]
pub struct RepositoryArgument {
    /// The repository, by its name in the config.
    #[arg(long, default_value = site::LOCAL_REPOSITORY)]
    pub repository: String,
}

#[derive(Debug, Args)]
pub struct Restore {
    pub vm: VmName,
    /// The backup; the first digits of its id are enough. `latest` is the newest.
    #[arg(long, value_name = "ID")]
    pub backup: String,
    /// The folder to write to.
    #[arg(long, value_name = "PATH", required_unless_present = "onto")]
    pub to: Option<PathBuf>,
    /// Instead of a folder: a disk, and the block device or raw image that it is written to, of which only what differs is
    /// written; repeat it for more disks. What was cut off goes on when it is run again.
    #[arg(long, value_name = "DISK=PATH", value_parser = when::seed_disk, conflicts_with_all = ["to", "format", "disks"])]
    pub onto: Vec<(DiskName, PathBuf)>,
    /// The files' format.
    #[arg(long, value_enum, default_value_t = Format::Raw)]
    pub format: Format,
    /// A disk to restore; repeat it for more. All if none is named.
    #[arg(long = "disk", value_name = "NAME")]
    pub disks: Vec<DiskName>,
    /// Save what is unharmed where a part of the backup is damaged.
    #[arg(long)]
    pub keep_going: bool,
    /// Replace files that are there; with --onto: what is on the device or in the image may go.
    #[arg(long)]
    pub overwrite: bool,
    #[command(flatten)]
    pub repository: RepositoryArgument,
}

#[derive(Debug, Args)]
pub struct Export {
    /// The VM whose recovery point is shown.
    #[arg(required_unless_present = "backup")]
    pub vm: Option<VmName>,
    /// The recovery point; the newest if none is named.
    #[arg(long, value_name = "ID", requires = "vm")]
    pub point: Option<PointRef>,
    /// A backup instead.
    #[arg(long, value_name = "ID", conflicts_with_all = ["vm", "point"])]
    pub backup: Option<String>,
    /// Let it be written to; what is written is gone with the export.
    #[arg(long)]
    pub writable: bool,
    #[command(flatten)]
    pub repository: RepositoryArgument,
}

#[derive(Debug, Args)]
pub struct Check {
    /// The VM.
    pub vm: VmName,
    /// The recovery point; the newest if none is named.
    #[arg(long, value_name = "ID")]
    pub point: Option<PointRef>,
    /// A backup instead.
    #[arg(long, value_name = "ID", conflicts_with = "point")]
    pub backup: Option<String>,
    /// What shows that the guest lives: agent, console:TEXT, tcp:PORT or runs:30s; what `protect` named, if nothing
    /// is given.
    #[arg(long, value_name = "SIGN")]
    pub sign_of_life: Option<SignOfLife>,
    /// How long it may take; what the config says, if nothing is given.
    #[arg(long, value_parser = humantime::parse_duration, value_name = "TIME")]
    pub within: Option<Duration>,
    #[command(flatten)]
    pub repository: RepositoryArgument,
}

#[derive(Debug, Subcommand)]
pub enum Failover {
    /// Try a recovery point, beside replication: a writable copy that is gone afterwards, in a VM without a network.
    Test {
        #[command(flatten)]
        target: Target,
        /// The recovery point (of a group: the moment); the newest if none is named.
        #[arg(long, value_name = "ID")]
        point: Option<PointRef>,
        /// Only show the disks over NBD; start no VM.
        #[arg(long)]
        disks_only: bool,
    },
    /// End a test failover; nothing of it stays.
    EndTest {
        /// The test, as 'failover test' named it.
        #[arg(required_unless_present = "group")]
        test: Option<String>,
        /// Instead of one: all that were begun together for this group.
        #[arg(long, value_name = "NAME", conflicts_with = "test")]
        group: Option<GroupName>,
    },
    /// The test failovers that are open.
    Tests {
        /// Of one VM only.
        vm: Option<VmName>,
    },
    /// Start from the replica without the primary: gives disks to start the VM with.
    Unplanned {
        #[command(flatten)]
        target: Target,
        /// The recovery point; the newest if none is named. Of a group: the moment; the newest that all its VMs have.
        #[arg(long, value_name = "ID")]
        point: Option<PointRef>,
        #[command(flatten)]
        starts: Starts,
    },
    /// Start a VM that is failed over to this site, on this site's networks; it goes on running by itself.
    Start {
        vm: VmName,
        /// Start nothing; show the command line and the networks.
        #[arg(long)]
        show: bool,
    },
    /// Shut down a VM that 'failover start' has started.
    Stop(Stop),
    /// At the site where the VM runs: give it, switched off, to its replica's site. Nothing is lost.
    Planned {
        #[command(flatten)]
        target: Target,
        /// Ask the guest to shut down, and wait for it that long.
        #[arg(long, value_parser = humantime::parse_duration, num_args = 0..=1, default_missing_value = "5m", value_name = "TIME")]
        shutdown: Option<Duration>,
    },
    /// Go back to replicating: what was written since is dropped.
    Cancel {
        #[command(flatten)]
        target: Target,
    },
    /// Make a failover final: the other points go, and the VM's disks need nothing of Afterimage any more.
    Complete {
        #[command(flatten)]
        target: Target,
        /// The QMP socket of the QEMU that runs the VM here; not needed for one that 'failover start' has started.
        /// Without either, its disks are moved when it is off.
        #[arg(long, value_name = "SOCKET", conflicts_with = "group")]
        qmp: Option<PathBuf>,
    },
    /// Replicate a VM that was failed over to this site back to where it came from; only differences travel.
    Reverse {
        vm: VmName,
        /// The QMP socket of the QEMU that runs the VM here, one for Afterimage alone; not needed for one that
        /// 'failover start' has started.
        #[arg(long, value_name = "SOCKET")]
        qmp: Option<PathBuf>,
        /// The socket of QEMU's NBD server, where it has one already.
        #[arg(long, value_name = "SOCKET")]
        nbd: Option<PathBuf>,
        /// The peer that is to keep the replica; the one that the VM came from if none is named.
        #[arg(long, value_name = "PEER")]
        to: Option<String>,
        /// The time between two cycles; as before if none is given.
        #[arg(long, value_parser = humantime::parse_duration, value_name = "TIME")]
        every: Option<Duration>,
        /// The guest agent's socket.
        #[arg(long, value_name = "SOCKET")]
        guest_agent: Option<PathBuf>,
    },
}

#[derive(Debug, Clone, Subcommand)]
pub enum Files {
    /// The volumes (partitions, logical volumes), or what is in a folder of one.
    List {
        vm: VmName,
        /// A folder or a file, such as vda/1:/etc; the volumes, if none is named.
        #[arg(value_name = "VOLUME:/PATH")]
        place: Option<OsString>,
        #[command(flatten)]
        of: FilesOf,
    },
    /// Search by name, in all volumes.
    Find {
        vm: VmName,
        /// The name; * stands for any text and ? for one letter. Capitals make no difference.
        name: OsString,
        /// In this volume only.
        #[arg(long = "in", value_name = "VOLUME")]
        volume: Option<String>,
        #[command(flatten)]
        of: FilesOf,
    },
    /// Fetch files, and folders with all that is in them.
    Get {
        vm: VmName,
        /// What to fetch, such as vda/1:/etc/fstab.
        #[arg(required = true, value_name = "VOLUME:/PATH")]
        places: Vec<OsString>,
        /// The folder to write to; nothing that is there is replaced.
        #[arg(long, value_name = "DIR")]
        to: PathBuf,
        #[command(flatten)]
        of: FilesOf,
    },
}

/// Whose files.
#[derive(Debug, Clone, Args)]
pub struct FilesOf {
    /// The recovery point; the newest if neither a point nor a backup is named.
    #[arg(long, value_name = "ID")]
    pub point: Option<PointRef>,
    /// A backup instead; `latest` is the newest.
    #[arg(long, value_name = "ID", conflicts_with = "point")]
    pub backup: Option<String>,
    #[command(flatten)]
    pub repository: RepositoryArgument,
}

/// How a VM that runs here is shut down.
#[derive(Debug, Args)]
pub struct Stop {
    pub vm: VmName,
    /// How long the guest may take.
    #[arg(long, value_parser = humantime::parse_duration, default_value = "5m", value_name = "TIME")]
    within: Duration,
    /// Do not ask the guest: pull the plug.
    #[arg(long)]
    kill: bool,
}

impl Stop {
    /// How long the guest may take, in seconds; it is not asked without it.
    pub fn within_s(&self) -> Option<u64> {
        (!self.kill).then(|| self.within.as_secs().max(1))
    }
}

#[derive(Debug, Subcommand)]
pub enum Recover {
    /// Start a VM from a backup at once, whatever its size; or again one that was recovered before.
    Start {
        vm: VmName,
        /// The backup; the first digits of its id are enough. `latest` is the newest.
        #[arg(long, value_name = "ID")]
        backup: Option<String>,
        #[command(flatten)]
        repository: RepositoryArgument,
        /// Connect its network cards to this site's networks, as 'failover start' does; without it they have no cables.
        #[arg(long)]
        connect: bool,
        /// Start nothing; show the command line and the networks.
        #[arg(long)]
        show: bool,
    },
    /// Move its disks to files in a folder (qcow2), while it runs; after that it needs nothing of Afterimage.
    Move {
        vm: VmName,
        /// The folder; it is made if it is not there.
        #[arg(long, value_name = "DIR")]
        to: PathBuf,
    },
    /// Shut it down.
    Stop(Stop),
    /// End it and drop what it has written; of one that was moved, only forget it.
    Drop { vm: VmName },
    /// Those there are.
    List,
}

/// How VMs are started.
#[derive(Debug, Args)]
pub struct Starts {
    /// Start the VM here too, as 'failover start' does; the VMs of a group in their order and with their delays.
    #[arg(long)]
    pub start: bool,
    /// Run this (with 'sh -c') for each VM of the group, in their order and with their delays. It finds the VM in
    /// $AFTERIMAGE_VM and its disks, as JSON, in $AFTERIMAGE_DISKS, and comes back when the VM is started.
    #[arg(long, value_name = "COMMAND", requires = "group", conflicts_with = "start")]
    pub start_with: Option<String>,
    /// Begin with this VM: those before it are started already.
    #[arg(long, value_name = "VM", requires = "group")]
    pub from: Option<VmName>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum ConsistencyWanted {
    Application,
    PreferApplication,
    Crash,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum View {
    Pinned,
    Strict,
    Hold,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Format {
    Raw,
    Qcow2,
    Vhdx,
}

/// A name that cannot be taken for an id.
fn point_name(name: &str) -> Result<PointName, String> {
    PointName::new(name).map_err(|error| error.to_string())
}

/// `500k`, `2M`, `1G` or plain bytes.
pub(crate) fn bytes_per_second(text: &str) -> Result<u64, String> {
    let (digits, unit) = match text.find(|c: char| !c.is_ascii_digit()) {
        Some(end) => text.split_at(end),
        None => (text, ""),
    };
    let factor = match unit.trim_end_matches("/s").trim_end_matches(['b', 'B']) {
        "" => 1,
        "k" | "K" => 1000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        _ => return Err(format!("{unit:?} is not a unit; use k, M or G (bytes per second)")),
    };
    let rate = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(factor));
    rate.filter(|&rate| rate >= 10_000)
        .ok_or_else(|| "a rate is a number of bytes per second, at least 10k".to_owned())
}

/// `500M`, `10G`, `2T` (powers of 1024) or plain bytes.
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    let (digits, unit) = match text.find(|c: char| !c.is_ascii_digit()) {
        Some(end) => text.split_at(end),
        None => (text, ""),
    };
    let shift = match unit.trim_end_matches(['b', 'B']).trim_end_matches('i') {
        "" => 0,
        "k" | "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(format!("{unit:?} is not a unit; use K, M, G or T")),
    };
    let bytes = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
    bytes.filter(|&bytes| bytes > 0).ok_or_else(|| "a size is a number of bytes, such as 500G".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn the_interval_is_the_one_that_the_model_knows() {
        let parsed =
            Arguments::try_parse_from(["afterimage", "protect", "web", "--qmp", "/q", "--to", "head"])
                .unwrap();
        let Command::Protect(protect) = parsed.command else {
            panic!("protect was parsed as something else")
        };
        assert_eq!(protect.every.as_secs(), model::INTERVAL_DEFAULT_SECONDS);
    }

    #[test]
    fn a_vm_is_reached_in_exactly_one_way() {
        let protect = |more: &[&str]| {
            let arguments = [&["afterimage", "protect", "web", "--to", "head"], more].concat();
            Arguments::try_parse_from(arguments).is_ok()
        };
        assert!(protect(&["--libvirt", "qemu:///system"]) && protect(&["--qmp", "/q", "--nbd", "/n"]));
        assert!(protect(&["--libvirt", "qemu:///system", "--domain", "www", "--app-every", "1h"]));
        assert!(!protect(&[]) && !protect(&["--qmp", "/q", "--libvirt", "qemu:///system"]));
        assert!(!protect(&["--qmp", "/q", "--domain", "www"]));
        assert!(!protect(&["--libvirt", "qemu:///system", "--nbd", "/n"]));
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!((bytes("2T"), bytes("500GiB"), bytes("7")), (Ok(2 << 40), Ok(500 << 30), Ok(7)));
        for bad in ["", "0", "T", "2X", "99999999999T"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn rates_have_units() {
        assert_eq!(bytes_per_second("2M"), Ok(2_000_000));
        assert_eq!(bytes_per_second("500kB/s"), Ok(500_000));
        assert_eq!(bytes_per_second("12345"), Ok(12_345));
        for bad in ["", "M", "2X", "1", "99999999999999999999G"] {
            assert!(bytes_per_second(bad).is_err(), "{bad}");
        }
    }
}
