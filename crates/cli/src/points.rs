//! Recovery points and what retention would do with them, as a person reads it.

use std::fmt::Write as _;

use serde_json::Value;

use crate::show::{bytes, list, moment, number, table, text};

/// The recovery points of a replica.
pub fn points(points: &[Value]) -> String {
    let mut rows: Vec<_> = points
        .iter()
        .map(|point| {
            vec![
                text(&point["id"]).to_owned(),
                number(&point["number"]),
                moment(&point["taken_at"]),
                text(&point["consistency"]).to_owned(),
                bytes(&point["bytes"]),
                pin(point),
                of_group(point),
            ]
        })
        .collect();
    if rows.is_empty() {
        return "No recovery points yet.".into();
    }
    let mut head = vec!["POINT", "NUMBER", "TAKEN AT", "CONSISTENCY", "LOG", "PINNED"];
    if points.iter().any(|point| point["moment"].is_string()) {
        head.push("OF MOMENT");
    } else {
        rows.iter_mut().for_each(|row| row.truncate(head.len()));
    }
    table(&head, &rows)
}

/// "68bc70b3 of shop, 9.2 ms": the moment of its group, and how far apart its points lie.
fn of_group(point: &Value) -> String {
    let Some(moment) = point["moment"].as_str() else { return "-".into() };
    let skew_ms = point["skew_ms"].as_f64().unwrap_or_default();
    let id: String = moment.chars().take(8).collect();
    format!("{id} of {}, {skew_ms:.1} ms", text(&point["group"]))
}

/// "before-upgrade (keeps 1.4 GiB)".
fn pin(point: &Value) -> String {
    if point["pinned"] != true {
        return "-".into();
    }
    let name = point["name"].as_str().unwrap_or("yes").to_owned();
    match point["pin_bytes"].as_u64() {
        Some(1..) => format!("{name} (keeps {})", bytes(&point["pin_bytes"])),
        _ => name,
    }
}

pub fn plan(answer: &Value) -> String {
    let rows: Vec<_> = list(&answer["plan"])
        .iter()
        .map(|step| {
            let words = |list: &[Value]| list.iter().map(text).collect::<Vec<_>>().join(", ");
            let what = match step["id"].as_str() {
                Some(id) => {
                    format!("point {} ({}, {})", number(&step["number"]), id, moment(&step["taken_at"]))
                }
                None => format!("logs {} to {}", number(&step["first"]), number(&step["last"])),
            };
            let why = match text(&step["action"]) {
                "keep" => words(list(&step["why"])),
                "drop" => "nothing asks for it any more".into(),
                "apply" => {
                    format!("{} in {} logs, to the base", bytes(&step["bytes"]), number(&step["logs"]))
                }
                _ => format!(
                    "{} in {} logs, if that is worth it",
                    bytes(&step["bytes"]),
                    number(&step["logs"])
                ),
            };
            vec![text(&step["action"]).to_owned(), what, why]
        })
        .collect();
    if rows.is_empty() {
        return "No recovery points yet, and nothing to do.".into();
    }
    let mut shown = table(&["", "WHAT", "WHY"], &rows);
    if let Some(why) = answer["waits_for"].as_str() {
        let _ = write!(shown, "\nNothing of it is done just now: {why}.");
    }
    shown
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_pin_shows_its_name_and_what_it_costs() {
        let one = |pinned: bool, name: Value, cost: u64| json!({ "id": "ab", "number": 1, "pinned": pinned, "name": name, "pin_bytes": cost });
        let shown = points(&[
            one(true, json!("before-upgrade"), 3 << 20),
            one(true, json!(null), 0),
            one(false, json!(null), 0),
        ]);
        let last = |line: &str| line.split("  ").last().unwrap_or_default().to_owned();
        let ends: Vec<String> = shown.lines().skip(1).map(last).collect();
        assert_eq!(ends, ["before-upgrade (keeps 3.00 MiB)", "yes", "-"]);
    }

    #[test]
    fn a_point_of_a_group_says_of_which_moment() {
        let shown = points(&[
            json!({ "id": "ab", "number": 1, "moment": "68bc70b3c9de", "group": "shop", "skew_ms": 9.24 }),
            json!({ "id": "cd", "number": 2 }),
        ]);
        assert!(shown.contains("68bc70b3 of shop, 9.2 ms") && shown.contains("OF MOMENT"), "{shown}");
        assert!(!points(&[json!({ "id": "cd", "number": 2 })]).contains("MOMENT"));
    }

    #[test]
    fn a_plan_says_why_points_stay_and_what_becomes_of_logs() {
        let answer = json!({ "plan": [
            { "action": "drop", "id": "aa", "number": 1, "taken_at": "2026-11-24T21:00:12Z", "why": [] },
            { "action": "keep", "id": "bb", "number": 2, "taken_at": "2026-11-24T22:00:12Z", "why": ["latest", "hourly"] },
            { "action": "apply", "first": 1, "last": 2, "logs": 2, "bytes": 1024 },
        ], "waits_for": "a failover is in progress" });
        let shown = plan(&answer);
        assert!(
            shown.contains("drop   point 1 (aa, 2026-11-24 21:00:12)  nothing asks for it any more"),
            "{shown}"
        );
        assert!(shown.contains("latest, hourly"), "{shown}");
        assert!(shown.contains("apply  logs 1 to 2"), "{shown}");
        assert!(shown.ends_with("a failover is in progress."), "{shown}");
    }
}
