//! Recovery points as commands show them and name them.

use chain::KeptFor;
use model::group::GroupMoment;
use model::{LogNumber, PointInfo, PointRef, VmId};
use replica::{LogRun, ShownPlan, ShownPoint, Store};
use serde_json::{Value, json};

use crate::clock::rfc3339;
use crate::failure::{Code, Failure};

/// The point that is named, or the newest.
pub(crate) fn point_or_newest(
    store: &Store,
    vm: VmId,
    wanted: Option<&PointRef>,
) -> Result<PointInfo, Failure> {
    match wanted {
        Some(wanted) => Ok(store.find_point(vm, wanted)?),
        None => store.points(vm)?.last().copied().ok_or_else(|| {
            let vm = store.name(vm).map_or_else(|| vm.to_string(), String::from);
            let message = format!("{vm} has no recovery point yet; 'afterimage status {vm}' says why");
            Failure::new(Code::NoSuchPoint, message)
        }),
    }
}

/// The recovery points of a replica, oldest first.
pub(crate) fn shown(store: &Store, vm: VmId) -> Result<Value, Failure> {
    let one = |shown: &ShownPoint| {
        let point = &shown.point;
        json!({
            "id": point.id, "number": point.number, "taken_at": rfc3339(point.taken_at),
            "consistency": point.consistency, "bytes": shown.log_bytes, "pinned": shown.pinned.is_some(),
            "name": shown.pinned.as_ref().and_then(|pin| pin.name.as_ref()), "pin_bytes": shown.pin_bytes,
            "group": shown.moment.as_ref().map(|moment| &moment.group),
            "moment": shown.moment.as_ref().map(|moment| moment.id),
            "skew_ms": shown.moment.as_ref().map(skew_ms),
        })
    };
    Ok(json!({ "points": store.shown_points(vm)?.iter().map(one).collect::<Vec<_>>() }))
}

/// How far apart the points of a moment lie at the most, in milliseconds.
pub(crate) fn skew_ms(moment: &GroupMoment) -> f64 {
    moment.skew_us as f64 / 1e3
}

/// What retention would do now: each point, then what would become of logs.
pub(crate) fn plan(store: &Store, vm: VmId) -> Result<Value, Failure> {
    let planned = store.retention_plan(vm)?;
    let points = planned.points.iter().map(|point| {
        let why = reasons(&planned, point.number);
        json!({
            "action": if why.is_empty() { "drop" } else { "keep" },
            "id": point.id, "number": point.number, "taken_at": rfc3339(point.taken_at), "why": why,
        })
    });
    let logs = |action: &str, run: &LogRun| {
        let (first, last) = (run.numbers.start(), run.numbers.end());
        json!({ "action": action, "first": first, "last": last, "logs": run.logs, "bytes": run.bytes })
    };
    let applied = planned.apply.iter().map(|run| logs("apply", run));
    let merged = planned.merge.iter().map(|run| logs("merge", run));
    let all: Vec<Value> = points.chain(applied).chain(merged).collect();
    Ok(json!({ "plan": all, "waits_for": planned.waits_for }))
}

/// Why a point is kept; nothing if it is not.
fn reasons(planned: &ShownPlan, number: LogNumber) -> Vec<&'static str> {
    let kept = planned.plan.keep.iter().find(|kept| kept.number == number);
    kept.into_iter().flat_map(|kept| &kept.why).copied().map(KeptFor::code).collect()
}
