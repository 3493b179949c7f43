//! Groups, as people ask for them: made and synced at the primary's site, looked at on either side, backed up at the
//! replicas'.

mod failover;

use std::time::Duration;

use futures::future::join_all;
use model::gate::Access;
use model::group::{Group, GroupMember, GroupMoment, Missing, SharedPoint, find_moment, shared_points};
use model::{Consistency, GroupName, PointInfo, PointRef, VmId, VmName};
use primary::GroupStatus;
use replica::{KeptPoint, ReplicaGroup};
use serde_json::{Value, json};

use crate::clock::rfc3339;
use crate::commands::Site;
use crate::control::Reporter;
use crate::events::Event;
use crate::failure::{Code, Failure};
use crate::points::skew_ms;
use crate::request::{BackupRequest, GroupRequest};

/// A member of a group at the replicas' site, and its point of the moment that is meant.
struct Place {
    vm: VmId,
    member: GroupMember,
    point: PointInfo,
}

/// A group's moment of which all members have their points, which stay while this is kept.
struct Meant {
    moment: GroupMoment,
    places: Vec<Place>,
    _kept: Vec<KeptPoint>,
}

impl Site {
    pub(crate) async fn group(&self, request: GroupRequest, reporter: &Reporter) -> Result<Value, Failure> {
        match request {
            GroupRequest::Create { group, members, every_s } => {
                self.create_group(group, members, every_s).await
            }
            GroupRequest::List => Ok(json!({ "groups": self.groups_shown() })),
            GroupRequest::Show { group } => self.show_group(&group),
            GroupRequest::Remove { group } => self.remove_group(&group).await,
            GroupRequest::Points { group } => self.group_points(&group),
            GroupRequest::Sync { group } => self.sync_group(&group).await,
            GroupRequest::Backup { group, point, repository, no_retry } => {
                self.group_backup(&group, point.as_ref(), &repository, no_retry, reporter).await
            }
        }
    }

    async fn create_group(
        &self,
        name: GroupName,
        members: Vec<GroupMember>,
        every_s: Option<u64>,
    ) -> Result<Value, Failure> {
        let group = Group { name, members };
        if let Some(member) = group.members.iter().find(|member| self.store.find(&member.vm).is_some()) {
            let message = format!(
                "{} is a replica here; a group is made at the site where its VMs run, and known here by itself",
                member.vm
            );
            return Err(Failure::new(Code::NoSuchVm, message));
        }
        let status = self.primary.create_group(group, every_s.map(Duration::from_secs)).await?;
        let what = format!("group {} is made: {}", status.group.name, names(&status.group));
        self.events.note(Event::new("group-made", what)).await;
        Ok(self.of_primary_group(&status))
    }

    async fn remove_group(&self, name: &GroupName) -> Result<Value, Failure> {
        let status = match self.primary.remove_group(name).await {
            Err(primary::Error::NoSuchGroup(_)) => return Err(self.runs_elsewhere(name, "remove it")),
            removed => removed?,
        };
        let what = format!("group {name} is removed; {} are replicated each by itself", names(&status.group));
        self.events.note(Event::new("group-removed", what)).await;
        Ok(json!({ "removed": name }))
    }

    /// Ends a protection, and says which group the VM has left.
    pub(crate) async fn unprotect_here(&self, vm: &VmName) -> Result<Value, Failure> {
        let group = self.primary.group_of(vm);
        let mut shown = self.of_primary(self.primary.unprotect(vm).await)?;
        if let Some(group) = group {
            let left = self.primary.group(&group).map_or(0, |status| status.group.members.len());
            let what = match left {
                0 => format!("{vm} was the last VM of group {group}: the group is removed"),
                left => format!("{vm} is taken out of group {group}, which has {left} VMs left"),
            };
            self.events.note(Event::new("group-left", &what).vm(vm)).await;
            shown["left_group"] = json!({ "group": group, "members": left, "message": what });
        }
        Ok(shown)
    }

    fn groups_shown(&self) -> Vec<Value> {
        let here = self.primary.group_list();
        let here = here.iter().map(|status| self.of_primary_group(status));
        let there = self.store.groups();
        here.chain(there.iter().map(|found| self.of_replica_group(found))).collect()
    }

    fn show_group(&self, name: &GroupName) -> Result<Value, Failure> {
        if let Ok(status) = self.primary.group(name) {
            return Ok(self.of_primary_group(&status));
        }
        Ok(self.of_replica_group(&self.replica_group(name)?))
    }

    fn of_primary_group(&self, status: &GroupStatus) -> Value {
        let GroupStatus { group, interval, made_at, last } = status;
        let members: Vec<_> =
            group.members.iter().map(|member| (member, self.primary.get(&member.vm))).collect();
        let peer = members.iter().find_map(|(_, vm)| Some(vm.as_ref()?.settings.peer.clone()));
        let shown = |(member, vm): &(&GroupMember, Option<primary::VmStatus>)| {
            json!({
                "vm": member.vm, "delay_s": member.delay_s,
                "state": vm.as_ref().map(|vm| vm.phase.name()),
                "health": vm.as_ref().map(|vm| vm.health.health),
            })
        };
        json!({
            "name": group.name, "role": "primary", "peer": peer, "interval_s": interval.as_secs(),
            "made_at": rfc3339(*made_at), "members": members.iter().map(shown).collect::<Vec<_>>(),
            "last": last.as_ref().map(fixed),
        })
    }

    fn of_replica_group(&self, found: &ReplicaGroup) -> Value {
        let shared = self.shared_points(found);
        let status = |vm: &Option<VmId>| self.store.status((*vm)?).ok();
        let members: Vec<_> = found.group.members.iter().zip(found.vms.iter().map(status)).collect();
        let shown = |(member, status): &(&GroupMember, Option<replica::ReplicaStatus>)| {
            json!({
                "vm": member.vm, "delay_s": member.delay_s,
                "state": status.as_ref().map(|status| status.facts.phase.name()),
                "health": status.as_ref().map(|status| status.facts.health.health),
            })
        };
        let interval = members.iter().find_map(|(_, status)| Some(status.as_ref()?.interval_s));
        let newest_complete = shared.iter().rev().find(|shared| shared.is_complete());
        json!({
            "name": found.group.name, "role": "replica", "peer": found.peer, "interval_s": interval,
            "members": members.iter().map(shown).collect::<Vec<_>>(),
            "last": shared.last().map(|shared| moment_shown(found, shared)),
            "last_complete": newest_complete.map(|shared| moment_shown(found, shared)),
        })
    }

    fn group_points(&self, name: &GroupName) -> Result<Value, Failure> {
        let found = self.replica_group(name)?;
        let shared = self.shared_points(&found);
        let moments: Vec<Value> = shared.iter().map(|shared| moment_shown(&found, shared)).collect();
        Ok(json!({ "group": name, "peer": found.peer, "moments": moments }))
    }

    async fn sync_group(&self, name: &GroupName) -> Result<Value, Failure> {
        let synced = match self.primary.sync_group(name).await {
            Err(primary::Error::NoSuchGroup(_)) => return Err(self.runs_elsewhere(name, "run this")),
            synced => synced?,
        };
        let mut moment = synced.moment;
        for (vm, failure) in &synced.failed {
            if moment.members.contains(vm) {
                moment.members.retain(|member| member != vm);
                moment.missing.push(Missing::new(vm, &format!("its point did not arrive: {failure}")));
            }
        }
        if moment.members.is_empty() {
            let message =
                format!("no moment of group {name} could be fixed: {}", why_missing(&moment.missing));
            return Err(Failure::transient(Code::Cycle, message));
        }
        Ok(fixed(&moment))
    }

    async fn group_backup(
        &self,
        name: &GroupName,
        point: Option<&PointRef>,
        repository: &str,
        no_retry: bool,
        reporter: &Reporter,
    ) -> Result<Value, Failure> {
        let Meant { moment, places, _kept } = self.moment_meant(name, point)?;
        let jobs = places.iter().map(|place| {
            let request = BackupRequest {
                vm: place.member.vm.clone(),
                point: Some(place.point.id.into()),
                consistency: None,
                view: Access::Pinned,
                repository: repository.to_owned(),
                no_retry,
                pause: false,
            };
            self.jobs.run(request, reporter.clone())
        });
        let (mut backups, mut failed) = (Vec::new(), None);
        for (place, outcome) in places.iter().zip(join_all(jobs).await) {
            match outcome {
                Ok(mut report) => {
                    report["vm"] = json!(place.member.vm);
                    backups.push(report);
                }
                Err(failure) => failed = failed.or(Some((&place.member.vm, failure))),
            }
        }
        if let Some((vm, failure)) = failed {
            let message = format!(
                "{} of the {} VMs of group {name} are backed up at {}, {vm} is not: {}; 'afterimage backup --group {name} --point {}' tries again, as long as the moment is kept",
                backups.len(),
                places.len(),
                rfc3339(moment.at),
                failure.message,
                moment.id
            );
            return Err(Failure { message, ..failure });
        }
        Ok(json!({
            "group": name, "moment": moment.id, "taken_at": rfc3339(moment.at), "skew_ms": skew_ms(&moment),
            "backups": backups,
        }))
    }

    /// Why what is done where the VMs run cannot be done here.
    fn runs_elsewhere(&self, name: &GroupName, what: &str) -> Failure {
        match self.replica_group(name) {
            Ok(found) => {
                let message = format!("group {name} is of VMs that run elsewhere; {what} at {}", found.peer);
                Failure::new(Code::NoSuchGroup, message)
            }
            Err(unknown) => unknown,
        }
    }

    /// The group of this name whose replicas are here.
    fn replica_group(&self, name: &GroupName) -> Result<ReplicaGroup, Failure> {
        let mut found: Vec<ReplicaGroup> =
            self.store.groups().into_iter().filter(|found| found.group.name == *name).collect();
        match (found.pop(), found.pop()) {
            (Some(found), None) => Ok(found),
            (Some(one), Some(other)) => {
                let message = format!(
                    "{} and {} both have a group {name}, so it is not clear which is meant; give one of them another name there",
                    other.peer, one.peer
                );
                Err(Failure::new(Code::NoSuchGroup, message))
            }
            (None, _) => Err(match self.primary.group(name) {
                Ok(_) => Failure::new(
                    Code::NoSuchGroup,
                    format!(
                        "the VMs of group {name} run here and their replicas are elsewhere; run this at the replicas' site"
                    ),
                ),
                Err(_) => Failure::new(
                    Code::NoSuchGroup,
                    format!("no group named {name} is known here; 'afterimage group list' lists them"),
                ),
            }),
        }
    }

    fn shared_points(&self, found: &ReplicaGroup) -> Vec<SharedPoint> {
        let points =
            |vm: &Option<VmId>| vm.and_then(|vm| self.store.member_points(vm).ok()).unwrap_or_default();
        shared_points(&found.vms.iter().map(points).collect::<Vec<_>>())
    }

    /// The moment that is meant, if all members have a point of it; the points stay as long as the answer is kept.
    fn moment_meant(&self, name: &GroupName, point: Option<&PointRef>) -> Result<Meant, Failure> {
        let found = self.replica_group(name)?;
        let shared = self.shared_points(&found);
        let meant = find_moment(name, &shared, point)
            .map_err(|error| Failure::new(Code::NoSuchPoint, error.to_string()))?;
        let missing = missing(&found, meant);
        if !missing.is_empty() {
            let message = format!(
                "the moment {} of group {name} is not complete: {}; take a complete one ('afterimage points --group {name}'), or fail each VM over by itself",
                meant.moment.id,
                why_missing(&missing)
            );
            return Err(Failure::new(Code::NoSuchPoint, message));
        }
        let places = found.group.members.iter().zip(&found.vms).zip(&meant.points);
        let places: Vec<Place> = places
            .filter_map(|((member, vm), point)| {
                Some(Place { vm: (*vm)?, member: member.clone(), point: (*point)? })
            })
            .collect();
        let kept = places.iter().map(|place| self.store.keep_point(place.vm, place.point.number));
        let kept = kept.collect::<replica::Result<Vec<_>>>()?;
        Ok(Meant { moment: meant.moment.clone(), places, _kept: kept })
    }
}

/// "db, web".
fn names(group: &Group) -> String {
    group.members.iter().map(|member| member.vm.as_str()).collect::<Vec<_>>().join(", ")
}

/// A moment as the primary's site has fixed it.
fn fixed(moment: &GroupMoment) -> Value {
    json!({
        "id": moment.id, "group": moment.group, "at": rfc3339(moment.at), "skew_ms": skew_ms(moment),
        "complete": moment.is_whole(), "members": moment.members, "missing": moment.missing,
    })
}

/// A moment as the replicas' site has it.
fn moment_shown(found: &ReplicaGroup, shared: &SharedPoint) -> Value {
    let SharedPoint { moment, points } = shared;
    let missing = missing(found, shared);
    let weakest = points.iter().flatten().map(|point| point.consistency);
    let application = weakest.clone().all(|consistency| consistency == Consistency::Application);
    let consistency = if application { Consistency::Application } else { Consistency::Crash };
    let members = found.group.members.iter().zip(points).filter_map(|(member, point)| {
        let point = point.as_ref()?;
        Some(json!({ "vm": member.vm, "point": point.id, "number": point.number, "consistency": point.consistency }))
    });
    json!({
        "id": moment.id, "group": moment.group, "at": rfc3339(moment.at), "skew_ms": skew_ms(moment),
        "complete": missing.is_empty(), "consistency": consistency,
        "members": members.collect::<Vec<_>>(), "missing": missing,
    })
}

/// Who has no point of a moment, and why.
fn missing(found: &ReplicaGroup, shared: &SharedPoint) -> Vec<Missing> {
    let without = found.group.members.iter().zip(&shared.points).filter(|(_, point)| point.is_none());
    without
        .map(|(member, _)| {
            let told = shared.moment.missing.iter().find(|missing| missing.vm == member.vm);
            told.cloned()
                .unwrap_or_else(|| Missing::new(&member.vm, "its point has not arrived here, or is gone"))
        })
        .collect()
}

/// "web (it is paused), app (…)".
fn why_missing(missing: &[Missing]) -> String {
    let shown: Vec<String> =
        missing.iter().map(|missing| format!("{} ({})", missing.vm, missing.why)).collect();
    shown.join(", ")
}
