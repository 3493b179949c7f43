//! The one place where the site reads the clock.

use std::time::{Duration, SystemTime};

use model::Timestamp;
use serde::{Serialize, Serializer};

/// The present moment.
pub fn now() -> Timestamp {
    Timestamp::from(SystemTime::now())
}

/// A moment as commands show it: RFC 3339, UTC, milliseconds.
#[must_use]
pub fn rfc3339(moment: Timestamp) -> String {
    let shown = jiff::Timestamp::from_microsecond(moment.0).unwrap_or_default();
    format!("{shown:.3}")
}

/// The moment that such a text shows.
pub fn from_rfc3339(text: &str) -> Option<Timestamp> {
    text.parse::<jiff::Timestamp>().ok().map(|moment| Timestamp(moment.as_microsecond()))
}

/// For `#[serde(serialize_with)]`.
pub fn serialize_moment<S: Serializer>(moment: &Timestamp, to: S) -> Result<S::Ok, S::Error> {
    rfc3339(*moment).serialize(to)
}

/// The same for one that may not be there.
pub fn serialize_optional_moment<S: Serializer>(
    moment: &Option<Timestamp>,
    to: S,
) -> Result<S::Ok, S::Error> {
    moment.map(rfc3339).serialize(to)
}

/// Seconds as a fraction, for figures.
#[must_use]
pub fn seconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1000.0).round() / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_shown_in_utc_with_milliseconds() {
        assert_eq!(rfc3339(Timestamp(1_700_000_000_123_456)), "2023-11-14T22:13:20.123Z");
        assert_eq!(rfc3339(Timestamp(i64::MAX)), "1970-01-01T00:00:00.000Z");
    }
}
