//! Monitoring windows as a person and as a spreadsheet read them.

use std::fmt::Write as _;

use serde_json::Value;

use crate::show::{bytes, list, moment, number, seconds, table, text};

/// The columns of the comma-separated form: those of both sides, by their names in the JSON form. New ones come last.
const COLUMNS: &[&str] = &[
    "name",
    "id",
    "role",
    "peer",
    "since",
    "window_h",
    "health",
    "health_reason",
    "cycles_done",
    "cycles_missed",
    "cycles_failed",
    "pass_cycles_done",
    "log_bytes",
    "log_bytes_avg",
    "log_bytes_max",
    "latency_avg_s",
    "latency_max_s",
    "pending_bytes",
    "last_error",
    "last_error_at",
    "logs_received",
    "gap_max_s",
    "newest_point_age_s",
    "applies_done",
    "applies_failed",
];

/// One table for VMs protected here and replicas passed on from here, one for replicas kept here.
pub fn tables(measured: &[Value]) -> String {
    if measured.is_empty() {
        return "No VM is protected here, and there is no replica.".into();
    }
    let (replicas, primaries): (Vec<_>, Vec<_>) = measured.iter().partition(|vm| vm["role"] == "replica");
    let mut shown = String::new();
    if !primaries.is_empty() {
        shown.push_str(&primaries_table(&primaries));
    }
    for vm in primaries.iter().filter(|vm| vm["last_error"].is_string()) {
        let (name, at) = (sent(vm), moment(&vm["last_error_at"]));
        let _ = writeln!(shown, "\n{name}: last error at {at}: {}", text(&vm["last_error"]));
    }
    if !replicas.is_empty() {
        let gap = if primaries.is_empty() { "" } else { "\n" };
        let _ = write!(shown, "{gap}{}", replicas_table(&replicas));
    }
    shown
}

/// A VM may be kept here, and passed on from here.
fn sent(vm: &Value) -> String {
    let name = text(&vm["name"]);
    if vm["role"] == "extension" { format!("{name} to {}", text(&vm["peer"])) } else { name.to_owned() }
}

fn primaries_table(vms: &[&Value]) -> String {
    let row = |vm: &&Value| {
        vec![
            sent(vm),
            moment(&vm["since"]),
            number(&vm["cycles_done"]),
            number(&vm["cycles_missed"]),
            number(&vm["cycles_failed"]),
            bytes(&vm["log_bytes_avg"]),
            bytes(&vm["log_bytes_max"]),
            seconds(&vm["latency_avg_s"]),
            seconds(&vm["latency_max_s"]),
            bytes(&vm["pending_bytes"]),
        ]
    };
    table(
        &["VM", "SINCE", "DONE", "MISSED", "FAILED", "AVERAGE", "LARGEST", "LATENCY", "LONGEST", "PENDING"],
        &vms.iter().map(row).collect::<Vec<_>>(),
    )
}

fn replicas_table(vms: &[&Value]) -> String {
    let row = |vm: &&Value| {
        vec![
            text(&vm["name"]).to_owned(),
            moment(&vm["since"]),
            number(&vm["logs_received"]),
            bytes(&vm["log_bytes"]),
            bytes(&vm["log_bytes_max"]),
            seconds(&vm["gap_max_s"]),
            number(&vm["applies_done"]),
            number(&vm["applies_failed"]),
        ]
    };
    table(
        &["REPLICA", "SINCE", "LOGS", "BYTES", "LARGEST", "LONGEST GAP", "APPLIES", "FAILED"],
        &vms.iter().map(row).collect::<Vec<_>>(),
    )
}

/// A line of names, then a line for each VM.
pub fn csv(answer: &Value) -> String {
    csv_lines(COLUMNS, list(&answer["measurements"]))
}

/// A line of names, and one for each row.
pub fn csv_lines(columns: &[&str], rows: &[Value]) -> String {
    let mut lines = columns.join(",");
    for row in rows {
        let cells: Vec<String> = columns.iter().map(|column| cell(&row[*column])).collect();
        let _ = write!(lines, "\n{}", cells.join(","));
    }
    lines
}

/// A cell as RFC 4180 wants it. A text that a spreadsheet would take for a formula is marked as one that is none: an
/// error's words may be another site's.
fn cell(value: &Value) -> String {
    let text = match value {
        Value::Null => return String::new(),
        Value::String(text) => text.as_str(),
        number => return number.to_string(),
    };
    let mark = if text.starts_with(['=', '+', '-', '@', '\t', '\r']) { "'" } else { "" };
    if mark.is_empty() && !text.contains([',', '"', '\n', '\r']) {
        return text.to_owned();
    }
    format!("\"{mark}{}\"", text.replace('"', "\"\"").replace(['\n', '\r'], " "))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_spreadsheet_reads_what_an_error_says_as_text() {
        let vm =
            json!({ "name": "web", "role": "primary", "cycles_done": 3, "last_error": "=1+1, \"cut\"\nx" });
        let shown = csv(&json!({ "measurements": [vm] }));
        let lines: Vec<&str> = shown.lines().collect();
        assert_eq!(lines.len(), 2);
        assert!(lines[1].starts_with("web,,primary,,"), "{shown}");
        assert!(lines[1].contains(",\"'=1+1, \"\"cut\"\" x\","), "{shown}");
        assert_eq!(lines[0].split(',').count(), COLUMNS.len());
    }

    #[test]
    fn each_side_has_its_table_and_the_last_error_its_line() {
        let primary = json!({
            "name": "web", "role": "primary", "cycles_done": 3, "cycles_missed": 1,
            "last_error": "the line is cut", "last_error_at": "2026-11-24T21:00:12Z",
        });
        let replica = json!({ "name": "db", "role": "replica", "logs_received": 7, "gap_max_s": 31.5 });
        let shown = tables(&[primary, replica]);
        assert!(shown.contains("web: last error at 2026-11-24 21:00:12: the line is cut"), "{shown}");
        assert!(shown.contains("REPLICA") && shown.contains("31.5 s"), "{shown}");
    }
}
