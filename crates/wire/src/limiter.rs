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
