//! Groups as the replica's site knows them: from what the primary offers of each VM, and from what it announces of logs.
//!
//! A log that makes a point of a group's moment is announced before it has ended, so that there is no such point of which that
//! is not known. What is known of it goes when the point does. Which moments all members have a point of is asked before
//! each decision about points, one VM at a time: no VM's lock is taken under another's. What is seen so may be old by then, and
//! that errs on the side of keeping: a moment that is complete is seen later, never earlier, than it is.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use model::group::{Group, GroupMoment, MemberPoints, complete};
use model::{GroupName, Head, LogId, LogNumber, MomentId, PointInfo, VmId, VmName};
use steps::durable_step;

use crate::error::Result;
use crate::relationship::check_peer;
use crate::rows;
use crate::store::Store;
use crate::vm::{State, Vm};

/// A group of a peer's VMs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaGroup {
    /// The group, as its primary last told.
    pub group: Group,
    /// The peer whose VMs they are.
    pub peer: String,
    /// Its members, in its order; none of one of which there is no replica here yet.
    pub vms: Vec<Option<VmId>>,
}

impl Store {
    /// A log that is arriving makes a point of a moment of the VM's group.
    pub fn announce(&self, peer: &str, vm: VmId, log: Head, mut moment: GroupMoment) -> Result<()> {
        let vm = self.vm(vm)?;
        let mut state = vm.live()?;
        check_peer(&state, peer)?;
        moment.members.clear(); // who was fixed has a point, and that is what counts here
        let gone = state.moments_without_points();
        let (id, (number, log_id), saved) = (vm.id, (log.number, log.id), moment.clone());
        let dropped = gone.clone();
        durable_step("replica::moment::writing");
        self.catalog().write(move |tx| {
            rows::remove_moments(tx, id, &dropped)?;
            rows::put_moment(tx, id, Head { number, id: log_id }, &saved)
        })?;
        durable_step("replica::moment::written");
        state.moments.retain(|number, _| !gone.contains(number));
        state.moments.insert(log.number, (log.id, moment));
        Ok(())
    }

    /// The groups whose replicas are here, by peer and name.
    #[must_use]
    pub fn groups(&self) -> Vec<ReplicaGroup> {
        let mut members: BTreeMap<(String, GroupName), Vec<Member>> = BTreeMap::new();
        for vm in self.vms().values().cloned().collect::<Vec<_>>() {
            let state = vm.lock();
            let row = &state.row;
            if let Some(group) = row.doc.group.clone().filter(|_| !state.removed && !row.doc.withdrawn) {
                let told_at = row.doc.reported.at;
                let member = Member { vm: vm.id, name: row.name.clone(), told_at, group };
                members.entry((row.peer.clone(), member.group.name.clone())).or_default().push(member);
            }
        }
        members.into_iter().filter_map(|((peer, _), members)| found(peer, &members)).collect()
    }

    /// The points of a VM that are of moments of its group.
    pub fn member_points(&self, vm: VmId) -> Result<MemberPoints> {
        let vm = self.vm(vm)?;
        let state = vm.live()?;
        let of_moment = |point: &PointInfo| {
            let moment = state.moment_of(point)?;
            Some((moment.id, (*point, moment.clone())))
        };
        Ok(state.points.values().filter_map(of_moment).collect())
    }

    /// Looks which of a VM's points all members of its group have, for the decisions that follow.
    pub(crate) fn note_shared(&self, vm: &Vm) {
        let (peer, group) = {
            let mut state = vm.lock();
            match state.row.doc.group.clone() {
                Some(group) => (state.row.peer.clone(), group),
                None => return state.shared.clear(),
            }
        };
        let vms: Vec<Arc<Vm>> = self.vms().values().cloned().collect();
        let mut moments: BTreeMap<VmName, BTreeSet<MomentId>> = BTreeMap::new();
        for other in vms {
            let state = other.lock();
            let is_member = state.row.peer == peer && group.has(&state.row.name) && !state.removed;
            if is_member {
                moments.insert(state.row.name.clone(), state.moments_with_points());
            }
        }
        let nothing = BTreeSet::new();
        let complete =
            complete(group.members.iter().map(|member| moments.get(&member.vm).unwrap_or(&nothing)));
        let mut state = vm.lock();
        let is_shared = |point: &&PointInfo| state.moment_of(point).is_some_and(|m| complete.contains(&m.id));
        state.shared = state.points.values().filter(is_shared).map(|point| point.number).collect();
    }
}

/// A VM that says that it is in a group.
struct Member {
    vm: VmId,
    name: VmName,
    told_at: model::Timestamp,
    group: Group,
}

/// The group that these VMs say that they are in. Where it has just changed, who was told last is right.
fn found(peer: String, members: &[Member]) -> Option<ReplicaGroup> {
    let group = members.iter().max_by_key(|member| member.told_at)?.group.clone();
    let of_name = |name: &VmName| members.iter().find(|member| member.name == *name).map(|member| member.vm);
    let vms: Vec<Option<VmId>> = group.members.iter().map(|member| of_name(&member.vm)).collect();
    Some(ReplicaGroup { group, peer, vms })
}

impl State {
    /// The moment of the VM's group that a point is of.
    pub fn moment_of(&self, point: &PointInfo) -> Option<&GroupMoment> {
        let (id, moment) = self.moments.get(&point.number)?;
        (*id == point.id).then_some(moment)
    }

    fn moments_with_points(&self) -> BTreeSet<MomentId> {
        self.points.values().filter_map(|point| self.moment_of(point)).map(|moment| moment.id).collect()
    }

    /// What was announced of logs that have made no point, or one that is gone.
    fn moments_without_points(&self) -> Vec<LogNumber> {
        let has_point = |(number, (id, _)): &(&LogNumber, &(LogId, GroupMoment))| {
            self.points.get(*number).is_some_and(|point| point.id == *id)
        };
        self.moments.iter().filter(|entry| !has_point(entry)).map(|(number, _)| *number).collect()
    }
}
