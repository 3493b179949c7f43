//! The monitoring window with real sites: what it counts, that it outlives a restart, that a planned stop counts as
//! nothing missed and a line that is cut does, and that health says so.

mod common;

use std::time::Duration;

use common::{LONG, VM, World};
use rig::{Site, wait_for};
use serde_json::Value;

/// Between two cycles.
const EVERY: &str = "2s";
/// More than three of them. Nothing happens in it that could be waited for.
const SOME_INTERVALS: Duration = Duration::from_secs(7);

fn measured(site: &Site, more: &[&str]) -> Value {
    let answer = site.ok(&[&["measurements", VM], more].concat()).unwrap();
    answer["measurements"][0].clone()
}

fn number(value: &Value, key: &str) -> u64 {
    value[key].as_u64().unwrap_or_else(|| panic!("{key} in {value}"))
}

fn wait_measured(site: &Site, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
    wait_for(what, LONG, || {
        let found = measured(site, &[]);
        Ok(is_so(&found).then_some(found))
    })
    .unwrap()
}

#[test]
fn a_window_counts_cycles_through_a_planned_stop_and_a_cut_line() {
    let mut world = World::new(81);
    world.write(1, Duration::from_millis(2));
    world.protect(EVERY, &[]);
    world.replicating();
    let before = wait_measured(&world.branch, "cycles to be done", |vm| number(vm, "cycles_done") >= 3);
    assert!(number(&before, "pass_cycles_done") >= 1, "{before}");
    assert!(number(&before, "log_bytes_max") >= number(&before, "log_bytes_avg"), "{before}");
    assert!(number(&before, "log_bytes_avg") > 0, "{before}");
    let (average, longest) =
        (before["latency_avg_s"].as_f64().unwrap(), before["latency_max_s"].as_f64().unwrap());
    assert!(average > 0.0 && longest >= average, "{before}");
    assert_eq!((number(&before, "cycles_failed"), &before["last_error"]), (0, &Value::Null), "{before}");

    // A planned stop: time passes in which nothing runs. It is no error, and nothing was missed.
    let before = measured(&world.branch, &[]);
    world.branch.stop();
    std::thread::sleep(SOME_INTERVALS);
    world.branch.serve().unwrap();
    let done = number(&before, "cycles_done") + 2;
    let after = wait_measured(&world.branch, "cycles to go on", |vm| number(vm, "cycles_done") >= done);
    assert_eq!(after["since"], before["since"], "the window outlives a restart");
    let missed = number(&after, "cycles_missed") - number(&before, "cycles_missed");
    assert!(missed < 3, "{missed} cycles missed by a planned stop of more than three intervals: {after}");
    assert_eq!((number(&after, "cycles_failed"), &after["last_error"]), (0, &Value::Null), "{after}");
    assert!(world.branch.vm(VM).unwrap()["error"].is_null());

    // The replica's site is stopped and started: replication goes on by itself, whatever came of it meanwhile.
    world.head.stop();
    world.head.serve().unwrap();
    let done = number(&measured(&world.branch, &[]), "cycles_done") + 2;
    wait_measured(&world.branch, "cycles to go on", |vm| number(vm, "cycles_done") >= done);
    assert_eq!(world.branch.vm(VM).unwrap()["state"], "replicating", "and needs no resynchronization");

    // The line is cut: that is missed, and health says of how many.
    let fresh = measured(&world.branch, &["--reset"]);
    assert!(number(&fresh, "cycles_done") >= done, "what the old window came to is shown once more: {fresh}");
    world.line.cut();
    let cut = wait_measured(&world.branch, "cycles to be missed", |vm| {
        number(vm, "cycles_failed") >= 2 && number(vm, "cycles_missed") >= 3
    });
    assert!(cut["since"] != before["since"], "{cut}");
    assert!(cut["last_error"].is_string() && cut["last_error_at"].is_string(), "{cut}");
    let warned = world.branch.vm(VM).unwrap();
    assert_eq!(warned["health"], "warning", "{warned}");
    let reason = warned["health_reason"].as_str().unwrap();
    assert!(reason.contains("cycles of the last") && reason.ends_with("were missed"), "{reason}");
    world.line.mend();
    wait_measured(&world.branch, "cycles to go on", |vm| {
        number(vm, "cycles_done") > number(&cut, "cycles_done")
    });
    measured(&world.branch, &["--reset"]);
    world.branch.wait_vm(VM, "to be well", LONG, |vm| vm["health"] == "normal").unwrap();
    assert!(measured(&world.branch, &[])["last_error"].is_null());

    // The replica's side: the gap is the one that the cut has torn.
    let replica = measured(&world.head, &[]);
    assert_eq!(
        (replica["role"].as_str(), number(&replica, "applies_failed")),
        (Some("replica"), 0),
        "{replica}"
    );
    assert!(number(&replica, "logs_received") >= done && number(&replica, "applies_done") > 0, "{replica}");
    assert!(replica["gap_max_s"].as_f64().unwrap() >= 3.0, "{replica}");
}

#[test]
fn measurements_are_given_to_spreadsheets_and_of_no_vm_that_is_not_there() {
    let world = World::new(82);
    world.protect("1s", &[]);
    world.replicating();
    wait_measured(&world.branch, "a cycle to be done", |vm| number(vm, "cycles_done") >= 1);
    let program = world.branch.command(&["measurements", "--csv"]).unwrap();
    let plain: Vec<_> = program.get_args().filter(|argument| *argument != "--json").collect();
    let output = std::process::Command::new(program.get_program()).args(plain).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split(',').collect()).collect();
    assert_eq!(rows.len(), 2, "{text}");
    let place = |name: &str| rows[0].iter().position(|column| *column == name).unwrap();
    assert_eq!((rows[1][place("name")], rows[1][place("role")]), (VM, "primary"));
    assert!(rows[1][place("cycles_done")].parse::<u64>().unwrap() >= 1, "{text}");
    let none = world.branch.run(&["measurements", "nobody"]).unwrap();
    assert_eq!(none.code(), Some("no-such-vm"));
}
