//! Moments as a calendar shows them.

use jiff::Zoned;
use jiff::tz::TimeZone;
use model::Timestamp;

/// The moment in this zone; one beyond what calendars know is the last or first that they do.
pub(crate) fn zoned(moment: Timestamp, zone: &TimeZone) -> Zoned {
    let bounded = jiff::Timestamp::from_microsecond(moment.0).unwrap_or(if moment.0 < 0 {
        jiff::Timestamp::MIN
    } else {
        jiff::Timestamp::MAX
    });
    bounded.to_zoned(zone.clone())
}

/// The moment that a calendar shows.
pub(crate) fn moment(zoned: &Zoned) -> Timestamp {
    Timestamp(zoned.timestamp().as_microsecond())
}
