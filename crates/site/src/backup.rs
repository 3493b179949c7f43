//! One attempt at a backup: through the gate, to a view or a hold, into the repository.

use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use catalog::Catalog;
use model::gate::{self, Access};
use model::{LogNumber, PointInfo, Timestamp, VmId, VmName, Wanted, choose_point};
use policy::Place;
use replica::{BarrierGuard, Store};
use repository::{BackupMeta, BackupReport};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::clock::{now, rfc3339, seconds};
use crate::config::Config;
use crate::control::Reporter;
use crate::events::{Event, Events};
use crate::failure::{Code, Failure};
use crate::jobs::{Attempts, Job, NoBackup, newest_backup};
use crate::policies::Known;
use crate::repositories::{OpenRepositories, named};
use crate::request::BackupRequest;
use crate::source::Opened;

/// The replica of this name.
pub(crate) fn replica_named(store: &Store, name: &VmName) -> Result<VmId, Failure> {
    store.find(name).ok_or_else(|| {
        let message =
            format!("there is no replica of a VM named {name} here; 'afterimage status' lists what there is");
        Failure::new(Code::NoSuchVm, message)
    })
}

/// How long an attempt that asked for the barrier waits for the running apply.
const BARRIER_PATIENCE: Duration = Duration::from_secs(10 * 60);

/// A VM to which nothing is promised is as urgent as one that is backed up every day.
const UNPROMISED: Duration = Duration::from_secs(24 * 3600);

/// A point that was chosen may go before it is opened; so often is another one chosen.
const CHOICES: u32 = 5;

/// Makes backups of this site's replicas.
#[derive(Clone)]
pub(crate) struct Backups {
    config: Arc<Config>,
    store: Store,
    events: Events,
    repositories: Arc<OpenRepositories>,
    policies: Arc<Known>,
    catalog: Catalog,
}

impl From<Failure> for NoBackup {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl From<replica::Error> for NoBackup {
    fn from(error: replica::Error) -> Self {
        match error {
            replica::Error::Gate(refusal) => Self::Refused(refusal),
            error => Self::Failed(error.into()),
        }
    }
}

impl Attempts for Backups {
    async fn attempt(
        &self,
        job: &Job,
        barrier: bool,
        reporter: Option<&Reporter>,
        stop: &CancellationToken,
    ) -> Result<Value, NoBackup> {
        let cancel = Arc::new(AtomicBool::new(false));
        let mut working = tokio::task::spawn_blocking({
            let (backups, job, reporter, cancel) =
                (self.clone(), job.clone(), reporter.cloned(), cancel.clone());
            move || backups.make(&job, barrier, reporter.as_ref(), &cancel)
        });
        let outcome = tokio::select! {
            outcome = &mut working => outcome,
            () = stop.cancelled() => {
                cancel.store(true, Ordering::SeqCst);
                working.await
            }
        };
        outcome.map_err(|error| NoBackup::Failed(Failure::new(Code::Internal, error.to_string())))?
    }

    async fn gave_up(&self, job: &Job, failure: &Failure) {
        let event = Event::new("backup-failed", format!("backup job {}: {failure}", job.id));
        self.events.note(event.vm(&job.request.vm)).await;
    }

    fn place(&self, job: &Job) -> Place {
        let folder = self.store.find(&job.request.vm).and_then(|vm| Some(self.store.status(vm).ok()?.folder));
        let device = folder.and_then(|folder| std::fs::metadata(folder).ok()).map(|meta| meta.dev());
        Place {
            repository: job.request.repository.clone(),
            storage: device.map(|device| device.to_string()).unwrap_or_default(),
        }
    }

    fn time_left(&self, job: &Job) -> Duration {
        // Somebody waits for it.
        let Some(name) = &job.terms.policy else { return Duration::ZERO };
        let policies = self.policies.last();
        let promise = policies.usable.get(name).and_then(|policy| policy.promise).unwrap_or(UNPROMISED);
        let newest = newest_backup(&self.catalog, &job.request.vm, &job.request.repository);
        policy::time_left(promise, newest.ok().flatten(), job.made_at, now())
    }

    fn allowed_from(&self, job: &Job, at: Timestamp) -> Option<Timestamp> {
        let policies = self.policies.last();
        let policy = job.terms.policy.as_ref().and_then(|name| policies.usable.get(name));
        policy.map_or(Some(at), |policy| policy.schedule.allowed_from(at))
    }

    fn caught_up_until(&self, job: &Job, now: Timestamp) -> Option<Timestamp> {
        let policies = self.policies.last();
        let policy = policies.usable.get(job.terms.policy.as_ref()?)?;
        Some(policy.schedule.deadline(job.terms.start?, now))
    }
}

impl Backups {
    pub fn new(
        config: Arc<Config>,
        store: Store,
        events: Events,
        repositories: Arc<OpenRepositories>,
        policies: Arc<Known>,
        catalog: Catalog,
    ) -> Self {
        Self { config, store, events, repositories, policies, catalog }
    }

    fn make(
        &self,
        job: &Job,
        barrier: bool,
        reporter: Option<&Reporter>,
        cancel: &AtomicBool,
    ) -> Result<Value, NoBackup> {
        let request = &job.request;
        let vm = replica_named(&self.store, &request.vm)?;
        let _paused = if request.pause { Some(self.store.pause(vm)?) } else { None };
        if request.pause && request.view == Access::Hold {
            self.store.prepare_hold(vm)?;
        }
        let barrier = if barrier || request.pause { self.barrier(vm)? } else { None };
        let (point, mut opened) = self.open(request, vm)?;
        // From here on the pin or the hold keeps applies away.
        drop(barrier);
        let repository = self.repositories.get(&request.repository)?;
        let of_repository = |error: repository::Error| named(&request.repository, error.into());
        let backups = repository.backups(Some(vm)).map_err(of_repository)?;
        let parent = opened.choose_parent(backups)?;
        let definition = self.store.definition(vm)?;
        let meta = BackupMeta {
            vm,
            vm_name: request.vm.clone(),
            point,
            definition,
            policy: job.terms.policy.clone(),
        };
        let shown = |progress: repository::Progress| {
            if let Some(reporter) = reporter {
                let what = format!("backing up {}", request.vm);
                reporter.progress(what, progress.done_bytes, progress.total_bytes);
            }
        };
        let outcome = repository.backup(&opened, meta, parent.as_ref(), &shown, cancel);
        match outcome.inspect_err(|_| self.repositories.forget(&request.repository)) {
            Ok(report) => Ok(answer(&report)),
            // What was read may not be used: the gate knows why, and whether it is worth coming again.
            Err(error) if error.kind() == repository::ErrorKind::Revoked => {
                self.store.admit(vm, request.view, point.number)?;
                Err(NoBackup::Failed(error.into()))
            }
            Err(error) => Err(NoBackup::Failed(of_repository(error))),
        }
    }

    /// Keeps applies away. One that outlasts our patience is a refusal like any other: the job comes again.
    fn barrier(&self, vm: VmId) -> Result<Option<BarrierGuard>, NoBackup> {
        match self.store.barrier(vm, BARRIER_PATIENCE) {
            Err(replica::Error::Busy { .. }) => self.ask(vm, Access::Hold).map(|()| None),
            barrier => Ok(Some(barrier?)),
        }
    }

    /// Whether the gate would admit anything, whatever the point.
    fn ask(&self, vm: VmId, access: Access) -> Result<(), NoBackup> {
        let facts = self.store.facts(vm)?;
        gate::admit(&facts.as_facts(), access, LogNumber::ZERO, now()).map_err(NoBackup::Refused)?;
        Ok(())
    }

    /// Chooses a point, asks the gate, and opens what it admits.
    fn open(&self, request: &BackupRequest, vm: VmId) -> Result<(PointInfo, Opened), NoBackup> {
        let mut choices = CHOICES;
        loop {
            let point = self.choose(request, vm).or_else(|failure| {
                // While there is no point to choose, the gate has more to say of why.
                self.ask(vm, request.view)?;
                Err(NoBackup::Failed(failure))
            })?;
            choices -= 1;
            match self.open_point(request, vm, point) {
                // A log that has just arrived, or an apply that has just ended, took the point away.
                Err(replica::Error::NoSuchPoint { .. } | replica::Error::NotTheBase { .. })
                    if request.point.is_none() && choices > 0 => {}
                opened => return Ok((point, opened?)),
            }
        }
    }

    fn open_point(&self, request: &BackupRequest, vm: VmId, point: PointInfo) -> replica::Result<Opened> {
        let admitted = self.store.admit(vm, request.view, point.number)?;
        Ok(match request.view {
            Access::Hold => {
                let (hold, admission) = self.store.open_hold(admitted, self.lease())?;
                let view =
                    hold.view(&self.store, admission).inspect_err(|_| drop(self.store.release(&hold.id)))?;
                Opened::new(&self.store, view, Some(hold.id))
            }
            Access::Pinned | Access::Strict => {
                Opened::new(&self.store, self.store.open_view(admitted)?, None)
            }
        })
    }

    fn choose(&self, request: &BackupRequest, vm: VmId) -> Result<PointInfo, Failure> {
        let mut points = self.store.points(vm)?;
        if request.view == Access::Hold {
            // The flat files equal one point, and no other can be held.
            let base = self.store.hold_point(vm)?.map(|base| base.number);
            points.retain(|point| Some(point.number) == base);
        }
        let none = |error: &dyn std::fmt::Display| {
            Failure::new(Code::NoSuchPoint, format!("{}: {error}", request.vm))
        };
        if let Some(wanted) = &request.point {
            let point = self.store.find_point(vm, wanted)?;
            let readable = points.iter().any(|readable| readable.number == point.number);
            return readable
                .then_some(point)
                .ok_or_else(|| none(&format!("recovery point {wanted} cannot be read in this way")));
        }
        let max_age = Duration::from_secs(self.config.backup.application_max_age_min * 60);
        let wanted = request.consistency.unwrap_or(Wanted::PreferApplication { max_age });
        choose_point(&points, wanted, now()).map_err(|error| none(&error))
    }

    fn lease(&self) -> Duration {
        Duration::from_secs(self.config.replica.hold_max_min * 60)
    }
}

fn answer(report: &BackupReport) -> Value {
    let backup = &report.backup;
    json!({
        "backup": backup.id,
        "vm": backup.vm_name,
        "point": backup.point.id,
        "number": backup.point.number,
        "taken_at": rfc3339(backup.point.taken_at),
        "consistency": backup.point.consistency,
        "parent": backup.parent,
        "bytes_read": report.bytes_read,
        "bytes_added": report.bytes_added,
        "seconds": seconds(Duration::from_secs_f64(report.seconds.max(0.0))),
    })
}
