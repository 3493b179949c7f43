//! What commands show of policies.

use std::sync::Arc;
use std::time::Duration;

use jiff::tz::TimeZone;
use model::{PolicyName, VmName};
use policy::{Candidate, Policy, Retention, Verdict, plan};
use repository::BackupInfo;
use serde_json::{Value, json};

use super::Policies;
use super::upkeep::is_into;
use crate::clock::{now, rfc3339};
use crate::commands::Site;
use crate::failure::{Code, Failure};
use crate::request::PolicyRequest;

/// How far back `policy show` looks for what came of jobs.
const SHOWN: Duration = Duration::from_secs(7 * 24 * 3600);

impl Site {
    pub(crate) async fn policy(self: &Arc<Self>, request: PolicyRequest) -> Result<Value, Failure> {
        match request {
            PolicyRequest::List => self.policies_shown(),
            PolicyRequest::Show { policy } => self.policy_shown(&policy),
            PolicyRequest::Plan { policy, vm } => {
                let site = self.clone();
                let planned = tokio::task::spawn_blocking(move || site.retention_shown(&policy, vm.as_ref()));
                planned.await.map_err(|error| Failure::new(Code::Internal, error.to_string()))?
            }
            PolicyRequest::Run { policy, vm } => {
                let jobs = self.run_policy(&policy, vm.as_ref()).await?;
                Ok(json!({ "policy": policy, "jobs": jobs }))
            }
        }
    }

    fn policies_shown(&self) -> Result<Value, Failure> {
        let policies = self.policies.look()?;
        let mut shown = Vec::new();
        for (name, policy) in &policies.usable {
            shown.push(self.summary(name, policy)?);
        }
        let broken = policies.broken.iter().map(|(name, why)| json!({ "name": name, "error": why }));
        shown.extend(broken);
        shown.sort_by_key(|policy| policy["name"].as_str().map(str::to_owned));
        Ok(json!({ "policies": shown }))
    }

    fn summary(&self, name: &PolicyName, policy: &Policy) -> Result<Value, Failure> {
        let next = policy.schedule.next_start(now());
        Ok(json!({
            "name": name, "vms": self.jobs.selected(name)?.len(), "repository": policy.repository, "copies": policy.copies,
            "view": policy.view, "next_start": next.map(rfc3339),
            "deadline": next.map(|next| rfc3339(policy.schedule.deadline(next, next))),
            "promise_s": policy.promise.map(|promise| promise.as_secs()), "error": null,
        }))
    }

    fn policy_shown(&self, name: &PolicyName) -> Result<Value, Failure> {
        let policies = self.policies.look()?;
        let policy = policies.named(name)?;
        let facts = self.facts(SHOWN)?;
        let peers = self.peers_of_vms();
        let vms: Vec<_> = self
            .jobs
            .selected(name)?
            .iter()
            .map(|selected| facts.report(name, policy, selected, peers.get(&selected.vm).cloned()))
            .collect();
        let mut shown = self.summary(name, policy)?;
        shown["vms"] = json!(vms);
        Ok(shown)
    }

    /// What the retention of a policy, and of those that share its repository, would keep and forget. Blocks.
    fn retention_shown(&self, name: &PolicyName, only: Option<&VmName>) -> Result<Value, Failure> {
        let policies = self.policies.look()?;
        let policy = policies.named(name)?;
        let backups = self.repositories.get(&policy.repository)?.backups(None)?;
        let mut shown = Vec::new();
        for vm in self.jobs.selected(name)?.into_iter().map(|selected| selected.vm) {
            if only.is_some_and(|only| *only != vm) {
                continue;
            }
            let verdicts = verdicts(&policies, &policy.repository, &vm, &backups);
            shown.push(json!({ "vm": vm, "backups": verdicts.iter().map(of_verdict).collect::<Vec<_>>() }));
        }
        Ok(json!({ "policy": name, "repository": policy.repository, "vms": shown }))
    }
}

/// What becomes of the backups of a VM in a repository, by all policies that back it up to there.
pub(super) fn verdicts(
    policies: &Policies,
    repository: &str,
    vm: &VmName,
    backups: &[BackupInfo],
) -> Vec<Verdict<BackupInfo>> {
    let rules: Vec<(Retention, TimeZone)> = policies
        .of(vm)
        .filter(|(_, policy)| is_into(policy, repository))
        .map(|(_, policy)| (policy.retention, policy.schedule.zone().clone()))
        .collect();
    let candidates = backups.iter().filter(|backup| backup.vm_name == *vm).map(|backup| Candidate {
        id: backup.clone(),
        taken_at: backup.point.taken_at,
        by_hand: backup.policy.is_none(),
    });
    plan(candidates.collect(), &rules, now())
}

fn of_verdict(verdict: &Verdict<BackupInfo>) -> Value {
    json!({
        "backup": verdict.id.id, "taken_at": rfc3339(verdict.taken_at), "kept": !verdict.kept_by.is_empty(),
        "kept_by": verdict.kept_by, "bytes_added": verdict.id.bytes_added,
    })
}
