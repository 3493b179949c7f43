//! Keeps a replica in shape: drops points, folds logs into the base, merges logs. One step at a time:
//! decide from what is true now, do it, decide again.

use chain::{CompactRule, RetentionInput, RetentionPlan, plan_retention};
use model::{BaseState, DiskName, LogNumber, Phase, PointInfo, Timestamp, VmId};
use steps::durable_step;

use crate::apply::ApplyJob;
use crate::error::{Error, Result};
use crate::folder::Folder;
use crate::rows;
use crate::store::Store;
use crate::vm::{State, Vm};

/// What one step of maintenance did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// There was nothing to do, or it must wait (a hold, a failed apply whose time has not come, a move).
    Idle,
    /// Points are no longer shown.
    Dropped(Vec<LogNumber>),
    /// Logs were folded into the base.
    Applied {
        /// The newest of them.
        through: LogNumber,
        /// The bytes written to the flat files.
        written_bytes: u64,
    },
    /// Logs were merged.
    Compacted {
        /// How many there are fewer.
        logs: usize,
        /// The bytes of the merged logs' files.
        written_bytes: u64,
    },
    /// A group of logs was looked at and is not worth merging.
    LeftAsItIs,
    /// A failover that was cut off has been carried on.
    FailoverReady,
    /// A failover that was completed is at its end: the VM is no replica any more.
    Released,
    /// The flat files were written anew as they are, to be sure that they are on the disk.
    Rewritten,
}

/// What is to be done.
enum Decision {
    Nothing,
    Drop(Vec<LogNumber>),
    Apply(ApplyJob),
    Compact(Vec<LogNumber>, CompactRule),
    Failover,
    Complete(LogNumber),
    Rewrite(Folder, Vec<DiskName>),
}

impl Store {
    /// Does the next thing that there is to do for a VM. The background workers call it; a test or a
    /// program without workers calls it until it is [`Step::Idle`].
    pub fn maintain(&self, vm: VmId) -> Result<Step> {
        let vm = self.vm(vm)?;
        let _work = vm.work();
        let outcome = self.step(&vm);
        if let Err(Error::Damaged { path, .. }) = &outcome {
            self.check_damage(&vm, path)?;
        }
        outcome
    }

    fn step(&self, vm: &Vm) -> Result<Step> {
        self.tidy_migration(vm)?;
        let decision = self.decide(vm)?;
        match decision {
            Decision::Nothing => Ok(Step::Idle),
            Decision::Drop(points) => Ok(Step::Dropped(points)),
            Decision::Apply(job) => self.run_apply(vm, job),
            Decision::Compact(group, rule) => self.compact(vm, &group, rule),
            Decision::Rewrite(folder, disks) => self.rewrite(vm, &folder, &disks),
            Decision::Failover => self.carry_on_failover(vm).map(|()| Step::FailoverReady),
            Decision::Complete(point) => self.carry_on_completion(vm, point),
        }
    }

    fn decide(&self, vm: &Vm) -> Result<Decision> {
        self.note_shared(vm);
        let mut state = vm.live()?;
        self.expire_holds(&mut state)?;
        let now = self.now();
        if let Some(failover) = &state.row.doc.failover {
            return Ok(match failover {
                failover if !failover.ready => Decision::Failover,
                failover if failover.completing => Decision::Complete(failover.point),
                _ => Decision::Nothing,
            });
        }
        if state.row.doc.migrating.is_some() {
            return Ok(Decision::Nothing);
        }
        if state.row.doc.unsure {
            return Ok(Decision::Rewrite(state.folder(), state.row.doc.disks.clone()));
        }
        let (plan, through) = self.plan(&state, now, false);
        if let Some(through) = through {
            return self.begin_apply(&mut state, through, plan.drop).map(Decision::Apply);
        }
        if !plan.drop.is_empty() {
            let (id, gone) = (vm.id, plan.drop.clone());
            durable_step("replica::retention::dropping");
            self.catalog().write(move |tx| rows::remove_points(tx, id, &gone))?;
            durable_step("replica::retention::committed");
            state.points.retain(|number, _| !plan.drop.contains(number));
            return Ok(Decision::Drop(plan.drop));
        }
        let groups = plan.compact.into_iter().map(|group| {
            let numbers = state.logs.range(group).map(|(number, _)| *number);
            numbers.collect::<Vec<_>>()
        });
        let group = groups.into_iter().find(|group| state.is_to_be_looked_at(group));
        Ok(group.map_or(Decision::Nothing, |group| {
            let rule = state.compact_rule(&group);
            Decision::Compact(group, rule)
        }))
    }

    /// What retention says now, and how far to apply now, if at all. Past a barrier goes only who put it up.
    pub(crate) fn plan(
        &self,
        state: &State,
        now: Timestamp,
        past_barrier: bool,
    ) -> (RetentionPlan, Option<LogNumber>) {
        let base = BaseState {
            apply: &state.apply,
            held: state.is_held(now),
            barred: state.is_barred(now) && !past_barrier,
            retry_at: state.retry_at,
        };
        let points: Vec<PointInfo> = state.points.values().copied().collect();
        let logs: Vec<LogNumber> = state.logs.keys().copied().collect();
        let pins: Vec<LogNumber> = state.pins.keys().copied().collect();
        let forwarded = state.marks_kept();
        let shared: Vec<LogNumber> = state.shared.iter().copied().collect();
        let extra_hourly = state.row.doc.points;
        let plan = plan_retention(&RetentionInput {
            points: &points,
            logs: &logs,
            resync: matches!(
                state.row.doc.phase,
                Phase::ResyncRequired { .. } | Phase::Resynchronizing { .. }
            ),
            applied: state.applied(),
            pins: &pins,
            pinned: &state.pinned(),
            forwarded: &forwarded,
            shared: &shared,
            held: base.stays(),
            extra_hourly,
            recent: if extra_hourly == 0 { 0 } else { self.inner.config.recent_points },
            now,
        });
        let planned = plan.apply_through.or(plan.apply_initial_through);
        let unfinished = state.row.doc.applying.as_ref().map(|applying| applying.through);
        let through = base.apply_through(planned, unfinished, now);
        (plan, through)
    }

    /// Applies what retention lets, barrier or not; false if there was nothing to apply.
    pub(crate) fn apply_now(&self, vm: &Vm) -> Result<bool> {
        let _work = vm.work();
        self.note_shared(vm);
        let job = {
            let mut state = vm.live()?;
            self.expire_holds(&mut state)?;
            let now = self.now();
            if state.in_failover() || state.row.doc.migrating.is_some() {
                return Ok(false);
            }
            let (plan, through) = self.plan(&state, now, true);
            match through {
                Some(through) => self.begin_apply(&mut state, through, plan.drop)?,
                None => return Ok(false),
            }
        };
        self.run_apply(vm, job).map(|_| true)
    }

    /// Lets a failed apply be tried again now: its cause was mended.
    pub fn resume(&self, vm: VmId) -> Result<()> {
        let found = self.vm(vm)?;
        let mut state = found.live()?;
        state.retry_at = Timestamp::default();
        state.looked_at.clear();
        drop(state);
        self.wake(vm);
        Ok(())
    }
}
