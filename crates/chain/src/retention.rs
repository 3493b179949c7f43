//! Which recovery points to keep, and what that lets go.
//!
//! ```text
//!  base                oldest kept                                        newest pin       newest
//!   │ ── to be applied ──▶ │ ── left as it is: a view may read it ──────────▶ │ ── merged ──▶ │
//! ```
//!
//! A point pinned by hand is kept like any other, for as long as the person likes; nobody has it open. So the base
//! stops at the oldest of them, and what lies above is merged as elsewhere: no merge goes across a kept point.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::RangeInclusive;

use model::{LogNumber, POINTS_MAX, PointInfo, Timestamp};

/// What the decision is made from.
#[derive(Debug, Clone, Copy)]
pub struct RetentionInput<'a> {
    /// The recovery points that are shown, in any order; the one that the base equals among them.
    pub points: &'a [PointInfo],
    /// The logs that are not folded into the base, ascending. One newer than every point means that a pass
    /// (initial replication, resynchronization, a very large cycle) is under way.
    pub logs: &'a [LogNumber],
    /// The two sides must be compared: there is no newer point before that is done, however long it waits.
    pub resync: bool,
    /// The newest log that is folded into the base.
    pub applied: LogNumber,
    /// The points that views, exports and backups read.
    pub pins: &'a [LogNumber],
    /// The points that a person has pinned.
    pub pinned: &'a [LogNumber],
    /// The points after which logs are kept for a third site ([`crate::marks_kept`]).
    pub forwarded: &'a [LogNumber],
    /// The points of moments that all VMs of the VM's group have a point of, ascending.
    pub shared: &'a [LogNumber],
    /// Whether somebody reads the flat base files.
    pub held: bool,
    /// How many hourly points to keep beside the latest one (0 to 24). With 0 only the latest is kept; else
    /// every point of the current hour is, and the newest of each of that many hours before it.
    pub extra_hourly: u8,
    /// How many of the newest points to keep in any case, so that the full hour does not end the
    /// seconds-old ones. 0 asks for none.
    pub recent: usize,
    /// The present moment.
    pub now: Timestamp,
}

/// Why a point is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KeptFor {
    /// It is the newest.
    Latest,
    /// It is one of the newest, which stay in any case.
    Recent,
    /// It is the newest that all VMs of its group have.
    Group,
    /// It is of the current hour, or stands for one before it.
    Hourly,
    /// A person has pinned it.
    PinnedByHand,
    /// A view, an export or a backup reads it.
    Read,
    /// Somebody holds the flat files, which equal it.
    Held,
    /// What changed since it is to be passed on to a third site.
    Forwarded,
    /// A pass is under way or has to be: nothing goes before its end.
    PassUnderWay,
}

impl KeptFor {
    /// The stable code.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::Latest => "latest",
            Self::Recent => "recent",
            Self::Group => "group",
            Self::Hourly => "hourly",
            Self::PinnedByHand => "pinned-by-hand",
            Self::Read => "read",
            Self::Held => "held",
            Self::Forwarded => "forwarded",
            Self::PassUnderWay => "pass-under-way",
        }
    }
}

/// A point that stays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// The point.
    pub number: LogNumber,
    /// Why; at least one reason.
    pub why: BTreeSet<KeptFor>,
}

/// What to keep, drop, apply and merge. It is shown ([`fmt::Display`]) before it is carried out.
///
/// The plan speaks of points and bytes. When a log that was applied or merged can be deleted is the shell's
/// to say: not while a view that was opened before reads it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RetentionPlan {
    /// The points that stay, ascending.
    pub keep: Vec<Kept>,
    /// The points that are no longer shown, ascending.
    pub drop: Vec<LogNumber>,
    /// Fold the logs up to and including this one into the base. Always a point, never beyond the oldest
    /// one that is kept or pinned; none if there is nothing to do or the base is held.
    pub apply_through: Option<LogNumber>,
    /// There is no point yet: the parts of the initial replication up to this one may be folded into the
    /// base, which equals no point anyway. Saves the room for a second copy of the VM.
    pub apply_initial_through: Option<LogNumber>,
    /// Logs that may be merged into one: each group ends with a kept point and has no other in it. Whether
    /// it is worth the writing, [`crate::CompactPlan`] tells.
    pub compact: Vec<RangeInclusive<LogNumber>>,
}

/// Decides which points of a chain stay.
#[must_use]
pub fn plan_retention(input: &RetentionInput<'_>) -> RetentionPlan {
    let kept = kept_points(input);
    let drop = numbers(input).filter(|number| !kept.contains_key(number)).collect();
    // A pin may name a point that is no longer shown; it bounds everything all the same.
    let anchors: Vec<LogNumber> = kept
        .keys()
        .chain(input.pins)
        .chain(input.pinned)
        .chain(forwarded(input))
        .copied()
        .collect::<BTreeSet<_>>()
        .into_iter()
        .collect();
    RetentionPlan {
        keep: kept.into_iter().map(|(number, why)| Kept { number, why }).collect(),
        drop,
        apply_through: apply_through(input, &anchors),
        apply_initial_through: apply_initial_through(input),
        compact: compact_groups(input, &anchors),
    }
}

/// The numbers of all points, ascending.
fn numbers(input: &RetentionInput<'_>) -> impl Iterator<Item = LogNumber> + use<> {
    input.points.iter().map(|point| point.number).collect::<BTreeSet<_>>().into_iter()
}

fn kept_points(input: &RetentionInput<'_>) -> BTreeMap<LogNumber, BTreeSet<KeptFor>> {
    let mut newest_first: Vec<&PointInfo> = input.points.iter().collect();
    newest_first.sort_by_key(|point| std::cmp::Reverse(point.number));
    // What lies below the base can no longer be read, whatever the settings say.
    newest_first.retain(|point| point.number >= input.applied);
    let Some(latest) = newest_first.first() else { return BTreeMap::new() };

    let mut kept: BTreeMap<LogNumber, BTreeSet<KeptFor>> = BTreeMap::new();
    let mut keep = |number, why| kept.entry(number).or_default().insert(why);
    keep(latest.number, KeptFor::Latest);
    if let Some(shared) = newest_first.iter().find(|point| is_shared(input, point)) {
        keep(shared.number, KeptFor::Group);
    }
    for point in newest_first.iter().take(input.recent) {
        keep(point.number, KeptFor::Recent);
    }
    for number in hourly_points(input, &newest_first) {
        keep(number, KeptFor::Hourly);
    }
    if pass_under_way(input, latest.number) {
        // Only the pass's own end makes the next point: until then nothing that could be gone back to goes.
        for point in &newest_first {
            keep(point.number, KeptFor::PassUnderWay);
        }
    }
    let shown: BTreeSet<LogNumber> = newest_first.iter().map(|point| point.number).collect();
    let read = input.pins.iter().map(|number| (*number, KeptFor::Read));
    let pinned = input.pinned.iter().map(|number| (*number, KeptFor::PinnedByHand));
    let held = input.held.then_some((input.applied, KeptFor::Held));
    let forwarded = forwarded(input).map(|number| (*number, KeptFor::Forwarded));
    for (number, why) in
        read.chain(pinned).chain(held).chain(forwarded).filter(|(number, _)| shown.contains(number))
    {
        keep(number, why);
    }
    kept
}

/// What is folded in is told by the change map: a mark below the base keeps nothing.
fn forwarded<'a>(input: &RetentionInput<'a>) -> impl Iterator<Item = &'a LogNumber> + use<'a> {
    let applied = input.applied;
    input.forwarded.iter().filter(move |mark| **mark >= applied)
}

fn pass_under_way(input: &RetentionInput<'_>, latest_point: LogNumber) -> bool {
    input.resync || input.logs.last().is_some_and(|newest| *newest > latest_point)
}

fn is_shared(input: &RetentionInput<'_>, point: &PointInfo) -> bool {
    input.shared.binary_search(&point.number).is_ok()
}

/// All points of the current hour, and the newest one of each of the `extra_hourly` hours before it that
/// have any. Hours without points do not count: a VM that was away for a day keeps its old hours.
///
/// In an hour with points that all VMs of a group have, the newest of these stands for it. They are of the same moments in
/// all of them, so that each keeps that of the same moment.
fn hourly_points(input: &RetentionInput<'_>, newest_first: &[&PointInfo]) -> Vec<LogNumber> {
    let extra = usize::from(input.extra_hourly.min(POINTS_MAX));
    let (Some(latest), 1..) = (newest_first.first(), extra) else { return Vec::new() };
    let current = hour(input.now);
    let mut seen: BTreeSet<i64> = [hour(latest.taken_at)].into();
    let mut kept = Vec::new();
    for point in newest_first {
        let hour = hour(point.taken_at);
        let mut stands_for_its_hour = || seen.len() <= extra && seen.insert(hour);
        if hour >= current {
            kept.push(point.number);
        } else if stands_for_its_hour() {
            let is_here = |other: &&&PointInfo| self::hour(other.taken_at) == hour && is_shared(input, other);
            let stands = newest_first.iter().find(is_here).unwrap_or(point);
            kept.push(stands.number);
        }
    }
    kept
}

/// Full hours since 1970, UTC.
const fn hour(moment: Timestamp) -> i64 {
    moment.0.div_euclid(3600 * 1_000_000)
}

fn apply_through(input: &RetentionInput<'_>, anchors: &[LogNumber]) -> Option<LogNumber> {
    let floor = *anchors.first()?;
    let through = numbers(input).take_while(|number| *number <= floor).last()?;
    (!input.held && through > input.applied).then_some(through)
}

fn apply_initial_through(input: &RetentionInput<'_>) -> Option<LogNumber> {
    let free = input.pins.is_empty() && input.pinned.is_empty() && !input.held;
    let initial = input.points.is_empty() && free;
    input.logs.last().copied().filter(|newest| initial && *newest > input.applied)
}

/// Between neighbouring kept points, above the oldest one (what lies below is applied, not merged) and
/// above the newest point that is read (what lies below may be open in a view).
fn compact_groups(input: &RetentionInput<'_>, anchors: &[LogNumber]) -> Vec<RangeInclusive<LogNumber>> {
    let newest_pin = input.pins.iter().max().copied().unwrap_or(LogNumber::ZERO);
    let through = |number: LogNumber| input.logs.partition_point(|log| *log <= number);
    let unpinned = anchors.windows(2).filter(|pair| pair[0] >= newest_pin);
    let groups = unpinned.filter_map(|pair| match &input.logs[through(pair[0])..through(pair[1])] {
        [first, .., last] => Some(*first..=*last),
        _ => None,
    });
    groups.collect()
}

impl RetentionPlan {
    /// Whether there is nothing to do.
    #[must_use]
    pub const fn is_idle(&self) -> bool {
        self.drop.is_empty()
            && self.apply_through.is_none()
            && self.apply_initial_through.is_none()
            && self.compact.is_empty()
    }

    /// The numbers of the points that stay, ascending.
    pub fn kept(&self) -> impl Iterator<Item = LogNumber> + '_ {
        self.keep.iter().map(|kept| kept.number)
    }

    /// The oldest points that only a person's pins keep, each with the logs that are there only for it: if the
    /// oldest of them were unpinned, those logs would be folded into the base. Pins that come after a point that
    /// stays anyway cost nothing of their own.
    #[must_use]
    pub fn cost_of_pins(&self) -> Vec<(LogNumber, RangeInclusive<LogNumber>)> {
        let by_hand = BTreeSet::from([KeptFor::PinnedByHand]);
        let pairs = self.keep.windows(2).take_while(|pair| pair[0].why == by_hand);
        pairs.map(|pair| (pair[0].number, pair[0].number.next()..=pair[1].number)).collect()
    }
}

impl fmt::Display for RetentionPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "keep {}", points(&self.kept().collect::<Vec<_>>()))?;
        if !self.drop.is_empty() {
            writeln!(f, "stop showing {}", points(&self.drop))?;
        }
        if let Some(through) = self.apply_through {
            writeln!(f, "fold the logs up to point {through} into the base")?;
        }
        if let Some(through) = self.apply_initial_through {
            writeln!(f, "fold the parts of the initial replication up to log {through} into the base")?;
        }
        for group in &self.compact {
            let (first, last) = (group.start(), group.end());
            writeln!(f, "merge logs {first} to {last} where that halves them")?;
        }
        if self.is_idle() {
            writeln!(f, "nothing else to do")?;
        }
        Ok(())
    }
}

/// "3 points: 4, 7-8".
fn points(numbers: &[LogNumber]) -> String {
    let mut runs: Vec<RangeInclusive<u64>> = Vec::new();
    for LogNumber(number) in numbers.iter().copied() {
        match runs.last_mut() {
            Some(run) if run.end().checked_add(1) == Some(number) => *run = *run.start()..=number,
            _ => runs.push(number..=number),
        }
    }
    let shown: Vec<_> = runs
        .iter()
        .map(|run| {
            if run.start() == run.end() {
                run.start().to_string()
            } else {
                format!("{}-{}", run.start(), run.end())
            }
        })
        .collect();
    match numbers.len() {
        0 => "no points".to_owned(),
        1 => format!("1 point: {}", shown.join(", ")),
        count => format!("{count} points: {}", shown.join(", ")),
    }
}

#[cfg(test)]
#[path = "retention_tests.rs"]
mod tests;
