//! Which neighbouring logs to merge into one.

use std::ops::RangeInclusive;

use log::Header;
use model::LogNumber;

use crate::{ApplyPlan, IndexError, Layer};

/// Merging neighbouring logs into one that holds only the last after-image of each byte.
///
/// The merged log has the number, id, moment and class of the newest of them ([`merged_header`]); it is
/// that point still. It drops only what the merged logs themselves overwrite, so every log beside it stays
/// true to its own class.
#[derive(Debug, Clone)]
pub struct CompactPlan {
    /// The first and the last log of the group.
    pub logs: RangeInclusive<LogNumber>,
    /// How many logs the group has.
    pub log_count: usize,
    /// What goes into the merged log: records' pieces, and zeros.
    pub survivors: ApplyPlan,
    /// The raw bytes that the merged log will hold.
    pub live_bytes: u64,
    /// The raw bytes that the logs hold now.
    pub total_bytes: u64,
    /// The raw bytes of the largest of them.
    pub largest_bytes: u64,
}

/// What a merge must be worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompactRule {
    /// It halves the bytes.
    Halve,
    /// It halves the bytes, or it makes one log of many and at least doubles each. For logs that a point pinned by
    /// hand keeps from being folded into the base: they may be there for years, and without this a VM that writes
    /// ever new blocks would have a million of them.
    Few,
}

/// So many logs are worth one of their own under [`CompactRule::Few`].
pub const FEW_LOGS: usize = 16;

impl CompactPlan {
    /// The plan for a group of neighbouring logs; none for an empty group. The disks are those of the
    /// newest log: what an older one has of another disk is dropped.
    pub fn new(disks: usize, group: &[Layer<'_>]) -> Result<Option<Self>, IndexError> {
        let numbers = || group.iter().map(|layer| layer.number);
        let (Some(first), Some(last)) = (numbers().min(), numbers().max()) else { return Ok(None) };
        let survivors = ApplyPlan::new(disks, group.iter().copied())?;
        let bytes = |layer: &Layer<'_>| -> u64 {
            layer.index.records.iter().map(|record| u64::from(record.raw_bytes)).sum()
        };
        Ok(Some(Self {
            logs: first..=last,
            log_count: group.len(),
            live_bytes: survivors.write_bytes(),
            total_bytes: group.iter().map(bytes).sum(),
            largest_bytes: group.iter().map(bytes).max().unwrap_or(0),
            survivors,
        }))
    }

    /// Whether to do it: there are logs to merge and at most half of their bytes survive.
    ///
    /// That keeps the replica at two writes per changed byte, whatever the history, counted in raw bytes
    /// (what is stored is compressed, and less). Think of the raw bytes that are in logs at the moment:
    /// * a log that arrives is written once and adds its bytes;
    /// * a merge writes `live` bytes and takes `total - live ≥ live` away;
    /// * an apply writes survivors and takes their logs away, which hold at least as much.
    ///
    /// So all merges and applies together write no more than what has been taken away, and that is no
    /// more than what has arrived: with the arrival itself, twice.
    #[must_use]
    pub const fn worthwhile(&self) -> bool {
        self.log_count > 1 && self.live_bytes <= self.total_bytes / 2
    }

    /// Whether to do it by a rule.
    ///
    /// By [`CompactRule::Few`] a byte moves only into a log of at least twice the bytes of the one that it was in: so
    /// it is written once more for each doubling, some 10 times from a log of a MiB to one of a GiB. What stays are a
    /// few dozen logs, however many came: among [`FEW_LOGS`] neighbours there is one larger than the others together.
    #[must_use]
    pub const fn is_worth_it(&self, rule: CompactRule) -> bool {
        let few = matches!(rule, CompactRule::Few) && self.log_count >= FEW_LOGS;
        self.worthwhile() || few && self.largest_bytes <= self.live_bytes / 2
    }

    /// The worthwhile merges within a group of neighbouring logs, oldest first: the whole group if that is
    /// one, else those of its halves. So one large log full of new bytes does not keep a thousand small
    /// ones around it from being merged.
    ///
    /// It looks at each log once per halving. A group's answer changes only when its logs do: remember it.
    pub fn choose(disks: usize, group: &[Layer<'_>], rule: CompactRule) -> Result<Vec<Self>, IndexError> {
        let mut group = group.to_vec();
        group.sort_unstable_by_key(|layer| layer.number);
        let mut chosen = Vec::new();
        choose_in(disks, &group, rule, &mut chosen)?;
        Ok(chosen)
    }
}

fn choose_in(
    disks: usize,
    group: &[Layer<'_>],
    rule: CompactRule,
    chosen: &mut Vec<CompactPlan>,
) -> Result<(), IndexError> {
    if group.len() < 2 {
        return Ok(());
    }
    match CompactPlan::new(disks, group)? {
        Some(plan) if plan.is_worth_it(rule) => chosen.push(plan),
        _ => {
            let (older, newer) = group.split_at(group.len() / 2);
            choose_in(disks, older, rule, chosen)?;
            choose_in(disks, newer, rule, chosen)?;
        }
    }
    Ok(())
}

/// The header of the log that `oldest` to `newest` are merged into: the newest's, in the oldest's place.
#[must_use]
pub fn merged_header(oldest: &Header, newest: &Header) -> Header {
    Header { predecessor: oldest.predecessor, ..newest.clone() }
}
