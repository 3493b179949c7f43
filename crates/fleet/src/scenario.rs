//! What is simulated: the fleet, its sites and their disks, what fails, and the policy of the backups.

use model::gate::Access;
use model::{CycleBackoff, HealthThresholds, RetryPolicy};

use crate::churn::Churn;
use crate::clock::{HOUR, MINUTE, Micros, SECOND, micros};

/// How backups get a quiet replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Strategy {
    /// A view that is refused while logs are applied; refused backups come again.
    Strict,
    /// The flat files; refused backups come again.
    Hold,
    /// As `Strict`, and after a few collisions applies are held off.
    StrictBarrier,
    /// As `Hold`, and after a few collisions applies are held off.
    HoldBarrier,
    /// Replication is paused, the flat files are read, replication goes on.
    Pause,
    /// A view of a pinned point.
    Pinned,
}

impl Strategy {
    /// All of them, from what others do to what Afterimage does.
    pub const ALL: [Self; 6] =
        [Self::Strict, Self::Hold, Self::StrictBarrier, Self::HoldBarrier, Self::Pause, Self::Pinned];

    /// As tables and figures call it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Strict => "strict view, retry",
            Self::Hold => "hold, retry",
            Self::StrictBarrier => "strict view, retry + barrier",
            Self::HoldBarrier => "hold, retry + barrier",
            Self::Pause => "pause, hold, retry",
            Self::Pinned => "pinned view",
        }
    }

    /// What is asked of the gate.
    #[must_use]
    pub const fn access(self) -> Access {
        match self {
            Self::Strict | Self::StrictBarrier => Access::Strict,
            Self::Hold | Self::HoldBarrier | Self::Pause => Access::Hold,
            Self::Pinned => Access::Pinned,
        }
    }

    /// The production policy, with the barrier out of reach where the strategy has none.
    #[must_use]
    pub fn policy(self, policy: &RetryPolicy) -> RetryPolicy {
        match self {
            Self::StrictBarrier | Self::HoldBarrier => policy.clone(),
            _ => RetryPolicy { barrier_after: u32::MAX, ..policy.clone() },
        }
    }
}

/// What fails, per night and each.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Failures {
    /// The share of replica sites that go down once in the window, and for how many minutes on average.
    pub sites: (f64, f64),
    /// The share of primary hosts that lose their VMs once in the window, and for how many minutes.
    pub hosts: (f64, f64),
    /// VMs on one primary host.
    pub vms_per_host: u32,
    /// Both sides are compared at this rate after a host was lost, all VMs of a site together.
    pub compare_bytes_per_s: f64,
    /// A VM's disks, on average.
    pub disk_bytes: f64,
}

impl Failures {
    /// Nothing fails.
    pub const NONE: Self = Self {
        sites: (0.0, 0.0),
        hosts: (0.0, 0.0),
        vms_per_host: 25,
        compare_bytes_per_s: 400e6,
        disk_bytes: 100e9,
    };
    /// One site in a hundred and one host in a hundred, each night.
    pub const SOME: Self = Self { sites: (0.01, 15.0), hosts: (0.01, 10.0), ..Self::NONE };
}

/// The disk of a site, and how applies use it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SiteDisk {
    /// Changed bytes that it takes a second, scattered as changes are.
    pub bytes_per_s: f64,
    /// What an apply costs beside its bytes: the syncs of the flat files, the catalog.
    pub apply_seconds: f64,
    /// What each log of it costs.
    pub log_seconds: f64,
}

/// The window and its jobs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Window {
    /// When it begins.
    pub from: Micros,
    /// When the last backup is due; they are spread evenly from `from` on.
    pub due_until: Micros,
    /// When it ends: no attempt begins later by itself.
    pub until: Micros,
    /// Backups at the same time on one site.
    pub at_once: u32,
    /// What a backup costs beside its bytes, in seconds.
    pub backup_seconds: f64,
    /// What a backup reads a second.
    pub backup_bytes_per_s: f64,
}

impl Window {
    /// From 22:00 to 06:00, the last backup due at 04:00.
    #[must_use]
    pub const fn night() -> Self {
        Self {
            from: 22 * HOUR,
            due_until: 28 * HOUR,
            until: 30 * HOUR,
            at_once: 2,
            backup_seconds: 5.0,
            backup_bytes_per_s: 100e6,
        }
    }
}

/// One fleet on one night under one strategy.
#[derive(Debug, Clone, PartialEq)]
pub struct Scenario {
    /// Of everything that is left to chance. Two strategies with one seed see the same VMs and the same failures.
    pub seed: u64,
    /// Replica sites; they share nothing.
    pub sites: u32,
    /// VMs on each.
    pub vms_per_site: u32,
    /// Between two cycles of a VM.
    pub interval: Micros,
    /// Hourly points kept beside the latest one.
    pub points: u8,
    /// How many VMs of a site are applied at the same time.
    pub apply_workers: u32,
    /// Their disk.
    pub disk: SiteDisk,
    /// How VMs change.
    pub churn: Churn,
    /// What fails.
    pub failures: Failures,
    /// The backups.
    pub window: Window,
    /// How backups are made.
    pub strategy: Strategy,
    /// What follows a refusal; [`Strategy::policy`] takes the barrier out where it has none.
    pub policy: RetryPolicy,
    /// How long an attempt with the barrier waits for the running apply.
    pub barrier_patience: Micros,
    /// What follows a failed cycle.
    pub backoff: CycleBackoff,
    /// When health turns.
    pub health: HealthThresholds,
    /// Simulated before the window, so that it does not find everything at rest.
    pub warm_up: Micros,
}

impl Scenario {
    /// The defaults of the product on a site with solid-state disks, a hundred VMs each.
    #[must_use]
    pub fn standard(vms: u32, interval_seconds: u32, strategy: Strategy) -> Self {
        let vms_per_site = 100.min(vms);
        Self {
            seed: 1,
            sites: vms / vms_per_site,
            vms_per_site,
            interval: Micros::from(interval_seconds) * SECOND,
            points: 0,
            apply_workers: 2,
            disk: SiteDisk { bytes_per_s: 200e6, apply_seconds: 0.015, log_seconds: 0.001 },
            churn: Churn::published(),
            failures: Failures::SOME,
            window: Window::night(),
            strategy,
            policy: RetryPolicy::default(),
            barrier_patience: 10 * MINUTE,
            backoff: CycleBackoff::default(),
            health: HealthThresholds::default(),
            warm_up: 5 * MINUTE,
        }
    }

    /// One VM to a site, so that nothing disturbs it, whose applies take this share of the interval.
    #[must_use]
    pub fn alone(vms: u32, interval_seconds: u32, utilisation: f64, strategy: Strategy) -> Self {
        let standard = Self::standard(1, interval_seconds, strategy);
        let disk = SiteDisk { bytes_per_s: 100e6, apply_seconds: 0.0, log_seconds: 0.0 };
        Self {
            sites: vms,
            disk,
            churn: Churn::constant(utilisation * disk.bytes_per_s),
            failures: Failures::NONE,
            // A backup of ten seconds, whatever the VM changes.
            window: Window { backup_seconds: 10.0, backup_bytes_per_s: f64::INFINITY, ..Window::night() },
            ..standard
        }
    }

    /// VMs of the fleet.
    #[must_use]
    pub const fn vms(&self) -> u32 {
        self.sites * self.vms_per_site
    }

    /// How long a backup reads that has this many bytes to read.
    pub(crate) fn backup_time(&self, bytes: f64) -> Micros {
        micros(self.window.backup_seconds + bytes / self.window.backup_bytes_per_s)
    }

    /// The work of an apply, in seconds of the disk.
    pub(crate) fn apply_work(&self, bytes: f64, logs: u64) -> f64 {
        self.disk.apply_seconds + self.disk.log_seconds * logs as f64 + bytes / self.disk.bytes_per_s
    }
}
