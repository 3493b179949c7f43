//! Points that a person has pinned, and which point a person means.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::ids::is_id_prefix;
use crate::{LogId, LogNumber, NameError, PointInfo, PointName, Timestamp};

/// A point that is kept, whatever retention says, until a person lets it go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PinnedPoint {
    /// Its number.
    pub number: LogNumber,
    /// The id of the log that makes it: numbers alone can mean two things after a loss.
    pub id: LogId,
    /// What it is called, if it is.
    #[serde(default)]
    pub name: Option<PointName>,
    /// When it was pinned.
    pub pinned_at: Timestamp,
}

/// The newest point, for a person.
pub(crate) const LATEST: &str = "latest";

/// How a person names a point: its id, the beginning of its id, the name that it was pinned under, or `latest`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PointRef(String);

impl PointRef {
    /// Whether it means whatever point is the newest.
    #[must_use]
    pub fn is_latest(&self) -> bool {
        self.0 == LATEST
    }
}

impl FromStr for PointRef {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        text.parse::<PointName>().map(|name| Self(name.into()))
    }
}

impl TryFrom<String> for PointRef {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<PointRef> for String {
    fn from(named: PointRef) -> Self {
        named.0
    }
}

impl From<LogId> for PointRef {
    fn from(id: LogId) -> Self {
        Self(id.to_string())
    }
}

impl fmt::Display for PointRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// No point is meant, or more than one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnknownPoint {
    /// There is none of that id or name (any more).
    #[error("there is no recovery point {0} (any more); 'afterimage points' lists those there are")]
    None(PointRef),
    /// Several ids begin like that.
    #[error("{count} recovery points have an id that begins with {wanted}; give more of its digits")]
    Ambiguous {
        /// What was asked for.
        wanted: PointRef,
        /// How many there are.
        count: usize,
    },
}

/// The point that is meant, out of `points`: a name comes before an id, though none can be taken for the other.
pub fn find_point(
    points: &[PointInfo],
    pinned: &[PinnedPoint],
    wanted: &PointRef,
) -> Result<PointInfo, UnknownPoint> {
    let named = pinned.iter().find(|pin| pin.name.as_ref().is_some_and(|name| name.as_str() == wanted.0));
    let prefix = wanted.0.to_ascii_lowercase();
    if wanted.is_latest() {
        let newest = points.iter().max_by_key(|point| point.number);
        return newest.copied().ok_or_else(|| UnknownPoint::None(wanted.clone()));
    }
    let meant = |point: &&PointInfo| match named {
        Some(pin) => point.id == pin.id,
        None => is_id_prefix(&prefix) && point.id.to_string().starts_with(&prefix),
    };
    let mut found = points.iter().filter(meant);
    match (found.next(), found.count()) {
        (Some(point), 0) => Ok(*point),
        (Some(_), others) => Err(UnknownPoint::Ambiguous { wanted: wanted.clone(), count: others + 1 }),
        (None, _) => Err(UnknownPoint::None(wanted.clone())),
    }
}

/// A pin on its way to another site, where the point has another id: it is known by its moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TravellingPin {
    /// The point's moment.
    pub taken_at: Timestamp,
    /// The point's name.
    pub name: Option<PointName>,
    /// When it was pinned.
    pub pinned_at: Timestamp,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Consistency;

    fn point(number: u64, first: u8) -> PointInfo {
        let mut id = [0; 16];
        id[0] = first;
        id[15] = u8::try_from(number).unwrap();
        PointInfo {
            id: LogId::from_bytes(id),
            number: LogNumber(number),
            taken_at: Timestamp(0),
            consistency: Consistency::Crash,
        }
    }

    #[test]
    fn a_point_is_found_by_its_id_the_beginning_of_it_and_its_name() {
        let points = [point(1, 0xab), point(2, 0xac), point(3, 0xd0)];
        let name = Some(PointName::new("before-upgrade").unwrap());
        let pinned = [PinnedPoint { number: LogNumber(3), id: points[2].id, name, pinned_at: Timestamp(0) }];
        let find = |text: &str| find_point(&points, &pinned, &text.parse().unwrap());
        assert_eq!(find(&points[1].id.to_string()), Ok(points[1]));
        assert_eq!(find("AB"), Ok(points[0]));
        assert_eq!(find("before-upgrade"), Ok(points[2]));
        assert_eq!(find("latest"), Ok(points[2]));
        assert!(matches!(find("a"), Err(UnknownPoint::Ambiguous { count: 2, .. })));
        for none in ["e", "before", "x"] {
            assert!(matches!(find(none), Err(UnknownPoint::None(_))), "{none}");
        }
    }

    #[test]
    fn a_name_of_a_point_that_is_gone_means_no_other() {
        let (left, gone) = (point(1, 0xab), point(2, 0xac));
        let name = Some(PointName::new("gone").unwrap());
        let pinned = [PinnedPoint { number: gone.number, id: gone.id, name, pinned_at: Timestamp(0) }];
        assert!(find_point(&[left], &pinned, &"gone".parse().unwrap()).is_err());
    }

    #[test]
    fn no_name_can_be_taken_for_an_id() {
        for id in ["beef", "0", "DEADBEEF", &LogId::from_bytes([7; 16]).to_string()] {
            assert!(PointName::new(id).unwrap_err().to_string().contains("beginning of an id"), "{id}");
        }
        assert!(PointName::new("latest").is_err());
        for name in ["before-upgrade", "beefs", "2026-11-25", &"f".repeat(33)] {
            assert!(PointName::new(name).is_ok(), "{name}");
        }
        assert!("../x".parse::<PointRef>().is_err());
    }
}
