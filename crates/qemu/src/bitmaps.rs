//! Our dirty bitmaps, as QEMU has them: found in the graph, changed over all disks in one transaction. What is
//! to be done to them, `model::bitmaps` says.

use model::bitmaps::{Ours, Step, judge, repair};
use model::{BLOCK_BYTES, LogNumber, Tracking};
use serde_json::{Value, json};
use steps::durable_step;

use crate::disks::Disk;
use crate::error::Error;
use crate::graph::{Bitmap, Graph};
use crate::names::Names;
use crate::qmp::{Command, Qmp};

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
        if let Err(why) = judge(&disk.name, &ours(graph, names, disk), wanted) {
            return Tracking::Broken(why);
        }
    }
    Tracking::Intact
}

/// Changes all disks in one transaction, and removes what reading ahead has left; does nothing where nothing is to be
/// done.
pub(crate) async fn change_all(
    qmp: &Qmp,
    graph: &Graph,
    names: &Names,
    disks: &[Disk],
    keeps_again: bool,
    steps: impl Fn(&[Ours]) -> Vec<Step>,
) -> Result<(), Error> {
    let actions = disks
        .iter()
        .flat_map(|disk| {
            let steps = steps(&ours(graph, names, disk));
            let mut actions = strays(graph, names, disk, keeps_again);
            actions.extend(steps.into_iter().map(|step| action(names, disk, step)));
            actions
        })
        .collect();
    transaction(qmp, actions).await
}

/// Brings all disks back to bitmap `wanted`.
pub(crate) async fn repair_all(
    qmp: &Qmp,
    graph: &Graph,
    names: &Names,
    disks: &[Disk],
    wanted: Option<LogNumber>,
    keeps_again: bool,
) -> Result<(), Error> {
    change_all(qmp, graph, names, disks, keeps_again, |found| repair(found, wanted)).await
}

/// Removes the bitmaps of a reading ahead; `again` may have to stay for the capture that follows.
pub(crate) async fn remove_strays(
    qmp: &Qmp,
    graph: &Graph,
    names: &Names,
    disks: &[Disk],
    keeps_again: bool,
) -> Result<(), Error> {
    let actions = disks.iter().flat_map(|disk| strays(graph, names, disk, keeps_again)).collect();
    transaction(qmp, actions).await
}

fn strays(graph: &Graph, names: &Names, disk: &Disk, keeps_again: bool) -> Vec<Value> {
    let there = graph.nodes.get(&disk.block_node).map_or(&[][..], |node| &node.dirty_bitmaps);
    let mut strays = vec![names.seen()];
    strays.extend((!keeps_again).then(|| names.again()));
    strays.retain(|stray| there.iter().any(|bitmap| bitmap.name.as_ref() == Some(stray)));
    let node = &disk.block_node;
    let remove = |name| json!({"type": "block-dirty-bitmap-remove", "data": {"node": node, "name": name}});
    strays.into_iter().map(remove).collect()
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
