//! What happens only for a reason: a resynchronization, and the end of a recovery point.
//!
//! Both are safe, and both are what users pay for; a cycle that failed, a site that was killed or an answer that was
//! lost is a reason for neither.

use std::collections::BTreeSet;

use model::{LogNumber, Phase, PointInfo, ResyncReason, Timestamp, VmId};

use super::{Checked, World, wrong};
use crate::event::Side;

/// What has happened to a VM that a resynchronization can come of.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Causes {
    /// Its process was started again.
    pub restarted: bool,
    /// A disk got another size.
    pub resized: bool,
    /// A person asked for it.
    pub asked: bool,
    /// It was failed over, which gives points up.
    pub failed_over: bool,
}

impl World {
    /// A relationship that is to be resynchronized has a reason that is true.
    pub(super) fn check_cause(&self, place: usize, phase: &Phase) -> Checked {
        let Phase::ResyncRequired { why } = phase else { return Ok(()) };
        let (causes, vm) = (self.causes[place], self.vms[place].id);
        let late = self.line.lock().late_made > 0;
        let lost = vm.is_some_and(|vm| self.truth.may_lose(vm));
        let true_reason = match why {
            ResyncReason::BitmapLost(_) => causes.restarted,
            ResyncReason::BitmapInconsistent(_) | ResyncReason::DisksChanged(_) => false,
            ResyncReason::DiskResized(_) => causes.resized,
            // A log that was given up and comes late can take the place of the one that was sent instead.
            // So can one that was refused because the disk or the catalog failed at the very end, and whose file could
            // not be removed either: the next start takes it in.
            ResyncReason::ChainBroken(_) => late || lost || self.storage_failed,
            ResyncReason::Requested => causes.asked,
            // Nobody fails over for good here, brings images, or restores over disks.
            ResyncReason::Reversed | ResyncReason::Seeded | ResyncReason::Restored(_) => false,
        };
        if true_reason {
            Ok(())
        } else {
            wrong(format!("{} is to be resynchronized, but: {why}", self.vms[place].name))
        }
    }

    /// Points that are no longer shown are ones that the settings let go.
    pub(super) fn check_gone(
        &self,
        place: usize,
        vm: VmId,
        before: &[PointInfo],
        now: &[PointInfo],
    ) -> Checked {
        if self.truth.may_lose(vm) || self.causes[place].failed_over {
            return Ok(());
        }
        let all: Vec<PointInfo> = before.iter().chain(now).copied().collect();
        let (extra, recent) = (self.plan.vms[place].points, self.plan.recent_points);
        let clock = self.clock(Side::Replica).latest();
        let viewed = self.viewed(vm);
        for gone in before.iter().filter(|point| !now.iter().any(|still| still.id == point.id)) {
            if viewed.contains(&gone.number) || is_wanted(gone, &all, extra, recent, clock) {
                let name = &self.vms[place].name;
                return wrong(format!("{name} no longer shows point {}, which is to be kept", gone.number));
            }
        }
        Ok(())
    }
}

/// Whether the settings want a point to be kept, as `docs/` promises it: the newest ones, all of the current hour, and
/// the newest of each of so many hours.
fn is_wanted(point: &PointInfo, all: &[PointInfo], extra: u8, recent: usize, now: Timestamp) -> bool {
    let newer: Vec<&PointInfo> = all.iter().filter(|other| other.number > point.number).collect();
    let numbers: BTreeSet<LogNumber> = newer.iter().map(|point| point.number).collect();
    if numbers.is_empty() {
        return true;
    }
    if extra == 0 {
        return false;
    }
    let hours: BTreeSet<i64> = newer.iter().map(|point| hour(point.taken_at)).collect();
    let stands_for_its_hour = !hours.contains(&hour(point.taken_at)) && hours.len() <= usize::from(extra);
    numbers.len() < recent || hour(point.taken_at) >= hour(now) || stands_for_its_hour
}

const fn hour(at: Timestamp) -> i64 {
    at.0.div_euclid(3_600_000_000)
}
