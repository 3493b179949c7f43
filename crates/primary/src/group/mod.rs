//! Groups of protected VMs: kept in the catalog, each with a task that has its members' cycles come to one moment.
//!
//! ```text
//!  group's task ──▶ meeting ──seat──▶ runner of each member that takes part ─▶ cycle: prepares ─▶ waits ─▶ ONE moment ─▶ sends
//!       ▲ every interval, once nobody sends any more          (who takes none cycles by itself until it can again)
//! ```
//!
//! Who takes part, how long who is waited for, and what the moment is worth, `model::group` decides.

mod rows;
mod task;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use model::group::{Group, GroupMoment, absence};
use model::{GroupName, Phase, Timestamp, VmName};
use qemu::Seat;
use tokio::sync::{mpsc, oneshot};

use crate::cycle::CycleReport;
use crate::error::{Error, Failure, FailureCode};
use crate::ports::Ports;
use crate::relationship::{Relationship, Shared};
use crate::runner::{Handle, Order};
use crate::{Primary, VmStatus};

pub(crate) use rows::GroupRow;
pub(crate) use rows::TABLE;

/// What a relationship knows of its group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Membership {
    pub group: Group,
    /// Between two moments of the group, in place of the relationship's own interval.
    pub interval: Duration,
}

/// What there is to say of a group.
#[derive(Debug, Clone)]
pub struct GroupStatus {
    /// The group.
    pub group: Group,
    /// Between two of its moments.
    pub interval: Duration,
    /// Since when it is there.
    pub made_at: Timestamp,
    /// The newest moment since this site was started.
    pub last: Option<GroupMoment>,
}

/// A moment that was asked for.
#[derive(Debug)]
pub struct Synced {
    /// The moment.
    pub moment: GroupMoment,
    /// Whose point did not come to the replica's site, and why.
    pub failed: Vec<(VmName, Failure)>,
}

/// The runners of a site, shared with the groups' tasks.
pub(crate) type Handles = Arc<Mutex<BTreeMap<VmName, Handle>>>;

/// A group whose task runs.
pub(crate) struct Running {
    row: GroupRow,
    last: Arc<Mutex<Option<GroupMoment>>>,
    orders: mpsc::Sender<oneshot::Sender<Result<Synced, Failure>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Running {
    fn status(&self) -> GroupStatus {
        let GroupRow { group, interval, made_at } = self.row.clone();
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
        GroupStatus { group, interval, made_at, last }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl<P: Ports> Relationship<P> {
    /// Between the starts of two cycles.
    pub(crate) fn interval(&self) -> Duration {
        self.group.as_ref().map_or(self.row.settings.interval, |membership| membership.interval)
    }

    /// It is in this group from now on, or in none; the replica's site is told with the next cycle.
    pub(crate) fn join_group(&mut self, membership: Option<Membership>) {
        if self.group != membership {
            self.group = membership;
            self.squared = false;
            self.book_now();
        }
    }

    /// Why it takes no part in its group's moments.
    pub(crate) fn absence(&self) -> Option<String> {
        let error = self.row.error.as_ref().map(|failure| failure.message.as_str());
        absence(&self.row.phase, self.row.paused, error)
    }

    /// Runs one cycle whose moment is that of its group, or, if the others go without it, its own.
    pub(crate) async fn cycle_together(&mut self, seat: Seat) -> Result<CycleReport, Failure> {
        if let Some(why) = self.absence() {
            seat.leave(&why);
            return Err(Failure::transient(FailureCode::Unfit, why));
        }
        self.stop = self.stopper.renew();
        let started = self.shared.now();
        self.seat = Some(seat.clone());
        let outcome = self.cycle().await;
        self.seat = None;
        match &outcome {
            Ok(_) => drop(seat),
            Err(failure) => seat.leave(&failure.message),
        }
        self.settle(started, &outcome).await;
        outcome
    }
}

impl<P: Ports> Primary<P> {
    /// Makes a group of VMs that are protected here, to one peer. Without `every` its interval is the shortest of theirs.
    pub async fn create_group(&self, group: Group, every: Option<Duration>) -> Result<GroupStatus, Error> {
        let _changing = self.changing_groups.lock().await;
        group.check().map_err(Error::Setting)?;
        if self.groups().contains_key(&group.name) {
            let name = &group.name;
            return Err(Error::Taken(format!(
                "there is a group {name} already; 'afterimage group remove {name}' removes it"
            )));
        }
        for member in &group.members {
            if let Some(other) = self.group_of(&member.vm) {
                return Err(Error::Taken(format!(
                    "{} is in group {other} already, and a VM is in one group at most; 'afterimage group remove {other}' first",
                    member.vm
                )));
            }
        }
        let members: Vec<VmStatus> = group
            .members
            .iter()
            .map(|member| self.get(&member.vm).ok_or_else(|| Error::NoSuchVm(member.vm.clone())))
            .collect::<Result<_, _>>()?;
        check_members(&members)?;
        let shortest = members.iter().map(|member| member.settings.interval).min().unwrap_or_default();
        let interval = every.unwrap_or(shortest);
        crate::protect::check_interval(interval, self.shared.config.interval_min_s)?;
        let row = GroupRow { group, interval, made_at: self.shared.now() };
        rows::write(&self.shared.catalog, &row.group.name, Some(&row)).await?;
        Ok(self.run_group(row).await)
    }

    /// Ends a group; each of its VMs is replicated by itself again.
    pub async fn remove_group(&self, name: &GroupName) -> Result<GroupStatus, Error> {
        let _changing = self.changing_groups.lock().await;
        let status = self.group(name)?;
        rows::write(&self.shared.catalog, name, None).await?;
        self.groups().remove(name);
        for member in &status.group.members {
            self.tell_member(&member.vm, None).await;
        }
        Ok(status)
    }

    /// Takes a VM out of the group that it is in. Gives the group.
    pub async fn leave_group(&self, vm: &VmName) -> Result<Option<GroupName>, Error> {
        let _changing = self.changing_groups.lock().await;
        let found =
            self.groups().values().find(|running| running.row.group.has(vm)).map(|found| found.row.clone());
        let Some(row) = found else { return Ok(None) };
        let name = row.group.name.clone();
        let left = row.group.clone().without(vm).map(|group| GroupRow { group, ..row });
        rows::write(&self.shared.catalog, &name, left.as_ref()).await?;
        self.groups().remove(&name);
        self.tell_member(vm, None).await;
        if let Some(row) = left {
            self.run_group(row).await;
        }
        Ok(Some(name))
    }

    /// The group that a VM is in.
    pub fn group_of(&self, vm: &VmName) -> Option<GroupName> {
        self.groups()
            .values()
            .find(|running| running.row.group.has(vm))
            .map(|found| found.row.group.name.clone())
    }

    /// The groups of this site, by name.
    pub fn group_list(&self) -> Vec<GroupStatus> {
        self.groups().values().map(Running::status).collect()
    }

    /// One of them.
    pub fn group(&self, name: &GroupName) -> Result<GroupStatus, Error> {
        self.groups().get(name).map(Running::status).ok_or_else(|| Error::NoSuchGroup(name.clone()))
    }

    /// Fixes a moment of a group now, and waits until its points are at the replica's site.
    pub async fn sync_group(&self, name: &GroupName) -> Result<Synced, Error> {
        let no_such_group = || Error::NoSuchGroup(name.clone());
        let orders =
            self.groups().get(name).map(|running| running.orders.clone()).ok_or_else(no_such_group)?;
        let (done, answer) = oneshot::channel();
        orders.send(done).await.map_err(|_| no_such_group())?;
        Ok(answer.await.map_err(|_| no_such_group())??)
    }

    /// What a relationship that is just loaded knows of its group.
    pub(crate) fn membership(groups: &[GroupRow], vm: &VmName) -> Option<Membership> {
        let row = groups.iter().find(|row| row.group.has(vm))?;
        Some(Membership { group: row.group.clone(), interval: row.interval })
    }

    /// All groups that the catalog remembers.
    pub(crate) fn load_groups(shared: &Shared<P>) -> Result<Vec<GroupRow>, Error> {
        Ok(rows::load(&shared.catalog)?)
    }

    /// Starts the task of a group whose members know of it.
    pub(crate) fn start_group(&self, row: GroupRow) -> GroupStatus {
        let (orders, received) = mpsc::channel(16);
        let last = Arc::default();
        let task = task::Task::new(row.clone(), self.shared.clone(), self.handles.clone(), Arc::clone(&last));
        let running = Running { row, last, orders, task: tokio::spawn(task.run(received)) };
        let status = running.status();
        self.groups().insert(status.group.name.clone(), running);
        status
    }

    async fn run_group(&self, row: GroupRow) -> GroupStatus {
        let membership = Membership { group: row.group.clone(), interval: row.interval };
        for member in &row.group.members {
            self.tell_member(&member.vm, Some(membership.clone())).await;
        }
        self.start_group(row)
    }

    /// Its runner comes to it when it has done what it does.
    async fn tell_member(&self, vm: &VmName, membership: Option<Membership>) {
        let orders = self.lock().get(vm).map(|handle| handle.orders.clone());
        if let Some(orders) = orders {
            let _ = orders.send(Order::Join(membership)).await;
        }
    }

    pub(crate) fn groups(&self) -> std::sync::MutexGuard<'_, BTreeMap<GroupName, Running>> {
        self.running_groups.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether VMs can be a group: of one peer, and still this site's.
fn check_members(members: &[VmStatus]) -> Result<(), Error> {
    let Some(first) = members.first() else { return Ok(()) };
    for member in members {
        if member.settings.peer != first.settings.peer {
            return Err(Error::Setting(format!(
                "{} is replicated to {}, {} to {}; the VMs of a group are replicated to one peer, for somebody to have all of them",
                first.name, first.settings.peer, member.name, member.settings.peer
            )));
        }
        if member.phase == Phase::FailedOver {
            return Err(Error::Setting(format!(
                "{} was failed over and does not run here any more; group it where it runs",
                member.name
            )));
        }
    }
    Ok(())
}
