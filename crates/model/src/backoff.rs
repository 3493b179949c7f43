//! When a failed cycle is tried again.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Delays between failed cycles: each is used once, the last one for ever after.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CycleBackoff(Vec<Duration>);

impl Default for CycleBackoff {
    /// 1, 2, 4, 8, 10 minutes, then every 30 minutes.
    fn default() -> Self {
        Self([1, 2, 4, 8, 10, 30].map(|minutes| Duration::from_secs(minutes * 60)).to_vec())
    }
}

impl CycleBackoff {
    /// A backoff with these delays; the default ones if there are none.
    #[must_use]
    pub fn new(delays: Vec<Duration>) -> Self {
        if delays.is_empty() { Self::default() } else { Self(delays) }
    }

    /// How long to wait after the `failures`th failure in a row (from 1).
    #[must_use]
    pub fn delay(&self, failures: u32) -> Duration {
        let last = self.0.len() - 1;
        self.0[usize::try_from(failures.saturating_sub(1)).unwrap_or(last).min(last)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_grows_and_then_stays() {
        let backoff = CycleBackoff::default();
        let minutes: Vec<_> = (1..=8).map(|n| backoff.delay(n).as_secs() / 60).collect();
        assert_eq!(minutes, [1, 2, 4, 8, 10, 30, 30, 30]);
        assert_eq!(CycleBackoff::new(vec![]), backoff);
    }
}
