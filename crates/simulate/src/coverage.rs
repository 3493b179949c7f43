//! What happened, in figures: whether the worlds are wild enough to prove anything.

use std::collections::BTreeMap;
use std::fmt;

use crate::event::Event;

/// Counters by name; they add up over worlds.
#[derive(Debug, Clone, Default)]
pub struct Coverage {
    counts: BTreeMap<String, u64>,
}

impl Coverage {
    /// Something happened so many times.
    pub fn count(&mut self, what: impl Into<String>, times: u64) {
        if times > 0 {
            *self.counts.entry(what.into()).or_insert(0) += times;
        }
    }

    /// Something happened.
    pub fn hit(&mut self, what: impl Into<String>) {
        self.count(what, 1);
    }

    /// An event was taken.
    pub fn event(&mut self, event: &Event) {
        let shown = format!("{event:?}");
        let name = shown.split([' ', '{']).next().unwrap_or_default();
        self.hit(format!("event {name}"));
    }

    /// How often something happened.
    #[must_use]
    pub fn of(&self, what: &str) -> u64 {
        self.counts.get(what).copied().unwrap_or(0)
    }

    /// How often all happened whose name begins like this.
    #[must_use]
    pub fn sum(&self, prefix: &str) -> u64 {
        self.counts.iter().filter(|(name, _)| name.starts_with(prefix)).map(|(_, count)| count).sum()
    }

    /// Adds another world's.
    pub fn add(&mut self, other: &Self) {
        other.counts.iter().for_each(|(name, count)| self.count(name.clone(), *count));
    }
}

impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.counts.iter().try_for_each(|(name, count)| writeln!(f, "{count:>12}  {name}"))
    }
}
