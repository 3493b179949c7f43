//! What follows the backups of policies: copies in other repositories, forgetting what no rule keeps, and giving back its
//! room. Each look compares what there is with what there should be, so nothing of it has to be remembered: a copy that
//! could not be made today is made tomorrow.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use model::VmName;
use policy::Verdict;
use repository::{BackupInfo, ErrorKind, PruneOptions};
use tokio_util::sync::CancellationToken;

use super::Policies;
use super::shown::verdicts;
use crate::clock::now;
use crate::commands::Site;
use crate::events::Event;
use crate::failure::{Code, Failure};
use crate::jobs::BackedUp;

/// How long the next look is away.
const LOOK: Duration = Duration::from_secs(5);
/// Delays after something failed; the last one again and again.
const BACKOFF_S: [u64; 5] = [10, 60, 300, 900, 3600];

/// What has failed, how often in a row, and when it is tried again.
#[derive(Default)]
struct Failures(HashMap<String, (usize, Instant)>);

impl Failures {
    fn may_try(&self, what: &str) -> bool {
        self.0.get(what).is_none_or(|(_, again)| *again <= Instant::now())
    }

    /// Notes how it went. Whether it has failed for the first time.
    fn note(&mut self, what: &str, went_well: bool) -> bool {
        if went_well {
            self.0.remove(what);
            return false;
        }
        let times = self.0.get(what).map_or(0, |(times, _)| times + 1);
        let delay = Duration::from_secs(BACKOFF_S[times.min(BACKOFF_S.len() - 1)]);
        self.0.insert(what.to_owned(), (times, Instant::now() + delay));
        times == 0
    }
}

impl Site {
    /// Looks, again and again.
    pub(crate) async fn run_upkeep(self: Arc<Self>, stop: CancellationToken) {
        let (mut failures, cancel) = (Failures::default(), Arc::new(AtomicBool::new(false)));
        while !stop.is_cancelled() {
            let (site, cancelled) = (self.clone(), cancel.clone());
            let mut working = tokio::task::spawn_blocking(move || {
                let told = site.keep_up(&mut failures, &cancelled);
                (failures, told)
            });
            let done = tokio::select! {
                done = &mut working => done,
                () = stop.cancelled() => {
                    cancel.store(true, Ordering::SeqCst);
                    working.await
                }
            };
            let Ok((left, told)) = done else { return };
            failures = left;
            for event in told {
                self.events.note(event).await;
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                () = stop.cancelled() => {}
            }
        }
    }

    /// One look. Blocks. What is to be told of it.
    fn keep_up(&self, failures: &mut Failures, cancel: &AtomicBool) -> Vec<Event> {
        let policies = self.policies.last();
        let mut told = Vec::new();
        let mut attempt = |what: String, work: &dyn Fn() -> Result<Option<String>, Failure>| {
            if cancel.load(Ordering::SeqCst) || !failures.may_try(&what) {
                return;
            }
            let outcome = work();
            match &outcome {
                Ok(Some(done)) => tracing::info!("{done}"),
                Ok(None) => {}
                Err(failure) => tracing::warn!(%what, "{failure}"),
            }
            if failures.note(&what, outcome.is_ok())
                && let Err(failure) = outcome
            {
                told.push(Event::new("policy", format!("{what} failed, and is tried again: {failure}")));
            }
        };
        for (from, to) in pairs(&policies) {
            attempt(format!("copying from {from} to {to}"), &|| {
                self.copy_newest(&policies, &from, &to, cancel)
            });
        }
        for repository in repositories(&policies) {
            attempt(format!("forgetting backups in {repository}"), &|| self.forget(&policies, &repository));
            attempt(format!("pruning {repository}"), &|| self.prune(&repository, cancel));
        }
        told
    }

    /// Copies the newest backup of each VM that the second repository does not have yet.
    fn copy_newest(
        &self,
        policies: &Policies,
        from: &str,
        to: &str,
        cancel: &AtomicBool,
    ) -> Result<Option<String>, Failure> {
        let known = self.jobs.backed_up()?;
        let in_repository = |repository: &str| -> HashMap<&VmName, &BackedUp> {
            known.iter().filter(|one| one.repository == repository).map(|one| (&one.vm, one)).collect()
        };
        let (here, there) = (in_repository(from), in_repository(to));
        let is_behind = |vm: &VmName, newest: &BackedUp| {
            let wanted = policies
                .of(vm)
                .any(|(_, policy)| policy.repository == from && policy.copies.iter().any(|copy| copy == to));
            wanted && there.get(vm).is_none_or(|copied| copied.taken_at < newest.taken_at)
        };
        let behind: BTreeSet<&str> = here
            .into_iter()
            .filter(|(vm, newest)| is_behind(vm, newest))
            .map(|(_, newest)| newest.backup.as_str())
            .collect();
        if behind.is_empty() {
            return Ok(None);
        }
        let (source, target) = (self.repositories.get(from)?, self.repositories.get(to)?);
        let mut backups = source.backups(None)?;
        backups.retain(|backup| behind.contains(backup.id.to_string().as_str()));
        let report = source.copy(&backups, &target, &|_| {}, cancel)?;
        for pair in report.copied.iter().chain(&report.there) {
            let Some(backup) = backups.iter().find(|backup| backup.id == pair.from) else { continue };
            self.jobs.note_backup(BackedUp {
                vm: backup.vm_name.clone(),
                repository: to.to_owned(),
                backup: pair.to.to_string(),
                taken_at: backup.point.taken_at,
            })?;
        }
        if let Some((backup, why)) = report.damaged.first() {
            return Err(Failure::new(Code::Damaged, format!("backup {backup} is damaged in {from}: {why}")));
        }
        Ok(Some(format!("{} backups copied from {from} to {to}", report.copied.len())))
    }

    /// Forgets what no rule keeps, once the jobs into a repository are at their end.
    fn forget(&self, policies: &Policies, repository: &str) -> Result<Option<String>, Failure> {
        let has_rules = |policy: &policy::Policy| is_into(policy, repository) && !policy.retention.is_empty();
        if !policies.usable.values().any(has_rules) || !self.jobs.is_forgetting_due(repository)? {
            return Ok(None);
        }
        let looked_at = now();
        let opened = self.repositories.get(repository)?;
        let backups = opened.backups(None)?;
        let vms: BTreeSet<&VmName> = backups.iter().map(|backup| &backup.vm_name).collect();
        let in_use = self.backups_in_use(repository)?;
        let verdicts = vms.into_iter().flat_map(|vm| verdicts(policies, repository, vm, &backups));
        let gone = verdicts.filter(is_forgotten).map(|verdict| verdict.id.id);
        // One that a VM was recovered from, and may run from yet, stays whatever the rules say.
        let gone: Vec<_> =
            gone.filter(|id| !in_use.iter().any(|used| id.to_string().starts_with(used))).collect();
        let forgotten = if gone.is_empty() { Vec::new() } else { opened.forget(&gone)? };
        self.jobs.note_forgetting(repository, looked_at, !forgotten.is_empty())?;
        Ok((!forgotten.is_empty()).then(|| format!("{} backups forgotten in {repository}", forgotten.len())))
    }

    /// Gives the room of forgotten backups back, now and then, while no backup runs into the repository.
    fn prune(&self, repository: &str, cancel: &AtomicBool) -> Result<Option<String>, Failure> {
        let every = Duration::from_secs(self.config.backup.prune_every_h.saturating_mul(3600));
        if every.is_zero() || !self.jobs.is_pruning_due(repository, every)? {
            return Ok(None);
        }
        match self.repositories.get(repository)?.prune(&PruneOptions::default(), cancel) {
            // Somebody uses it; there is no hurry.
            Err(error) if matches!(error.kind(), ErrorKind::Locked | ErrorKind::Cancelled) => Ok(None),
            Err(error) => Err(error.into()),
            Ok(report) => {
                self.jobs.note_pruning(repository, now())?;
                let freed = report.bytes_before.saturating_sub(report.bytes) >> 20;
                Ok(Some(format!("{repository} pruned: {freed} MiB freed")))
            }
        }
    }
}

fn is_forgotten(verdict: &Verdict<BackupInfo>) -> bool {
    verdict.kept_by.is_empty()
}

/// Whether a policy's backups are in a repository, by themselves or as copies.
pub(super) fn is_into(policy: &policy::Policy, repository: &str) -> bool {
    policy.repository == repository || policy.copies.iter().any(|copy| copy == repository)
}

/// What is copied from where to where.
fn pairs(policies: &Policies) -> BTreeSet<(String, String)> {
    let of = |policy: &policy::Policy| {
        let from = policy.repository.clone();
        policy.copies.iter().map(move |to| (from.clone(), to.clone())).collect::<Vec<_>>()
    };
    policies.usable.values().flat_map(of).collect()
}

fn repositories(policies: &Policies) -> BTreeSet<String> {
    let of = |policy: &policy::Policy| {
        std::iter::once(&policy.repository).chain(&policy.copies).cloned().collect::<Vec<_>>()
    };
    policies.usable.values().flat_map(of).collect()
}
