//! Fixes one moment over all disks of a VM.
//!
//! ```text
//! scratch files, overlays ─▶ [freeze] ─▶ ONE transaction: backup jobs, bitmap `next`, stop `base` ─▶ [thaw]
//!                         ▲           ▲   with a seat: wait for the other VMs of the moment    ▲
//!   ─▶ NBD exports ─▶ (read) ─▶ exports, jobs, overlays, scratch files removed; the bitmaps stay
//! ```
//!
//! A capture that fails anywhere, is dropped, or whose caller was cancelled, is taken out of QEMU by a task
//! of its own: as long as it is there, the guest pays for it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use model::bitmaps::{at_moment, judge_repairable};
use model::group::{Door, GroupMoment};
use model::{DiskName, LogNumber, Timestamp, Tracking};
use serde_json::{Value, json};
use steps::durable_step;
use tokio::sync::OwnedMutexGuard;
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, sleep};

use crate::agent::{AgentAddress, AgentError, GuestAgent};
use crate::bitmaps::{self, action};
use crate::disks::Disk;
use crate::error::Error;
use crate::freeze::{Freeze, FreezeLimits};
use crate::meeting::Seat;
use crate::qmp::Command;
use crate::scratch::{self, Scratch, WATCH_INTERVAL};
use crate::sweep::sweep;
use crate::vm::Vm;

/// A capture costs the guest as long as it is there, so that taking it down is tried again, after these
/// pauses.
const END_PAUSES: [Duration; 3] = [Duration::ZERO, Duration::from_millis(100), Duration::from_secs(1)];

/// What is to be fixed.
#[derive(Debug, Clone)]
pub struct CaptureRequest {
    /// The disks, all at one moment.
    pub disks: Vec<Disk>,
    /// The places of those that no `base` is needed of: nothing of them has been read yet.
    pub fresh: Vec<usize>,
    /// The bitmap that says what changed: it is frozen at the moment and can be read with the data.
    pub base: Option<LogNumber>,
    /// The bitmap that begins at the moment.
    pub next: LogNumber,
    /// Whether changes were read ahead: bitmap `again` ends at the moment too, and can be read with the data.
    pub again: bool,
    /// Where what the guest overwrites goes; QEMU must be able to make files there.
    pub scratch_dir: PathBuf,
    /// The most that it may take there.
    pub scratch_limit_bytes: u64,
    /// Where the moment is to be that of other VMs too.
    pub seat: Option<Seat>,
}

impl CaptureRequest {
    /// The bitmap that ends at the moment, of one of the disks.
    fn base_of(&self, place: usize) -> Option<LogNumber> {
        self.base.filter(|_| !self.fresh.contains(&place))
    }
}

/// A fixed moment. [`Vm::end_reading`] ends it; so does dropping it.
#[derive(Debug)]
pub struct Capture {
    /// The moment: every write that the guest knew to be done before it is in. No later than the real one.
    pub moment: Timestamp,
    /// No earlier than the real one: no write that the guest began after it is in.
    pub moment_end: Timestamp,
    /// What other VMs were fixed together with this one, if any were to be and did not go without it.
    pub shared: Option<GroupMoment>,
    /// The disks as they were, in the order of the request.
    pub disks: Vec<CapturedDisk>,
    /// What it took.
    pub timings: Timings,
    open: Option<Open>,
}

/// A disk as it was at the moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CapturedDisk {
    /// What people call it.
    pub name: DiskName,
    /// How it was named in the request.
    pub node: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// The NBD export that shows it.
    pub export: String,
    /// The NBD server's unix socket.
    pub nbd_socket: PathBuf,
    /// The NBD metadata context with what changed since the moment of `base`.
    pub bitmap_context: Option<String>,
    /// The one with what has changed since reading ahead began.
    pub again_context: Option<String>,
}

/// What the steps of a capture took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Timings {
    /// Looking at QEMU, and making and attaching the scratch.
    pub prepare: Duration,
    /// The transaction: the guest waits.
    pub transaction: Duration,
    /// How long the guest's file systems were at rest, if they were.
    pub frozen: Option<Duration>,
    /// The exports.
    pub export: Duration,
}

/// What must be taken down again.
#[derive(Debug)]
struct Open {
    vm: Vm,
    scratch: Arc<Scratch>,
    _changing: OwnedMutexGuard<()>,
}

impl Vm {
    /// Fixes a moment over all disks.
    pub async fn begin_capture(&self, request: CaptureRequest) -> Result<Capture, Error> {
        let begun = tokio::spawn(begin(self.clone(), request, None));
        joined(begun).await.map(|(capture, _)| capture)
    }

    /// The same with the guest's file systems at rest. If the guest cannot be brought to rest the moment is
    /// fixed all the same; the second value says why it is only crash-consistent.
    pub async fn begin_capture_frozen(
        &self,
        request: CaptureRequest,
        agent: &AgentAddress,
    ) -> Result<(Capture, Result<(), AgentError>), Error> {
        let begun = tokio::spawn(begin(self.clone(), request, Some(agent.clone())));
        let (mut capture, freeze) = joined(begun).await?;
        let frozen = freeze.expect("an agent was given");
        capture.timings.frozen = frozen.as_ref().ok().copied();
        Ok((capture, frozen.map(drop)))
    }

    /// Takes a capture out of QEMU; the bitmaps stay. Goes on to its end even if the caller does not.
    pub async fn end_reading(&self, mut capture: Capture) -> Result<(), Error> {
        match capture.open.take() {
            Some(open) => joined(tokio::spawn(async move { open.end().await })).await,
            None => Ok(()),
        }
    }
}

impl Capture {
    /// What the scratch takes now.
    pub fn scratch_bytes(&self) -> Result<u64, Error> {
        self.open.as_ref().map_or(Ok(0), |open| open.scratch.used_bytes())
    }

    /// Waits until the capture must be given up, and says why: the scratch has come to its bound, QEMU is
    /// gone, or a job of ours ended. Never returns while all is well.
    pub async fn watch(&self) -> Error {
        let Some(open) = &self.open else { return Error::CaptureBroken("it has ended".into()) };
        let mut ticks = interval(WATCH_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut events = open.vm.qmp().events();
        if let Err(error) = open.check_jobs(self.disks.len()).await {
            return error;
        }
        loop {
            tokio::select! {
                _ = ticks.tick() => {
                    let scratch = open.scratch.clone();
                    // A file system that hangs must not hang everything else of this site.
                    match tokio::task::spawn_blocking(move || scratch.check()).await {
                        Ok(Ok(())) => {}
                        Ok(Err(error)) => return error,
                        Err(error) => return Error::CaptureBroken(error.to_string()),
                    }
                }
                error = open.vm.qmp().closed() => return error,
                event = events.recv() => {
                    let concerns_jobs = event.map_or(true, |event| event.name == "JOB_STATUS_CHANGE");
                    if concerns_jobs && let Err(error) = open.check_jobs(self.disks.len()).await {
                        return error;
                    }
                }
            }
        }
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        let Some(open) = self.open.take() else { return };
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return tracing::warn!(
                "a capture was dropped outside the runtime; the next connection removes it"
            );
        };
        runtime.spawn(async move {
            if let Err(error) = open.end().await {
                tracing::warn!(%error, "a dropped capture could not be removed; the next connection does it");
            }
        });
    }
}

impl Open {
    async fn end(&self) -> Result<(), Error> {
        let mut swept = Ok(());
        for pause in END_PAUSES {
            sleep(pause).await;
            swept = sweep(&self.vm.inner.qmp, &self.vm.inner.names).await.map(drop);
            if swept.as_ref().err().is_none_or(Error::is_gone) {
                break;
            }
        }
        // Without QEMU the files are nobody's; with it, and not swept, they are still being written to.
        match &swept {
            Err(error) if !error.is_gone() => {}
            _ => self.scratch.remove()?,
        }
        swept?;
        self.vm.free_nbd_server().await
    }

    /// Our jobs run for ever unless somebody ends them. (QEMU shows them paused for a moment now and then.)
    async fn check_jobs(&self, disks: usize) -> Result<(), Error> {
        let jobs: Vec<Value> = self.vm.qmp().ask(Command::bare("query-jobs")).await?;
        let goes_on = |job: &Value| matches!(job["status"].as_str(), Some("created" | "running" | "paused"));
        for name in (0..disks).map(|disk| self.vm.names().job(disk)) {
            if !jobs.iter().any(|job| job["id"] == name.as_str() && goes_on(job)) {
                return Err(Error::CaptureBroken(format!("its job {name} was ended by somebody else")));
            }
        }
        Ok(())
    }
}

/// The whole way to an open capture. Runs in a task of its own, so that it is never left half-way.
async fn begin(
    vm: Vm,
    request: CaptureRequest,
    agent: Option<AgentAddress>,
) -> Result<(Capture, Option<Freeze>), Error> {
    let changing = vm.changing().await?;
    let started = Instant::now();
    vm.check_others().await?;
    vm.start_nbd_server().await?;
    // The agent is greeted before there is anything that costs the guest.
    let agent = match agent {
        Some(address) => Some(GuestAgent::at(&address).await),
        None => None,
    };
    let scratch = match prepare(&vm, &request).await {
        Ok(scratch) => scratch,
        Err(error) => {
            let _ = vm.free_nbd_server().await; // the next capture frees it
            return Err(error);
        }
    };
    match fix(&vm, &request, &scratch, agent, started).await {
        Ok((mut capture, freeze)) => {
            let scratch = Arc::new(scratch);
            capture.open = Some(Open { vm, scratch, _changing: changing });
            Ok((capture, freeze))
        }
        Err(error) => {
            // The others need not wait until all of it is undone.
            if let Some(seat) = &request.seat {
                seat.leave(&error.to_string());
            }
            undo(Open { vm, scratch: Arc::new(scratch), _changing: changing }, &request).await;
            Err(error)
        }
    }
}

/// Leaves QEMU as it was before: nothing of the capture, and bitmap `base` with all its changes.
async fn undo(open: Open, request: &CaptureRequest) {
    let undone = async {
        open.end().await?;
        repair(&open.vm, request).await
    };
    if let Err(error) = undone.await {
        tracing::warn!(%error, "a capture that failed could not be undone; the next connection does it");
    }
}

/// Makes sure of the bitmaps and the scratch directory: a run before this one may have been killed.
async fn prepare(vm: &Vm, request: &CaptureRequest) -> Result<Scratch, Error> {
    let names = vm.names();
    let scratch = Scratch::plan(
        &request.scratch_dir,
        request.scratch_limit_bytes,
        names,
        request.next,
        request.disks.len(),
    )?;
    if scratch::has_leftovers(&scratch.dir, names)? {
        tracing::info!("what an earlier capture left behind is removed");
        sweep(&vm.inner.qmp, names).await?;
        scratch::remove_leftovers(&scratch.dir, names)?;
    }
    scratch.check()?;
    repair(vm, request).await?;
    Ok(scratch)
}

/// Brings the bitmaps to `base` alone, and to none on a fresh disk; an error if that no longer tells all changes.
async fn repair(vm: &Vm, request: &CaptureRequest) -> Result<(), Error> {
    let graph = vm.graph().await?;
    let (mut tracked, mut fresh) = (Vec::new(), Vec::new());
    for (place, disk) in request.disks.iter().enumerate() {
        let to = if request.base_of(place).is_some() { &mut tracked } else { &mut fresh };
        to.push(disk.clone());
    }
    if let Some(base) = request.base
        && let Tracking::Broken(why) = inspect_repairable(vm, &graph, &tracked, base)
    {
        return Err(Error::Tracking(why));
    }
    let (qmp, names, again) = (&vm.inner.qmp, vm.names(), request.again);
    bitmaps::repair_all(qmp, &graph, names, &fresh, None, again).await?;
    bitmaps::repair_all(qmp, &graph, names, &tracked, request.base, again).await
}

/// Whether `base` will tell all changes once it is repaired.
fn inspect_repairable(vm: &Vm, graph: &crate::graph::Graph, disks: &[Disk], base: LogNumber) -> Tracking {
    for disk in disks {
        let found = bitmaps::ours(graph, vm.names(), disk);
        if let Err(why) = judge_repairable(&disk.name, &found, base) {
            return Tracking::Broken(why);
        }
    }
    Tracking::Intact
}

/// From the scratch to the exports.
async fn fix(
    vm: &Vm,
    request: &CaptureRequest,
    scratch: &Scratch,
    agent: Option<Result<GuestAgent, AgentError>>,
    started: Instant,
) -> Result<(Capture, Option<Freeze>), Error> {
    scratch::attach(vm.qmp(), vm.names(), scratch, &request.disks).await?;
    durable_step("qemu::scratch::attached");
    let prepare = started.elapsed();
    if let Some(seat) = &request.seat {
        seat.pass(Door::Prepare).await;
    }
    let transaction = fix_moment(vm, request);
    let (fixed, freeze) = match agent {
        None => (transaction.await, None),
        Some(Err(error)) => (transaction.await, Some(Err(error))),
        Some(Ok(agent)) => {
            let (fixed, freeze) = agent.freeze_for(FreezeLimits::default(), transaction).await;
            (fixed, Some(freeze))
        }
    };
    let Fixed { moment, took: transaction, shared } = fixed?;
    let exporting = Instant::now();
    let disks = export(vm, request).await?;
    let timings = Timings { prepare, transaction, frozen: None, export: exporting.elapsed() };
    tracing::debug!(?timings, "a moment is fixed");
    let moment_end = moment.plus(transaction);
    Ok((Capture { moment, moment_end, shared, disks, timings, open: None }, freeze))
}

/// What a transaction came to.
struct Fixed {
    moment: Timestamp,
    took: Duration,
    shared: Option<GroupMoment>,
}

/// A guest that is frozen stays so until the other VMs of its moment are fixed, too.
async fn fix_moment(vm: &Vm, request: &CaptureRequest) -> Result<Fixed, Error> {
    let actions = actions(vm, request);
    if let Some(seat) = &request.seat {
        seat.pass(Door::Freeze).await;
    }
    let (before, clock) = (SystemTime::now(), Instant::now());
    bitmaps::transaction(vm.qmp(), actions).await?;
    let took = clock.elapsed();
    let shared = match &request.seat {
        Some(seat) => seat.fixed(clock.into(), (clock + took).into()).await,
        None => None,
    };
    Ok(Fixed { moment: Timestamp::from(before), took, shared })
}

/// The jobs come before the bitmaps. A job's action keeps its disk quiet until the transaction is over, so
/// that the bitmaps change hands exactly at the moment, also for disks that an I/O thread serves.
fn actions(vm: &Vm, request: &CaptureRequest) -> Vec<Value> {
    let names = vm.names();
    let mut actions = Vec::new();
    for (i, disk) in request.disks.iter().enumerate() {
        let mut data = json!({
            "job-id": names.job(i), "device": disk.block_node, "target": names.overlay(i), "sync": "none",
            "filter-node-name": names.filter(i),
        });
        if vm.inner.breaks_snapshot {
            data["on-cbw-error"] = "break-snapshot".into();
        }
        actions.push(json!({"type": "blockdev-backup", "data": data}));
    }
    for (i, disk) in request.disks.iter().enumerate() {
        let steps = at_moment(request.base_of(i), request.next);
        actions.extend(steps.into_iter().map(|step| action(names, disk, step)));
        if request.again {
            let data = json!({"node": disk.block_node, "name": names.again()});
            actions.push(json!({"type": "block-dirty-bitmap-disable", "data": data}));
        }
    }
    actions
}

async fn export(vm: &Vm, request: &CaptureRequest) -> Result<Vec<CapturedDisk>, Error> {
    let names = vm.names();
    let again = request.again.then(|| names.again());
    let mut commands = Vec::new();
    let mut disks = Vec::new();
    for (i, disk) in request.disks.iter().enumerate() {
        let bitmap = request.base_of(i).map(|base| names.bitmap(base));
        let shown: Vec<&String> = bitmap.iter().chain(&again).collect();
        let export = names.export(request.next, i);
        let mut options = json!({"type": "nbd", "id": export, "name": export, "node-name": names.overlay(i), "writable": false});
        if !shown.is_empty() {
            let of_disk = |name: &&String| json!({"node": disk.block_node, "name": name});
            options["bitmaps"] = shown.iter().map(of_disk).collect();
        }
        commands.push(Command::new("block-export-add", options));
        disks.push(CapturedDisk {
            name: disk.name.clone(),
            node: disk.node.clone(),
            size_bytes: disk.size_bytes,
            export,
            nbd_socket: vm.inner.nbd_socket.clone(),
            bitmap_context: bitmap.as_ref().map(context),
            again_context: again.as_ref().map(context),
        });
    }
    vm.qmp().run_all(commands).await?;
    Ok(disks)
}

/// The NBD metadata context of a bitmap.
pub(crate) fn context(bitmap: &String) -> String {
    format!("qemu:dirty-bitmap:{bitmap}")
}

pub(crate) async fn joined<T>(task: JoinHandle<Result<T, Error>>) -> Result<T, Error> {
    match task.await {
        Ok(outcome) => outcome,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(Error::CaptureBroken("this process is ending".into())),
    }
}
