//! A replica without its catalog: each VM's folder describes itself as far as the logs do not.
//!
//! `vm.json` is replaced before an apply touches the base ("applying through N") and again when it has
//! ended ("applied N"), each time before the catalog says so. So it is never behind the base.

use std::collections::BTreeMap;
use std::path::Path;

use catalog::Catalog;
use log::Header;
use model::group::Group;
use model::{
    Head, LogId, LogNumber, Phase, PinnedPoint, PointInfo, Progress, ResyncReason, Timestamp, VmId, VmName,
    Window, phase_after,
};
use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::error::Result;
use crate::folder::{Folder, parse_log};
use crate::fs::Files;
use crate::relationship::set_phase;
use crate::rows::{self, Applying, Base, DiskSize, LogRow, Reported, VmDoc, VmRow};
use crate::vm::{At, State};

/// What a VM's folder says of itself.
#[derive(Debug, Serialize, Deserialize)]
struct Description {
    vm: VmId,
    name: VmName,
    peer: String,
    primary_name: String,
    #[serde(default = "rows::first_generation")]
    generation: u64,
    interval_s: u64,
    points: u8,
    disks: Vec<DiskSize>,
    base: Base,
    /// The point that the base equals, if it is one.
    base_point: Option<PointInfo>,
    applying: Option<LogNumber>,
    /// The points that people have pinned. One too many here does no harm, one too few would.
    #[serde(default)]
    pinned: Vec<PinnedPoint>,
    #[serde(default)]
    group: Option<Group>,
}

/// Writes a VM's description into its folder, durably.
pub(crate) fn describe(state: &State) -> Result<()> {
    describe_row(&state.row, state)
}

/// The same for a row that is about to be committed.
pub(crate) fn describe_row(row: &VmRow, state: &State) -> Result<()> {
    let doc = &row.doc;
    let description = Description {
        vm: row.vm,
        name: row.name.clone(),
        peer: row.peer.clone(),
        primary_name: doc.primary_name.clone(),
        generation: doc.generation,
        interval_s: doc.interval_s,
        points: doc.points,
        disks: doc.offered.clone(),
        base: doc.base.clone(),
        base_point: state.points.get(&doc.base.applied).copied(),
        applying: doc.applying.as_ref().map(|applying| applying.through),
        pinned: doc.pinned.clone(),
        group: doc.group.clone(),
    };
    let text = serde_json::to_vec_pretty(&description).expect("plain values can be written as JSON");
    let folder = Folder { files: state.files.clone(), path: row.folder.clone() };
    folder.files.replace(&folder.description(), &text)
}

/// Makes the catalog's rows of all VMs in `config.dir` and `config.storages` that it does not have, out of their folders: what can
/// be known is, in doubt the VM is to be resynchronized. Every log is read and verified. To be called before
/// [`crate::Store::open`]. Gives the VMs that were found.
///
/// What only the catalog knew is gone: which points had been dropped (they are shown again, their bytes are
/// right), holds, which points were read (the next backups read everything), failovers, moved folders, which moment of its
/// group a point is of (points of one moment still say the same of when they were taken, to the microsecond).
pub fn rebuild(catalog: &Catalog, config: &Config) -> Result<Vec<VmId>> {
    catalog.migrate("replica", rows::MIGRATIONS)?;
    let known: Vec<VmId> = rows::load_vms(catalog)?.into_iter().map(|row| row.vm).collect();
    let mut found = Vec::new();
    for storage in std::iter::once(&config.dir.join("vms")).chain(&config.storages) {
        rebuild_all_in(storage, catalog, config, &known, &mut found)?;
    }
    Ok(found)
}

fn rebuild_all_in(
    storage: &Path,
    catalog: &Catalog,
    config: &Config,
    known: &[VmId],
    found: &mut Vec<VmId>,
) -> Result<()> {
    let files = Files(config.files.clone());
    for name in files.names(storage)? {
        let vm_folder = Folder { files: files.clone(), path: storage.join(name) };
        if let Some(fence) = crate::completion::released(&vm_folder)? {
            catalog.write(move |tx| rows::raise_fence(tx, &fence))?;
            continue;
        }
        let Ok(text) = files.read(&vm_folder.description()) else { continue };
        match serde_json::from_slice::<Description>(&text) {
            Ok(description) if known.contains(&description.vm) => {}
            Ok(description) => {
                found.push(description.vm);
                rebuild_vm(catalog, config.clock.now(), vm_folder, description)?;
            }
            Err(error) => {
                tracing::error!(%error, folder = %vm_folder.path.display(), "a VM's description cannot be read")
            }
        }
    }
    Ok(())
}

/// A log that was found, and what its file says.
struct Found {
    row: LogRow,
    header: Header,
}

fn rebuild_vm(catalog: &Catalog, now: Timestamp, folder: Folder, description: Description) -> Result<()> {
    let mut doc = first_doc(&description, now);
    let mut logs = Vec::new();
    let files = find_logs(&folder)?;
    let mut broken = None;
    let mut tip = Head { number: description.base.applied, id: description.base.id };
    for found in files {
        if found.row.number <= tip.number {
            continue; // folded in already, or a part of a merged log
        }
        if found.row.predecessor != tip.id {
            broken = Some(format!("log {} does not follow log {}", found.row.number, tip.number));
            break;
        }
        tip = found.row.head();
        doc.head_moment = Some(found.row.moment);
        let phase =
            phase_after(found.row.purpose, found.row.class.point().is_some(), found.row.progress, &doc.phase);
        set_phase(&mut doc, phase, now);
        for disk in &found.header.disks {
            if !doc.disks.contains(&disk.name) {
                doc.disks.push(disk.name.clone());
            }
        }
        logs.push(found.row);
    }
    doc.head = tip;
    if description.applying.is_some_and(|through| through > tip.number) {
        broken = Some("logs that were being applied are missing".to_owned());
        doc.applying = None;
        doc.unsure = true;
    }
    // Points below an apply that had begun can no longer be read.
    let floor = description.applying.unwrap_or(LogNumber::ZERO);
    let unbroken_base = broken.is_none() || doc.applying.is_none() && description.applying.is_none();
    let shown = description.base_point.into_iter().chain(logs.iter().filter_map(LogRow::point));
    let points: Vec<PointInfo> = shown.filter(|point| unbroken_base && point.number >= floor).collect();
    doc.pinned = description.pinned;
    doc.pinned.retain(|pin| points.iter().any(|point| point.id == pin.id));
    if let Some(why) = broken {
        doc.damage = Some(why.clone());
        set_phase(&mut doc, Phase::ResyncRequired { why: ResyncReason::ChainBroken(why) }, now);
    }
    let row = VmRow {
        vm: description.vm,
        name: description.name,
        peer: description.peer,
        folder: folder.path,
        definition: "null".to_owned(),
        doc,
    };
    catalog.write(move |tx| {
        rows::save_vm(tx, &row)?;
        logs.iter().try_for_each(|log| rows::add_log(tx, row.vm, log))?;
        points.iter().try_for_each(|point| rows::add_point(tx, row.vm, point))
    })?;
    Ok(())
}

/// All logs of a folder that verify, in order of their first number; of two that begin alike the merged one
/// comes first, and then stands for both.
fn find_logs(folder: &Folder) -> Result<Vec<Found>> {
    let mut found: BTreeMap<(LogNumber, std::cmp::Reverse<LogNumber>), Found> = BTreeMap::new();
    let path = folder.logs();
    for name in folder.files.names(&path)? {
        let name = name.to_string_lossy().into_owned();
        let Some((first, last)) = parse_log(&name) else { continue };
        let path = folder.log(&name);
        let file = folder.files.open_read(&path)?;
        match log::verify(&mut At::start(&*file)) {
            Ok(verified) if verified.header.number == last => {
                let row = LogRow::from_verified(&verified, first, name);
                found.insert((first, std::cmp::Reverse(last)), Found { row, header: verified.header });
            }
            Ok(_) => {
                tracing::error!(file = %path.display(), "a log has another number than its file")
            }
            Err(error) => tracing::error!(%error, file = %path.display(), "a log is damaged"),
        }
    }
    Ok(found.into_values().collect())
}

fn first_doc(description: &Description, now: Timestamp) -> VmDoc {
    let base = description.base.clone();
    let total_bytes = description.disks.iter().map(|disk| disk.size_bytes).fold(0, u64::saturating_add);
    let mut disks: Vec<_> = description.disks.iter().map(|disk| disk.name.clone()).collect();
    disks.extend(
        base.disks
            .iter()
            .map(|disk| disk.name.clone())
            .filter(|name| !description.disks.iter().any(|d| d.name == *name)),
    );
    let initial = Phase::InitialReplication { progress: Progress { covered_bytes: 0, total_bytes } };
    let phase = if description.base_point.is_some() { Phase::Replicating } else { initial };
    VmDoc {
        primary_name: description.primary_name.clone(),
        generation: description.generation,
        interval_s: description.interval_s,
        points: description.points,
        offered: description.disks.clone(),
        disks,
        base,
        head: Head { number: LogNumber::ZERO, id: LogId::NONE },
        head_moment: description.base_point.map(|point| point.taken_at),
        phase: phase.clone(),
        phase_since: now,
        reported: Reported { phase, error: None, paused: false, at: now },
        made_at: now,
        last_log_at: Some(now),
        applying: description.applying.map(|through| Applying { through, since: now, failed: None }),
        migrating: None,
        leftover: None,
        failover: None,
        withdrawn: false,
        removing: false,
        damage: None,
        unsure: false,
        pinned: Vec::new(),
        forwarded: Vec::new(),
        relocating: None,
        awaited_pins: Vec::new(),
        media: None,
        group: description.group.clone(),
        measured: Window::beginning(now),
    }
}
