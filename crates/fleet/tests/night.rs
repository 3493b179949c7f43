//! What must be true of every simulated night, and what is known without simulating it.

use std::time::Duration;

use fleet::{Churn, Failures, MINUTE, SECOND, Scenario, SiteDisk, Strategy, Tally, Window, run};
use model::RetryPolicy;
use model::gate::Condition;

/// Four standard deviations of a share that was counted in so many.
fn four_sigma(share: f64, count: f64) -> f64 {
    4.0 * (share * (1.0 - share) / count).sqrt()
}

fn close(found: f64, expected: f64, tolerance: f64, what: &str) {
    assert!((found - expected).abs() <= tolerance, "{what}: {found} instead of {expected} ± {tolerance}");
}

/// VMs by themselves, asked once within half an hour.
fn alone(vms: u32, utilisation: f64, strategy: Strategy) -> Scenario {
    let alone = Scenario::alone(vms, 30, utilisation, strategy);
    let window = Window { due_until: alone.window.from + 30 * MINUTE, ..alone.window };
    Scenario { window, ..alone }
}

/// A fleet with everything in it that goes wrong, much of it.
fn rough(strategy: Strategy) -> Scenario {
    let failures = Failures { sites: (0.5, 20.0), hosts: (0.3, 90.0), ..Failures::SOME };
    let disk = SiteDisk { bytes_per_s: 20e6, apply_seconds: 0.2, log_seconds: 0.01 };
    let standard = Scenario::standard(600, 30, strategy);
    Scenario { failures, disk, apply_workers: 20, ..standard }
}

fn refused(tally: &Tally, condition: Condition) -> u64 {
    tally.refusals[Condition::ALL.iter().position(|known| *known == condition).unwrap()]
}

#[test]
fn one_seed_gives_one_night_on_any_number_of_threads() {
    let scenario = rough(Strategy::HoldBarrier);
    let night = run(&scenario, 1);
    assert_eq!(night, run(&scenario, 3));
    assert_ne!(night, run(&Scenario { seed: 2, ..scenario }, 1));
}

/// Asked at a moment that has nothing to do with the cycle, a VM's apply runs with the probability that is its
/// share of the time.
#[test]
fn a_first_attempt_collides_as_often_as_applies_run() {
    for utilisation in [0.05, 0.3, 0.8] {
        let tally = run(&alone(20_000, utilisation, Strategy::Strict), 2);
        let tolerance = four_sigma(utilisation, 20_000.0);
        close(tally.collision_share(), utilisation, tolerance, "first attempts that collide");
    }
}

/// Delays much longer than the interval make attempts independent: their number is geometric.
#[test]
fn attempts_that_have_forgotten_the_last_are_geometric() {
    let utilisation: f64 = 0.8;
    let long = Duration::from_secs(900);
    let policy =
        RetryPolicy { first_delay: long, delay_max: long, attempts_max: 8, ..RetryPolicy::default() };
    let tally = run(&Scenario { policy, ..alone(20_000, utilisation, Strategy::Strict) }, 2);
    let given_up = utilisation.powi(8);
    close(1.0 - tally.done_share(), given_up, four_sigma(given_up, 20_000.0), "backups given up");
    let mean = (1.0 - given_up) / (1.0 - utilisation);
    close(tally.attempts.mean(), mean, 0.07, "attempts per backup");
}

/// On a disk that all applies share, by Little's law and the formula for processor sharing, load / (1 - load)
/// of them run on average, as long as logs arrive as if by chance; many VMs with cycles of their own come near.
#[test]
fn on_a_shared_disk_as_many_applies_run_as_queueing_theory_says() {
    let load = 0.5;
    let standard = Scenario::standard(4_000, 30, Strategy::Strict);
    let churn = Churn { noise: 1.0, ..Churn::constant(100e3) };
    let bytes_per_s = 100e3 * f64::from(standard.vms_per_site) / load;
    let disk = SiteDisk { bytes_per_s, apply_seconds: 0.0, log_seconds: 0.0 };
    let window = Window { backup_seconds: 0.001, backup_bytes_per_s: 1e12, ..standard.window };
    let scenario = Scenario { churn, disk, apply_workers: 100, failures: Failures::NONE, window, ..standard };
    let tally = run(&scenario, 2);
    let busy = load / (1.0 - load) / f64::from(scenario.vms_per_site);
    close(tally.busy_share(), busy, busy * 0.1, "share of VMs whose apply runs");
    close(
        tally.collision_share(),
        tally.busy_share(),
        four_sigma(busy, 4_000.0),
        "first attempts that collide",
    );
}

#[test]
fn no_more_vms_are_busy_than_there_are_workers() {
    let standard = Scenario::standard(1_000, 5, Strategy::Strict);
    let disk = SiteDisk { bytes_per_s: 20e6, apply_seconds: 0.5, log_seconds: 0.0 }; // far too slow
    let churn = Churn::constant(10e3);
    let tally = run(&Scenario { churn, disk, apply_workers: 2, failures: Failures::NONE, ..standard }, 2);
    close(tally.busy_share(), 0.02, 0.0005, "share of VMs whose apply runs");
    assert_eq!(tally.done_share(), 1.0);
}

#[test]
fn a_pinned_view_never_collides() {
    for scenario in [alone(500, 1.5, Strategy::Pinned), rough(Strategy::Pinned)] {
        let tally = run(&scenario, 2);
        assert_eq!((tally.first_collided, refused(&tally, Condition::ApplyInProgress)), (0, 0));
    }
}

#[test]
fn retry_alone_starves_where_applies_take_longer_than_the_interval_and_the_barrier_ends_that() {
    let starved = run(&alone(500, 1.2, Strategy::Strict), 2);
    assert!(starved.done_share() < 0.01 && starved.starved > 490, "{starved:?}");
    for strategy in [Strategy::StrictBarrier, Strategy::HoldBarrier] {
        let tally = run(&alone(500, 1.2, strategy), 2);
        assert_eq!((tally.done_share(), tally.starved), (1.0, 0), "{strategy:?}");
        assert!(tally.attempts.max() <= 5, "three collisions, the barrier, and one more at the most");
    }
}

#[test]
fn whatever_fails_every_job_ends_and_every_pause_is_released() {
    for strategy in Strategy::ALL {
        let tally = run(&rough(strategy), 2);
        assert_eq!((tally.unfinished, tally.still_paused), (0, 0), "{strategy:?}");
        assert_eq!(tally.tried, 600);
        assert_eq!(tally.done + tally.out_of_attempts + tally.out_of_time, 600);
        assert!(tally.attempts.max() <= u64::from(RetryPolicy::default().attempts_max));
        for condition in [Condition::Resync, Condition::ApplyInterrupted] {
            assert!(refused(&tally, condition) > 0, "{strategy:?} never met {condition}");
        }
        // A pause is a warning, however long the VM was away: it never refuses the backup it was made for.
        let critical = refused(&tally, Condition::HealthCritical);
        assert_eq!(critical == 0, strategy == Strategy::Pause, "{strategy:?}: {critical}");
    }
}

#[test]
fn only_a_pause_costs_recovery_points() {
    let exposed = |strategy| {
        let tally = run(&alone(500, 0.5, strategy), 2);
        tally.exposed_ms.max()
    };
    let interval_ms = (30 * SECOND / 1000) as u64;
    for strategy in [Strategy::Strict, Strategy::HoldBarrier, Strategy::Pinned] {
        assert_eq!(exposed(strategy), interval_ms, "{strategy:?}");
    }
    assert!(exposed(Strategy::Pause) > interval_ms);
}
