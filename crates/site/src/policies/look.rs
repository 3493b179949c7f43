//! The look that is taken every few seconds: who is selected now, and whose backup is due.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use model::{PolicyName, RetryPolicy, Timestamp, VmName};
use policy::{Due, Policy, Window, due};
use tokio_util::sync::CancellationToken;

use super::Policies;
use crate::clock::now;
use crate::commands::Site;
use crate::events::Event;
use crate::failure::{Code, Failure};
use crate::jobs::{Job, Selected, Terms};
use crate::request::BackupRequest;

/// How long the next look is away at the most: so late are files read that were changed, and VMs seen that are new.
const LOOK: Duration = Duration::from_secs(5);

impl Site {
    /// Looks, again and again.
    pub(crate) async fn run_policies(self: Arc<Self>, stop: CancellationToken) {
        let mut told = BTreeSet::new();
        while !stop.is_cancelled() {
            let next = match self.look_at_policies(&mut told).await {
                Ok(next) => next.map_or(LOOK, |next| next.since(now()).min(LOOK)),
                Err(failure) => {
                    self.tell(&mut told, format!("policies are not seen to: {failure}")).await;
                    LOOK
                }
            };
            tokio::select! {
                () = tokio::time::sleep(next.max(Duration::from_millis(100))) => {}
                () = stop.cancelled() => {}
            }
        }
    }

    /// One look. Gives when something is due next.
    async fn look_at_policies(
        self: &Arc<Self>,
        told: &mut BTreeSet<String>,
    ) -> Result<Option<Timestamp>, Failure> {
        let known = self.policies.clone();
        let looked = tokio::task::spawn_blocking(move || known.look()).await;
        let policies = looked.map_err(|error| Failure::new(Code::Internal, error.to_string()))??;
        told.retain(|told| policies.broken.values().any(|why| told.ends_with(why)));
        for (name, why) in &policies.broken {
            self.tell(told, format!("policy {name} cannot be used: {why}")).await;
        }
        for name in self.jobs.policies()? {
            if !policies.usable.contains_key(&name) && !policies.broken.contains_key(&name) {
                self.select(&name, &BTreeSet::new()).await?;
            }
        }
        let mut next = None;
        for (name, policy) in &policies.usable {
            let at = self.see_to(name, policy, &policies).await?;
            next = [next, at].into_iter().flatten().min();
        }
        Ok(next)
    }

    async fn tell(&self, told: &mut BTreeSet<String>, what: String) {
        if told.insert(what.clone()) {
            self.events.note(Event::new("policy", what)).await;
        }
    }

    /// Makes the jobs of one policy that are due. Gives when something is due next.
    async fn see_to(
        self: &Arc<Self>,
        name: &PolicyName,
        policy: &Policy,
        policies: &Policies,
    ) -> Result<Option<Timestamp>, Failure> {
        let selected = self.select(name, &self.meant(policy, policies)).await?;
        let now = now();
        match due(&policy.schedule, Timestamp(i64::MIN), now) {
            Due::NotBefore(at) => Ok(at),
            Due::Now(window) => {
                let due = selected.iter().filter(|vm| vm.seen < window.start);
                let retry = policy.retry.applied_to(&self.config.retry_policy());
                let jobs: Vec<Job> = due.map(|vm| job(name, policy, &retry, vm.vm.clone(), window)).collect();
                if !jobs.is_empty() {
                    let made = self.jobs.plan(jobs).await?;
                    tracing::info!(policy = %name, jobs = made.len(), caught_up = window.caught_up, "backups are due");
                }
                Ok(policy.schedule.next_start(now))
            }
        }
    }

    /// The replicas here that a policy means.
    fn meant(&self, policy: &Policy, policies: &Policies) -> BTreeSet<VmName> {
        let replicas = self.store.list().into_iter().filter_map(|vm| self.store.name(vm));
        replicas.filter(|vm| policy.selection.selects(vm, &policies.tags_of(vm))).collect()
    }

    /// Notes whom a policy selects, and gives what is known of them.
    async fn select(&self, policy: &PolicyName, meant: &BTreeSet<VmName>) -> Result<Vec<Selected>, Failure> {
        let known = self.jobs.selected(policy)?;
        let before: BTreeSet<&VmName> = known.iter().map(|selected| &selected.vm).collect();
        let joined: Vec<VmName> = meant.iter().filter(|vm| !before.contains(vm)).cloned().collect();
        let left: Vec<VmName> = before.into_iter().filter(|vm| !meant.contains(*vm)).cloned().collect();
        if joined.is_empty() && left.is_empty() {
            return Ok(known);
        }
        self.jobs.select(policy.clone(), joined, left, now()).await?;
        self.jobs.selected(policy)
    }

    /// Makes the jobs of a policy now, whatever is due: of one of its VMs, or of all.
    pub(super) async fn run_policy(
        self: &Arc<Self>,
        name: &PolicyName,
        only: Option<&VmName>,
    ) -> Result<Vec<i64>, Failure> {
        let policies = self.policies.look()?;
        let policy = policies.named(name)?;
        let now = now();
        let deadline = policy.schedule.deadline(now, now);
        let window = Window { start: now, begin: now, deadline, caught_up: false };
        let selected = self.select(name, &self.meant(policy, &policies)).await?;
        let meant = selected.into_iter().filter(|vm| only.is_none_or(|only| vm.vm == *only));
        let retry = policy.retry.applied_to(&self.config.retry_policy());
        let jobs: Vec<Job> = meant.map(|vm| job(name, policy, &retry, vm.vm, window)).collect();
        if jobs.is_empty() {
            let whom =
                only.map_or_else(|| "no replica here".to_owned(), |vm| format!("no replica here named {vm}"));
            return Err(Failure::new(
                Code::NoSuchVm,
                format!("policy {name} selects {whom}; see 'afterimage policy show {name}'"),
            ));
        }
        self.jobs.plan(jobs).await
    }
}

fn job(name: &PolicyName, policy: &Policy, retry: &RetryPolicy, vm: VmName, window: Window) -> Job {
    let request = BackupRequest {
        vm,
        point: None,
        consistency: policy.consistency,
        view: policy.view,
        repository: policy.repository.clone(),
        no_retry: false,
        pause: policy.pause,
    };
    let terms = Terms {
        policy: Some(name.clone()),
        start: Some(window.start),
        caught_up: window.caught_up,
        retry: Some(retry.clone()),
    };
    Job::new(request, terms, window.begin, window.deadline)
}
