//! The link is cut for an hour, and the replica's site is killed in each phase, again and again and at any of its steps: no
//! initial replication begins anew, nothing is compared without a cause, and no point is lost. That they are not, every world
//! looks after itself (`world/check.rs`, `world/causes.rs`); here it is seen to it that it has happened.

use std::time::Duration;

use simulate::coverage::Coverage;
use simulate::disk::Loss;
use simulate::event::{Event, Order, Side};
use simulate::plan::{Plan, Schedule, VmPlan};
use simulate::run::run;

const HOUR_S: u64 = 3600;
/// So many worlds for each phase.
const WORLDS: u64 = 40;
/// Where the replica can be when its site is killed.
const PHASES: [&str; 5] =
    ["initial-replication", "replicating", "resynchronization-required", "resynchronizing", "failover"];

fn plan() -> Plan {
    let vm = VmPlan { blocks: vec![70, 9], points: 3, app_every_s: Some(600), interval_s: 300 };
    Plan {
        vms: vec![vm],
        recent_points: 3,
        initial_log_bytes: 1 << 14, // a pass is of many logs
        plan_extents_max: 64,
        cycles_at_once: 1,
    }
}

fn order(order: Order) -> [Event; 2] {
    [Event::Order { vm: 0, order }, Event::Finish { vm: 0 }]
}

/// All over the disks, so that no pass fits into one log.
fn writes(seed: u64) -> impl Iterator<Item = Event> {
    (0..24).map(move |place| Event::Write {
        vm: 0,
        disk: u64::from(place % 6 == 0),
        sector: (seed * 31 + place * 24) % 560,
        count: 20,
        zeros: place % 11 == 7,
    })
}

/// Brings the replica to a phase.
fn until(phase: &str, seed: u64) -> Vec<Event> {
    let mut events: Vec<Event> = writes(seed).collect();
    if phase == "initial-replication" {
        events.extend(order(Order::Cycle));
        return events;
    }
    for round in 0..3 {
        events.extend(order(Order::Sync));
        events.extend(writes(seed + round).take(5));
        events.push(Event::Pass { seconds: 1300 });
    }
    events.extend(order(Order::Sync));
    match phase {
        "resynchronization-required" | "resynchronizing" => {
            events.push(Event::Restart { vm: 0 });
            events.extend(writes(seed + 7));
            events.extend(order(Order::Cycle)); // it finds that the bitmaps are gone
            if phase == "resynchronizing" {
                events.extend(order(Order::Cycle)); // the first log of the compare
            }
        }
        "failover" => events.push(Event::Failover { vm: 0, point: seed % 4 }),
        _ => {}
    }
    events
}

/// An hour without a link, in which the replica's site is killed, and dies at a step of what it does by itself.
fn outage(seed: u64) -> Vec<Event> {
    let mut events = vec![Event::Line { down: true }];
    for part in 0..12 {
        if part % 4 == 0 {
            let loss = Loss::CUTS[usize::try_from(seed + part).unwrap() % Loss::CUTS.len()];
            events.push(Event::Boot { side: Side::Replica, loss });
        }
        events.extend(writes(seed + part).take(3));
        events.extend(order(Order::Cycle));
        if part == 6 {
            events.push(Event::Cut {
                side: Side::Replica,
                steps: 1 + seed % 7,
                after: seed.is_multiple_of(2),
            });
        }
        events.push(Event::Maintain { vm: 0, steps: 4, looks: 2 });
        events.push(Event::Pass { seconds: HOUR_S / 12 });
    }
    events.push(Event::Line { down: false });
    events
}

/// And once the link is back: it dies at the steps of receiving, too.
fn comes_back(seed: u64) -> Vec<Event> {
    let mut events = vec![
        Event::Boot { side: Side::Replica, loss: Loss::Everything },
        Event::Cut { side: Side::Replica, steps: 1 + seed % 23, after: seed.is_multiple_of(3) },
    ];
    events.extend(order(Order::Resume));
    events.extend(order(Order::Cycle));
    events.push(Event::Boot {
        side: Side::Replica,
        loss: Loss::CUTS[usize::try_from(seed).unwrap() % Loss::CUTS.len()],
    });
    if seed.is_multiple_of(2) {
        events.push(Event::CancelFailover { vm: 0 }); // the others are cancelled at the end
    }
    events
}

fn world(phase: &str, seed: u64) -> (Coverage, Duration) {
    let events = [until(phase, seed), outage(seed), comes_back(seed)].concat();
    let schedule = Schedule { seed: seed ^ 0x007a_6e00, plan: plan(), events };
    let outcome = run(&schedule, false);
    if let Some(violation) = outcome.violation {
        let trace = run(&schedule, true).trace.join("\n");
        panic!("phase {phase}, world {seed}: {violation}\n{trace}");
    }
    (outcome.coverage, outcome.simulated)
}

#[test]
fn an_hour_without_a_link_and_a_kill_in_each_phase_cost_no_initial_replication_and_no_point() {
    for phase in PHASES {
        let mut coverage = Coverage::default();
        for seed in 0..WORLDS {
            let (happened, simulated) = world(phase, seed);
            assert!(simulated >= Duration::from_secs(HOUR_S));
            coverage.add(&happened);
        }
        let killed = coverage.of(&format!("the replica killed in {phase}, with the link cut"));
        assert!(killed >= 3 * WORLDS, "{phase}: killed {killed} times\n{coverage}");
        assert!(coverage.of("failed Link") >= 10 * WORLDS || phase == "failover", "{coverage}");
        assert!(coverage.of("deaths of the replica") > 0 && coverage.of("points checked") > WORLDS);
        // Bitmaps outlive the link and the replica: only where QEMU was restarted both sides are compared.
        let compared = coverage.sum("primary replicating -> resynchronization");
        let restarts = if phase.starts_with("resync") { WORLDS } else { 0 };
        assert_eq!(compared, restarts, "{phase}\n{coverage}");
        let begun = coverage.of("primary none -> initial-replication");
        let ended = coverage.of("primary initial-replication -> replicating")
            + coverage.of("primary none -> replicating");
        assert!(ended == WORLDS && begun <= WORLDS, "{phase}: one initial replication each\n{coverage}");
        println!(
            "{phase}: killed {killed} times with the link cut, {} points read",
            coverage.of("points checked")
        );
    }
}
