//! The points that members of a group share.

use std::collections::{BTreeMap, BTreeSet};

use super::GroupMoment;
use crate::ids::is_id_prefix;
use crate::{GroupName, MomentId, PointInfo, PointRef};

/// The points of one member that are of moments of its group.
pub type MemberPoints = BTreeMap<MomentId, (PointInfo, GroupMoment)>;

/// A moment of a group, and the points that its members have of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SharedPoint {
    /// The moment.
    pub moment: GroupMoment,
    /// Each member's point, in the group's order; none of who has none (any more).
    pub points: Vec<Option<PointInfo>>,
}

impl SharedPoint {
    /// Whether every member has a point of it.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.points.iter().all(Option::is_some)
    }
}

/// All moments that any member has a point of, oldest first.
#[must_use]
pub fn shared_points(members: &[MemberPoints]) -> Vec<SharedPoint> {
    let mut found: BTreeMap<MomentId, SharedPoint> = BTreeMap::new();
    for (place, points) in members.iter().enumerate() {
        for (id, (point, moment)) in points {
            let nobody = || SharedPoint { moment: moment.clone(), points: vec![None; members.len()] };
            found.entry(*id).or_insert_with(nobody).points[place] = Some(*point);
        }
    }
    let mut found: Vec<SharedPoint> = found.into_values().collect();
    found.sort_by_key(|shared| (shared.moment.at, shared.moment.id));
    found
}

/// The moments that every member has a point of.
pub fn complete<'a>(members: impl IntoIterator<Item = &'a BTreeSet<MomentId>>) -> BTreeSet<MomentId> {
    let mut members = members.into_iter();
    let first = members.next().cloned().unwrap_or_default();
    members.fold(first, |found, member| found.intersection(member).copied().collect())
}

/// No moment is meant, or more than one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnknownMoment {
    /// Nothing that all members have.
    #[error(
        "group {0} has no moment yet that all its members have a point of; 'afterimage points --group {0}' says who is missing"
    )]
    NoneYet(GroupName),
    /// There is none of that id (any more).
    #[error(
        "group {group} has no moment {wanted} (any more); 'afterimage points --group {group}' lists those there are"
    )]
    None {
        /// The group.
        group: GroupName,
        /// What was asked for.
        wanted: PointRef,
    },
    /// Several ids begin like that.
    #[error("several moments of group {group} have an id that begins with {wanted}; give more of its digits")]
    Ambiguous {
        /// The group.
        group: GroupName,
        /// What was asked for.
        wanted: PointRef,
    },
}

/// The moment that a person means: by its id, the beginning of one, or the newest that is complete. One that is meant by
/// its id need not be complete.
pub fn find_moment<'a>(
    group: &GroupName,
    moments: &'a [SharedPoint],
    wanted: Option<&PointRef>,
) -> Result<&'a SharedPoint, UnknownMoment> {
    let Some(wanted) = wanted.filter(|wanted| !wanted.is_latest()) else {
        let newest = moments.iter().rev().find(|shared| shared.is_complete());
        return newest.ok_or_else(|| UnknownMoment::NoneYet(group.clone()));
    };
    let prefix = wanted.to_string().to_ascii_lowercase();
    let is_meant =
        |shared: &&SharedPoint| is_id_prefix(&prefix) && shared.moment.id.to_string().starts_with(&prefix);
    let mut found = moments.iter().filter(is_meant);
    match (found.next(), found.next()) {
        (Some(shared), None) => Ok(shared),
        (Some(_), Some(_)) => Err(UnknownMoment::Ambiguous { group: group.clone(), wanted: wanted.clone() }),
        (None, _) => Err(UnknownMoment::None { group: group.clone(), wanted: wanted.clone() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Consistency, LogId, LogNumber, Timestamp};

    fn points(of: &[(u8, u64)]) -> MemberPoints {
        let one = |(moment, number): &(u8, u64)| {
            let (id, at) = (MomentId::from_bytes([*moment; 16]), Timestamp(i64::from(*moment)));
            let point = PointInfo {
                id: LogId::from_bytes([9; 16]),
                number: LogNumber(*number),
                taken_at: at,
                consistency: Consistency::Crash,
            };
            let moment = GroupMoment {
                id,
                group: "shop".parse().unwrap(),
                at,
                skew_us: 7,
                members: Vec::new(),
                missing: Vec::new(),
            };
            (id, (point, moment))
        };
        of.iter().map(one).collect()
    }

    #[test]
    fn a_moment_is_complete_when_every_member_has_its_point() {
        let shared = shared_points(&[points(&[(1, 5), (2, 6)]), points(&[(1, 3), (0x1f, 4)])]);
        let told: Vec<_> = shared.iter().map(|s| (s.moment.at.0, s.is_complete())).collect();
        assert_eq!(told, [(1, true), (2, false), (31, false)]);
        assert_eq!(shared[0].points[1].unwrap().number, LogNumber(3));
        let sets = [[1, 2, 3], [3, 2, 9]].map(|ids| ids.map(|id| MomentId::from_bytes([id; 16])).into());
        assert_eq!(complete(&sets), [2, 3].map(|id| MomentId::from_bytes([id; 16])).into());
        assert_eq!(complete(&[] as &[BTreeSet<MomentId>]), BTreeSet::new());
    }

    #[test]
    fn a_moment_is_found_by_its_id_or_is_the_newest_that_all_have() {
        let shared = shared_points(&[points(&[(1, 5), (2, 6)]), points(&[(1, 3), (0x1f, 4)])]);
        let group: GroupName = "shop".parse().unwrap();
        let find = |wanted: Option<&str>| {
            let wanted: Option<PointRef> = wanted.map(|wanted| wanted.parse().unwrap());
            find_moment(&group, &shared, wanted.as_ref()).map(|shared| shared.moment.at.0)
        };
        assert_eq!((find(None), find(Some("latest"))), (Ok(1), Ok(1)));
        assert_eq!((find(Some("02")), find(Some("0101"))), (Ok(2), Ok(1)));
        assert!(matches!(find(Some("0")), Err(UnknownMoment::Ambiguous { .. })));
        assert!(matches!(find(Some("ab")), Err(UnknownMoment::None { .. })));
        assert!(matches!(find_moment(&group, &shared[1..], None), Err(UnknownMoment::NoneYet(_))));
    }
}
