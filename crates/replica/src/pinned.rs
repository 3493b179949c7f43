//! Points that a person has pinned: how they come and go, and what all of retention looks like.
//!
//! A pin is in the VM's row and in its description, so that it outlives a restart, a move and the catalog. On
//! the way in it is described first, on the way out last: whatever cuts it short, the description has no pin less
//! than the catalog.

use std::ops::RangeInclusive;

use chain::RetentionPlan;
use model::group::GroupMoment;
use model::{LogNumber, PinnedPoint, PointInfo, PointName, PointRef, VmId, find_point};
use steps::durable_step;

use crate::error::{Error, Result};
use crate::store::Store;
use crate::vm::State;

/// A recovery point as it is shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShownPoint {
    /// The point.
    pub point: PointInfo,
    /// The bytes of the log that makes it; none once that is folded into the base.
    pub log_bytes: Option<u64>,
    /// It is pinned by hand.
    pub pinned: Option<PinnedPoint>,
    /// The bytes of logs that are there only for this pin.
    pub pin_bytes: u64,
    /// The moment of the VM's group that it is of.
    pub moment: Option<GroupMoment>,
}

/// A run of logs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogRun {
    /// Their numbers.
    pub numbers: RangeInclusive<LogNumber>,
    /// How many there are.
    pub logs: usize,
    /// The bytes of their files.
    pub bytes: u64,
}

/// What retention would do now.
#[derive(Debug, Clone)]
pub struct ShownPlan {
    /// The plan itself.
    pub plan: RetentionPlan,
    /// All points that are shown now, oldest first.
    pub points: Vec<PointInfo>,
    /// The logs that would be folded into the base at once.
    pub apply: Option<LogRun>,
    /// The logs that would be merged if that is worth it; those that were looked at and are not are left out.
    pub merge: Vec<LogRun>,
    /// Why nothing of it is done just now, if that is so.
    pub waits_for: Option<&'static str>,
}

impl Store {
    /// Keeps a point until [`Store::unpin_point`]. A point that is pinned already gets the name, if one is given.
    pub fn pin_point(&self, vm: VmId, wanted: &PointRef, name: Option<PointName>) -> Result<PinnedPoint> {
        let vm = self.vm(vm)?;
        let mut state = vm.live()?;
        let point = find(&state, wanted)?;
        if state.row.doc.migrating.is_some() {
            return Err(Error::busy(vm.id, "its storage is being moved; pin the point afterwards"));
        }
        let mut row = state.row.clone();
        let pinned = &mut row.doc.pinned;
        let taken = pinned.iter().find(|pin| name.is_some() && pin.name == name && pin.id != point.id);
        if let (Some(taken), Some(name)) = (taken, &name) {
            let (vm, point) = (state.row.name.clone(), taken.id);
            return Err(Error::NameTaken { vm, name: name.clone(), point });
        }
        let pin = match pinned.iter_mut().find(|pin| pin.id == point.id) {
            Some(pin) => {
                pin.name = name.or_else(|| pin.name.take());
                pin.clone()
            }
            None => {
                let PointInfo { number, id, .. } = point;
                let pin = PinnedPoint { number, id, name, pinned_at: self.now() };
                pinned.push(pin.clone());
                pin
            }
        };
        durable_step("replica::pin::describing");
        crate::rebuild::describe_row(&row, &state)?;
        durable_step("replica::pin::described");
        self.commit_row(&mut state, row)?;
        durable_step("replica::pin::committed");
        Ok(pin)
    }

    /// Lets a point go that was pinned by hand; retention decides of it again.
    pub fn unpin_point(&self, vm: VmId, wanted: &PointRef) -> Result<PointInfo> {
        let vm = self.vm(vm)?;
        let mut state = vm.live()?;
        let point = find(&state, wanted)?;
        let mut row = state.row.clone();
        row.doc.pinned.retain(|pin| pin.id != point.id);
        durable_step("replica::unpin::committing");
        self.commit_row(&mut state, row)?;
        durable_step("replica::unpin::committed");
        crate::rebuild::describe(&state)?;
        durable_step("replica::unpin::described");
        drop(state);
        self.wake(vm.id);
        Ok(point)
    }

    /// The point that a person means by an id, the beginning of one, or a name: the one place where that is decided.
    pub fn find_point(&self, vm: VmId, wanted: &PointRef) -> Result<PointInfo> {
        let vm = self.vm(vm)?;
        let state = vm.live()?;
        find(&state, wanted)
    }

    /// The recovery points of a VM with all that there is to show of them, oldest first.
    pub fn shown_points(&self, vm: VmId) -> Result<Vec<ShownPoint>> {
        let vm = self.vm(vm)?;
        let state = vm.live()?;
        let costs = self.plan(&state, self.now(), false).0.cost_of_pins();
        let shown = state.points.values().map(|point| ShownPoint {
            point: *point,
            log_bytes: state.logs.get(&point.number).map(|log| log.row.bytes),
            pinned: state.row.doc.pinned.iter().find(|pin| pin.id == point.id).cloned(),
            pin_bytes: costs
                .iter()
                .filter(|(pin, _)| *pin == point.number)
                .map(|(_, logs)| run(&state, logs.clone()).bytes)
                .sum(),
            moment: state.moment_of(point).cloned(),
        });
        Ok(shown.collect())
    }

    /// What retention would do now, without doing it.
    pub fn retention_plan(&self, vm: VmId) -> Result<ShownPlan> {
        let vm = self.vm(vm)?;
        self.note_shared(&vm);
        let state = vm.live()?;
        let (plan, through) = self.plan(&state, self.now(), false);
        let waits_for = match &state.row.doc {
            _ if state.in_failover() => Some("a failover is in progress"),
            doc if doc.migrating.is_some() => Some("the replica's storage is being moved"),
            doc if doc.unsure => Some("the flat files are being written anew"),
            _ => None,
        };
        let is_due = |group: &&RangeInclusive<LogNumber>| {
            let numbers: Vec<LogNumber> =
                state.logs.range((*group).clone()).map(|(number, _)| *number).collect();
            state.is_to_be_looked_at(&numbers)
        };
        let merge = plan.compact.iter().filter(is_due).map(|group| run(&state, group.clone())).collect();
        Ok(ShownPlan {
            points: state.points.values().copied().collect(),
            apply: through.map(|through| run(&state, state.applied().next()..=through)),
            merge,
            plan,
            waits_for,
        })
    }

    /// The bytes of logs that only points pinned by hand keep.
    pub(crate) fn pin_bytes(&self, state: &State) -> u64 {
        let costs = self.plan(state, self.now(), false).0.cost_of_pins();
        costs.into_iter().map(|(_, logs)| run(state, logs).bytes).sum()
    }
}

fn find(state: &State, wanted: &PointRef) -> Result<PointInfo> {
    let points: Vec<PointInfo> = state.points.values().copied().collect();
    find_point(&points, &state.row.doc.pinned, wanted)
        .map_err(|source| Error::UnknownPoint { vm: state.row.name.clone(), source })
}

/// The logs within a range of numbers, as they are now.
fn run(state: &State, numbers: RangeInclusive<LogNumber>) -> LogRun {
    let (mut logs, mut bytes) = (0, 0);
    for log in state.logs.range(numbers.clone()).map(|(_, log)| log) {
        logs += 1;
        bytes += log.row.bytes;
    }
    LogRun { numbers, logs, bytes }
}
