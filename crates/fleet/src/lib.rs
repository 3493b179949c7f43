//! A fleet's night, simulated: how often backups of replicas collide with the applies of the replication that
//! they ride on, how they come home, and what that costs, for ten thousand and a hundred thousand VMs.
//!
//! The rules are production's: the gate is `model::gate::admit` over `Facts`, health is `model::assess`, what
//! follows a refusal is `model::RetryPolicy::decide`, what follows a failed cycle is `model::CycleBackoff`, when a
//! base may move is `model::BaseState`. How far it may is `chain::plan_retention`'s answer, found in constant time
//! and tested against it. What is made up is the world: VMs and how they change ([`Churn`]), the disk that
//! applies and backups share, and what fails.
//!
//! Invariants:
//! * one seed gives one outcome, whatever the number of threads, and all strategies see the same VMs;
//! * memory is bounded by the VMs of one site, not by the fleet, the night or the number of cycles;
//! * no backup is counted that does not hold a [`model::gate::Admission`] from its first byte to its last.
//!
//! What it does not do: move bytes, lose them, or check them (that is what the other simulation is for). A cycle's
//! shipping takes no time here, migrations, failovers, initial replications and failed applies do not happen,
//! and logs are merged at no cost.

mod applies;
mod churn;
mod clock;
mod disk;
pub mod figures;
mod histogram;
mod jobs;
mod outages;
mod run;
mod scenario;
mod site;
mod studies;
mod tables;
mod tally;
mod vm;

pub use churn::{Bursts, Churn, LogSizes, VmChurn};
pub use clock::{HOUR, MINUTE, Micros, SECOND};
pub use histogram::Histogram;
pub use run::run;
pub use scenario::{Failures, Scenario, SiteDisk, Strategy, Window};
pub use studies::{Fleet, Results, Size, Starvation, Workers, closed_form_done, study};
pub use tables::markdown;
pub use tally::{RATE_CLASSES, Tally};
pub use vm::{Kept, Point};
