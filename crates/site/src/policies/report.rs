//! Who is kept, who is at risk and what was broken, and what came of the backups: `backup report`.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use jiff::tz::TimeZone;
use model::{PolicyName, Timestamp, VmName};
use policy::{Policy, Standing, standing};
use serde::Serialize;
use serde_json::{Value, json};

use crate::clock::{now, rfc3339, serialize_moment, serialize_optional_moment};
use crate::commands::Site;
use crate::failure::Failure;
use crate::jobs::{BackedUp, Job, Selected, State};

/// What came of a number of jobs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(super) struct Count {
    /// Jobs that have ended.
    pub ended: u64,
    /// Of these, those with a backup.
    pub done: u64,
    /// Of these, at the first try.
    pub first_try: u64,
    /// Of these, within the window that they were due in.
    pub in_window: u64,
    /// Jobs that wait or run.
    pub open: u64,
    /// Attempts that came to nothing, by what.
    pub setbacks: BTreeMap<String, u64>,
}

impl Count {
    fn add(&mut self, job: &Job) {
        for attempt in &job.attempts {
            *self.setbacks.entry(attempt.refused.to_string()).or_default() += 1;
        }
        let Some(ended_at) = job.ended_at else {
            self.open += 1;
            return;
        };
        self.ended += 1;
        if matches!(job.state, State::Done { .. }) {
            self.done += 1;
            self.first_try += u64::from(job.attempts.is_empty());
            self.in_window += u64::from(!job.terms.caught_up && ended_at <= job.deadline);
        }
    }

    fn of<'a>(jobs: impl IntoIterator<Item = &'a Job>) -> Self {
        let mut count = Self::default();
        jobs.into_iter().for_each(|job| count.add(job));
        count
    }
}

/// A VM under a policy.
#[derive(Debug, Clone, Serialize)]
pub(super) struct VmReport {
    pub vm: VmName,
    /// The peer that it is replicated from.
    pub peer: Option<String>,
    pub policy: PolicyName,
    pub repository: String,
    /// How old the newest backup may be, in seconds; none is promised without it.
    pub promise_s: Option<u64>,
    #[serde(flatten)]
    pub standing: Option<Standing>,
    /// The newest backup.
    pub backup: Option<String>,
    /// The moment of its point.
    #[serde(serialize_with = "serialize_optional_moment")]
    pub taken_at: Option<Timestamp>,
    pub age_s: Option<u64>,
    /// When the next one is there at the latest.
    #[serde(serialize_with = "serialize_optional_moment")]
    pub expected_by: Option<Timestamp>,
    /// Why the last job failed, if it did.
    pub last_error: Option<String>,
    /// The refused attempts of the last job that had some.
    pub refused: Vec<Refused>,
    #[serde(flatten)]
    pub count: Count,
}

/// An attempt that came to nothing.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Refused {
    #[serde(serialize_with = "serialize_moment")]
    at: Timestamp,
    by: String,
}

/// What is known beside a policy.
pub(super) struct Facts {
    jobs: Vec<Job>,
    /// The places of the jobs of each policy and VM.
    places: HashMap<(PolicyName, VmName), Vec<usize>>,
    newest: HashMap<(VmName, String), BackedUp>,
    now: Timestamp,
}

impl Facts {
    fn new(jobs: Vec<Job>, newest: Vec<BackedUp>, now: Timestamp) -> Self {
        let mut places: HashMap<_, Vec<usize>> = HashMap::new();
        for (place, job) in jobs.iter().enumerate() {
            if let Some(policy) = &job.terms.policy {
                places.entry((policy.clone(), job.request.vm.clone())).or_default().push(place);
            }
        }
        let key = |newest: BackedUp| ((newest.vm.clone(), newest.repository.clone()), newest);
        Self { jobs, places, newest: newest.into_iter().map(key).collect(), now }
    }

    /// The jobs of a VM under a policy, oldest first.
    fn of_vm(&self, policy: &PolicyName, vm: &VmName) -> Vec<&Job> {
        let places = self.places.get(&(policy.clone(), vm.clone()));
        places.into_iter().flatten().map(|place| &self.jobs[*place]).collect()
    }

    pub(super) fn report(
        &self,
        name: &PolicyName,
        policy: &Policy,
        selected: &Selected,
        peer: Option<String>,
    ) -> VmReport {
        let vm = &selected.vm;
        let newest = self.newest.get(&(vm.clone(), policy.repository.clone()));
        let taken_at = newest.map(|newest| newest.taken_at);
        let jobs = self.of_vm(name, vm);
        let open = jobs.iter().find(|job| job.ended_at.is_none()).map(|job| job.deadline);
        let expected_by = open.or_else(|| {
            let next = policy.schedule.next_start(self.now)?;
            Some(policy.schedule.deadline(next, next))
        });
        let last = jobs.iter().rev().find(|job| job.ended_at.is_some());
        let last_error = last.and_then(|job| job.outcome()?.err()).map(|failure| failure.message);
        let stands = |promise| {
            standing(promise, taken_at, selected.since, expected_by, last_error.as_deref(), self.now)
        };
        let refused = jobs.iter().rev().find(|job| !job.attempts.is_empty());
        let refused = refused.map_or(&[][..], |job| &job.attempts);
        VmReport {
            vm: vm.clone(),
            peer,
            policy: name.clone(),
            repository: policy.repository.clone(),
            promise_s: policy.promise.map(|promise| promise.as_secs()),
            standing: policy.promise.map(stands),
            backup: newest.map(|newest| newest.backup.clone()),
            taken_at,
            age_s: taken_at.map(|at| self.now.since(at).as_secs()),
            expected_by,
            count: Count::of(jobs.iter().copied()),
            refused: refused.iter().map(|one| Refused { at: one.at, by: one.refused.to_string() }).collect(),
            last_error,
        }
    }
}

impl Site {
    /// What is known of the jobs of this time, and of the newest backups.
    pub(super) fn facts(&self, past: Duration) -> Result<Facts, Failure> {
        let now = now();
        Ok(Facts::new(self.jobs.made_since(now.minus(past))?, self.jobs.backed_up()?, now))
    }

    /// The peers that the replicas here come from, by the VM's name.
    pub(super) fn peers_of_vms(&self) -> HashMap<VmName, String> {
        let statuses = self.store.list().into_iter().filter_map(|vm| self.store.status(vm).ok());
        statuses.map(|status| (status.name, status.peer)).collect()
    }

    /// The report over so many days.
    pub(crate) fn backup_report(&self, days: u32) -> Result<Value, Failure> {
        let past = Duration::from_secs(u64::from(days) * 24 * 3600);
        let (policies, facts) = (self.policies.look()?, self.facts(past)?);
        let (mut vms, peers) = (Vec::new(), self.peers_of_vms());
        for (name, policy) in &policies.usable {
            for selected in self.jobs.selected(name)? {
                vms.push(facts.report(name, policy, &selected, peers.get(&selected.vm).cloned()));
            }
        }
        vms.sort_by_key(|vm| (rank(vm.standing.as_ref()), vm.vm.clone()));
        let stand = |wanted: u8| vms.iter().filter(|vm| rank(vm.standing.as_ref()) == wanted).count();
        let selects_none = |vm: &VmName| policies.of(vm).next().is_none();
        let mut without: Vec<&VmName> = peers.keys().filter(|vm| selects_none(vm)).collect();
        without.sort_unstable();
        Ok(json!({
            "at": rfc3339(facts.now), "days": days,
            "broken": stand(0), "at_risk": stand(1), "kept": stand(2),
            "all": Count::of(&facts.jobs), "by_day": by_day(&facts.jobs), "by_peer": by_peer(&vms),
            "vms": vms, "without_policy": without, "unusable_policies": policies.broken,
        }))
    }
}

/// The worst first.
fn rank(standing: Option<&Standing>) -> u8 {
    match standing {
        Some(Standing::Broken(_)) => 0,
        Some(Standing::AtRisk(_)) => 1,
        Some(Standing::Kept) => 2,
        None => 3,
    }
}

/// By the day that a job was made on, as this machine's calendar has it.
fn by_day(jobs: &[Job]) -> BTreeMap<String, Count> {
    let zone = TimeZone::system();
    let mut days: BTreeMap<String, Count> = BTreeMap::new();
    for job in jobs {
        let made = jiff::Timestamp::from_microsecond(job.made_at.0).unwrap_or_default();
        days.entry(zone.to_datetime(made).date().to_string()).or_default().add(job);
    }
    days
}

/// Who is kept, of the VMs of each peer.
fn by_peer(vms: &[VmReport]) -> BTreeMap<String, Value> {
    let mut peers: BTreeMap<String, [u64; 4]> = BTreeMap::new();
    for vm in vms {
        let peer = vm.peer.clone().unwrap_or_else(|| "-".to_owned());
        peers.entry(peer).or_default()[usize::from(rank(vm.standing.as_ref()))] += 1;
    }
    let shown = |[broken, at_risk, kept, none]: [u64; 4]| json!({ "broken": broken, "at_risk": at_risk, "kept": kept, "without_promise": none });
    peers.into_iter().map(|(peer, counts)| (peer, shown(counts))).collect()
}
