//! Every change of phase that the model knows is made by a real operation, on both sides; what is not possible in a phase
//! is refused by name, with what to do.

mod common;

use std::collections::BTreeSet;

use common::{BURST_AT, DISKS, LONG, VM, World};
use model::TRANSITIONS;
use rig::{Output, StorageDaemon};
use serde_json::Value;

/// A pass is cut into logs of this much.
const LOG_MIB: &str = "initial-log-mib = 1";
/// Slow enough for a pass to be met in its middle, in bytes per second.
const SLOW: &str = "1M";

impl World {
    fn in_small_logs(seed: u64) -> Self {
        let mut world = Self::new(seed);
        world.branch.stop();
        world.branch.configure(&[("initial-log-mib = 1024", LOG_MIB)]).unwrap();
        world.branch.serve().unwrap();
        world
    }

    fn both(&self, state: &str) {
        for site in [&self.branch, &self.head] {
            site.wait_vm(VM, state, LONG, |vm| vm["state"] == state).unwrap();
        }
    }

    fn bandwidth(&self, rate: &str) {
        self.head.ok(&["peer", "allow", "branch", "--bandwidth", rate]).unwrap();
    }

    /// QEMU dies, and what it knew of changed blocks with it; meanwhile the disk changes.
    fn restart_qemu(&mut self) {
        self.daemon.kill();
        self.daemon = StorageDaemon::start(&self.dir.path().join("vm"), &DISKS).unwrap();
    }

    /// What takes several logs to send: a pass ends a log between stretches of 64 MiB of disk.
    fn differ(&self, seed: u64) {
        for place in 0..4 {
            let at = BURST_AT + place * (128 << 20);
            rig::fill(&self.daemon, DISKS[1].0, at, 3 << 20, seed * 10 + place).unwrap();
        }
    }

    /// The changes of phase that the sites have told of.
    fn seen(&self) -> BTreeSet<String> {
        let told = self.branch.log() + &self.head.log();
        TRANSITIONS.iter().map(ToString::to_string).filter(|change| told.contains(change)).collect()
    }
}

/// Refused with this code, and a sentence that says what happens to which VM.
fn refused(output: &Output, code: &str) {
    let error = &output.json["error"];
    assert_eq!((output.status != 0, &error["code"]), (true, &Value::from(code)), "{output:?}");
    let message = error["message"].as_str().unwrap();
    // The gate's sentences are about the VM that the command names.
    let is_named = message.contains(VM) || code == "refused";
    assert!(message.len() > 30 && is_named, "a sentence for a person: {message}");
    println!("  {code}: {message}");
}

#[test]
fn every_change_of_phase_is_made_by_a_real_operation_and_others_are_refused() {
    let mut world = World::in_small_logs(701);
    println!("initial replication:");
    world.protect("1s", &[]);
    world.both("replicating");
    for site in [&world.branch, &world.head] {
        site.ok(&["unprotect", VM]).unwrap();
    }
    println!("and one that is broken off by the end of QEMU:");
    world.differ(1);
    world.bandwidth(SLOW);
    world.protect("1s", &["--resync", "manual"]);
    world.both("initial-replication");
    let has_a_log = |vm: &Value| vm["received"].as_u64() > Some(0);
    world.head.wait_vm(VM, "the first log", LONG, has_a_log).unwrap();
    refused(&world.head.run(&["failover", "unplanned", VM]).unwrap(), "no-such-point");
    refused(&world.head.run(&["failover", "complete", VM]).unwrap(), "failover");
    refused(&world.head.run(&["backup", VM, "--no-retry"]).unwrap(), "refused");
    world.restart_qemu();
    world.both("resynchronization-required");

    println!("a compare in several logs:");
    world.differ(2);
    world.branch.ok(&["resync", VM]).unwrap();
    world.both("resynchronizing");
    world.bandwidth("none");
    world.both("replicating");

    println!("a compare that is cancelled, and one that a failover is made in the middle of:");
    world.restart_qemu();
    world.both("resynchronization-required");
    refused(&world.branch.run(&["sync", VM]).unwrap(), "rests");
    world.bandwidth(SLOW);
    world.differ(3);
    world.branch.ok(&["resync", VM]).unwrap();
    world.both("resynchronizing");
    world.branch.ok(&["resync", VM, "--cancel"]).unwrap();
    world.both("resynchronization-required");
    let tried = world.head.ok(&["failover", "unplanned", VM]).unwrap();
    assert_eq!(world.head.vm(VM).unwrap()["state"], "failover", "{tried}");
    refused(&world.head.run(&["failover", "planned", VM]).unwrap(), "no-such-vm");
    refused(&world.head.run(&["hold", VM]).unwrap(), "refused");
    world.head.ok(&["failover", "cancel", VM]).unwrap();
    assert_eq!(world.head.vm(VM).unwrap()["state"], "resynchronization-required");
    world.branch.ok(&["resync", VM]).unwrap();
    world.both("resynchronizing");
    world.head.ok(&["failover", "unplanned", VM]).unwrap();
    world.head.ok(&["failover", "cancel", VM]).unwrap();
    assert_eq!(world.head.vm(VM).unwrap()["state"], "resynchronizing");
    world.bandwidth("none");
    world.both("replicating");

    println!("a compare that fits into one log:");
    world.restart_qemu();
    world.both("resynchronization-required");
    world.branch.ok(&["resync", VM]).unwrap();
    world.both("replicating");

    println!("failed over and back, and handed over:");
    world.head.ok(&["failover", "unplanned", VM]).unwrap();
    world.head.ok(&["failover", "cancel", VM]).unwrap();
    world.both("replicating");
    refused(&world.head.run(&["failover", "start", VM]).unwrap(), "failover");
    refused(&world.head.run(&["resync", VM]).unwrap(), "no-such-vm");
    refused(&world.head.run(&["failover", "reverse", VM]).unwrap(), "failover");
    world.branch.ok(&["failover", "planned", VM]).unwrap();
    for command in ["sync", "resync", "pause"] {
        refused(&world.branch.run(&[command, VM]).unwrap(), "cycle");
    }

    let known: BTreeSet<String> = TRANSITIONS.iter().map(ToString::to_string).collect();
    let seen = world.seen();
    let missing: Vec<&String> = known.difference(&seen).collect();
    assert!(missing.is_empty(), "never made: {missing:#?}");
    println!("{} of {} changes of phase", seen.len(), known.len());
}
