//! How fast a relationship may send.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// What is sent between two looks at the budget lasts about this long at the limit: what leaves the site
/// is smooth, whatever the size of a segment.
const SLICE_TIME: Duration = Duration::from_millis(20);
/// Bounds of a slice: below, waiting would cost more than sending; above, nothing is won.
const SLICE_BYTES: std::ops::RangeInclusive<u64> = 1024..=256 * 1024;
/// What was not used in the past is forgotten beyond this, so that a pause is not followed by a burst.
const BURST_TIME: Duration = Duration::from_millis(50);

/// A bandwidth limit. Clones share one budget.
#[derive(Debug, Clone)]
pub struct RateLimiter {
    bytes_per_s: u64,
    /// When everything granted so far will have been sent at the limit.
    granted_until: Arc<Mutex<Option<Instant>>>,
}

impl RateLimiter {
    /// A limit of so many bytes per second (at least one).
    #[must_use]
    pub fn new(bytes_per_s: u64) -> Self {
        Self { bytes_per_s: bytes_per_s.max(1), granted_until: Arc::default() }
    }

    /// The limit.
    #[must_use]
    pub const fn bytes_per_s(&self) -> u64 {
        self.bytes_per_s
    }

    /// How much to send between two calls of [`Self::take`].
    #[must_use]
    pub fn slice_bytes(&self) -> usize {
        let slice = self.bytes_in(SLICE_TIME).clamp(*SLICE_BYTES.start(), *SLICE_BYTES.end());
        usize::try_from(slice).unwrap_or(usize::MAX)
    }

    /// How much the limit lets through in `time`.
    pub(crate) fn bytes_in(&self, time: Duration) -> u64 {
        let bytes = u128::from(self.bytes_per_s) * time.as_micros() / 1_000_000;
        u64::try_from(bytes).unwrap_or(u64::MAX)
    }

    /// Waits until `bytes` may be sent. Those who wait are served in the order in which they came.
    pub async fn take(&self, bytes: usize) {
        tokio::time::sleep_until(self.reserve(bytes)).await;
    }

    /// Takes `bytes` out of the budget and tells from when on they may be sent.
    fn reserve(&self, bytes: usize) -> Instant {
        let now = Instant::now();
        let cost = Duration::from_micros(
            u64::try_from(bytes as u128 * 1_000_000 / u128::from(self.bytes_per_s)).unwrap_or(u64::MAX / 2),
        );
        let mut granted_until = self.granted_until.lock().unwrap_or_else(PoisonError::into_inner);
        let earliest = now.checked_sub(BURST_TIME).unwrap_or(now);
        let from = granted_until.map_or(now, |until| until.max(earliest));
        // A limit so low that the end cannot be told is as good as "in a year".
        let until = from.checked_add(cost).unwrap_or(now + Duration::from_secs(365 * 86_400));
        *granted_until = Some(until);
        from
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends `total` bytes in slices; how many were let through in each tenth of a second.
    async fn send(limiter: RateLimiter, total: u64) -> Vec<u64> {
        let started = Instant::now();
        let mut tenths = Vec::new();
        let mut sent = 0;
        while sent < total {
            let slice = limiter.slice_bytes() as u64;
            limiter.take(limiter.slice_bytes()).await;
            let at = usize::try_from(started.elapsed().as_millis() / 100).unwrap();
            tenths.resize(tenths.len().max(at + 1), 0);
            tenths[at] += slice;
            sent += slice;
        }
        tenths
    }

    #[tokio::test(start_paused = true)]
    async fn the_limit_is_kept_smoothly() {
        for rate in [50_000, 1_000_000, 20_000_000, 1_000_000_000] {
            let tenths = send(RateLimiter::new(rate), rate * 5).await;
            assert!((49..=51).contains(&tenths.len()), "{rate}: 5 s of it took {} tenths", tenths.len());
            for sent in &tenths[..tenths.len() - 1] {
                assert!(sent.abs_diff(rate / 10) <= rate / 50, "{rate}: {sent} in a tenth of a second");
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn clones_share_one_budget_and_each_gets_its_part() {
        let limiter = RateLimiter::new(1_000_000);
        let started = Instant::now();
        let (a, b) = tokio::join!(send(limiter.clone(), 2_000_000), send(limiter.clone(), 2_000_000));
        let took = started.elapsed().as_secs_f64();
        assert!((3.8..4.2).contains(&took), "{took}");
        let half: u64 = a[..10].iter().sum();
        assert!((400_000..600_000).contains(&half), "{half} in the first second");
        assert_eq!(a.len(), b.len());
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_is_not_followed_by_a_burst() {
        let limiter = RateLimiter::new(1_000_000);
        limiter.take(1000).await;
        tokio::time::sleep(Duration::from_secs(60)).await;
        let tenths = send(limiter, 1_000_000).await;
        assert!(tenths[0] <= 180_000, "{} in the first tenth of a second", tenths[0]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_limit_of_next_to_nothing_is_no_panic() {
        let limiter = RateLimiter::new(0);
        limiter.take(usize::MAX).await;
        limiter.reserve(usize::MAX);
        assert!(limiter.reserve(1) > Instant::now());
        assert_eq!(limiter.slice_bytes(), 1024);
    }
}
