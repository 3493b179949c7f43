//! Failover, as people ask for it: unplanned at the replica's site, planned at the primary's, completed, and the
//! direction turned round.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use model::{INTERVAL_DEFAULT_SECONDS, InitialStart, PointRef, ResyncPolicy, ResyncReason, VmId, VmName};
use primary::{Monitor, ProtectRequest, Settings};
use qemu::{Layer, Qmp, rest_layers};
use serde_json::{Value, json};

use crate::clock::rfc3339;
use crate::commands::Site;
use crate::control::Reporter;
use crate::events::Event;
use crate::failure::{Code, Failure};
use crate::points;
use crate::request::{FailoverRequest, Reverse};
use crate::running::Stop;
use crate::status::VmView;

/// How often a completed failover is looked at.
const LOOK: Duration = Duration::from_millis(200);
/// How long QEMU's monitor may take to answer.
const MONITOR: Duration = Duration::from_secs(10);

impl Site {
    pub(crate) async fn failover(
        self: &Arc<Self>,
        request: FailoverRequest,
        reporter: &Reporter,
    ) -> Result<Value, Failure> {
        match request {
            FailoverRequest::Test { vm, point, start } => {
                self.replica(&vm)?;
                self.trials.begin(&self.checks, vm, point, start).await
            }
            FailoverRequest::EndTest { test } => self.trials.end(&test).await,
            FailoverRequest::Tests { vm } => Ok(self.trials.list(vm.as_ref()).await),
            FailoverRequest::Planned { vm, shut_down_s } => {
                self.planned(&vm, shut_down_s.map(Duration::from_secs)).await
            }
            FailoverRequest::Unplanned { vm, point, start } => {
                let mut answer = self.unplanned(&vm, point).await?;
                if start {
                    answer["machine"] = self.start_vm(&vm, false).await?;
                }
                Ok(answer)
            }
            FailoverRequest::Start { vm, only_show } => self.start_vm(&vm, only_show).await,
            FailoverRequest::Stop { vm, within_s } => {
                let how = within_s.map_or(Stop::PullThePlug, |s| Stop::ShutDown(Duration::from_secs(s)));
                self.stop_vm(&vm, how).await
            }
            FailoverRequest::Cancel { vm } => self.cancel(&vm).await,
            FailoverRequest::Complete { vm, qmp } => self.complete(&vm, qmp, reporter).await,
            FailoverRequest::Reverse(reverse) => self.reverse(*reverse, reporter).await,
            FailoverRequest::Group { group, what } => self.group_failover(&group, what, reporter).await,
        }
    }

    /// What is needed of failovers of before this start: what lies below their layers is shown again, and those that
    /// were completed are brought to their end.
    pub(crate) async fn take_up_failovers(self: &Arc<Self>) {
        for vm in self.store.failed_over() {
            if let Err(failure) = self.exports.show_failover(vm).await {
                let name = self.store.name(vm).map(String::from).unwrap_or_default();
                let what = format!("what {name} runs from cannot be shown to its QEMU: {}", failure.message);
                self.events.note(Event::new("failover-not-shown", what).vm(name)).await;
            }
            self.watch_completion(vm);
        }
        self.take_up_addresses();
    }

    pub(crate) async fn unplanned(&self, vm: &VmName, point: Option<PointRef>) -> Result<Value, Failure> {
        let id = self.replica(vm)?;
        let point = points::point_or_newest(&self.store, id, point.as_ref())?;
        let disks = self.store.run(move |store| store.failover_begin(id, point.number)).await?;
        self.exports.show_failover(id).await?;
        let shown: Vec<Value> = disks
            .iter()
            .map(|disk| json!({ "name": disk.name, "path": disk.overlay, "format": "qcow2" }))
            .collect();
        let what = format!("failed over to the point of {}", rfc3339(point.taken_at));
        self.events.note(Event::new("failover", what).vm(vm)).await;
        Ok(json!({ "vm": vm, "point": point.id, "taken_at": rfc3339(point.taken_at), "disks": shown }))
    }

    pub(crate) async fn cancel(&self, vm: &VmName) -> Result<Value, Failure> {
        let id = self.replica(vm)?;
        // What it has written is dropped in any case. One that is final is not cancelled, and runs on.
        if self.store.status(id)?.failover.is_some_and(|failover| !failover.completing) {
            self.end_vm(vm).await?;
        }
        self.store.run(move |store| store.failover_cancel(id)).await?;
        self.exports.hide_failover(id).await;
        self.events.note(Event::new("failover-cancelled", "the failover was cancelled").vm(vm)).await;
        self.of_replica(id)
    }

    pub(crate) async fn planned(&self, vm: &VmName, shut_down: Option<Duration>) -> Result<Value, Failure> {
        if self.store.find(vm).is_some() {
            let message = format!(
                "{vm} is a replica here; a planned failover begins at the site where the VM runs, for nothing to be lost"
            );
            return Err(Failure::new(Code::NoSuchVm, message));
        }
        let handed = self.primary.hand_over(vm, shut_down).await?;
        let status = self.primary.get(vm).ok_or_else(|| crate::commands::no_such_vm(vm))?;
        self.note_moved(vm, &status.settings.peer, status.generation).await?;
        let what = format!("handed over to {} with everything, and switched off here", status.settings.peer);
        self.events.note(Event::new("failover", what).vm(vm)).await;
        let disk =
            |disk: &wire::HandedOverDisk| json!({ "name": disk.name, "path": disk.path, "format": "qcow2" });
        let disks: Vec<Value> = handed.disks.iter().map(disk).collect();
        Ok(
            json!({ "vm": vm, "site": status.settings.peer, "taken_at": status.last_point_at.map(rfc3339), "disks": disks }),
        )
    }

    pub(crate) async fn complete(
        self: &Arc<Self>,
        vm: &VmName,
        qmp: Option<PathBuf>,
        reporter: &Reporter,
    ) -> Result<Value, Failure> {
        let id = self.replica(vm)?;
        if self.store.status(id)?.failover.is_none() {
            let message = format!("{vm} is not failed over; there is nothing to complete");
            return Err(Failure::new(Code::Failover, message));
        }
        self.store.run(move |store| store.failover_complete(id)).await?;
        self.events.note(Event::new("failover-completed", "the failover was completed").vm(vm)).await;
        self.watch_completion(id);
        if let Some(qmp) = qmp.or_else(|| self.live_monitor(vm)) {
            self.bring_to_its_end(id, vm, &qmp, reporter).await?;
        }
        Ok(json!({ "vm": vm, "id": id, "released": self.store.name(id).is_none() }))
    }

    /// The monitor of a VM that this site has started and that runs.
    fn live_monitor(&self, vm: &VmName) -> Option<PathBuf> {
        let live = self.live(vm);
        live.process().map(|_| live.replication())
    }

    /// Ends the NBD exports of a failover once nothing reads them any more.
    pub(crate) fn watch_completion(self: &Arc<Self>, vm: VmId) {
        let site = Arc::downgrade(self);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(LOOK).await;
                let Some(site) = site.upgrade() else { return };
                match site.store.status(vm).map(|status| status.failover) {
                    Ok(Some(failover)) if failover.completing => {}
                    // Cancelled, or not completed yet: whoever completes it watches.
                    Ok(_) => return,
                    Err(_) => return site.exports.hide_failover(vm).await,
                }
            }
        });
    }

    /// Waits until the logs of a completed failover are folded in, and has the VM's QEMU read from the flat files.
    async fn bring_to_its_end(
        &self,
        id: VmId,
        vm: &VmName,
        socket: &Path,
        reporter: &Reporter,
    ) -> Result<(), Failure> {
        let mut moved = false;
        loop {
            let Ok(status) = self.store.status(id) else { return Ok(()) };
            let Some(failover) = status.failover else { return Ok(()) };
            if failover.folded && !moved {
                let layers: Vec<Layer> = self.store.failover_disks(id)?.into_iter().map(layer).collect();
                let at_monitor = |error: qemu::Error| {
                    Failure::new(Code::Failover, format!("the QEMU of {vm} cannot be told: {error}"))
                };
                let monitor = Qmp::connect(socket, MONITOR).await.map_err(at_monitor)?;
                if !rest_layers(&monitor, &layers).await.map_err(at_monitor)? {
                    let message = format!(
                        "the QEMU at {} does not run {vm} from its failover disks; 'afterimage status {vm}' names them",
                        socket.display()
                    );
                    return Err(Failure::new(Code::Failover, message));
                }
                moved = true;
            }
            // QEMU has let go of what lay below, or does so in a moment; then the VM is no replica any more.
            if moved && self.store.resume(id).is_err() {
                return Ok(());
            }
            if let model::ApplyState::Failed { error, .. } = &status.facts.apply {
                return Err(Failure::new(
                    Code::Replica,
                    format!("the logs of {vm} cannot be folded in: {error}"),
                ));
            }
            reporter.progress(format!("{vm}: {} logs to fold in", status.logs), 0, 0);
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn reverse(self: &Arc<Self>, reverse: Reverse, reporter: &Reporter) -> Result<Value, Failure> {
        let Reverse { vm, qmp, nbd, to, every_s, guest_agent } = reverse;
        let completing = self.store.find(&vm);
        if let Some(id) = completing {
            let completing = self.store.status(id)?.failover.is_some_and(|failover| failover.completing);
            if !completing {
                let message = format!(
                    "{vm} is not failed over for good; run 'afterimage failover complete {vm}' first: until then it can be cancelled"
                );
                return Err(Failure::new(Code::Failover, message));
            }
        } else if self.store.fence_of_name(&vm)?.is_none() {
            let message = format!(
                "{vm} was never failed over to this site; 'afterimage protect' begins to protect a VM"
            );
            return Err(Failure::new(Code::NoSuchVm, message));
        }
        let agent = self.live(&vm).agent();
        let guest_agent = guest_agent.or_else(|| qmp.is_none().then_some(agent));
        let qmp = qmp.or_else(|| self.live_monitor(&vm)).ok_or_else(|| {
            let message = format!(
                "{vm} does not run by this site: name the monitor of its QEMU with --qmp, or start it with 'afterimage failover start {vm}'"
            );
            Failure::new(Code::Usage, message)
        })?;
        if let Some(id) = completing {
            self.bring_to_its_end(id, &vm, &qmp, reporter).await?;
        }
        // Raised with the end of the failover.
        let fence = self.store.fence_of_name(&vm)?.ok_or_else(|| crate::commands::no_such_vm(&vm))?;
        let (peer, interval_s, points) = fence.replicated;
        let peer = to.unwrap_or(peer);
        self.end_extension(fence.vm, &vm, &peer).await?;
        let interval = every_s.unwrap_or(if interval_s == 0 { INTERVAL_DEFAULT_SECONDS } else { interval_s });
        let settings = Settings {
            monitor: Monitor::Socket(qmp),
            nbd,
            nodes: Vec::new(),
            peer,
            interval: Duration::from_secs(interval),
            points,
            app_every: None,
            guest_agent,
            bandwidth_bytes_per_s: None,
            sign_of_life: None,
            excluded: Vec::new(),
            relocating: None,
            resync: ResyncPolicy::Automatic,
        };
        let request = ProtectRequest { name: vm.clone(), settings, initial: InitialStart::Now };
        let status =
            self.primary.take_over(request, fence.vm, fence.generation, ResyncReason::Reversed).await?;
        let what = format!("replicated the other way now, to {}", status.settings.peer);
        self.events.note(Event::new("failover-reversed", what).vm(&vm)).await;
        Ok(json!(VmView::of_primary(&status, crate::clock::now())))
    }
}

fn layer(disk: replica::FailoverDisk) -> Layer {
    let named = format!("../disks/{}.raw", disk.name);
    Layer { layer: disk.overlay, base: disk.base, named }
}
