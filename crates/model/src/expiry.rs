//! How near the end of a certificate is.

use std::time::Duration;

use crate::Timestamp;

/// A certificate that ends sooner than this is spoken of: half a month is left after somebody's holidays.
pub const EXPIRY_WARNING: Duration = Duration::from_secs(30 * 86_400);

/// How near its end is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expiry {
    /// Far enough.
    Far,
    /// It ends within [`EXPIRY_WARNING`].
    Soon {
        /// In so long.
        left: Duration,
    },
    /// It is past.
    Past {
        /// For so long.
        ago: Duration,
    },
}

/// How near the end is of a certificate that is good until `expires_at`.
#[must_use]
pub fn expiry(expires_at: Timestamp, now: Timestamp) -> Expiry {
    if now >= expires_at {
        return Expiry::Past { ago: now.since(expires_at) };
    }
    match expires_at.since(now) {
        left if left <= EXPIRY_WARNING => Expiry::Soon { left },
        _ => Expiry::Far,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_month_is_soon_and_the_end_is_past() {
        let end = Timestamp::default().plus(Duration::from_secs(1000 * 86_400));
        let days = |days: u64| Duration::from_secs(days * 86_400);
        let at = |day: u64| expiry(end, Timestamp::default().plus(days(day)));
        assert_eq!((at(0), at(969)), (Expiry::Far, Expiry::Far));
        assert_eq!((at(970), at(999)), (Expiry::Soon { left: days(30) }, Expiry::Soon { left: days(1) }));
        assert_eq!((at(1000), at(1002)), (Expiry::Past { ago: days(0) }, Expiry::Past { ago: days(2) }));
    }
}
