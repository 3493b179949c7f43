//! The studies: which scenarios are run, and what is kept of each.

use crate::churn::{Churn, LogSizes};
use crate::clock::MINUTE;
use crate::run::run;
use crate::scenario::{Scenario, SiteDisk, Strategy, Window};
use crate::tally::Tally;

/// How much is simulated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// VMs of the small fleet.
    pub small: u32,
    /// VMs of the large fleet; none if it is left out.
    pub large: Option<u32>,
    /// VMs of each point of a curve.
    pub curve: u32,
}

impl Size {
    /// 10,000 and 100,000 VMs.
    pub const FULL: Self = Self { small: 10_000, large: Some(100_000), curve: 4_000 };
    /// Seconds, to see that it works.
    pub const QUICK: Self = Self { small: 500, large: None, curve: 200 };
}

/// A VM by itself whose applies take a share of the interval.
#[derive(Debug, Clone)]
pub struct Starvation {
    /// Apply time by interval.
    pub utilisation: f64,
    /// The policy.
    pub strategy: Strategy,
    /// What came out.
    pub tally: Tally,
}

/// A site of a hundred VMs that applies so many at the same time.
#[derive(Debug, Clone)]
pub struct Workers {
    /// Work offered to the disk by its capacity.
    pub load: f64,
    /// VMs whose logs are applied at the same time.
    pub workers: u32,
    /// What came out.
    pub tally: Tally,
}

/// A fleet.
#[derive(Debug, Clone)]
pub struct Fleet {
    /// The disk of its sites, as tables call it.
    pub disk: &'static str,
    /// The scenario.
    pub scenario: Scenario,
    /// What came out.
    pub tally: Tally,
}

/// Everything.
#[derive(Debug, Clone, Default)]
pub struct Results {
    /// The starvation curves.
    pub starvation: Vec<Starvation>,
    /// The curves over workers.
    pub workers: Vec<Workers>,
    /// The fleets, without and with hourly points, on fast and on slow disks.
    pub fleets: Vec<Fleet>,
}

/// The utilisations of the starvation curve.
const UTILISATIONS: [f64; 17] =
    [0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0, 1.1, 1.25, 1.5];
/// What the curve compares; a view and a hold meet the same applies.
const CURVES: [Strategy; 4] = [Strategy::Strict, Strategy::StrictBarrier, Strategy::Pause, Strategy::Pinned];
const LOADS: [f64; 4] = [0.3, 0.6, 0.9, 1.2];
const WORKERS: [u32; 7] = [1, 2, 4, 8, 16, 32, 100];
/// The disks of [`Scenario::standard`], as tables call them.
pub(crate) const FAST: &str = "fast disks";
/// Disks that turn, or that deduplicate.
pub(crate) const SLOW: &str = "slow disks";
/// The same, with as many workers as there are VMs.
pub(crate) const ALL_AT_ONCE: &str = "slow disks, all VMs applied at once";
const SLOW_DISK: SiteDisk = SiteDisk { bytes_per_s: 40e6, apply_seconds: 0.1, log_seconds: 0.01 };

/// The share of backups that retry alone makes on a VM whose applies take this share of the time, if each attempt
/// meets an apply independently of the others.
#[must_use]
pub fn closed_form_done(utilisation: f64, attempts: u32) -> f64 {
    1.0 - utilisation.min(1.0).powi(attempts as i32)
}

/// Runs everything, telling what it does.
pub fn study(size: Size, seed: u64, threads: usize, tell: &dyn Fn(&str)) -> Results {
    let mut results = Results::default();
    tell("starvation curves");
    for strategy in CURVES {
        for utilisation in UTILISATIONS {
            let scenario = Scenario { seed, ..starving(size.curve, utilisation, strategy) };
            results.starvation.push(Starvation { utilisation, strategy, tally: run(&scenario, threads) });
        }
    }
    tell("workers");
    for load in LOADS {
        for workers in WORKERS {
            let scenario = Scenario { seed, ..loaded(size.small.min(5_000), load, workers) };
            results.workers.push(Workers { load, workers, tally: run(&scenario, threads) });
        }
    }
    for (disk, scenario) in fleets(size) {
        let scenario = Scenario { seed, ..scenario };
        let interval = scenario.interval / crate::clock::SECOND;
        let (vms, strategy) = (scenario.vms(), scenario.strategy.name());
        tell(&format!("{vms} VMs every {interval} s, {disk}, {} points: {strategy}", scenario.points));
        let tally = run(&scenario, threads);
        results.fleets.push(Fleet { disk, scenario, tally });
    }
    results
}

/// VMs by themselves whose logs overlap as those of real ones do.
fn starving(vms: u32, utilisation: f64, strategy: Strategy) -> Scenario {
    let alone = Scenario::alone(vms, 30, utilisation, strategy);
    let churn = Churn { growth: Churn::published().growth, ..alone.churn };
    // Half an hour shows as much as a night: VM by VM nothing else happens.
    let window = Window { due_until: alone.window.from + 30 * MINUTE, ..alone.window };
    Scenario { churn, window, warm_up: 15 * MINUTE, ..alone }
}

/// Sites whose disks are so busy with applies that read as steadily as they are written.
fn loaded(vms: u32, load: f64, apply_workers: u32) -> Scenario {
    let standard = Scenario::standard(vms, 30, Strategy::Strict);
    let churn = Churn { swing: 0.0, bursts: None, skew: 1.0, ..Churn::published() };
    let sizes = LogSizes::new(&churn, standard.interval);
    let mean = Churn { skew: 0.0, ..churn.clone() }.vm(0, &mut fastrand::Rng::with_seed(0));
    let bytes_per_interval = sizes.expected(&mean, standard.interval) * f64::from(standard.vms_per_site);
    let interval_seconds = crate::clock::seconds(standard.interval);
    let disk = SiteDisk {
        bytes_per_s: bytes_per_interval / interval_seconds / load,
        apply_seconds: 0.0,
        log_seconds: 0.0,
    };
    let window = Window { at_once: 1, backup_seconds: 1.0, backup_bytes_per_s: 1e9, ..standard.window };
    Scenario { churn, disk, apply_workers, window, failures: crate::Failures::NONE, ..standard }
}

fn fleets(size: Size) -> Vec<(&'static str, Scenario)> {
    let mut fleets = Vec::new();
    let sizes = [Some(size.small), size.large];
    for vms in sizes.into_iter().flatten() {
        for interval in [30, 5] {
            for strategy in Strategy::ALL {
                fleets.push((FAST, Scenario::standard(vms, interval, strategy)));
            }
        }
    }
    for (disk, apply_workers) in [(SLOW, 2), (ALL_AT_ONCE, 100)] {
        for interval in [30, 5] {
            for strategy in Strategy::ALL {
                let standard = Scenario::standard(size.small, interval, strategy);
                fleets.push((disk, Scenario { disk: SLOW_DISK, apply_workers, ..standard }));
            }
        }
    }
    for strategy in Strategy::ALL {
        let standard = Scenario::standard(size.small, 30, strategy);
        fleets.push((SLOW, Scenario { disk: SLOW_DISK, points: 24, ..standard }));
    }
    fleets
}
