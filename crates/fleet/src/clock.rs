//! Time in a simulated night: microseconds since the midnight before it.

use model::Timestamp;

/// Microseconds, as [`Timestamp`] counts them.
pub type Micros = i64;
/// One second.
pub const SECOND: Micros = 1_000_000;
/// One minute.
pub const MINUTE: Micros = 60 * SECOND;
/// One hour.
pub const HOUR: Micros = 60 * MINUTE;

/// A moment of the night as the rules take it.
pub(crate) const fn moment(at: Micros) -> Timestamp {
    Timestamp(at)
}

/// Seconds as microseconds.
pub(crate) fn micros(seconds: f64) -> Micros {
    (seconds * SECOND as f64).round() as Micros
}

/// A time as seconds.
pub(crate) fn seconds(time: Micros) -> f64 {
    time as f64 / SECOND as f64
}
