//! The power of one site: what its disk and its catalog ask at each durable step.
//!
//! A site dies *at* a step: before it has taken effect, or after it and before anybody has heard of it. From
//! then on every step fails, so that what the dying code still tries leaves no trace, until it is booted again.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What becomes of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It is taken.
    Lives,
    /// The site dies before it.
    DiesBefore,
    /// It is taken; then the site dies.
    DiesAfter,
}

#[derive(Debug, Default)]
struct State {
    down: bool,
    boots: u64,
    steps: u64,
    /// The step to die at, and whether after it.
    cut: Option<(u64, bool)>,
    /// Commits of the catalog that go well, and then commits that fail, and whether the next process finds the
    /// last of those all the same.
    commits: (u64, u64, bool),
    /// Steps are neither counted nor died at: a checker looks.
    observed: bool,
}

/// The power of one site; clones share it.
#[derive(Debug, Clone, Default)]
pub struct Power(Arc<Mutex<State>>);

impl Power {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A durable step is about to be taken.
    pub fn step(&self) -> Fate {
        let mut state = self.lock();
        if state.down {
            return Fate::DiesBefore;
        }
        if state.observed {
            return Fate::Lives;
        }
        state.steps += 1;
        match state.cut {
            Some((at, after)) if state.steps >= at => {
                (state.down, state.cut) = (true, None);
                if after { Fate::DiesAfter } else { Fate::DiesBefore }
            }
            _ => Fate::Lives,
        }
    }

    /// Whether the next commit of the catalog fails though the site lives, and whether the next process finds it all
    /// the same.
    pub fn failed_commit(&self) -> Option<bool> {
        let mut state = self.lock();
        if state.observed || state.down {
            return None;
        }
        let (skip, count, kept) = &mut state.commits;
        if *count == 0 {
            return None;
        }
        if *skip > 0 {
            *skip -= 1;
            return None;
        }
        *count -= 1;
        Some(*kept)
    }

    /// Lets commits fail: after `skip` ones, `count` ones.
    pub fn fail_commits(&self, skip: u64, count: u64, kept: bool) {
        self.lock().commits = (skip, count, kept);
    }

    /// Lets the site die at the `nth` step from now (from 1), before or after it.
    pub fn cut_at(&self, nth: u64, after: bool) {
        let mut state = self.lock();
        state.cut = Some((state.steps + nth.max(1), after));
    }

    /// The site is not to die after all.
    pub fn disarm(&self) {
        let mut state = self.lock();
        (state.cut, state.commits) = (None, (0, 0, false));
    }

    /// Lets the site die now.
    pub fn cut(&self) {
        let mut state = self.lock();
        (state.down, state.cut) = (true, None);
    }

    /// The site is started again.
    pub fn boot(&self) {
        let mut state = self.lock();
        (state.down, state.cut) = (false, None);
        state.boots += 1;
    }

    /// Nobody dies while a checker looks.
    pub fn observe(&self, observed: bool) {
        self.lock().observed = observed;
    }

    /// Whether a checker is looking.
    #[must_use]
    pub fn is_observed(&self) -> bool {
        self.lock().observed
    }

    /// Whether the site is dead.
    #[must_use]
    pub fn is_down(&self) -> bool {
        self.lock().down
    }

    /// How often the site was started again. What was opened in another life is of no use in this one.
    #[must_use]
    pub fn boots(&self) -> u64 {
        self.lock().boots
    }

    /// Durable steps so far.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.lock().steps
    }
}

/// What every call of a dead site gets.
#[must_use]
pub fn dead() -> io::Error {
    io::Error::other("the power is cut")
}
