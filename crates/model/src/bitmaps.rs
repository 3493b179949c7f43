//! What we know of changes: bitmap *k* holds every change since the moment of log *k*.
//!
//! Each function decides, per disk and purely, what is done to the bitmaps at one point of a cycle's life; it
//! is done over all disks in one transaction. [`repair`] brings the bitmaps that a run left behind, wherever it
//! was cut off, back to the one that is wanted.

use crate::{DiskName, LogNumber, ResyncReason};

/// A bitmap of ours on one disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ours {
    /// Which one.
    pub k: LogNumber,
    /// Whether it takes in what is written now.
    pub recording: bool,
    /// QEMU says that it cannot be relied on.
    pub inconsistent: bool,
    /// The bytes that it names.
    pub count_bytes: u64,
}

/// One change to the bitmaps of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// A new one, which records.
    Add(LogNumber),
    /// What one names, the other names too.
    Merge {
        /// The one.
        from: LogNumber,
        /// The other.
        into: LogNumber,
    },
    /// It records.
    Enable(LogNumber),
    /// It stays as it is.
    Disable(LogNumber),
    /// It goes.
    Remove(LogNumber),
}

/// At the moment of log `next`: its bitmap begins, and the one of `base` ends and can be read.
#[must_use]
pub fn at_moment(base: Option<LogNumber>, next: LogNumber) -> Vec<Step> {
    std::iter::once(Step::Add(next)).chain(base.map(Step::Disable)).collect()
}

/// Once the log that was read with `base` is durable: only then `base` goes.
#[must_use]
pub fn after_durable(found: &[Ours], base: Option<LogNumber>, next: LogNumber) -> Vec<Step> {
    found
        .iter()
        .filter(|bitmap| base == Some(bitmap.k) && bitmap.k != next)
        .map(|b| Step::Remove(b.k))
        .collect()
}

/// When it did not become durable, as far as is known: `base` is again what changed since its moment. Without a
/// `base`, at the start of a pass or on a disk that it had not come to, everything stays: should the log have arrived
/// after all, `next` is what is needed, and if it has not, [`repair`] takes it away.
#[must_use]
pub fn after_failure(found: &[Ours], base: Option<LogNumber>) -> Vec<Step> {
    let base = base.filter(|base| found.iter().any(|bitmap| bitmap.k == *base));
    base.map_or_else(Vec::new, |base| repair(found, Some(base)))
}

/// What makes bitmap `wanted` the only one, holding every change since the moment of log `wanted`. If
/// that cannot be had, nothing of ours is of use and all of it goes.
#[must_use]
pub fn repair(found: &[Ours], wanted: Option<LogNumber>) -> Vec<Step> {
    let remove_others = |keep: Option<LogNumber>| {
        found.iter().map(|b| b.k).filter(move |k| Some(*k) != keep).map(Step::Remove)
    };
    let Some(wanted) = wanted else { return remove_others(None).collect() };
    if let Some(base) = found.iter().find(|bitmap| bitmap.k == wanted) {
        let newer: Vec<_> = found.iter().filter(|bitmap| bitmap.k > wanted).collect();
        let usable = !base.inconsistent && newer.iter().all(|bitmap| !bitmap.inconsistent);
        // Frozen with nothing newer that records: what happened since is lost, and `inspect` says so.
        let goes_on = base.recording || newer.iter().any(|bitmap| bitmap.recording);
        let mut steps = Vec::new();
        if usable && goes_on {
            steps.extend(newer.iter().map(|bitmap| Step::Merge { from: bitmap.k, into: wanted }));
            if !base.recording {
                steps.push(Step::Enable(wanted));
            }
        }
        steps.extend(remove_others(Some(wanted)));
        return steps;
    }
    match found {
        // A log was given up and its changes given back, and then it turned out to have arrived. What is
        // recorded since an older moment holds what changed since the newer one.
        [older] if older.k < wanted && older.recording && !older.inconsistent => {
            vec![Step::Add(wanted), Step::Merge { from: older.k, into: wanted }, Step::Remove(older.k)]
        }
        _ => remove_others(None).collect(),
    }
}

/// Whether the bitmap `wanted` is there on a disk and records.
pub fn judge(name: &DiskName, found: &[Ours], wanted: LogNumber) -> Result<(), ResyncReason> {
    match found.iter().find(|bitmap| bitmap.k == wanted) {
        None => Err(ResyncReason::BitmapLost(format!(
            "disk {name}: QEMU was restarted, or the disk replaced, since log {wanted}"
        ))),
        Some(bitmap) if bitmap.inconsistent => {
            Err(ResyncReason::BitmapInconsistent(format!("disk {name}, since log {wanted}")))
        }
        Some(bitmap) if !bitmap.recording => Err(ResyncReason::BitmapLost(format!(
            "disk {name}: the bitmap since log {wanted} was stopped by somebody else"
        ))),
        Some(_) => Ok(()),
    }
}

/// Whether bitmap `wanted` will tell all changes once it is [repaired](repair).
pub fn judge_repairable(name: &DiskName, found: &[Ours], wanted: LogNumber) -> Result<(), ResyncReason> {
    let steps = repair(found, Some(wanted));
    if steps.contains(&Step::Add(wanted)) {
        return Ok(());
    }
    let mut found = found.to_vec();
    if steps.contains(&Step::Enable(wanted)) {
        found.iter_mut().filter(|bitmap| bitmap.k == wanted).for_each(|bitmap| bitmap.recording = true);
    }
    judge(name, &found, wanted)
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;

    /// A disk as a naive model: when each block was last written, and bitmaps as sets of blocks.
    #[derive(Debug, Clone, Default)]
    struct Model {
        moments: BTreeMap<LogNumber, BTreeSet<u8>>,
        bitmaps: BTreeMap<LogNumber, (BTreeSet<u8>, bool)>,
    }

    impl Model {
        fn write(&mut self, block: u8) {
            self.moments.values_mut().for_each(|changed| changed.extend([block]));
            self.bitmaps
                .values_mut()
                .filter(|(_, recording)| *recording)
                .for_each(|(set, _)| set.extend([block]));
        }

        fn capture(&mut self, base: Option<LogNumber>, next: LogNumber) {
            self.moments.insert(next, BTreeSet::new());
            self.run(&at_moment(base, next));
        }

        fn run(&mut self, steps: &[Step]) {
            for &step in steps {
                match step {
                    Step::Add(k) => assert!(self.bitmaps.insert(k, (BTreeSet::new(), true)).is_none()),
                    Step::Merge { from, into } => {
                        let from = self.bitmaps[&from].0.clone();
                        self.bitmaps.get_mut(&into).unwrap().0.extend(from);
                    }
                    Step::Enable(k) => self.bitmaps.get_mut(&k).unwrap().1 = true,
                    Step::Disable(k) => self.bitmaps.get_mut(&k).unwrap().1 = false,
                    Step::Remove(k) => drop(self.bitmaps.remove(&k).unwrap()),
                }
            }
        }

        fn found(&self) -> Vec<Ours> {
            let ours = |(&k, (set, recording)): (&LogNumber, &(BTreeSet<u8>, bool))| Ours {
                k,
                recording: *recording,
                inconsistent: false,
                count_bytes: set.len() as u64,
            };
            self.bitmaps.iter().map(ours).collect()
        }
    }

    /// What becomes of one cycle.
    #[derive(Debug, Clone, Copy)]
    enum Fate {
        /// Acknowledged, and the old bitmap dropped.
        Committed,
        /// Given back.
        GivenBack,
        /// Given back, and then it turned out to have arrived.
        ArrivedAfterAll,
        /// Acknowledged, and we were killed before the old bitmap was dropped.
        KilledAfterAck,
        /// Killed before anything was known.
        Killed,
    }

    fn fate() -> impl Strategy<Value = Fate> {
        prop_oneof![
            Just(Fate::Committed),
            Just(Fate::GivenBack),
            Just(Fate::ArrivedAfterAll),
            Just(Fate::KilledAfterAck),
            Just(Fate::Killed)
        ]
    }

    proptest! {
        #[test]
        fn no_change_since_the_acknowledged_moment_is_ever_forgotten(
            cycles in prop::collection::vec((prop::collection::vec(0_u8..40, 0..6), prop::collection::vec(0_u8..40, 0..6), fate()), 1..12)
        ) {
            let mut model = Model::default();
            let mut acked: Option<LogNumber> = None;
            for (before, during, fate) in cycles {
                before.into_iter().for_each(|block| model.write(block));
                let next = acked.unwrap_or_default().next();
                let steps = repair(&model.found(), acked);
                model.run(&steps);
                model.capture(acked, next);
                during.into_iter().for_each(|block| model.write(block));
                match fate {
                    Fate::Committed => {
                        model.run(&after_durable(&model.found(), acked, next));
                        acked = Some(next);
                    }
                    Fate::GivenBack | Fate::ArrivedAfterAll => {
                        let steps = after_failure(&model.found(), acked);
                        model.run(&steps);
                        if matches!(fate, Fate::ArrivedAfterAll) {
                            acked = Some(next);
                        }
                    }
                    Fate::KilledAfterAck => acked = Some(next),
                    Fate::Killed => {}
                }
                let steps = repair(&model.found(), acked);
                model.run(&steps);
                match acked {
                    None => prop_assert!(model.bitmaps.is_empty()),
                    Some(acked) => {
                        prop_assert_eq!(model.bitmaps.len(), 1);
                        let (set, recording) = &model.bitmaps[&acked];
                        prop_assert!(*recording && set.is_superset(&model.moments[&acked]));
                    }
                }
                prop_assert!(repair(&model.found(), acked).is_empty(), "a repair needs no repair");
            }
        }
    }

    fn bitmap(k: u64, recording: bool) -> Ours {
        Ours { k: LogNumber(k), recording, inconsistent: false, count_bytes: 0 }
    }

    #[test]
    fn what_cannot_be_known_is_never_made_up() {
        let wanted = Some(LogNumber(5));
        // Another tool removed ours, or stopped it: never "intact" afterwards.
        for found in [&[][..], &[bitmap(4, false)], &[bitmap(6, true)], &[bitmap(4, false), bitmap(6, true)]]
        {
            let adds =
                repair(found, wanted).iter().any(|step| matches!(step, Step::Add(_) | Step::Enable(_)));
            assert!(!adds, "{found:?}");
        }
        assert_eq!(repair(&[bitmap(5, false)], wanted), []);
        let broken = Ours { inconsistent: true, ..bitmap(6, true) };
        assert_eq!(repair(&[bitmap(5, false), broken], wanted), [Step::Remove(LogNumber(6))]);
    }
}
