//! How consistent a point is, and which point a request gets.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{LogId, LogNumber, Timestamp};

/// How consistent a recovery point is. Less than crash-consistent does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Consistency {
    /// All disks as they were at one moment, as after a power cut.
    Crash,
    /// The guest had frozen its file systems (and told its applications) at that moment.
    Application,
}

/// What a log brings its chain to when it is applied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogClass {
    /// Not a recovery point: a part of an initial replication, of a resynchronization or of a very
    /// large cycle, whose rest is in the logs that follow.
    Partial,
    /// A recovery point.
    Point(Consistency),
}

impl LogClass {
    /// The consistency of the point that this log makes, if it makes one.
    #[must_use]
    pub fn point(self) -> Option<Consistency> {
        match self {
            Self::Partial => None,
            Self::Point(consistency) => Some(consistency),
        }
    }
}

/// The consistency that a backup asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Wanted {
    /// Only an application-consistent point will do.
    Application,
    /// The newest application-consistent point no older than this, else the newest crash-consistent one.
    PreferApplication {
        /// The age that an application-consistent point may have.
        max_age: Duration,
    },
    /// The newest point, whatever its consistency.
    Crash,
}

impl Default for Wanted {
    fn default() -> Self {
        Self::PreferApplication { max_age: Duration::from_secs(24 * 3600) }
    }
}

/// A recovery point as rules see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PointInfo {
    /// The id of the log that makes the point.
    pub id: LogId,
    /// The number of that log.
    pub number: LogNumber,
    /// The moment that the point shows.
    pub taken_at: Timestamp,
    /// How consistent it is.
    pub consistency: Consistency,
}

/// No point satisfies the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoSuchPoint {
    /// The replica has no recovery point at all.
    #[error("the replica has no recovery point yet")]
    None,
    /// There are points, but no application-consistent one.
    #[error(
        "the replica has no application-consistent recovery point; ask for 'prefer-application' or set --app-every"
    )]
    NoApplication,
}

/// The point that a request for `wanted` gets, out of `points` (in any order).
pub fn choose_point(points: &[PointInfo], wanted: Wanted, now: Timestamp) -> Result<PointInfo, NoSuchPoint> {
    let newest = |only: Option<Consistency>| {
        points
            .iter()
            .filter(|point| only.is_none_or(|consistency| point.consistency == consistency))
            .max_by_key(|point| point.number)
            .copied()
    };
    let application = newest(Some(Consistency::Application));
    match wanted {
        Wanted::Crash => newest(None).ok_or(NoSuchPoint::None),
        Wanted::Application if points.is_empty() => Err(NoSuchPoint::None),
        Wanted::Application => application.ok_or(NoSuchPoint::NoApplication),
        Wanted::PreferApplication { max_age } => application
            .filter(|point| now.since(point.taken_at) <= max_age)
            .or_else(|| newest(None))
            .ok_or(NoSuchPoint::None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(number: u64, consistency: Consistency) -> PointInfo {
        PointInfo {
            id: LogId::from_bytes([u8::try_from(number).unwrap(); 16]),
            number: LogNumber(number),
            taken_at: Timestamp::default().plus(Duration::from_secs(number * 60)),
            consistency,
        }
    }

    #[test]
    fn prefer_application_takes_it_while_it_is_young_enough() {
        let points =
            [point(3, Consistency::Crash), point(1, Consistency::Application), point(2, Consistency::Crash)];
        let now = Timestamp::default().plus(Duration::from_secs(240));
        let prefer = |seconds| {
            let wanted = Wanted::PreferApplication { max_age: Duration::from_secs(seconds) };
            choose_point(&points, wanted, now).unwrap().number
        };
        assert_eq!(prefer(180), LogNumber(1));
        assert_eq!(prefer(179), LogNumber(3));
        assert_eq!(choose_point(&points, Wanted::Crash, now).unwrap().number, LogNumber(3));
        assert_eq!(choose_point(&points[..1], Wanted::Application, now), Err(NoSuchPoint::NoApplication));
        assert_eq!(choose_point(&[], Wanted::default(), now), Err(NoSuchPoint::None));
    }
}
