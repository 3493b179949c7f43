//! What each command does in a running site.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use model::gate::Access;
use model::{LogNumber, PointName, PointRef, ResyncReason, VmId, VmName};
use primary::{Monitor, PeerClients as _, Primary, ProtectRequest, Settings};
use replica::Store;
use serde_json::{Value, json};

use crate::backup::Backups;
use crate::checks::Checks;
use crate::clock::{now, rfc3339};
use crate::config::Config;
use crate::control::{Commands, Reporter};
use crate::events::{Event, Events};
use crate::exports::Exports;
use crate::extend::Extensions;
use crate::failure::{Code, Failure};
use crate::identity::CertificateWarning;
use crate::jobs::Jobs;
use crate::measurements;
use crate::peers::{Peers, no_such_peer};
use crate::points;
use crate::policies::Known;
use crate::repositories::OpenRepositories;
use crate::request::{BackupRequest, By, Protect, Request};
use crate::status::VmView;
use crate::trials::Trials;
use crate::turn::Turns;

/// The parts of a running site.
pub(crate) struct Site {
    pub dir: PathBuf,
    pub config: Arc<Config>,
    pub peers: Arc<Peers>,
    pub events: Events,
    pub primary: Primary,
    pub extensions: Extensions,
    pub store: Store,
    pub jobs: Arc<Jobs<Backups>>,
    pub policies: Arc<Known>,
    pub repositories: Arc<OpenRepositories>,
    pub exports: Arc<Exports>,
    pub checks: Checks,
    pub turns: Turns,
    pub trials: Trials,
    /// Recovered VMs are moved one at a time.
    pub moves: tokio::sync::Mutex<()>,
}

impl Commands for Site {
    async fn run(self: Arc<Self>, request: Request, reporter: Reporter) -> Result<Value, Failure> {
        match request {
            Request::PeerInvite { name, change, replace } => self.invite(&name, change, replace).await,
            Request::PeerAccept { invite, change, replace } => self.accept(&invite, change, replace).await,
            Request::PeerList => self.list_peers().await,
            Request::PeerShow { name } => self.show_peer(&name).await,
            Request::PeerAllow { name, change } => self.allow(&name, change).await,
            Request::PeerRevoke { name } => self.revoke_peer(&name).await,
            Request::Identity => Ok(self.identity_shown()),
            Request::IdentityRenew { new_key: false, .. } => self.renew().await,
            Request::IdentityRenew { new_key: true, force } => self.new_key(force).await,
            Request::IdentityUse { pair, ca, force } => self.use_certificate(pair, ca, force).await,
            Request::PeerRemove { name } => self.remove_peer(&name).await,
            Request::Protect(protect) => self.protect(*protect).await,
            Request::Status { vm } => self.status(vm.as_ref()).await,
            Request::Points { vm, plan: false } => points::shown(&self.store, self.replica(&vm)?),
            Request::Points { vm, plan: true } => points::plan(&self.store, self.replica(&vm)?),
            Request::Pin { vm, point, name } => self.pin(&vm, point, name).await,
            Request::Unpin { vm, point } => self.unpin(&vm, point).await,
            Request::Pause { vm } if self.is_extended(&vm) => {
                self.of_primary(self.extensions.pause(&vm).await)
            }
            Request::Pause { vm } => self.of_primary(self.primary.pause(&vm).await),
            Request::Resume { vm } => self.resume(&vm).await,
            Request::Resync { vm, cancel: false } if self.is_extended(&vm) => {
                self.of_primary(self.extensions.resync(&vm).await)
            }
            Request::Resync { vm, cancel: true } if self.is_extended(&vm) => {
                self.of_primary(self.extensions.cancel_resync(&vm).await)
            }
            Request::Sync { vm } if self.is_extended(&vm) => self.of_primary(self.extensions.sync(&vm).await),
            Request::Resync { vm, cancel: false } => self.of_primary(self.primary.resync(&vm).await),
            Request::Resync { vm, cancel: true } => self.of_primary(self.primary.cancel_resync(&vm).await),
            Request::Configure { vm, changes } => self.configure(&vm, *changes).await,
            Request::Seed(request) => self.seed_replica(request).await,
            Request::Import { dir } => self.import_media(dir, &reporter).await,
            Request::Sync { vm } => self.of_primary(self.primary.sync(&vm).await),
            Request::Extend(extend) => self.extend(extend).await,
            Request::Unextend { vm } => self.unextend(&vm).await,
            Request::AddDisks { vm, nodes } => self.of_primary(self.primary.add_disks(&vm, nodes).await),
            Request::RemoveDisks { vm, disks } => {
                self.of_primary(self.primary.remove_disks(&vm, disks).await)
            }
            Request::Unprotect { vm } => self.unprotect(&vm).await,
            Request::Backup(request) => self.jobs.run(self.with_point_id(request), reporter.clone()).await,
            Request::Jobs => {
                let jobs = self.jobs.list()?;
                Ok(json!({ "jobs": jobs.iter().map(crate::jobs::Job::shown).collect::<Vec<_>>() }))
            }
            Request::Hold { vm, for_s } => self.hold(&vm, Duration::from_secs(for_s)).await,
            Request::Release { hold } => self.release(hold).await,
            Request::Failover(request) => self.failover(request, &reporter).await,
            Request::Recover(request) => self.recover(request, &reporter).await,
            Request::Group(request) => self.group(request, &reporter).await,
            Request::Policy(request) => self.policy(request).await,
            Request::BackupReport { days } => self.backup_report(days),
            Request::Migrate { vm, storage } => self.migrate(&vm, storage).await,
            Request::Relocate { vm, to } => self.relocate(&vm, to).await,
            Request::Export(export) => Ok(self.exports.add(export).await?.shown()),
            Request::Unexport { export } => self.exports.remove(&export).await,
            Request::Overwriting { places } => self.overwriting(&places).await,
            Request::Check(check) => self.checks.run(check).await,
            Request::Checks { vm } => Ok(json!({ "checks": self.checks.list(vm.as_ref())? })),
            Request::Measurements { vm, reset } => self.measurements(vm.as_ref(), reset).await,
            Request::Events { count } => Ok(json!({ "events": self.events_shown(count)? })),
        }
    }
}

impl Site {
    async fn protect(&self, protect: Protect) -> Result<Value, Failure> {
        let name = protect.vm;
        if let Some(vm) = self.store.find(&name) {
            let message = format!("this site has a replica of a VM named {name} ({vm}); choose another name");
            return Err(Failure::new(Code::Exists, message));
        }
        let monitor = match protect.by {
            By::Qmp(socket) => Monitor::Socket(socket),
            By::Libvirt { uri, domain } => {
                let needs_agent = protect.app_every_s.is_some() && protect.guest_agent.is_none();
                Monitor::Libvirt(primary::find_domain(&uri, &domain, needs_agent).await?)
            }
        };
        let settings = Settings {
            monitor,
            nbd: protect.nbd,
            nodes: protect.disks,
            peer: protect.to,
            interval: Duration::from_secs(protect.every_s),
            points: protect.points,
            app_every: protect.app_every_s.map(Duration::from_secs),
            guest_agent: protect.guest_agent,
            bandwidth_bytes_per_s: protect.bandwidth_bytes_per_s,
            sign_of_life: protect.sign_of_life.as_ref().map(ToString::to_string),
            excluded: protect.excluded,
            relocating: None,
            resync: protect.resync,
        };
        let request = ProtectRequest { name, settings, initial: protect.initial };
        if protect.take_over {
            return self.take_over(request).await;
        }
        self.of_primary(self.primary.protect(request).await)
    }

    /// Becomes the primary of a VM that another site of the trust group has protected until now.
    async fn take_over(&self, request: ProtectRequest) -> Result<Value, Failure> {
        let (name, peer) = (request.name.clone(), request.settings.peer.clone());
        if self.primary.get(&name).is_some() {
            return Err(primary::Error::Exists(name).into());
        }
        let client = self.peers.client(&peer).ok_or_else(|| no_such_peer(&peer))?;
        let taken = client.take_over(&name, None).await.map_err(|error| Failure {
            transient: error.transient(),
            ..Failure::new(Code::Peer, error.to_string())
        })?;
        let begun =
            self.primary.take_over(request, taken.vm, taken.generation, ResyncReason::Requested).await;
        self.of_primary(begun).map_err(|failure| Failure {
            message: format!(
                "{name} is this site's at {peer} now, but it could not be begun to replicate it; run the same command again: {}",
                failure.message
            ),
            ..failure
        })
    }

    /// Whether a VM is one whose replica is passed on from here.
    pub(crate) fn is_extended(&self, vm: &VmName) -> bool {
        self.primary.get(vm).is_none() && self.extensions.get(vm).is_some()
    }

    /// The relationship after a command of the primary's side.
    pub(crate) fn of_primary(
        &self,
        outcome: Result<primary::VmStatus, primary::Error>,
    ) -> Result<Value, Failure> {
        match outcome {
            Ok(status) => Ok(json!(VmView::of_primary(&status, now()))),
            Err(primary::Error::NoSuchVm(name)) if self.store.find(&name).is_some() => Err(Failure::new(
                Code::NoSuchVm,
                format!("{name} is a replica here; run this at the site where the VM runs"),
            )),
            Err(error) => Err(error.into()),
        }
    }

    async fn status(&self, only: Option<&VmName>) -> Result<Value, Failure> {
        self.take_up_news().await;
        let now = now();
        let warnings = self.certificate_warnings();
        let mut vms: Vec<VmView> =
            self.primary.status().iter().map(|status| VmView::of_primary(status, now)).collect();
        let extensions = self.extensions.status();
        for vm in self.store.list() {
            // One that is being removed just now is no longer shown.
            if let Ok(status) = self.store.status(vm) {
                vms.push(VmView::of_replica(vm, &status, now));
            }
        }
        // After the replicas that they pass on: the order of equal names stays.
        vms.extend(extensions.iter().map(|status| VmView::of_primary(status, now)));
        if let Some(name) = only {
            vms.retain(|vm| vm.name == name.as_str());
            if vms.is_empty() {
                return Err(no_such_vm(name));
            }
        }
        for vm in &mut vms {
            let concerns =
                |warning: &&CertificateWarning| warning.peer.as_ref().is_none_or(|peer| *peer == vm.peer);
            if let Some(warning) = warnings.iter().find(concerns) {
                vm.warn(&warning.message);
            }
        }
        vms.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(json!({ "vms": vms, "warnings": warnings }))
    }

    async fn pin(&self, vm: &VmName, point: PointRef, name: Option<PointName>) -> Result<Value, Failure> {
        let id = self.replica(vm)?;
        let pin = self.store.run(move |store| store.pin_point(id, &point, name)).await?;
        Ok(json!({ "vm": vm, "point": pin.id, "number": pin.number, "pinned": true, "name": pin.name }))
    }

    async fn unpin(&self, vm: &VmName, point: PointRef) -> Result<Value, Failure> {
        let id = self.replica(vm)?;
        let point = self.store.run(move |store| store.unpin_point(id, &point)).await?;
        Ok(json!({ "vm": vm, "point": point.id, "number": point.number, "pinned": false }))
    }

    /// A backup that waits for days is still of the point that was meant when it was asked for. What means no point
    /// is left as it is: the attempt refuses it, and knows more of why.
    fn with_point_id(&self, mut request: BackupRequest) -> BackupRequest {
        if let (Some(wanted), Some(vm)) = (&request.point, self.store.find(&request.vm))
            && !wanted.is_latest()
            && let Ok(point) = self.store.find_point(vm, wanted)
        {
            request.point = Some(point.id.into());
        }
        request
    }

    /// The monitoring windows, as they were before they were begun anew if that is asked for.
    async fn measurements(&self, only: Option<&VmName>, reset: bool) -> Result<Value, Failure> {
        let (window, now) = (self.config.thresholds().window, now());
        let mut shown = Vec::new();
        for status in self.primary.status().into_iter().filter(|vm| only.is_none_or(|only| vm.name == *only))
        {
            let status = if reset { self.primary.reset_measurements(&status.name).await? } else { status };
            shown.push(measurements::of_primary(&status, window));
        }
        for status in
            self.extensions.status().into_iter().filter(|vm| only.is_none_or(|only| vm.name == *only))
        {
            let status = if reset { self.extensions.reset_measurements(&status.name).await? } else { status };
            shown.push(measurements::of_primary(&status, window));
        }
        for vm in self.store.list() {
            // One that is being removed just now is no longer shown.
            let Ok(status) = self.store.status(vm) else { continue };
            if only.is_none_or(|only| status.name == *only) {
                shown.push(measurements::of_replica(vm, &status, window, now));
                if reset {
                    self.store.run(move |store| store.reset_measurements(vm)).await?;
                }
            }
        }
        match only {
            Some(name) if shown.is_empty() => Err(no_such_vm(name)),
            _ => Ok(json!({ "measurements": shown })),
        }
    }

    async fn resume(&self, vm: &VmName) -> Result<Value, Failure> {
        if let Some(id) = self.store.find(vm) {
            self.store.run(move |store| store.resume(id)).await?;
            if self.is_extended(vm) {
                return self.of_primary(self.extensions.resume(vm).await);
            }
            return self.of_replica(id);
        }
        self.of_primary(self.primary.resume(vm).await)
    }

    async fn unprotect(&self, vm: &VmName) -> Result<Value, Failure> {
        let Some(id) = self.store.find(vm) else {
            return self.unprotect_here(vm).await;
        };
        if let Some(extension) = self.extensions.get(vm) {
            let message = format!(
                "the replica of {vm} is passed on to {}; run 'afterimage unextend {vm}' first",
                extension.settings.peer
            );
            return Err(Failure::new(Code::Exists, message));
        }
        let status = self.store.status(id)?;
        if !status.withdrawn && self.peers.get(&status.peer).is_some() {
            let message = format!(
                "{vm} is still protected by {}; run 'afterimage unprotect {vm}' there first, or remove that peer",
                status.peer
            );
            return Err(Failure::new(Code::Exists, message));
        }
        self.store.run(move |store| store.remove(id)).await?;
        Ok(json!({ "removed": vm, "id": id }))
    }

    /// A replica after a command.
    pub(crate) fn of_replica(&self, vm: VmId) -> Result<Value, Failure> {
        Ok(json!(VmView::of_replica(vm, &self.store.status(vm)?, now())))
    }

    async fn hold(&self, vm: &VmName, lease: Duration) -> Result<Value, Failure> {
        let vm = self.replica(vm)?;
        let hold = self
            .store
            .run(move |store| {
                let base = store.hold_point(vm)?.map_or(LogNumber::ZERO, |point| point.number);
                store.open_hold(store.admit(vm, Access::Hold, base)?, lease).map(|(hold, _)| hold)
            })
            .await?;
        let disks: Vec<Value> = hold
            .disks
            .iter()
            .map(|disk| json!({ "name": disk.name, "path": disk.path, "format": "raw", "bytes": disk.size_bytes }))
            .collect();
        Ok(json!({
            "hold": hold.id, "point": hold.point.id, "number": hold.point.number,
            "taken_at": rfc3339(hold.point.taken_at), "consistency": hold.point.consistency,
            "disks": disks, "expires_at": rfc3339(hold.expires_at),
        }))
    }

    async fn release(&self, hold: String) -> Result<Value, Failure> {
        let id = hold.clone();
        if self.store.run(move |store| store.release(&id)).await? {
            return Ok(json!({ "hold": hold, "valid": true }));
        }
        let message = format!(
            "hold {hold} had run out, or is not known: its files may have changed while they were read; throw away what was read"
        );
        Err(Failure::new(Code::Hold, message))
    }

    async fn migrate(&self, vm: &VmName, storage: PathBuf) -> Result<Value, Failure> {
        let id = self.replica(vm)?;
        crate::init::make_folder(&storage, 0o777)?;
        self.store.run(move |store| store.migrate(id, &storage)).await?;
        self.of_replica(id)
    }

    fn events_shown(&self, count: u32) -> Result<Vec<Value>, Failure> {
        let events = self.events.newest(count)?;
        let shown = |event: &Event| {
            json!({
                "at": rfc3339(event.at), "kind": event.kind, "vm": event.vm, "peer": event.peer,
                "message": event.message,
            })
        };
        Ok(events.iter().map(shown).collect())
    }

    /// The replica of this name.
    pub(crate) fn replica(&self, name: &VmName) -> Result<VmId, Failure> {
        match self.store.find(name) {
            Some(vm) => Ok(vm),
            None if self.primary.get(name).is_some() => Err(Failure::new(
                Code::NoSuchVm,
                format!("{name} runs here and its replica is elsewhere; run this at the replica's site"),
            )),
            None => Err(no_such_vm(name)),
        }
    }
}

pub(crate) fn no_such_vm(name: &VmName) -> Failure {
    Failure::new(Code::NoSuchVm, format!("no VM named {name} is known here; 'afterimage status' lists them"))
}
