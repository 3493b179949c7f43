//! Time: one true time, and what each site's clock makes of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use model::Timestamp;

/// When worlds begin: 2027-01-15 08:00 UTC, in microseconds.
const BEGINNING: i64 = 1_800_000_000_000_000;

/// The true time of a world; clones share it.
#[derive(Debug, Clone)]
pub struct Time(Arc<AtomicI64>);

impl Default for Time {
    fn default() -> Self {
        Self(Arc::new(AtomicI64::new(BEGINNING)))
    }
}

impl Time {
    /// The true time.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        Timestamp(self.0.load(Ordering::Relaxed))
    }

    /// Time passes.
    pub fn pass(&self, duration: Duration) {
        self.0.fetch_add(micros(duration), Ordering::Relaxed);
    }

    /// How much has passed since the beginning.
    #[must_use]
    pub fn passed(&self) -> Duration {
        self.now().since(Timestamp(BEGINNING))
    }

    /// A clock that shows this time.
    #[must_use]
    pub fn clock(&self) -> SiteClock {
        SiteClock { time: self.clone(), off: Arc::default(), latest: Arc::default() }
    }
}

/// A site's clock: it may be wrong, and be set.
#[derive(Debug, Clone)]
pub struct SiteClock {
    time: Time,
    off: Arc<AtomicI64>,
    /// The latest moment it showed, of those before it was set.
    latest: Arc<AtomicI64>,
}

impl SiteClock {
    /// What it shows.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        Timestamp(self.time.now().0.saturating_add(self.off.load(Ordering::Relaxed)))
    }

    /// Sets it forward, or back.
    pub fn jump(&self, seconds: i64) {
        self.latest.fetch_max(self.now().0, Ordering::Relaxed);
        self.off.fetch_add(seconds.saturating_mul(1_000_000), Ordering::Relaxed);
    }

    /// Sets it right.
    pub fn set_right(&self) {
        self.latest.fetch_max(self.now().0, Ordering::Relaxed);
        self.off.store(0, Ordering::Relaxed);
    }

    /// The latest moment that it showed since somebody looked.
    #[must_use]
    pub fn latest(&self) -> Timestamp {
        Timestamp(self.latest.load(Ordering::Relaxed)).max(self.now())
    }

    /// Somebody has looked.
    pub fn looked_at(&self) {
        self.latest.store(0, Ordering::Relaxed);
    }
}

fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}
