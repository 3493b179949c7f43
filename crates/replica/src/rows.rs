//! What the catalog knows of each VM. A VM's row is one document beside a few columns: it is always read
//! and written as a whole.

use std::collections::BTreeMap;
use std::path::PathBuf;

use catalog::column::{json, parsed, to_json};
use catalog::{Catalog, Transaction, params, rusqlite};
use log::{DiskInfo, Verified};
use media::MediaKey;
use model::group::{Group, GroupMoment};
use model::{
    DiskName, Head, LogClass, LogId, LogNumber, MediaId, Phase, PinnedPoint, PointInfo, Progress, Purpose,
    ReplicaTally, Timestamp, TravellingPin, VmId, VmName, Window,
};
use rusqlite::types::FromSqlError;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::forward::Mark;

pub(crate) const MIGRATIONS: &[&str] = &["
CREATE TABLE replica_vms (
    vm TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, peer TEXT NOT NULL, folder TEXT NOT NULL,
    definition TEXT NOT NULL, state TEXT NOT NULL) STRICT;
CREATE TABLE replica_logs (
    vm TEXT NOT NULL REFERENCES replica_vms ON DELETE CASCADE,
    number INTEGER NOT NULL, first INTEGER NOT NULL, file TEXT NOT NULL, id TEXT NOT NULL, predecessor TEXT NOT NULL,
    moment INTEGER NOT NULL, class TEXT NOT NULL, purpose TEXT NOT NULL, covered_bytes INTEGER NOT NULL,
    total_bytes INTEGER NOT NULL, bytes INTEGER NOT NULL, raw_bytes INTEGER NOT NULL, extents INTEGER NOT NULL,
    hash TEXT NOT NULL, PRIMARY KEY (vm, number)) STRICT;
CREATE TABLE replica_points (
    vm TEXT NOT NULL REFERENCES replica_vms ON DELETE CASCADE,
    number INTEGER NOT NULL, id TEXT NOT NULL, taken_at INTEGER NOT NULL, consistency TEXT NOT NULL,
    PRIMARY KEY (vm, number)) STRICT;
CREATE TABLE replica_holds (
    id TEXT PRIMARY KEY, vm TEXT NOT NULL REFERENCES replica_vms ON DELETE CASCADE,
    point INTEGER NOT NULL, made_at INTEGER NOT NULL, expires_at INTEGER NOT NULL) STRICT;
-- The points that somebody has read: only they can be the parent of an incremental backup.
CREATE TABLE replica_parents (
    vm TEXT NOT NULL REFERENCES replica_vms ON DELETE CASCADE,
    id TEXT NOT NULL, number INTEGER NOT NULL, PRIMARY KEY (vm, id)) STRICT;
", "
-- VMs that were failed over for good: a primary of an older generation is turned away.
CREATE TABLE replica_fences (
    vm TEXT PRIMARY KEY, name TEXT NOT NULL, generation INTEGER NOT NULL, at INTEGER NOT NULL,
    replicated TEXT NOT NULL) STRICT;
", "
-- Where their disks are.
ALTER TABLE replica_fences ADD COLUMN folder TEXT;
-- Logs that make points of a moment of the VM's group; known before they are here.
CREATE TABLE replica_moments (
    vm TEXT NOT NULL REFERENCES replica_vms ON DELETE CASCADE,
    number INTEGER NOT NULL, id TEXT NOT NULL, moment TEXT NOT NULL, PRIMARY KEY (vm, number)) STRICT;
", "
-- The site that the replica was moved to, where it was no failover that it ended with.
ALTER TABLE replica_fences ADD COLUMN moved_to TEXT;
"];

/// A disk and its size, as the catalog keeps it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSize {
    /// Its name.
    pub name: DiskName,
    /// Its size in bytes.
    pub size_bytes: u64,
}

impl From<&DiskInfo> for DiskSize {
    fn from(disk: &DiskInfo) -> Self {
        Self { name: disk.name.clone(), size_bytes: disk.size_bytes }
    }
}

/// A set of media that the replica begins with, as the primary has announced it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Awaited {
    /// The set.
    pub set: MediaId,
    /// What opens it.
    pub key: MediaKey,
    /// How many logs it has, once it is whole.
    pub logs: Option<LogNumber>,
}

/// What the primary last said of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reported {
    /// Where it stands.
    pub phase: Phase,
    /// Its error, if it has one that does not clear by itself.
    pub error: Option<String>,
    /// Replication is paused by a person.
    pub paused: bool,
    /// When it said so.
    pub at: Timestamp,
}

/// The flat images: what has been folded into them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Base {
    /// The newest log folded in, as a whole; [`LogNumber::ZERO`] for an empty base.
    pub applied: LogNumber,
    pub id: LogId,
    /// The VM's disks at that log's moment.
    pub disks: Vec<DiskSize>,
}

/// An apply that has begun and is not known to have ended well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Applying {
    pub through: LogNumber,
    pub since: Timestamp,
    /// When it failed, and how.
    pub failed: Option<(Timestamp, String)>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Migrating {
    pub since: Timestamp,
    pub to: PathBuf,
}

/// The replica is on its way to another site.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Relocating {
    /// That site, as a peer of this one.
    pub to: String,
    pub since: Timestamp,
    /// No more logs are taken: the other site has everything, and is about to get the next one.
    #[serde(default)]
    pub sealed: bool,
    /// It was passed on to that site before, and is if it stays.
    #[serde(default)]
    pub extended: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FailoverRow {
    pub point: LogNumber,
    /// Where the relationship stood before, for a cancel.
    pub before: Phase,
    pub before_since: Timestamp,
    /// The layers are there.
    pub ready: bool,
    /// The VM's disks at the point.
    #[serde(default)]
    pub disks: Vec<DiskSize>,
    /// It was made final by a person.
    #[serde(default)]
    pub completing: bool,
}

/// What keeps the old primary of a VM that was failed over for good, or whose replica was moved away, from replicating to this site.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fence {
    /// The VM.
    pub vm: VmId,
    /// What it was called.
    pub name: VmName,
    /// Only a primary of this generation or a newer one is the VM.
    pub generation: u64,
    /// When the failover was completed.
    pub at: Timestamp,
    /// The peer that it was replicated from, the seconds between cycles, and the hourly points kept.
    pub replicated: (String, u64, u8),
    /// The folder with its disks.
    pub folder: Option<PathBuf>,
    /// The peer that has the replica now, where it was moved and nothing runs here.
    pub moved_to: Option<String>,
}

/// What changes with a VM's life; one document in the catalog.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VmDoc {
    pub primary_name: String,
    /// How often the VM has changed its site for good, and one more.
    #[serde(default = "first_generation")]
    pub generation: u64,
    pub interval_s: u64,
    pub points: u8,
    /// The disks as the primary last offered them.
    pub offered: Vec<DiskSize>,
    /// All disks that the base or a log has, by their place in the chain.
    pub disks: Vec<DiskName>,
    pub base: Base,
    pub head: Head,
    pub head_moment: Option<Timestamp>,
    pub phase: Phase,
    pub phase_since: Timestamp,
    pub reported: Reported,
    pub made_at: Timestamp,
    pub last_log_at: Option<Timestamp>,
    pub applying: Option<Applying>,
    pub migrating: Option<Migrating>,
    /// A folder that the VM has moved out of, still to be removed.
    pub leftover: Option<PathBuf>,
    pub failover: Option<FailoverRow>,
    pub withdrawn: bool,
    /// It was removed by a person; its files are going.
    #[serde(default)]
    pub removing: bool,
    /// What was lost here, until a resynchronization has made it good.
    pub damage: Option<String>,
    /// What the flat files show may not be on the disk: an apply that may have failed in its sync was given up.
    #[serde(default)]
    pub unsure: bool,
    /// The points that people have pinned, each of them shown.
    #[serde(default)]
    pub pinned: Vec<PinnedPoint>,
    /// What a third site has, to which this replica is passed on.
    #[serde(default)]
    pub forwarded: Vec<Mark>,
    /// It is on its way to another site.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relocating: Option<Relocating>,
    /// Points that are to be pinned once they are here.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub awaited_pins: Vec<TravellingPin>,
    /// The media that the initial replication comes on, until the primary has heard that they were imported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media: Option<Awaited>,
    /// The group that its primary has it in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<Group>,
    /// The monitoring window. It changes only with what is written anyway.
    #[serde(default)]
    pub measured: Window<ReplicaTally>,
}

pub(crate) const fn first_generation() -> u64 {
    1
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VmRow {
    pub vm: VmId,
    pub name: VmName,
    /// The peer that the VM belongs to, by its name.
    pub peer: String,
    pub folder: PathBuf,
    /// The VM's definition, as JSON text.
    pub definition: String,
    pub doc: VmDoc,
}

/// A log of the chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LogRow {
    pub number: LogNumber,
    /// The oldest log that was merged into it; itself if none was.
    pub first: LogNumber,
    /// Its file, within the folder of logs.
    pub file: String,
    pub id: LogId,
    pub predecessor: LogId,
    pub moment: Timestamp,
    pub class: LogClass,
    pub purpose: Purpose,
    pub progress: Progress,
    pub bytes: u64,
    /// The bytes of its records before compression.
    pub raw_bytes: u64,
    pub extents: u64,
    pub hash: [u8; 32],
}

impl LogRow {
    pub fn from_verified(verified: &Verified, first: LogNumber, file: String) -> Self {
        let Verified { header, footer, index, summary } = verified;
        Self {
            number: header.number,
            first,
            file,
            id: header.id,
            predecessor: header.predecessor,
            moment: header.moment,
            class: footer.class,
            purpose: header.purpose,
            progress: footer.progress,
            bytes: summary.total_bytes,
            raw_bytes: summary.data_bytes,
            extents: index.extents.len() as u64,
            hash: summary.hash,
        }
    }

    pub const fn head(&self) -> Head {
        Head { number: self.number, id: self.id }
    }

    /// The point that the log makes, if it makes one.
    pub fn point(&self) -> Option<PointInfo> {
        let consistency = self.class.point()?;
        Some(PointInfo { id: self.id, number: self.number, taken_at: self.moment, consistency })
    }
}

/// A hold as the catalog keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HoldRow {
    pub id: String,
    pub vm: VmId,
    pub point: LogNumber,
    pub made_at: Timestamp,
    pub expires_at: Timestamp,
}

pub(crate) fn save_vm(tx: &Transaction<'_>, row: &VmRow) -> rusqlite::Result<()> {
    tx.prepare_cached(
        "INSERT INTO replica_vms VALUES (?1, ?2, ?3, ?4, ?5, ?6) ON CONFLICT (vm) DO UPDATE SET
         name = excluded.name, peer = excluded.peer, folder = excluded.folder,
         definition = excluded.definition, state = excluded.state",
    )?
    .execute(params![
        row.vm.to_string(),
        row.name.as_str(),
        row.peer,
        row.folder.to_string_lossy(),
        row.definition,
        to_json(&row.doc)
    ])?;
    Ok(())
}

pub(crate) fn remove_vm(tx: &Transaction<'_>, vm: VmId) -> rusqlite::Result<()> {
    tx.prepare_cached("DELETE FROM replica_vms WHERE vm = ?1")?.execute([vm.to_string()])?;
    Ok(())
}

pub(crate) fn add_log(tx: &Transaction<'_>, vm: VmId, log: &LogRow) -> rusqlite::Result<()> {
    tx.prepare_cached(
        "INSERT INTO replica_logs VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15)",
    )?
    .execute(params![
        vm.to_string(),
        log.number.0,
        log.first.0,
        log.file,
        log.id.to_string(),
        log.predecessor.to_string(),
        log.moment.0,
        to_json(&log.class),
        to_json(&log.purpose),
        log.progress.covered_bytes,
        log.progress.total_bytes,
        log.bytes,
        log.raw_bytes,
        log.extents,
        hex::encode(log.hash),
    ])?;
    Ok(())
}

/// Removes the rows of the logs from `first` to `last`.
pub(crate) fn remove_logs(
    tx: &Transaction<'_>,
    vm: VmId,
    first: LogNumber,
    last: LogNumber,
) -> rusqlite::Result<()> {
    tx.prepare_cached("DELETE FROM replica_logs WHERE vm = ?1 AND number BETWEEN ?2 AND ?3")?
        .execute(params![vm.to_string(), clamp(first), clamp(last)])?;
    Ok(())
}

pub(crate) fn add_point(tx: &Transaction<'_>, vm: VmId, point: &PointInfo) -> rusqlite::Result<()> {
    tx.prepare_cached("INSERT OR REPLACE INTO replica_points VALUES (?1, ?2, ?3, ?4, ?5)")?.execute(
        params![
            vm.to_string(),
            point.number.0,
            point.id.to_string(),
            point.taken_at.0,
            to_json(&point.consistency)
        ],
    )?;
    Ok(())
}

pub(crate) fn remove_points(tx: &Transaction<'_>, vm: VmId, points: &[LogNumber]) -> rusqlite::Result<()> {
    let mut remove = tx.prepare_cached("DELETE FROM replica_points WHERE vm = ?1 AND number = ?2")?;
    points.iter().try_for_each(|point| remove.execute(params![vm.to_string(), point.0]).map(drop))
}

/// Writes down which moment of its VM's group a log is of.
pub(crate) fn put_moment(
    tx: &Transaction<'_>,
    vm: VmId,
    log: Head,
    moment: &GroupMoment,
) -> rusqlite::Result<()> {
    tx.prepare_cached("INSERT OR REPLACE INTO replica_moments VALUES (?1, ?2, ?3, ?4)")?.execute(params![
        vm.to_string(),
        clamp(log.number),
        log.id.to_string(),
        to_json(moment)
    ])?;
    Ok(())
}

pub(crate) fn remove_moments(tx: &Transaction<'_>, vm: VmId, logs: &[LogNumber]) -> rusqlite::Result<()> {
    let mut remove = tx.prepare_cached("DELETE FROM replica_moments WHERE vm = ?1 AND number = ?2")?;
    logs.iter().try_for_each(|log| remove.execute(params![vm.to_string(), clamp(*log)]).map(drop))
}

/// The moments of a VM's logs, by the logs' numbers.
pub(crate) fn load_moments(catalog: &Catalog, vm: VmId) -> Result<BTreeMap<LogNumber, (LogId, GroupMoment)>> {
    let query = "SELECT number, id, moment FROM replica_moments WHERE vm = ?1";
    Ok(catalog.read(|c| {
        c.prepare_cached(query)?
            .query_map([vm.to_string()], |row| {
                Ok((LogNumber(row.get(0)?), (parsed(row, 1)?, json(row, 2)?)))
            })?
            .collect()
    })?)
}

/// Forgets which points from `first` on were read: their bytes are lost, nothing can be told against them.
pub(crate) fn forget_parents(tx: &Transaction<'_>, vm: VmId, first: LogNumber) -> rusqlite::Result<()> {
    tx.prepare_cached("DELETE FROM replica_parents WHERE vm = ?1 AND number >= ?2")?
        .execute(params![vm.to_string(), clamp(first)])?;
    Ok(())
}

pub(crate) fn add_parent(
    tx: &Transaction<'_>,
    vm: VmId,
    id: LogId,
    number: LogNumber,
) -> rusqlite::Result<()> {
    tx.prepare_cached("INSERT OR IGNORE INTO replica_parents VALUES (?1, ?2, ?3)")?.execute(params![
        vm.to_string(),
        id.to_string(),
        number.0
    ])?;
    Ok(())
}

/// The number of a point that somebody has read of this chain.
pub(crate) fn parent(catalog: &Catalog, vm: VmId, id: LogId) -> Result<Option<LogNumber>> {
    use catalog::OptionalExtension;
    let query = "SELECT number FROM replica_parents WHERE vm = ?1 AND id = ?2";
    Ok(catalog.read(|c| {
        c.query_row(query, params![vm.to_string(), id.to_string()], |row| row.get(0).map(LogNumber))
            .optional()
    })?)
}

/// Raises a fence; one that is there is never lowered.
pub(crate) fn raise_fence(tx: &Transaction<'_>, fence: &Fence) -> rusqlite::Result<()> {
    tx.prepare_cached(
        "INSERT INTO replica_fences VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7) ON CONFLICT (vm) DO UPDATE SET
         name = excluded.name, generation = max(generation, excluded.generation), at = excluded.at,
         replicated = excluded.replicated, folder = excluded.folder, moved_to = excluded.moved_to",
    )?
    .execute(params![
        fence.vm.to_string(),
        fence.name.as_str(),
        fence.generation,
        fence.at.0,
        to_json(&fence.replicated),
        fence.folder.as_ref().map(|folder| folder.to_string_lossy()),
        fence.moved_to,
    ])?;
    Ok(())
}

pub(crate) fn fence(catalog: &Catalog, vm: VmId) -> Result<Option<Fence>> {
    use catalog::OptionalExtension;
    let query = "SELECT * FROM replica_fences WHERE vm = ?1";
    Ok(catalog.read(|c| c.query_row(query, [vm.to_string()], read_fence).optional())?)
}

/// The newest fence of a VM of this name that was failed over to this site.
pub(crate) fn fence_of_name(catalog: &Catalog, name: &VmName) -> Result<Option<Fence>> {
    use catalog::OptionalExtension;
    let query = "SELECT * FROM replica_fences WHERE name = ?1 AND moved_to IS NULL ORDER BY at DESC LIMIT 1";
    Ok(catalog.read(|c| c.query_row(query, [name.as_str()], read_fence).optional())?)
}

fn read_fence(row: &rusqlite::Row<'_>) -> rusqlite::Result<Fence> {
    Ok(Fence {
        vm: parsed(row, 0)?,
        name: parsed(row, 1)?,
        generation: row.get(2)?,
        at: Timestamp(row.get(3)?),
        replicated: json(row, 4)?,
        folder: row.get::<_, Option<String>>(5)?.map(PathBuf::from),
        moved_to: row.get(6)?,
    })
}

pub(crate) fn add_hold(tx: &Transaction<'_>, hold: &HoldRow) -> rusqlite::Result<()> {
    tx.prepare_cached("INSERT INTO replica_holds VALUES (?1, ?2, ?3, ?4, ?5)")?.execute(params![
        hold.id,
        hold.vm.to_string(),
        hold.point.0,
        hold.made_at.0,
        hold.expires_at.0
    ])?;
    Ok(())
}

pub(crate) fn remove_hold(tx: &Transaction<'_>, id: &str) -> rusqlite::Result<()> {
    tx.prepare_cached("DELETE FROM replica_holds WHERE id = ?1")?.execute([id])?;
    Ok(())
}

pub(crate) fn load_vms(catalog: &Catalog) -> Result<Vec<VmRow>> {
    let query = "SELECT vm, name, peer, folder, definition, state FROM replica_vms ORDER BY vm";
    Ok(catalog.read(|c| {
        c.prepare_cached(query)?
            .query_map([], |row| {
                Ok(VmRow {
                    vm: parsed(row, 0)?,
                    name: parsed(row, 1)?,
                    peer: row.get(2)?,
                    folder: PathBuf::from(row.get::<_, String>(3)?),
                    definition: row.get(4)?,
                    doc: json(row, 5)?,
                })
            })?
            .collect()
    })?)
}

pub(crate) fn load_logs(catalog: &Catalog, vm: VmId) -> Result<Vec<LogRow>> {
    let query =
        "SELECT number, first, file, id, predecessor, moment, class, purpose, covered_bytes, total_bytes,
                 bytes, raw_bytes, extents, hash FROM replica_logs WHERE vm = ?1 ORDER BY number";
    Ok(catalog.read(|c| {
        c.prepare_cached(query)?
            .query_map([vm.to_string()], |row| {
                let hash: String = row.get(13)?;
                Ok(LogRow {
                    number: LogNumber(row.get(0)?),
                    first: LogNumber(row.get(1)?),
                    file: row.get(2)?,
                    id: parsed(row, 3)?,
                    predecessor: parsed(row, 4)?,
                    moment: Timestamp(row.get(5)?),
                    class: json(row, 6)?,
                    purpose: json(row, 7)?,
                    progress: Progress { covered_bytes: row.get(8)?, total_bytes: row.get(9)? },
                    bytes: row.get(10)?,
                    raw_bytes: row.get(11)?,
                    extents: row.get(12)?,
                    hash: hex::decode(hash)
                        .ok()
                        .and_then(|bytes| bytes.try_into().ok())
                        .ok_or_else(|| rusqlite::Error::from(FromSqlError::InvalidType))?,
                })
            })?
            .collect()
    })?)
}

pub(crate) fn load_points(catalog: &Catalog, vm: VmId) -> Result<Vec<PointInfo>> {
    let query = "SELECT number, id, taken_at, consistency FROM replica_points WHERE vm = ?1 ORDER BY number";
    Ok(catalog.read(|c| {
        c.prepare_cached(query)?
            .query_map([vm.to_string()], |row| {
                Ok(PointInfo {
                    number: LogNumber(row.get(0)?),
                    id: parsed(row, 1)?,
                    taken_at: Timestamp(row.get(2)?),
                    consistency: json(row, 3)?,
                })
            })?
            .collect()
    })?)
}

pub(crate) fn load_holds(catalog: &Catalog) -> Result<Vec<HoldRow>> {
    Ok(catalog.read(|c| {
        c.prepare_cached("SELECT id, vm, point, made_at, expires_at FROM replica_holds")?
            .query_map([], |row| {
                Ok(HoldRow {
                    id: row.get(0)?,
                    vm: parsed(row, 1)?,
                    point: LogNumber(row.get(2)?),
                    made_at: Timestamp(row.get(3)?),
                    expires_at: Timestamp(row.get(4)?),
                })
            })?
            .collect()
    })?)
}

/// SQLite's integers are signed.
fn clamp(number: LogNumber) -> i64 {
    i64::try_from(number.0).unwrap_or(i64::MAX)
}
