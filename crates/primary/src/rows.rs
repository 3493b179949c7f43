//! What the primary keeps in the catalog: one row per protected VM.

use std::path::PathBuf;
use std::time::Duration;

use catalog::column::{json, parsed, to_json};
use catalog::rusqlite::Row;
use catalog::{Catalog, OptionalExtension, params, rusqlite};
use media::MediaKey;
use model::{
    CycleTally, DiskName, InitialStart, LastError, MayRun, MediaId, Phase, ResyncPolicy, ResyncReason,
    ResyncWord, Shipped, Side, Timestamp, VmId, VmName, Window, may_run,
};
use qemu::{AgentAddress, Monitor};
use serde::{Deserialize, Serialize};
use steps::durable_step;
use wire::KeyId;

use crate::error::Failure;

const TABLES: &[&str] = &["
    CREATE TABLE protected (
        vm         TEXT PRIMARY KEY,
        name       TEXT NOT NULL UNIQUE,
        settings   TEXT NOT NULL,           -- json: Settings
        disks      TEXT NOT NULL,           -- json: what was agreed with the replica
        phase      TEXT NOT NULL,           -- json: model::Phase
        paused     INTEGER NOT NULL DEFAULT 0,
        shipped    TEXT NOT NULL,           -- json: model::Shipped
        made_at    INTEGER NOT NULL,        -- microseconds since 1970
        point_at   INTEGER,                 -- moment of the newest durable point
        app_at     INTEGER,                 -- moment of the newest application-consistent one
        failures   INTEGER NOT NULL DEFAULT 0,
        error      TEXT                     -- json: Failure
    ) STRICT;
", "
    ALTER TABLE protected ADD COLUMN generation INTEGER NOT NULL DEFAULT 1;  -- how often the VM has changed its site, and one more
", "
    -- Of its own, because it changes once in a cycle and the row above several times; and no reference to that row,
    -- because that is replaced.
    CREATE TABLE measured (
        vm     TEXT PRIMARY KEY,
        window TEXT NOT NULL            -- json: Measured
    ) STRICT;
", "
    ALTER TABLE protected ADD COLUMN passes TEXT NOT NULL DEFAULT '{}';      -- json: Passes
", crate::group::TABLE];

/// What a person has set for one protected VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// How the VM's QEMU is reached: `qmp` with a socket, or `libvirt` with a domain.
    #[serde(flatten)]
    pub monitor: Monitor,
    /// The NBD server's socket, where QEMU has one already.
    pub nbd: Option<PathBuf>,
    /// The block nodes, or the targets of a domain of libvirt's, to protect; empty: every writable disk.
    pub nodes: Vec<String>,
    /// The peer that keeps the replica.
    pub peer: String,
    /// Between the starts of two cycles.
    pub interval: Duration,
    /// Hourly recovery points kept beside the latest one.
    pub points: u8,
    /// How often a point is application-consistent.
    pub app_every: Option<Duration>,
    /// The guest agent's socket. Libvirt has that of its domains, and passes on what we say.
    pub guest_agent: Option<PathBuf>,
    /// The most that this relationship may send, in bytes per second.
    pub bandwidth_bytes_per_s: Option<u64>,
    /// What shows that the VM has booted, for boot checks of its replica.
    #[serde(default)]
    pub sign_of_life: Option<String>,
    /// Where every writable disk is protected: all but these nodes, or targets of a domain of libvirt's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub excluded: Vec<String>,
    /// When both sides are compared without being asked.
    #[serde(default)]
    pub resync: ResyncPolicy,
    /// The replica moves to another peer, or has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relocating: Option<Relocating>,
}

/// A replica's move to another site, as its primary steers it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Relocating {
    /// It is to be at that peer, whose key is this.
    To {
        /// The peer.
        peer: String,
        /// Its key, by which the other sites know it.
        key: KeyId,
    },
    /// It is, and the peer that had it before has not heard of it yet.
    From {
        /// The peer that had it.
        peer: String,
        /// The key of the one that has it.
        key: KeyId,
    },
}

/// What a person has said of the pass that is under way or to come, and why it is to be.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Passes {
    /// How the initial replication is to begin.
    pub initial: InitialStart,
    /// What was said of the resynchronization.
    pub word: ResyncWord,
    /// Why it is required; kept while it is under way.
    pub why: Option<ResyncReason>,
    /// The media that the initial replication goes by, until they were imported.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub media: Option<Media>,
}

/// A set of media.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Media {
    /// The folder that it is written to.
    pub dir: PathBuf,
    /// Its id.
    pub set: MediaId,
    /// What opens it; never on the media.
    pub key: MediaKey,
    /// A set that was begun in the folder before and is worth nothing.
    #[serde(default)]
    pub before: Option<MediaId>,
    /// The moment of its last log, which makes a recovery point.
    #[serde(default)]
    pub moment: Option<Timestamp>,
    /// When all of it had been written; none before.
    #[serde(default)]
    pub written: Option<Written>,
}

/// A set of media that is whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    /// Since when.
    pub at: Timestamp,
    /// The bytes of its files.
    pub bytes: u64,
}

impl Settings {
    /// Where the guest's agent is, if application-consistent points are to be made.
    pub(crate) fn agent(&self) -> Option<AgentAddress> {
        match (&self.guest_agent, &self.monitor) {
            (Some(socket), _) => Some(AgentAddress::Socket(socket.clone())),
            (None, Monitor::Libvirt(domain)) => self.app_every.map(|_| AgentAddress::Libvirt(domain.clone())),
            (None, Monitor::Socket(_) | Monitor::Replica) => None,
        }
    }
}

/// A disk as agreed with the replica.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownDisk {
    /// The QEMU node, or the target of a domain of libvirt's.
    pub node: String,
    /// Its name on both sides.
    pub name: DiskName,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// The file or device that it lies in, where it lies in one.
    #[serde(default)]
    pub image: Option<Image>,
    /// So much of a disk that has joined is at the replica, from its start, in bytes. It is in no recovery point before
    /// all of it is. None of the others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub joining: Option<u64>,
}

pub use qemu::Image;

/// Everything remembered of one protected VM.
#[derive(Debug, Clone)]
pub struct Protected {
    /// Its id.
    pub vm: VmId,
    /// Its name.
    pub name: VmName,
    /// How it is protected.
    pub settings: Settings,
    /// Its disks, as agreed with the replica.
    pub disks: Vec<KnownDisk>,
    /// Where the relationship stands.
    pub phase: Phase,
    /// Paused by a person.
    pub paused: bool,
    /// What has been shipped.
    pub shipped: Shipped,
    /// Since when it is protected.
    pub made_at: Timestamp,
    /// The moment of the newest recovery point.
    pub point_at: Option<Timestamp>,
    /// The moment of the newest application-consistent one.
    pub app_at: Option<Timestamp>,
    /// Cycles failed in a row.
    pub failures: u32,
    /// Why the last cycle failed.
    pub error: Option<Failure>,
    /// How often the VM has changed its site for good, and one more.
    pub generation: u64,
    /// What steers its passes.
    pub passes: Passes,
}

/// The monitoring window of one protected VM.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Measured {
    /// Its cycles.
    pub cycles: Window<CycleTally>,
    /// Why the last one of them that failed did.
    pub last_error: Option<LastError>,
}

impl Measured {
    /// One that begins now.
    pub fn beginning(now: Timestamp) -> Self {
        Self { cycles: Window::beginning(now), last_error: None }
    }

    /// The one that the catalog has; a new one where it has none that can be read.
    pub fn load(catalog: &Catalog, vm: VmId, now: Timestamp) -> Result<Self, catalog::Error> {
        let query = "SELECT window FROM measured WHERE vm = ?1";
        let text: Option<String> =
            catalog.read(|c| c.query_row(query, [vm.to_string()], |row| row.get(0)).optional())?;
        Ok(text.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_else(|| Self::beginning(now)))
    }
}

impl Protected {
    /// Bytes of all disks together.
    pub fn total_bytes(&self) -> u64 {
        self.disks.iter().map(|disk| disk.size_bytes).sum()
    }

    /// Whether the next cycle is the first of a pass.
    pub(crate) fn begins_pass(&self) -> bool {
        match self.phase {
            Phase::InitialReplication { progress } | Phase::Resynchronizing { progress } => {
                progress.covered_bytes == 0
            }
            Phase::ResyncRequired { .. } => true,
            Phase::Replicating | Phase::Failover { .. } | Phase::FailedOver => false,
        }
    }

    /// Whether a disk has joined and is not whole at the replica yet.
    pub fn has_joining(&self) -> bool {
        self.disks.iter().any(|disk| disk.joining.is_some())
    }

    /// The QEMU nodes of all disks.
    pub fn nodes(&self) -> Vec<String> {
        self.disks.iter().map(|disk| disk.node.clone()).collect()
    }

    /// Whether its next cycle may run now, as far as passes are concerned.
    pub fn may_run(&self, now: Timestamp) -> MayRun {
        may_run(&self.phase, self.settings.resync, self.passes.word, &self.passes.initial, now)
    }

    /// A pass that is complete has nothing to be steered by any more.
    pub(crate) fn enter(&mut self, phase: Phase) {
        if phase == Phase::Replicating {
            self.passes = Passes::default();
        }
        if let Some(change) = self.phase.transition(&phase, Side::Primary) {
            tracing::info!(vm = %self.name, %change, "a primary enters another phase");
        }
        self.phase = phase;
    }

    /// Both sides must be compared; `why` is kept while they are.
    pub(crate) fn must_resync(&mut self, why: ResyncReason) {
        self.passes.why = Some(why.clone());
        self.passes.media = None;
        self.enter(Phase::ResyncRequired { why });
    }

    /// Writes the row; durable when this returns.
    pub async fn save(&self, catalog: &Catalog) -> Result<(), catalog::Error> {
        let row = self.clone();
        catalog.change(move |tx| row.put(tx)).await
    }

    /// The same for a caller that may block.
    pub(crate) fn save_blocking(&self, catalog: &Catalog) -> Result<(), catalog::Error> {
        let row = self.clone();
        catalog.write(move |tx| row.put(tx))
    }

    /// Writes the row of a VM that is new. False, and nothing is written, if there is one of its name by now: two people
    /// may protect it at once.
    pub async fn save_new(&self, catalog: &Catalog) -> Result<bool, catalog::Error> {
        let row = self.clone();
        let put = move |tx: &catalog::Transaction<'_>| {
            let is_new = !has_name(tx, &row.name)?;
            if is_new {
                row.put(tx)?;
            }
            Ok(is_new)
        };
        catalog.change(put).await
    }

    /// Writes the row together with the window, in one transaction: a cycle that is measured costs no sync more.
    pub async fn save_measured(&self, catalog: &Catalog, measured: &Measured) -> Result<(), catalog::Error> {
        let (row, window) = (self.clone(), to_json(measured));
        let put = move |tx: &catalog::Transaction<'_>| {
            row.put(tx)?;
            tx.prepare_cached("INSERT OR REPLACE INTO measured VALUES (?1, ?2)")?
                .execute(params![row.vm.to_string(), window])?;
            Ok(())
        };
        catalog.change(put).await
    }

    fn put(&self, tx: &catalog::Transaction<'_>) -> rusqlite::Result<()> {
        tx.prepare_cached("INSERT OR REPLACE INTO protected VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14)")?.execute(params![
                self.vm.to_string(),
                self.name.as_str(),
                to_json(&self.settings),
                to_json(&self.disks),
                to_json(&self.phase),
                self.paused,
                to_json(&self.shipped),
                self.made_at.0,
                self.point_at.map(|at| at.0),
                self.app_at.map(|at| at.0),
                self.failures,
                self.error.as_ref().map(to_json),
                self.generation,
                to_json(&self.passes),
            ])?;
        Ok(())
    }

    fn get(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            vm: parsed(row, 0)?,
            name: parsed(row, 1)?,
            settings: json(row, 2)?,
            disks: json(row, 3)?,
            phase: json(row, 4)?,
            paused: row.get(5)?,
            shipped: json(row, 6)?,
            made_at: Timestamp(row.get(7)?),
            point_at: row.get::<_, Option<i64>>(8)?.map(Timestamp),
            app_at: row.get::<_, Option<i64>>(9)?.map(Timestamp),
            failures: row.get(10)?,
            error: match row.get_ref(11)? {
                rusqlite::types::ValueRef::Null => None,
                _ => Some(json(row, 11)?),
            },
            generation: row.get(12)?,
            passes: json(row, 13)?,
        })
    }
}

/// Makes the table if it is not there. Blocks.
pub fn migrate(catalog: &Catalog) -> Result<(), catalog::Error> {
    catalog.migrate("primary", TABLES)
}

/// Reads all rows, by name.
pub fn load(catalog: &Catalog) -> Result<Vec<Protected>, catalog::Error> {
    catalog.read(|c| {
        c.prepare_cached("SELECT * FROM protected ORDER BY name")?.query_map([], Protected::get)?.collect()
    })
}

/// Whether a VM of this name is protected.
pub fn is_known(catalog: &Catalog, name: &VmName) -> Result<bool, catalog::Error> {
    catalog.read(|c| has_name(c, name))
}

fn has_name(c: &rusqlite::Connection, name: &VmName) -> rusqlite::Result<bool> {
    c.prepare_cached("SELECT 1 FROM protected WHERE name = ?1")?.exists([name.as_str()])
}

/// Forgets a VM.
pub async fn remove(catalog: &Catalog, vm: VmId) -> Result<(), catalog::Error> {
    let id = vm.to_string();
    durable_step("primary::forget::removing");
    catalog
        .change(move |tx| {
            tx.prepare_cached("DELETE FROM measured WHERE vm = ?1")?.execute([&id])?;
            tx.prepare_cached("DELETE FROM protected WHERE vm = ?1")?.execute([&id])
        })
        .await?;
    durable_step("primary::forget::removed");
    Ok(())
}

#[cfg(test)]
mod tests {
    use model::Progress;

    use super::*;

    #[tokio::test]
    async fn a_row_comes_back_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(dir.path().join("catalog.sqlite")).unwrap();
        migrate(&catalog).unwrap();
        assert!(load(&catalog).unwrap().is_empty());
        let mut row = Protected {
            vm: VmId::from_bytes([1; 16]),
            name: "web".parse().unwrap(),
            settings: Settings {
                monitor: Monitor::Socket("/run/qmp".into()),
                nbd: None,
                nodes: vec!["vda".into()],
                peer: "head-office".into(),
                interval: Duration::from_secs(30),
                points: 24,
                app_every: None,
                guest_agent: None,
                bandwidth_bytes_per_s: Some(1_000_000),
                sign_of_life: Some("agent".into()),
                excluded: vec!["cd0".into()],
                relocating: None,
                resync: "22:00-06:00".parse().unwrap(),
            },
            disks: vec![KnownDisk {
                node: "vda".into(),
                name: "vda".parse().unwrap(),
                size_bytes: 1 << 30,
                image: None,
                joining: Some(1 << 20),
            }],
            phase: Phase::InitialReplication { progress: Progress { covered_bytes: 1, total_bytes: 2 } },
            paused: true,
            shipped: Shipped::NOTHING,
            made_at: Timestamp(5),
            point_at: None,
            app_at: Some(Timestamp(7)),
            failures: 3,
            error: Some(Failure::transient(crate::error::FailureCode::Link, "cut")),
            generation: 2,
            passes: Passes {
                initial: InitialStart::At { at: Timestamp(11) },
                word: ResyncWord::Cancelled { at: Timestamp(12) },
                why: Some(ResyncReason::Requested),
                media: Some(Media {
                    dir: "/mnt/usb".into(),
                    set: MediaId::from_bytes([3; 16]),
                    key: MediaKey::from_bytes([4; 32]),
                    before: Some(MediaId::from_bytes([5; 16])),
                    moment: Some(Timestamp(13)),
                    written: Some(Written { at: Timestamp(14), bytes: 15 }),
                }),
            },
        };
        assert!(row.save_new(&catalog).await.unwrap());
        let other = Protected { vm: VmId::from_bytes([2; 16]), ..row.clone() };
        assert!(!other.save_new(&catalog).await.unwrap(), "a VM of that name is there already");
        row.phase = Phase::ResyncRequired { why: ResyncReason::BitmapLost("vda".into()) };
        row.save(&catalog).await.unwrap();
        let rows = load(&catalog).unwrap();
        assert_eq!(format!("{rows:?}"), format!("{:?}", [&row]));
        let mut measured = Measured::load(&catalog, row.vm, Timestamp(9)).unwrap();
        assert_eq!(measured, Measured::beginning(Timestamp(9)), "nothing was measured yet");
        let tally = CycleTally { done: 3, log_bytes: 7, ..CycleTally::default() };
        measured.cycles.note(&tally, Timestamp(10), Duration::from_secs(3600));
        measured.last_error = Some(LastError { at: Timestamp(10), message: "cut".into() });
        row.save_measured(&catalog, &measured).await.unwrap();
        row.save(&catalog).await.unwrap();
        assert_eq!(Measured::load(&catalog, row.vm, Timestamp(11)).unwrap(), measured);
        remove(&catalog, row.vm).await.unwrap();
        assert!(load(&catalog).unwrap().is_empty());
        assert_eq!(
            Measured::load(&catalog, row.vm, Timestamp(0)).unwrap(),
            Measured::beginning(Timestamp(0))
        );
    }

    #[test]
    fn the_settings_of_earlier_versions_are_read_and_those_of_a_domain_too() {
        let common = r#""nbd": null, "nodes": [], "peer": "head", "interval": {"secs": 30, "nanos": 0}, "points": 0,
            "app_every": {"secs": 3600, "nanos": 0}, "guest_agent": null, "bandwidth_bytes_per_s": null"#;
        let read = |monitor: &str| serde_json::from_str::<Settings>(&format!("{{{monitor}, {common}}}"));
        let plain = read(r#""qmp": "/run/qmp""#).unwrap();
        assert_eq!((&plain.monitor, plain.agent()), (&Monitor::Socket("/run/qmp".into()), None));
        assert_eq!(plain.resync, ResyncPolicy::Automatic);
        let domain = read(r#""libvirt": {"uri": "qemu:///system", "name": "web", "uuid": "c7"}"#).unwrap();
        let Monitor::Libvirt(address) = &domain.monitor else { panic!("{:?}", domain.monitor) };
        assert_eq!(address.name, "web");
        assert_eq!(domain.agent(), Some(AgentAddress::Libvirt(address.clone())));
        let again = serde_json::from_str::<Settings>(&serde_json::to_string(&domain).unwrap()).unwrap();
        assert_eq!(again, domain);
        assert!(read(r#""libvrt": {}"#).is_err());
    }
}
