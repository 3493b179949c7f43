//! How well a relationship is. Thresholds follow Hyper-V Replica's rules (20 % of cycles missed in the monitoring
//! window, an average latency of five minutes, one hour behind) and can be set in the config.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{ApplyState, CycleTally, Phase, Sum, Timestamp, human_duration};

/// The three grades.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Health {
    /// All is well.
    Normal,
    /// It works, but a person should look.
    Warning,
    /// Replication stands still, or the replica cannot be trusted.
    Critical,
}

/// What health is judged by.
#[derive(Debug, Clone)]
pub struct HealthInput<'a> {
    /// Where the relationship stands.
    pub phase: &'a Phase,
    /// What the last apply came to (idle on the primary).
    pub apply: &'a ApplyState,
    /// Replication was paused by a person.
    pub paused: bool,
    /// When the newest log became durable, or the relationship was made.
    pub last_log_at: Timestamp,
    /// The interval between cycles.
    pub interval: Duration,
    /// How cycles went in the monitoring window.
    pub lately: Lately,
    /// An error that does not clear by itself.
    pub error: Option<&'a str>,
}

/// How cycles went in the monitoring window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Lately {
    /// How many were missed.
    pub missed: u64,
    /// How many there should have been.
    pub cycles: u64,
    /// The average time from a moment to its durable acknowledgement.
    pub latency: Duration,
    /// How long the window counts by now.
    pub over: Duration,
}

impl Lately {
    /// As the window has it.
    #[must_use]
    pub fn of(window: &Sum<CycleTally>, now: Timestamp) -> Self {
        let Sum { since, sum } = window;
        Self {
            missed: sum.missed,
            cycles: sum.cycles(),
            latency: sum.latency_avg().unwrap_or_default(),
            over: now.since(*since),
        }
    }
}

/// When health turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthThresholds {
    /// The monitoring window: so far back cycles count.
    pub window: Duration,
    /// Warning above this share of missed cycles, in percent.
    pub missed_percent: u32,
    /// Warning above this average latency.
    pub latency_max: Duration,
    /// Warning when the newest log is older than this (and than three intervals).
    pub warning_after: Duration,
    /// Critical when the newest log is older than this (and than three intervals).
    pub critical_after: Duration,
}

impl Default for HealthThresholds {
    fn default() -> Self {
        Self {
            window: Duration::from_secs(24 * 3600),
            missed_percent: 20,
            latency_max: Duration::from_secs(5 * 60),
            warning_after: Duration::from_secs(10 * 60),
            critical_after: Duration::from_secs(3600),
        }
    }
}

/// A grade and the reason for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assessment {
    /// The grade.
    pub health: Health,
    /// One sentence for a person; empty when all is well.
    pub reason: String,
}

/// Judges a relationship. A pause is an operator's own act: it is a warning and never Critical, so
/// a pause made for a backup cannot refuse that backup.
#[must_use]
pub fn assess(input: &HealthInput<'_>, thresholds: &HealthThresholds, now: Timestamp) -> Assessment {
    let grade = |health, reason: String| Assessment { health, reason };
    if let Some(error) = input.error {
        return grade(Health::Critical, error.to_owned());
    }
    if let ApplyState::Failed { error, .. } = input.apply {
        return grade(Health::Critical, format!("the last apply failed: {error}"));
    }
    if let Phase::ResyncRequired { why } = input.phase {
        return grade(Health::Critical, format!("resynchronization is required: {why}"));
    }
    if input.paused {
        return grade(Health::Warning, "replication is paused".into());
    }
    let age = now.since(input.last_log_at);
    // Nothing is to arrive any more where the VM has been failed over.
    let ended = matches!(input.phase, Phase::FailedOver);
    let overdue = |limit: Duration| !ended && age > limit.max(input.interval.saturating_mul(3));
    let behind = || format!("the last log arrived {} ago", human_duration(age));
    if overdue(thresholds.critical_after) {
        return grade(Health::Critical, behind());
    }
    if overdue(thresholds.warning_after) {
        return grade(Health::Warning, behind());
    }
    match input.phase {
        Phase::InitialReplication { .. } => {
            grade(Health::Warning, "initial replication is not complete".into())
        }
        Phase::Resynchronizing { .. } => grade(Health::Warning, "resynchronization is not complete".into()),
        Phase::Failover { .. } => grade(Health::Warning, "a failover is in progress".into()),
        Phase::FailedOver => grade(
            Health::Warning,
            "the VM was failed over and runs at the other site; 'failover reverse' there makes this site its replica".into(),
        ),
        _ => {
            let Lately { missed, cycles, latency, over } = input.lately;
            let over = human_duration(over);
            if u128::from(missed) * 100 > u128::from(cycles) * u128::from(thresholds.missed_percent) {
                let reason = format!("{missed} of the {cycles} cycles of the last {over} were missed");
                grade(Health::Warning, reason)
            } else if latency > thresholds.latency_max {
                let latency = human_duration(latency);
                grade(Health::Warning, format!("the cycles of the last {over} took {latency} on average"))
            } else {
                grade(Health::Normal, String::new())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Timestamp {
        Timestamp::default().plus(Duration::from_secs(seconds))
    }

    fn input<'a>(phase: &'a Phase) -> HealthInput<'a> {
        HealthInput {
            phase,
            apply: &ApplyState::Idle,
            paused: false,
            last_log_at: at(0),
            interval: Duration::from_secs(30),
            lately: Lately { cycles: 100, ..Lately::default() },
            error: None,
        }
    }

    fn judge(input: &HealthInput<'_>, seconds: u64) -> Health {
        assess(input, &HealthThresholds::default(), at(seconds)).health
    }

    #[test]
    fn silence_turns_a_warning_and_then_critical() {
        let normal = input(&Phase::Replicating);
        assert_eq!(judge(&normal, 600), Health::Normal);
        assert_eq!(judge(&normal, 601), Health::Warning);
        assert_eq!(judge(&normal, 3601), Health::Critical);
    }

    #[test]
    fn a_pause_is_never_critical_however_long() {
        let paused = HealthInput { paused: true, ..input(&Phase::Replicating) };
        assert_eq!(judge(&paused, 1_000_000), Health::Warning);
    }

    #[test]
    fn more_than_a_fifth_of_missed_cycles_is_a_warning_that_says_of_how_many() {
        let lately =
            |missed| Lately { missed, cycles: 100, over: Duration::from_secs(7200), ..Lately::default() };
        let phase = Phase::Replicating;
        let missed = |missed| HealthInput { lately: lately(missed), ..input(&phase) };
        assert_eq!(judge(&missed(20), 1), Health::Normal);
        let warned = assess(&missed(21), &HealthThresholds::default(), at(1));
        assert_eq!(warned.health, Health::Warning);
        assert_eq!(warned.reason, "21 of the 100 cycles of the last 2 h were missed");
    }

    #[test]
    fn slow_cycles_are_a_warning() {
        let slow = |seconds| Lately { latency: Duration::from_secs(seconds), ..Lately::default() };
        let phase = Phase::Replicating;
        let judged = |seconds| judge(&HealthInput { lately: slow(seconds), ..input(&phase) }, 1);
        assert_eq!((judged(300), judged(301)), (Health::Normal, Health::Warning));
    }

    #[test]
    fn what_does_not_clear_by_itself_is_critical() {
        let resync = Phase::ResyncRequired { why: crate::ResyncReason::Requested };
        assert_eq!(judge(&input(&resync), 1), Health::Critical);
        let failed = ApplyState::Failed { since: at(0), error: "disk".into() };
        assert_eq!(judge(&HealthInput { apply: &failed, ..input(&Phase::Replicating) }, 1), Health::Critical);
        assert_eq!(
            judge(&HealthInput { error: Some("refused"), ..input(&Phase::Replicating) }, 1),
            Health::Critical
        );
    }
}
