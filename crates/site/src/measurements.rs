//! The monitoring windows as `measurements` shows them. Names are stable.

use std::time::Duration;

use model::{Timestamp, VmId};
use serde_json::{Value, json};

use crate::clock::{rfc3339, seconds};

/// What a VM protected here has come to.
pub(crate) fn of_primary(status: &primary::VmStatus, window: Duration) -> Value {
    let sum = &status.measured.sum;
    let error = status.last_error.as_ref();
    json!({
        "name": status.name, "id": status.vm, "role": crate::status::sending_role(status), "peer": status.settings.peer,
        "since": rfc3339(status.measured.since), "window_h": window.as_secs() / 3600,
        "health": status.health.health, "health_reason": status.health.reason,
        "cycles_done": sum.done, "cycles_missed": sum.missed, "cycles_failed": sum.failed,
        "pass_cycles_done": sum.passes,
        "log_bytes": sum.log_bytes, "log_bytes_avg": sum.log_bytes_avg(), "log_bytes_max": sum.log_bytes_max,
        "latency_avg_s": sum.latency_avg().map(seconds), "latency_max_s": millis(sum.latency_ms_max),
        "pending_bytes": status.pending_bytes,
        "last_error": error.map(|error| &error.message), "last_error_at": error.map(|error| rfc3339(error.at)),
    })
}

/// What a replica kept here has come to.
pub(crate) fn of_replica(
    vm: VmId,
    status: &replica::ReplicaStatus,
    window: Duration,
    now: Timestamp,
) -> Value {
    let sum = &status.measured.sum;
    let newest = status.points.iter().max_by_key(|point| point.number);
    json!({
        "name": status.name, "id": vm, "role": "replica", "peer": status.peer,
        "since": rfc3339(status.measured.since), "window_h": window.as_secs() / 3600,
        "health": status.facts.health.health, "health_reason": status.facts.health.reason,
        "logs_received": sum.logs, "log_bytes": sum.log_bytes, "log_bytes_max": sum.log_bytes_max,
        "gap_max_s": millis(sum.gap_ms_max),
        "newest_point_age_s": newest.map(|point| seconds(now.since(point.taken_at))),
        "applies_done": sum.applies, "applies_failed": sum.applies_failed,
    })
}

fn millis(millis: u64) -> f64 {
    seconds(Duration::from_millis(millis))
}
