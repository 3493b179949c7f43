//! One VM's replica: what has arrived, what is applied, who reads it.
//!
//! Retention is `chain::plan_retention`'s, cut down to what the base needs and to constant time per log; a
//! test holds the two against each other.

use std::collections::VecDeque;
use std::time::Duration;

use model::gate::{Access, Admission, Facts, Refusal, admit};
use model::{
    ApplyState, BaseState, Health, HealthInput, HealthThresholds, Lately, LogNumber, Phase, Timestamp, VmId,
    assess,
};

use crate::churn::VmChurn;
use crate::clock::{HOUR, Micros, moment};

/// A point of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Point {
    /// Its number.
    pub number: u64,
    /// Its moment.
    pub at: Micros,
    /// The bytes of all logs up to it.
    pub bytes: f64,
}

/// The newest point of each hour that retention keeps, oldest first. The first one is as far as the base may go.
#[derive(Debug, Clone, PartialEq)]
pub struct Kept {
    hours: VecDeque<Point>,
    /// Of a chain that is younger than its hour, every point is kept: this one is the oldest.
    first: Point,
    extra_hourly: usize,
}

impl Kept {
    /// Keeps this many hours beside the latest one.
    #[must_use]
    pub fn new(extra_hourly: u8, first: Point) -> Self {
        Self { hours: [first].into(), first, extra_hourly: extra_hourly.into() }
    }

    /// A point has arrived.
    pub fn push(&mut self, point: Point) {
        if let Some(last) = self.hours.back_mut() {
            // With no hours kept, only the latest point is.
            if self.extra_hourly == 0 || last.at.div_euclid(HOUR) == point.at.div_euclid(HOUR) {
                *last = point;
                return;
            }
        }
        self.hours.push_back(point);
        while self.hours.len() > self.extra_hourly + 1 {
            self.hours.pop_front();
        }
    }

    /// The latest point.
    #[must_use]
    pub fn latest(&self) -> Point {
        self.hours.back().copied().unwrap_or_default()
    }

    /// The oldest point kept.
    #[must_use]
    pub fn oldest(&self) -> Point {
        match self.hours.front() {
            Some(front) if self.hours.len() > 1 || self.extra_hourly == 0 => *front,
            _ => self.first,
        }
    }
}

/// A replica.
#[derive(Debug)]
pub(crate) struct Vm {
    pub id: VmId,
    pub churn: VmChurn,
    pub kept: Kept,
    /// The point that the base equals, or did before an apply began that has not ended.
    pub base: Point,
    /// How far the apply goes that runs or was cut off.
    pub applying: Option<Point>,
    pub apply: ApplyState,
    pub pin: Option<Point>,
    pub held: bool,
    /// A hold whose backup died with the site: nobody gives it back, it ends by its lease.
    pub orphaned: bool,
    pub barred: bool,
    /// It waits for a worker.
    pub queued: bool,
    /// A worker is at it.
    pub working: bool,
    pub phase: Phase,
    pub phase_since: Micros,
    pub health: (Health, Micros),
    pub primary: Primary,
    /// The greatest age that its newest point has had since a backup of it was first tried.
    pub watched_age: Option<Micros>,
}

/// What the primary of a VM does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Primary {
    /// An operator, or a script of theirs, has paused it.
    pub paused: bool,
    /// Its host is down, or both sides are still to be compared.
    pub away: bool,
    /// Cycles that failed in a row.
    pub failures: u32,
    /// A cycle is due at some moment.
    pub scheduled: bool,
    /// Its place in the ring no longer counts: the cycle was run before its time.
    pub early: bool,
}

impl Vm {
    /// A replica that is well, with nothing to apply.
    pub fn new(id: VmId, churn: VmChurn, kept: Kept) -> Self {
        Self {
            id,
            churn,
            base: kept.oldest(),
            kept,
            applying: None,
            apply: ApplyState::Idle,
            pin: None,
            held: false,
            orphaned: false,
            barred: false,
            queued: false,
            working: false,
            phase: Phase::Replicating,
            phase_since: 0,
            health: (Health::Normal, 0),
            primary: Primary::default(),
            watched_age: None,
        }
    }

    /// A log has become durable.
    pub fn arrived(&mut self, now: Micros, bytes: f64) {
        let before = self.kept.latest();
        self.watch(now);
        self.kept.push(Point { number: before.number + 1, at: now, bytes: before.bytes + bytes });
    }

    /// Notes how old the newest point has become.
    pub fn watch(&mut self, now: Micros) {
        if let Some(age) = &mut self.watched_age {
            *age = (*age).max(now - self.kept.latest().at);
        }
    }

    /// How far to apply now, if at all.
    pub fn apply_target(&self, now: Micros) -> Option<Point> {
        let base = BaseState {
            apply: &self.apply,
            held: self.held || self.orphaned,
            barred: self.barred,
            retry_at: Timestamp::default(),
        };
        let floor = self.pin.filter(|pin| pin.number < self.kept.oldest().number);
        let floor = floor.unwrap_or_else(|| self.kept.oldest());
        let planned = (!base.stays() && floor.number > self.base.number).then_some(floor);
        let number = |point: Option<Point>| point.map(|point| LogNumber(point.number));
        let through = base.apply_through(number(planned), number(self.applying), moment(now))?;
        planned.into_iter().chain(self.applying).find(|point| point.number == through.0)
    }

    /// Asks the gate, as `replica::Store` does: a view of the newest point, or a hold of the base's.
    pub fn ask(
        &mut self,
        access: Access,
        interval: Duration,
        thresholds: &HealthThresholds,
        now: Micros,
    ) -> Result<(Admission, Point), Refusal> {
        let input = HealthInput {
            phase: &self.phase,
            apply: &self.apply,
            paused: self.primary.paused,
            last_log_at: moment(self.kept.latest().at),
            interval,
            lately: Lately::default(),
            error: None,
        };
        let health = assess(&input, thresholds, moment(now)).health;
        if health != self.health.0 {
            self.health = (health, now);
        }
        let point = if access == Access::Hold { self.base } else { self.kept.latest() };
        let facts = Facts {
            vm: self.id,
            phase: &self.phase,
            phase_since: moment(self.phase_since),
            apply: &self.apply,
            health,
            health_since: moment(self.health.1),
            migrating_since: None,
        };
        Ok((admit(&facts, access, LogNumber(point.number), moment(now))?, point))
    }
}
