//! Real guests over failovers: to any point, and to the other site and back. File systems are clean, databases open, what
//! was acknowledged is there: all of it after a planned failover, a prefix of it after an unplanned one.

mod common;
mod guest_world;

use std::fs::File;
use std::io::Write as _;
use std::time::Duration;

use common::{LONG, VM, path};
use guest::{Acked, BOOT, Checked, MAC};
use guest_world::moved::Moved;
use guest_world::{World, failover_disks, pauses};
use rig::wait_for;
use serde_json::{Value, json};

/// Fails over to so many points, any of those there are, and goes back to replicating after each.
fn to_points(seed: u64, count: usize) {
    let world = World::new(|guest| {
        let agent = guest.agent();
        ["--points", "2", "--app-every", "6s", "--guest-agent", path(&agent)].map(str::to_owned).into()
    });
    let begun = world.guest.acked();
    let mut at_rest = 0;
    for (number, (pause, which)) in (1..=count).zip(pauses(seed).zip(rig::noise(seed + 1, 1024))) {
        std::thread::sleep(pause);
        world.branch.wait_vm(VM, "to replicate", BOOT, |vm| vm["state"] == "replicating").unwrap();
        world.branch.ok(&["sync", VM]).unwrap();
        let points = world.points();
        let point = &points[usize::from(which) % points.len()];
        println!("failover {number} of {count}, to point {} of {}: {point}", point["number"], points.len());
        let failover =
            world.head.ok(&["failover", "unplanned", VM, "--point", point["id"].as_str().unwrap()]).unwrap();
        assert_eq!(failover["point"], point["id"]);
        let now = world.guest.acked();
        let checked = world.boot(&failover_disks(&failover), point, Some(&now));
        let is_at_rest = point["consistency"] == "application";
        assert_eq!(checked.needs_recovery, !is_at_rest, "at rest nothing is left to replay: {point}");
        at_rest += usize::from(is_at_rest);
        world.head.ok(&["failover", "cancel", VM]).unwrap();
    }
    let committed = world.guest.acked().total() - begun.total();
    println!(
        "seed {seed}: {count} of {count} failovers boot clean, {at_rest} of them at rest; {committed} numbers acknowledged meanwhile"
    );
    assert_eq!(world.guest.console().failure(), None);
}

#[test]
fn a_guest_goes_on_from_any_point() {
    to_points(11, 3);
}

#[test]
#[ignore = "twenty boots: make soak"]
fn a_guest_goes_on_from_twenty_points() {
    to_points(12, 20);
}

fn event(world: &World, kind: &str) -> Option<Value> {
    let events = world.head.ok(&["events"]).unwrap();
    events["events"].as_array().unwrap().iter().find(|event| event["kind"] == kind).cloned()
}

/// Nothing that was acknowledged before its end is missing, and nothing had to be replayed: it was switched off.
fn nothing_is_lost(checked: &Checked, acked: &Acked) {
    println!("  found {checked}; acknowledged {acked}");
    checked.judge(acked, None).unwrap();
    assert!(!checked.needs_recovery, "it was switched off in order");
}

#[test]
fn a_guest_moves_to_the_other_site_and_back_and_loses_nothing() {
    let mut world = World::new(|_| Vec::new());
    world.machine_file();
    let machine_file = world.head.dir().join("machines").join(format!("{VM}.toml"));
    let mut text = File::options().append(true).open(machine_file).unwrap();
    let settings = format!(
        "[networks]\nlan = \"user\"\n[[ip]]\nmac = \"{MAC}\"\naddresses = [\"192.0.2.7/24\"]\ngateway = \"192.0.2.1\"\n"
    );
    text.write_all(settings.as_bytes()).unwrap();

    println!("a replica is not started outside a failover:");
    let refused = world.head.run(&["failover", "start", VM]).unwrap();
    assert_eq!((refused.status, &refused.json["error"]["code"]), (1, &"failover".into()), "{refused:?}");

    println!("switched off, and started at the head office:");
    let answer = world.branch.ok(&["failover", "planned", VM, "--shutdown", "10m"]).unwrap();
    world.guest.wait_ended(BOOT).unwrap();
    assert!(world.guest.console().lines().iter().any(|line| line.text == "off"), "{answer}");
    let left = world.guest.acked();
    nothing_is_lost(&world.check(&failover_disks(&answer)), &left);
    let machine = world.head.ok(&["failover", "start", VM]).unwrap();
    assert_eq!(machine["networks"], json!([{"mac": MAC, "network": "lan", "to": "user"}]), "{machine}");
    let moved = Moved::of(&machine, world.dir.path());
    let next = left.of_ledger("relay-sqlite") + 5;
    moved.console.wait_for(&format!("ack relay-sqlite {next}"), BOOT).unwrap();
    let twice = world.head.run(&["failover", "start", VM]).unwrap();
    assert!(twice.status == 1 && twice.json.to_string().contains("runs already"), "{twice:?}");

    println!("given its address through its agent:");
    wait_for("the address to be set", BOOT, || {
        assert!(event(&world, "addresses-not-set").is_none(), "{:?}", event(&world, "addresses-not-set"));
        Ok(event(&world, "addresses-set"))
    })
    .unwrap();
    let told = moved.addresses();
    assert!(told.contains("192.0.2.7"), "{told}");

    println!("the site is killed; the guest goes on, and is replicated back from there:");
    world.head.kill();
    let next = moved.console.acked().of_ledger("relay-sqlite") + 3;
    moved.console.wait_for(&format!("ack relay-sqlite {next}"), BOOT).unwrap();
    world.head.serve().unwrap();
    assert!(moved.runs());
    world.head.ok(&["failover", "reverse", VM, "--every", "2s"]).unwrap();
    world.head.wait_vm(VM, "to replicate back", BOOT, |vm| vm["state"] == "replicating").unwrap();
    std::thread::sleep(Duration::from_secs(5));

    println!("switched off there, and back at the branch:");
    let answer = world.head.ok(&["failover", "planned", VM, "--shutdown", "10m"]).unwrap();
    wait_for("its QEMU to end", LONG, || Ok((!moved.runs()).then_some(()))).unwrap();
    let acked = moved.console.acked();
    assert!(acked.total() > left.total());
    nothing_is_lost(&world.check(&failover_disks(&answer)), &acked);
    let refused = world.head.run(&["failover", "start", VM]).unwrap();
    assert_eq!(refused.status, 1, "what has moved away is not started again: {refused:?}");
}

#[test]
fn a_guest_started_from_an_unplanned_failover_goes_on_without_the_site() {
    let mut world = World::new(|_| Vec::new());
    world.machine_file();
    world.branch.ok(&["sync", VM]).unwrap();
    world.guest.kill();
    world.branch.kill();
    let acked = world.guest.acked();

    println!("tried, and dropped:");
    let answer = world.head.ok(&["failover", "unplanned", VM, "--start"]).unwrap();
    let tried = Moved::of(&answer["machine"], world.dir.path());
    assert_eq!(answer["machine"]["networks"], json!([{"mac": MAC, "network": "lan", "to": "none"}]));
    tried.console.wait_for("ack relay-sqlite", BOOT).unwrap();
    world.head.ok(&["failover", "cancel", VM]).unwrap();
    assert!(!tried.runs(), "its disks are gone, and so is it");

    println!("for good:");
    let point = world.points().last().unwrap().clone();
    let before = world.guest.console().acked_by(guest_world::moment(&point));
    let answer = world.head.ok(&["failover", "unplanned", VM, "--start"]).unwrap();
    let moved = Moved::of(&answer["machine"], world.dir.path());
    let first = moved.console.wait_for("ack relay-sqlite", BOOT).unwrap();
    let number: u64 = first.text.rsplit(' ').next().unwrap().parse().unwrap();
    assert!(number > before.of_ledger("relay-sqlite"), "{}: {before}; {acked}", first.text);
    let completed = world.head.ok(&["failover", "complete", VM]).unwrap();
    assert_eq!(
        completed["released"], true,
        "its disks were laid on the flat files while it ran: {completed}"
    );
    world.head.kill();
    let next = moved.console.acked().of_ledger("relay-sqlite") + 5;
    moved.console.wait_for(&format!("ack relay-sqlite {next}"), BOOT).unwrap();
    assert!(moved.runs(), "it needs nothing of ours");

    println!("stopped, and started as before by the site of later:");
    world.head.serve().unwrap();
    world.head.ok(&["failover", "stop", VM, "--within", "10m"]).unwrap();
    assert!(!moved.runs());
    let acked = moved.console.acked();
    let machine = world.head.ok(&["failover", "start", VM]).unwrap();
    let again = Moved::of(&machine, world.dir.path());
    let first = again.console.wait_for("ack relay-sqlite", BOOT).unwrap();
    let number: u64 = first.text.rsplit(' ').next().unwrap().parse().unwrap();
    assert!(number > acked.of_ledger("relay-sqlite"), "{}: {acked}", first.text);
    world.head.ok(&["failover", "stop", VM, "--kill"]).unwrap();
    assert!(!again.runs());
}
