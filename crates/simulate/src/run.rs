//! Runs schedules, and shrinks those that fail.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use crate::coverage::Coverage;
use crate::event::Event;
use crate::plan::Schedule;
use crate::world::{Violation, World};

/// Events of a world, if nobody says otherwise.
pub const EVENTS: usize = 120;

/// What a world came to.
#[derive(Debug)]
pub struct Outcome {
    /// What must never happen and did.
    pub violation: Option<Violation>,
    /// What happened, in figures.
    pub coverage: Coverage,
    /// The time that passed in it.
    pub simulated: Duration,
    /// What happened, line by line, if it was to be traced.
    pub trace: Vec<String>,
}

/// Runs a schedule from its beginning to its end.
#[must_use]
pub fn run(schedule: &Schedule, traced: bool) -> Outcome {
    let mut world = match World::new(schedule.seed, &schedule.plan, traced) {
        Ok(world) => world,
        Err(violation) => {
            let (coverage, simulated) = (Coverage::default(), Duration::ZERO);
            return Outcome { violation: Some(violation), coverage, simulated, trace: Vec::new() };
        }
    };
    // A panic of the product is as wrong as anything else.
    let ran = catch_unwind(AssertUnwindSafe(|| {
        schedule.events.iter().try_for_each(|event| world.happen(event))?;
        world.end()
    }));
    let violation = match ran {
        Ok(outcome) => outcome.err(),
        Err(panic) => Some(Violation(format!("a panic: {}", said(panic.as_ref())))),
    };
    let (coverage, simulated) = (std::mem::take(&mut world.coverage), world.passed());
    let trace = world.trace().to_vec();
    if violation.is_some() {
        std::mem::forget(world); // what has panicked may not be taken down in good order
    }
    Outcome { violation, coverage, simulated, trace }
}

fn said(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default()
}

/// Takes events away from a schedule that fails, as long as it still fails: in large pieces first, then one by
/// one, and then from what happens while backups read.
#[must_use]
pub fn shrink(schedule: &Schedule) -> Schedule {
    let fails = |events: &[Event]| {
        let tried = Schedule { events: events.to_vec(), ..schedule.clone() };
        run(&tried, false).violation.is_some()
    };
    let mut events = schedule.events.clone();
    let mut piece = events.len().div_ceil(2).max(1);
    loop {
        let before = events.len();
        let mut at = 0;
        while at < events.len() {
            let mut fewer = events.clone();
            fewer.drain(at..(at + piece).min(fewer.len()));
            if fails(&fewer) { events = fewer } else { at += piece }
        }
        if piece == 1 && events.len() == before {
            break;
        }
        piece = (piece / 2).max(1);
    }
    for place in 0..events.len() {
        let Event::Jobs { meanwhile } = events[place].clone() else { continue };
        for at in (0..meanwhile.len()).rev() {
            let mut fewer = events.clone();
            if let Event::Jobs { meanwhile } = &mut fewer[place]
                && at < meanwhile.len()
            {
                meanwhile.remove(at);
            }
            if fails(&fewer) {
                events = fewer;
            }
        }
    }
    Schedule { events, ..schedule.clone() }
}
