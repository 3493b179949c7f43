//! What we know of changes: bitmap *k* holds every change since the moment of log *k*.
//!
//! [`repair`] decides, per disk and purely, what brings the bitmaps that a run left behind, wherever it was
//! cut off, back to the one that is wanted. Whatever it decides is done over all disks in one transaction.

use model::{BLOCK_BYTES, LogNumber, ResyncReason, Tracking};
use serde_json::{Value, json};
use steps::durable_step;

use crate::disks::Disk;
use crate::error::Error;
use crate::graph::{Bitmap, Graph};
use crate::names::Names;
use crate::qmp::{Command, Qmp};

/// A bitmap of ours on one disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ours {
    pub k: LogNumber,
    pub recording: bool,
    pub inconsistent: bool,
    pub count_bytes: u64,
}

/// One step of a repair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    Add(LogNumber),
    Merge { from: LogNumber, into: LogNumber },
    Enable(LogNumber),
    Disable(LogNumber),
    Remove(LogNumber),
}

/// What makes bitmap `wanted` the only one, holding every change since the moment of log `wanted`. If
/// that cannot be had, nothing of ours is of use and all of it goes.
pub(crate) fn repair(found: &[Ours], wanted: Option<LogNumber>) -> Vec<Step> {
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
pub(crate) fn judge(disk: &Disk, found: &[Ours], wanted: LogNumber) -> Result<(), ResyncReason> {
    let name = &disk.name;
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

/// Our bitmaps on a disk.
pub(crate) fn ours(graph: &Graph, names: &Names, disk: &Disk) -> Vec<Ours> {
    let bitmaps = graph.nodes.get(&disk.block_node).map_or(&[][..], |node| &node.dirty_bitmaps);
    let ours = |bitmap: &Bitmap| {
        Some(Ours {
            k: names.bitmap_number(bitmap.name.as_deref()?)?,
            recording: bitmap.recording,
            inconsistent: bitmap.inconsistent,
            count_bytes: bitmap.count,
        })
    };
    bitmaps.iter().filter_map(ours).collect()
}

/// All disks together.
pub(crate) fn inspect(graph: &Graph, names: &Names, disks: &[Disk], wanted: LogNumber) -> Tracking {
    for disk in disks {
        if let Err(why) = judge(disk, &ours(graph, names, disk), wanted) {
            return Tracking::Broken(why);
        }
    }
    Tracking::Intact
}

/// Repairs all disks in one transaction; does nothing where nothing is to be done.
pub(crate) async fn repair_all(
    qmp: &Qmp,
    graph: &Graph,
    names: &Names,
    disks: &[Disk],
    wanted: Option<LogNumber>,
) -> Result<(), Error> {
    let actions = disks
        .iter()
        .flat_map(|disk| {
            let steps = repair(&ours(graph, names, disk), wanted);
            steps.into_iter().map(|step| action(names, disk, step)).collect::<Vec<_>>()
        })
        .collect();
    transaction(qmp, actions).await
}

/// Removes bitmap `k` from the disks that have it.
pub(crate) async fn remove(
    qmp: &Qmp,
    graph: &Graph,
    names: &Names,
    disks: &[Disk],
    which: impl Fn(LogNumber) -> bool,
) -> Result<(), Error> {
    let actions = disks
        .iter()
        .flat_map(|disk| {
            let ours = ours(graph, names, disk).into_iter().filter(|bitmap| which(bitmap.k));
            ours.map(|bitmap| action(names, disk, Step::Remove(bitmap.k))).collect::<Vec<_>>()
        })
        .collect();
    transaction(qmp, actions).await
}

/// Runs actions as one; none is nothing to do.
pub(crate) async fn transaction(qmp: &Qmp, actions: Vec<Value>) -> Result<(), Error> {
    if !actions.is_empty() {
        durable_step("qemu::transaction::sending");
        qmp.run(Command::new("transaction", json!({ "actions": actions }))).await?;
        durable_step("qemu::transaction::done");
    }
    Ok(())
}

/// A step as an action of a transaction.
pub(crate) fn action(names: &Names, disk: &Disk, step: Step) -> Value {
    let node = &disk.block_node;
    let of = |kind: &str, k| json!({"type": kind, "data": {"node": node, "name": names.bitmap(k)}});
    match step {
        Step::Add(k) => json!({"type": "block-dirty-bitmap-add", "data": {
            "node": node, "name": names.bitmap(k), "granularity": BLOCK_BYTES, "persistent": false,
        }}),
        Step::Merge { from, into } => json!({"type": "block-dirty-bitmap-merge", "data": {
            "node": node, "target": names.bitmap(into), "bitmaps": [names.bitmap(from)],
        }}),
        Step::Enable(k) => of("block-dirty-bitmap-enable", k),
        Step::Disable(k) => of("block-dirty-bitmap-disable", k),
        Step::Remove(k) => of("block-dirty-bitmap-remove", k),
    }
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
            self.run(&[Step::Add(next)]);
            self.run(&base.map(Step::Disable).into_iter().collect::<Vec<_>>());
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
                        acked.into_iter().for_each(|base| model.run(&[Step::Remove(base)]));
                        acked = Some(next);
                    }
                    Fate::GivenBack | Fate::ArrivedAfterAll => {
                        let steps = repair(&model.found(), acked);
                        model.run(&steps);
                        if matches!(fate, Fate::ArrivedAfterAll) && acked.is_some() {
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
