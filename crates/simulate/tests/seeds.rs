//! A thousand worlds, and every one that ever failed.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use simulate::coverage::Coverage;
use simulate::plan::Schedule;
use simulate::run::{EVENTS, run};

/// Runs worlds on two threads; fails with the smallest seed that does.
fn run_all(worlds: &[(u64, usize)]) -> Coverage {
    let (next, coverage) = (AtomicU64::new(0), Mutex::new(Coverage::default()));
    let failed = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some((seed, events)) =
                    worlds.get(usize::try_from(next.fetch_add(1, Ordering::Relaxed)).unwrap())
                {
                    let outcome = run(&Schedule::of(*seed, *events), false);
                    coverage.lock().unwrap().add(&outcome.coverage);
                    if let Some(violation) = outcome.violation {
                        failed.lock().unwrap().insert(*seed, (*events, violation));
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap();
    if let Some((seed, (events, violation))) = failed.first_key_value() {
        panic!(
            "{} of {} worlds failed; seed {seed}: {violation}\nreplay: afterimage-simulate --seed {seed} --steps {events} --trace",
            failed.len(),
            worlds.len()
        );
    }
    coverage.into_inner().unwrap()
}

#[test]
fn a_thousand_worlds_hold_and_none_of_them_is_tame() {
    let began = Instant::now();
    let worlds: Vec<_> = (0..1000).map(|seed| (seed, EVENTS)).collect();
    let coverage = run_all(&worlds);
    println!("{:.1} s\n{coverage}", began.elapsed().as_secs_f64());
    let mut missing = Vec::new();
    for condition in model::gate::Condition::ALL {
        missing
            .extend((coverage.of(&format!("refused {condition}")) == 0).then(|| condition.code().to_owned()));
    }
    for what in [
        "failed Link",
        "failed ReplicaRefused",
        "failed Certificate",
        "failed NotAuthorized",
        "failed UnknownPeer",
        "failed QemuGone",
        "failed Qemu",
        "failed ScratchFull",
        "failed ResyncRequired",
        "failed Stopped",
        "failed Catalog",
        "primary initial-replication -> replicating",
        "primary replicating -> resynchronization-required",
        "primary resynchronization-required -> replicating",
        "primary resynchronizing -> replicating",
        "replica initial-replication -> replicating",
        "replica replicating -> resynchronization-required",
        "replica replicating -> failover",
        "maintain Applied",
        "maintain Compacted",
        "maintain Dropped",
        "maintain LeftAsItIs",
        "maintain Rewritten",
        "holds",
        "views",
        "looks in the middle",
        "moves",
        "failovers",
        "backups Pinned",
        "backups Strict",
        "backups Hold",
        "backups begun incremental",
        "jobs again",
        "jobs again, with the barrier",
        "jobs attempts used up",
        "rotten bits",
        "late calls",
        "deaths of the primary",
        "deaths of the replica",
        "starts that failed",
    ] {
        missing.extend((coverage.of(what) == 0).then(|| what.to_owned()));
    }
    assert!(missing.is_empty(), "it never happened: {missing:?}");
}

#[test]
fn every_seed_that_ever_failed_holds() {
    let lines =
        include_str!("../seeds.txt").lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    let worlds: Vec<_> = lines
        .map(|line| {
            let mut words = line.split_whitespace();
            let mut number =
                || words.next().and_then(|word| word.parse().ok()).expect("SEED EVENTS what it found");
            (number(), usize::try_from(number()).unwrap())
        })
        .collect();
    run_all(&worlds);
}

#[test]
fn a_seed_is_the_same_world_every_time() {
    for seed in 0..20 {
        let schedule = Schedule::of(seed, EVENTS);
        let (one, other) = (run(&schedule, true), run(&schedule, true));
        assert_eq!(one.trace, other.trace, "seed {seed}");
        assert!(one.trace.len() > EVENTS);
    }
}

#[test]
fn a_mutation_has_one_place_in_the_code_of_today() {
    let checked =
        std::process::Command::new(env!("CARGO_BIN_EXE_afterimage-mutants")).arg("--check").output().unwrap();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
}
