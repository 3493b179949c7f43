//! How often somebody may be refused before we stop listening: guesses of an invite's secret, and refusals that
//! are written down.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Who is counted at once; beyond that, all others are counted as one.
const KEYS_MAX: usize = 4096;

/// Counts, for each of many, what happened within a while.
#[derive(Debug)]
pub(crate) struct Attempts<K> {
    most: u32,
    within: Duration,
    windows: Mutex<HashMap<Option<K>, Window>>,
}

#[derive(Debug, Clone, Copy)]
struct Window {
    since: Instant,
    count: u32,
}

/// Whether it may go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Yes; so many were kept back since the last one that was not.
    Yes {
        /// How many.
        kept_back: u32,
    },
    /// Not for this long.
    No(Duration),
}

impl<K: Eq + Hash + Copy> Attempts<K> {
    pub fn new(most: u32, within: Duration) -> Self {
        Self { most, within, windows: Mutex::default() }
    }

    /// Counts one more.
    pub fn count(&self, key: K) -> Verdict {
        let now = Instant::now();
        let mut windows = self.lock();
        let key = if windows.contains_key(&Some(key)) || windows.len() < KEYS_MAX {
            Some(key)
        } else {
            let within = self.within;
            windows.retain(|_, window| now.duration_since(window.since) < within);
            (windows.len() < KEYS_MAX).then_some(key)
        };
        let fresh = Window { since: now, count: 0 };
        let window = windows.entry(key).or_insert(fresh);
        let age = now.duration_since(window.since);
        let mut kept_back = 0;
        if age >= self.within {
            kept_back = window.count.saturating_sub(self.most);
            *window = fresh;
        }
        window.count = window.count.saturating_add(1);
        if window.count > self.most {
            return Verdict::No(self.within.saturating_sub(age));
        }
        Verdict::Yes { kept_back }
    }

    /// Whether the next one would be too many.
    pub fn is_over(&self, key: K) -> Option<Duration> {
        let windows = self.lock();
        let window =
            windows.get(&Some(key)).or_else(|| windows.get(&None).filter(|_| windows.len() >= KEYS_MAX))?;
        let left = self.within.checked_sub(window.since.elapsed())?;
        (window.count >= self.most && !left.is_zero()).then_some(left)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Option<K>, Window>> {
        self.windows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WITHIN: Duration = Duration::from_secs(60);

    #[tokio::test(start_paused = true)]
    async fn some_are_taken_and_later_some_more() {
        let attempts = Attempts::new(2, WITHIN);
        assert_eq!(attempts.is_over(1), None);
        assert_eq!(attempts.count(1), Verdict::Yes { kept_back: 0 });
        assert_eq!(attempts.count(1), Verdict::Yes { kept_back: 0 });
        assert_eq!(attempts.is_over(1), Some(WITHIN));
        assert_eq!(attempts.count(2), Verdict::Yes { kept_back: 0 });
        tokio::time::advance(WITHIN / 2).await;
        assert_eq!(attempts.count(1), Verdict::No(WITHIN / 2));
        tokio::time::advance(WITHIN / 2).await;
        assert_eq!(attempts.is_over(1), None);
        assert_eq!(attempts.count(1), Verdict::Yes { kept_back: 1 });
    }

    #[tokio::test(start_paused = true)]
    async fn memory_is_bounded_and_the_many_count_as_one() {
        let attempts = Attempts::new(2, WITHIN);
        for key in 0..10_000 {
            attempts.count(key);
        }
        assert!(attempts.lock().len() <= KEYS_MAX + 1);
        assert!(matches!(attempts.count(200_000), Verdict::No(_)));
        tokio::time::advance(WITHIN).await;
        assert!(matches!(attempts.count(200_001), Verdict::Yes { .. }));
    }
}
