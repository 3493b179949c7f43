//! One VM, by its QEMU.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use model::bitmaps::{Ours, after_durable, after_failure};
use model::{LogNumber, Tracking, VmId};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio::time::timeout;

use crate::bitmaps;
use crate::disks::{self, Disk};
use crate::error::Error;
use crate::graph::{Edges, Graph};
use crate::libvirt::{self, Domain, DomainAddress};
use crate::names::Names;
use crate::nbd_server;
use crate::others;
use crate::qmp::{Command, Qmp, Version};
use crate::sweep::{named_block_nodes, sweep};

/// How long a greeting may take. QEMU's main loop stalls for seconds when its storage does.
const CONNECT_TIME: Duration = Duration::from_secs(10);
/// How long one waits for a capture that is being taken down.
const CAPTURE_END_TIME: Duration = Duration::from_secs(60);
/// Since this version NBD clients of a disk in an I/O thread are let go in the main thread.
const SAFE_WITH_IO_THREADS: Version = Version { major: 8, minor: 2, micro: 0 };
/// The oldest QEMU that we drive.
const OLDEST: Version = Version { major: 7, minor: 2, micro: 0 };

/// How QEMU's monitor is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Monitor {
    /// A QMP socket. It serves one client at a time, so it must be for us alone.
    #[serde(rename = "qmp")]
    Socket(PathBuf),
    /// Libvirt has it, and passes on what we say.
    #[serde(rename = "libvirt")]
    Libvirt(DomainAddress),
    /// There is no QEMU here: the VM runs elsewhere, and its replica on this machine is what is meant.
    #[serde(rename = "replica")]
    Replica,
}

impl std::fmt::Display for Monitor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Socket(socket) => socket.display().fmt(f),
            Self::Libvirt(domain) => domain.fmt(f),
            Self::Replica => f.write_str("the replica"),
        }
    }
}

/// How a fixed moment is read: over which NBD server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NbdAccess {
    /// We start QEMU's NBD server, on a unix socket of our own in this directory.
    Own(PathBuf),
    /// QEMU has an NBD server on this unix socket already.
    Existing(PathBuf),
}

/// Where a VM is found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmAddress {
    /// Which VM: names in QEMU are made from it.
    pub id: VmId,
    /// QEMU's monitor.
    pub monitor: Monitor,
    /// The NBD server.
    pub nbd: NbdAccess,
}

/// A VM that we are connected to. Clones share the connection.
#[derive(Debug, Clone)]
pub struct Vm {
    pub(crate) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub qmp: Qmp,
    pub names: Names,
    pub nbd: NbdAccess,
    pub nbd_socket: PathBuf,
    /// Where libvirt runs it.
    under: Option<UnderLibvirt>,
    /// QEMU can be told to break the fixed moment rather than fail the guest's write.
    pub breaks_snapshot: bool,
    /// Held by whatever changes what we have in QEMU, and by a capture until it is taken down.
    changing: Arc<Mutex<()>>,
}

/// A VM that libvirt runs: other programs use it too, through libvirt, and its QEMU may be another user's.
#[derive(Debug)]
struct UnderLibvirt {
    domain: Domain,
    /// The user, and the group where it is known, that QEMU runs as, if not as we do.
    runs_as: Option<(u32, Option<u32>)>,
    confined_by: Option<String>,
}

impl UnderLibvirt {
    async fn of(domain: Domain) -> Result<Self, Error> {
        let told = domain.describe().await?;
        // A daemon that is not root's runs QEMU as itself.
        let daemon = domain.daemon_uid().filter(|&uid| uid != 0).map(|uid| (uid, None));
        let runs_as = told.runs_as.map(|(user, group)| (user, Some(group))).or(daemon);
        Ok(Self { domain, runs_as, confined_by: told.confined_by })
    }
}

impl Vm {
    /// Connects to QEMU and starts its NBD server, if that is ours to do.
    pub async fn connect(address: VmAddress) -> Result<Self, Error> {
        let (qmp, under) = match &address.monitor {
            Monitor::Socket(socket) => (Qmp::connect(socket, CONNECT_TIME).await?, None),
            Monitor::Libvirt(domain) => {
                let domain = Domain::connect(domain).await?;
                (domain.qmp().await?, Some(UnderLibvirt::of(domain).await?))
            }
            Monitor::Replica => return Err(Error::NoQemu),
        };
        if qmp.version() < OLDEST {
            return Err(Error::TooOld { found: qmp.version().to_string() });
        }
        spare_io_threads(&qmp).await?;
        let names = Names::new(address.id);
        let nbd_socket = match &address.nbd {
            NbdAccess::Own(dir) => dir.join(names.socket_file()),
            NbdAccess::Existing(socket) => socket.clone(),
        };
        let breaks_snapshot = takes_on_cbw_error(&qmp).await?;
        let changing = Arc::default();
        let inner = Inner { qmp, names, nbd: address.nbd, nbd_socket, under, breaks_snapshot, changing };
        let vm = Self { inner: Arc::new(inner) };
        match vm.start_nbd_server().await {
            // Whoever is in the way just now says nothing about whether we can be.
            Err(Error::InTheWay { .. }) => {}
            started => started?,
        }
        vm.free_nbd_server().await?;
        Ok(vm)
    }

    /// A VM whose monitor we have already, and whose NBD server is on this socket. Nothing is asked.
    #[must_use]
    pub fn over(qmp: Qmp, id: VmId, nbd_socket: PathBuf) -> Self {
        let nbd = NbdAccess::Existing(nbd_socket.clone());
        let names = Names::new(id);
        let (under, changing) = (None, Arc::default());
        let inner = Inner { qmp, names, nbd, nbd_socket, under, breaks_snapshot: false, changing };
        Self { inner: Arc::new(inner) }
    }

    /// QEMU's version.
    #[must_use]
    pub fn version(&self) -> Version {
        self.inner.qmp.version()
    }

    /// Whether a scratch that fails ends the capture and not the guest's write (QEMU ≥ 10.1).
    #[must_use]
    pub fn spares_guest_writes(&self) -> bool {
        self.inner.breaks_snapshot
    }

    /// Whether the connection still stands, as far as is known.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.inner.qmp.is_alive()
    }

    /// The monitor, for what is not offered here.
    #[must_use]
    pub fn qmp(&self) -> &Qmp {
        &self.inner.qmp
    }

    /// The names of what we make in this QEMU.
    #[must_use]
    pub fn names(&self) -> &Names {
        &self.inner.names
    }

    /// The domain, where libvirt runs it.
    pub(crate) fn domain(&self) -> Option<&Domain> {
        self.inner.under.as_ref().map(|under| &under.domain)
    }

    /// Every writable disk.
    pub async fn disks(&self) -> Result<Vec<Disk>, Error> {
        match self.domain() {
            Some(domain) => self.disks_of(domain, &[]).await,
            None => Ok(disks::find(&self.graph().await?)),
        }
    }

    /// The disks of these nodes or devices, in this order; of a domain of libvirt's those of these targets.
    pub async fn resolve(&self, nodes: &[String]) -> Result<Vec<Disk>, Error> {
        match self.domain() {
            Some(domain) => self.disks_of(domain, nodes).await,
            None => disks::resolve(&self.graph().await?, nodes),
        }
    }

    /// The disks of a domain by their targets, all if none is named. Libvirt is asked each time: what QEMU calls them
    /// changes with each start, and may change with a snapshot.
    async fn disks_of(&self, domain: &Domain, targets: &[String]) -> Result<Vec<Disk>, Error> {
        let told = domain.describe().await?;
        let chosen = told.choose(targets).map_err(|(node, why)| Error::UnusableDisk { node, why })?;
        let graph = self.graph().await?;
        chosen.iter().map(|disk| disks::of_target(&graph, disk)).collect()
    }

    /// Whether bitmap `since`, with every change since the moment of that log, is on all disks and records.
    pub async fn inspect(&self, disks: &[Disk], since: LogNumber) -> Result<Tracking, Error> {
        Ok(bitmaps::inspect(&self.graph().await?, &self.inner.names, disks, since))
    }

    /// Bytes changed since the moment of log `since`, as far as its bitmaps are there.
    pub async fn pending_bytes(&self, disks: &[Disk], since: LogNumber) -> Result<u64, Error> {
        let graph = self.graph().await?;
        let ours = disks.iter().flat_map(|disk| bitmaps::ours(&graph, &self.inner.names, disk));
        Ok(ours.filter(|bitmap| bitmap.k >= since).map(|bitmap| bitmap.count_bytes).sum())
    }

    /// Drops bitmap `base`: the log that holds its changes is durable. What was dropped already is no error.
    pub async fn commit(
        &self,
        disks: &[Disk],
        base: Option<LogNumber>,
        next: LogNumber,
    ) -> Result<(), Error> {
        let _changing = self.changing().await?;
        let graph = self.graph().await?;
        let steps = |found: &[Ours]| after_durable(found, base, next);
        bitmaps::change_all(&self.inner.qmp, &graph, &self.inner.names, disks, false, steps).await
    }

    /// Gives the changes of a cycle that failed back: bitmap `base` is again what changed since its moment. Without
    /// one everything stays as it is: the log may have arrived after all.
    pub async fn give_back(&self, disks: &[Disk], base: Option<LogNumber>) -> Result<(), Error> {
        let _changing = self.changing().await?;
        let graph = self.graph().await?;
        let steps = |found: &[Ours]| after_failure(found, base);
        bitmaps::change_all(&self.inner.qmp, &graph, &self.inner.names, disks, false, steps).await
    }

    /// Removes every leftover of an earlier run, wherever it was cut off, and, if `since` is given, makes
    /// bitmap `since` the only one, with every change since the moment of that log. Where that cannot be
    /// had, none of ours stays and [`Vm::inspect`] says so. `None` leaves the bitmaps as they are.
    pub async fn cleanup(&self, disks: &[Disk], since: Option<LogNumber>) -> Result<(), Error> {
        let _changing = self.changing().await?;
        sweep(&self.inner.qmp, &self.inner.names).await?;
        if since.is_some() {
            let graph = self.graph().await?;
            bitmaps::repair_all(&self.inner.qmp, &graph, &self.inner.names, disks, since, false).await?;
        }
        self.free_nbd_server().await
    }

    /// Removes all bitmaps of ours, and the NBD server that we started if nothing uses it.
    pub async fn stop_tracking(&self, disks: &[Disk]) -> Result<(), Error> {
        let _changing = self.changing().await?;
        let graph = self.graph().await?;
        bitmaps::repair_all(&self.inner.qmp, &graph, &self.inner.names, disks, None, false).await?;
        let NbdAccess::Own(dir) = &self.inner.nbd else { return Ok(()) };
        nbd_server::stop_if_idle(&self.inner.qmp, &self.inner.nbd_socket).await?;
        if self.inner.under.is_some() {
            let _ = std::fs::remove_dir(dir); // it is made again when it is needed
        }
        Ok(())
    }

    pub(crate) async fn start_nbd_server(&self) -> Result<(), Error> {
        let NbdAccess::Own(dir) = &self.inner.nbd else { return Ok(()) };
        let start = nbd_server::start(&self.inner.qmp, &self.inner.nbd_socket);
        let Some(under) = &self.inner.under else { return start.await };
        libvirt::make_folder(dir, under.runs_as)?;
        start.await.map_err(|error| match error {
            Error::NbdServerRunning => {
                Error::InTheWay { what: "an NBD server (for a backup or a migration)".into() }
            }
            Error::Refused { desc, .. } if desc.contains("Permission denied") => {
                let why = libvirt::explain(dir, under.runs_as, under.confined_by.as_deref());
                let _ = std::fs::remove_dir(dir); // made for nothing
                Error::OutOfReach { folder: dir.clone(), why }
            }
            error => error,
        })
    }

    /// Stops the NBD server that we started where others may want to start theirs: a QEMU has only one, and libvirt
    /// starts it for backups and migrations.
    pub(crate) async fn free_nbd_server(&self) -> Result<(), Error> {
        match (&self.inner.under, &self.inner.nbd) {
            (Some(_), NbdAccess::Own(_)) => {
                nbd_server::stop_if_idle(&self.inner.qmp, &self.inner.nbd_socket).await
            }
            _ => Ok(()),
        }
    }

    /// An error while another program does something to a VM of libvirt's that we might disturb.
    pub(crate) async fn check_others(&self) -> Result<(), Error> {
        if self.inner.under.is_some() { others::check(&self.inner.qmp).await } else { Ok(()) }
    }

    /// Keeps others from changing what we have in QEMU; waits for a capture that is being taken down.
    pub(crate) async fn changing(&self) -> Result<OwnedMutexGuard<()>, Error> {
        let waited = CAPTURE_END_TIME;
        let turn = timeout(waited, self.inner.changing.clone().lock_owned()).await;
        turn.map_err(|_| Error::CaptureOpen { waited })
    }

    /// All block nodes, as they are now.
    pub(crate) async fn graph(&self) -> Result<Graph, Error> {
        let commands = ["query-block", "query-block-exports", "x-debug-query-block-graph"];
        let mut commands: Vec<_> = commands.into_iter().map(Command::bare).collect();
        commands.push(named_block_nodes());
        let mut answers = self.inner.qmp.run_each(commands).await.into_iter();
        let mut next = || answers.next().expect("an answer for each command");
        let devices = read("query-block", optional(next())?.unwrap_or(Value::Array(Vec::new())))?;
        let exports = read("query-block-exports", next()?)?;
        // A debugging aid that may go away: without it, filters are not seen through.
        let edges = next().ok().and_then(|answer| serde_json::from_value::<Edges>(answer).ok());
        let nodes = read("query-named-block-nodes", next()?)?;
        Ok(Graph::new(nodes, devices, exports, edges))
    }
}

/// Refuses a QEMU that reading a fixed moment would kill, and the guest with it: with a disk in an I/O thread,
/// its NBD server asserts that a client is let go in the main thread, and lets it go in the I/O thread
/// (`nbd_blockdev_client_closed`, seen with Debian's 7.2.22).
async fn spare_io_threads(qmp: &Qmp) -> Result<(), Error> {
    if qmp.version() >= SAFE_WITH_IO_THREADS {
        return Ok(());
    }
    // A storage daemon has no `query-iothreads`; its objects tell all the same. Without any there is no list.
    let objects = match qmp.run(Command::new("qom-list", json!({"path": "/objects"}))).await {
        Err(Error::Refused { .. }) => return Ok(()),
        answer => answer?,
    };
    let objects = objects.as_array().map_or(&[][..], Vec::as_slice);
    let threads = objects.iter().filter(|object| object["type"] == "child<iothread>");
    let mut names: Vec<&str> = threads.filter_map(|thread| thread["name"].as_str()).collect();
    if names.is_empty() {
        return Ok(());
    }
    names.sort_unstable();
    Err(Error::IoThreads { found: qmp.version().to_string(), threads: names.join(", ") })
}

/// An answer, or nothing where this QEMU has no such command.
pub(crate) fn optional(answer: Result<Value, Error>) -> Result<Option<Value>, Error> {
    match answer {
        Err(error) if error.is_unknown_command() => Ok(None),
        answer => answer.map(Some),
    }
}

fn read<T: serde::de::DeserializeOwned>(command: &str, answer: Value) -> Result<T, Error> {
    serde_json::from_value(answer)
        .map_err(|error| Error::Answer { command: command.to_owned(), why: error.to_string() })
}

/// Whether `blockdev-backup` takes `on-cbw-error`, by QEMU's own description of itself.
async fn takes_on_cbw_error(qmp: &Qmp) -> Result<bool, Error> {
    let schema = qmp.run(Command::bare("query-qmp-schema")).await?;
    let entries = schema.as_array().map_or(&[][..], Vec::as_slice);
    let named = |name: &Value| entries.iter().find(|entry| entry["name"] == *name);
    let members = named(&Value::from("blockdev-backup"))
        .and_then(|command| named(&command["arg-type"]))
        .and_then(|arguments| arguments["members"].as_array());
    Ok(members.is_some_and(|members| members.iter().any(|member| member["name"] == "on-cbw-error")))
}
