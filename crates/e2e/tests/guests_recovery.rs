//! Instant recovery of a real guest: it boots from a backup that nobody has restored, goes on while its site is killed,
//! is moved to files of its own while it commits, and its databases are whole.

mod common;
mod guest_world;

use std::time::{Duration, Instant};

use common::VM;
use guest::{BOOT, DATA, Disk, SYSTEM};
use guest_world::moved::Moved;
use guest_world::{World, moment};
use rig::wait_for;
use serde_json::{Value, json};

fn number(line: &str) -> u64 {
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

/// Waits until the guest has acknowledged so many more.
fn goes_on(moved: &Moved, more: u64) {
    let next = moved.console.acked().of_ledger("relay-sqlite") + more;
    moved.console.wait_for(&format!("ack relay-sqlite {next}"), BOOT).unwrap();
}

#[test]
fn a_guest_boots_from_its_backup_is_moved_while_it_runs_and_its_databases_are_whole() {
    let mut world = World::new(|_| Vec::new());
    world.machine_file();
    let backup = world.head.ok(&["backup", VM]).unwrap();
    let id = backup["backup"].as_str().unwrap();
    let before = world.guest.console().acked_by(moment(&backup));
    world.guest.kill();
    world.branch.kill();

    println!("shown, and nothing is left of it:");
    let shown = world.head.ok(&["recover", "start", VM, "--backup", id, "--show"]).unwrap();
    assert!(shown["command"].as_array().is_some_and(|words| words.len() > 10), "{shown}");
    assert_eq!(world.head.ok(&["recover", "list"]).unwrap(), json!({"recoveries": []}));

    println!("booted from the backup:");
    let started = Instant::now();
    let machine = world.head.ok(&["recover", "start", VM, "--backup", "latest"]).unwrap();
    println!("  runs after {:?}, shown after {} ms", started.elapsed(), machine["shown_ms"]);
    assert!(machine["networks"].as_array().unwrap().iter().all(|card| card["to"] == "none"), "{machine}");
    let moved = Moved::of(&machine, world.dir.path());
    let first = moved.console.wait_for("ack relay-sqlite", BOOT).unwrap();
    assert!(number(&first.text) > before.of_ledger("relay-sqlite"), "{}: {before}", first.text);
    let twice = world.head.run(&["recover", "start", VM, "--backup", id]).unwrap();
    assert_eq!(twice.code(), Some("exists"), "{twice:?}");

    println!("its site is killed, and comes back:");
    world.head.kill();
    std::thread::sleep(Duration::from_secs(1));
    world.head.serve().unwrap();
    goes_on(&moved, 3);

    println!("moved while it runs, and its site is killed again:");
    let to = world.dir.path().join("moved");
    let answer = world.head.ok(&["recover", "move", VM, "--to", common::path(&to)]).unwrap();
    assert_eq!(answer["moved"], true, "{answer}");
    world.head.kill();
    goes_on(&moved, 5);
    assert!(moved.runs(), "it needs nothing of ours");
    world.head.serve().unwrap();

    println!("shut down, checked, and started again from where it was moved to:");
    world.head.ok(&["recover", "stop", VM, "--within", "10m"]).unwrap();
    wait_for("its QEMU to end", BOOT, || Ok((!moved.runs()).then_some(()))).unwrap();
    let acked = moved.console.acked();
    let disks = [SYSTEM, DATA].map(|name| Disk::qcow2(name, &to.join(format!("{name}.qcow2"))));
    let checked = world.check(&disks);
    println!("  found {checked}; acknowledged {acked}");
    checked.judge(&acked, None).unwrap();
    let machine = world.head.ok(&["recover", "start", VM]).unwrap();
    let again = Moved::of(&machine, world.dir.path());
    let first = again.console.wait_for("ack relay-sqlite", BOOT).unwrap();
    assert!(number(&first.text) > acked.of_ledger("relay-sqlite"), "{}: {acked}", first.text);
    let refused = world.head.run(&["recover", "drop", VM]).unwrap();
    assert_eq!(refused.status, 1, "one that runs is not forgotten: {refused:?}");
    world.head.ok(&["recover", "stop", VM, "--kill"]).unwrap();
    world.head.ok(&["recover", "drop", VM]).unwrap();
    assert!(to.join(format!("{SYSTEM}.qcow2")).exists());

    println!("dropped, with all that it has written:");
    let machine = world.head.ok(&["recover", "start", VM, "--backup", id]).unwrap();
    let tried = Moved::of(&machine, world.dir.path());
    world.head.ok(&["recover", "drop", VM]).unwrap();
    assert!(!tried.runs());
    let list: Value = world.head.ok(&["recover", "list"]).unwrap();
    assert_eq!(list["recoveries"], json!([]));
}
