//! One VM, by its QEMU.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use model::bitmaps::{Ours, after_durable, after_failure};
use model::{LogNumber, Tracking, VmId};
use serde_json::{Value, json};
use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio::time::timeout;

use crate::bitmaps;
use crate::disks::{self, Disk};
use crate::error::Error;
use crate::graph::{Edges, Graph};
use crate::names::Names;
use crate::nbd_server;
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
    /// The QMP socket. It serves one client at a time, so it must be for us alone.
    pub qmp: PathBuf,
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
    /// QEMU can be told to break the fixed moment rather than fail the guest's write.
    pub breaks_snapshot: bool,
    /// Held by whatever changes what we have in QEMU, and by a capture until it is taken down.
    changing: Arc<Mutex<()>>,
}

impl Vm {
    /// Connects to QEMU and starts its NBD server, if that is ours to do.
    pub async fn connect(address: VmAddress) -> Result<Self, Error> {
        let qmp = Qmp::connect(&address.qmp, CONNECT_TIME).await?;
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
        let inner = Inner { qmp, names, nbd: address.nbd, nbd_socket, breaks_snapshot, changing };
        let vm = Self { inner: Arc::new(inner) };
        vm.start_nbd_server().await?;
        Ok(vm)
    }

    /// A VM whose monitor we have already, and whose NBD server is on this socket. Nothing is asked.
    #[must_use]
    pub fn over(qmp: Qmp, id: VmId, nbd_socket: PathBuf) -> Self {
        let nbd = NbdAccess::Existing(nbd_socket.clone());
        let names = Names::new(id);
        let inner = Inner { qmp, names, nbd, nbd_socket, breaks_snapshot: false, changing: Arc::default() };
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

    /// Every writable disk.
    pub async fn disks(&self) -> Result<Vec<Disk>, Error> {
        Ok(disks::find(&self.graph().await?))
    }

    /// The disks of these nodes or devices, in this order.
    pub async fn resolve(&self, nodes: &[String]) -> Result<Vec<Disk>, Error> {
        disks::resolve(&self.graph().await?, nodes)
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
        Ok(())
    }

    /// Removes all bitmaps of ours, and the NBD server that we started if nothing uses it.
    pub async fn stop_tracking(&self, disks: &[Disk]) -> Result<(), Error> {
        let _changing = self.changing().await?;
        let graph = self.graph().await?;
        bitmaps::repair_all(&self.inner.qmp, &graph, &self.inner.names, disks, None, false).await?;
        if matches!(self.inner.nbd, NbdAccess::Own(_)) {
            nbd_server::stop_if_idle(&self.inner.qmp, &self.inner.nbd_socket).await?;
        }
        Ok(())
    }

    pub(crate) async fn start_nbd_server(&self) -> Result<(), Error> {
        match self.inner.nbd {
            NbdAccess::Own(_) => nbd_server::start(&self.inner.qmp, &self.inner.nbd_socket).await,
            NbdAccess::Existing(_) => Ok(()),
        }
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
