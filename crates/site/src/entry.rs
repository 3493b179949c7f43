//! A peer as the catalog keeps it: who it is, and what it has been granted here.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use catalog::column::parsed;
use catalog::rusqlite::types::ValueRef;
use catalog::{Transaction, params, rusqlite};
use model::authorization::{Entry, VmPatterns};
use model::{Change, GroupName, Timestamp};
use serde::{Deserialize, Serialize};
use wire::{Fingerprint, KeyId, Pin, Shown};

use crate::clock::{now, serialize_moment, serialize_optional_moment};
use crate::failure::{Code, Failure};
use crate::init::make_folder;

pub(crate) const TABLES: &[&str] = &["
    CREATE TABLE peers (
        name        TEXT PRIMARY KEY,
        address     TEXT NOT NULL,
        fingerprint TEXT NOT NULL UNIQUE,
        vms         TEXT NOT NULL,      -- which VMs it may replicate to this site: patterns
        since       INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE invites (
        secret_hash TEXT PRIMARY KEY,
        name        TEXT NOT NULL,
        vms         TEXT NOT NULL,
        expires_at  INTEGER NOT NULL
    ) STRICT;
", "
    ALTER TABLE peers ADD COLUMN quota_bytes INTEGER;       -- what its replicas may take up here; NULL: all there is
    ALTER TABLE invites ADD COLUMN quota_bytes INTEGER;
", "
    ALTER TABLE peers ADD COLUMN storage TEXT;              -- where its new replicas go; NULL: the site's own folder
    ALTER TABLE peers ADD COLUMN bandwidth INTEGER;         -- bytes per second of its logs; NULL: as they come
    ALTER TABLE peers ADD COLUMN trust_group TEXT;
    ALTER TABLE peers ADD COLUMN revoked_at INTEGER;        -- NULL: it is trusted
    ALTER TABLE invites ADD COLUMN storage TEXT;
    ALTER TABLE invites ADD COLUMN bandwidth INTEGER;
    ALTER TABLE invites ADD COLUMN trust_group TEXT;
", "
    ALTER TABLE peers ADD COLUMN key TEXT;                  -- its public key, once it was seen
    ALTER TABLE peers ADD COLUMN next_key TEXT;             -- the one that it has announced
    ALTER TABLE peers ADD COLUMN expires_at INTEGER;        -- its certificate's end
    ALTER TABLE peers ADD COLUMN certificate_name TEXT;     -- with it, our CA decides which certificate is its own
"];

/// A site that this one trusts, or did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PeerRow {
    /// What it is called here.
    pub name: String,
    /// Where it listens.
    pub address: String,
    /// Its certificate, as it was seen last.
    pub fingerprint: Fingerprint,
    /// The key of that, once it was seen.
    pub key: Option<KeyId>,
    /// The key that it has said it will have next.
    pub next_key: Option<KeyId>,
    /// Until when that certificate is good, once it was seen.
    #[serde(serialize_with = "serialize_optional_moment")]
    pub expires_at: Option<Timestamp>,
    /// The name for which a certificate of our CA must be, if the CA decides which one is its own.
    pub certificate_name: Option<String>,
    /// What it may do here.
    #[serde(flatten)]
    pub entry: Entry,
    /// Since when.
    #[serde(serialize_with = "serialize_moment")]
    pub since: Timestamp,
    /// When a person has taken back what it may; none while it is trusted.
    #[serde(serialize_with = "serialize_optional_moment")]
    pub revoked_at: Option<Timestamp>,
}

/// What an entry is made of, in the order of [`read_entry`].
pub(crate) const ENTRY: &str = "vms, quota_bytes, storage, bandwidth, trust_group";

pub(crate) const ALL_PEERS: &str =
    "SELECT name, address, fingerprint, since, revoked_at, vms, quota_bytes, storage,
    bandwidth, trust_group, key, next_key, expires_at, certificate_name FROM peers";

pub(crate) fn read_peer(row: &rusqlite::Row<'_>) -> rusqlite::Result<PeerRow> {
    Ok(PeerRow {
        name: row.get(0)?,
        address: row.get(1)?,
        fingerprint: parsed(row, 2)?,
        since: Timestamp(row.get(3)?),
        revoked_at: row.get::<_, Option<i64>>(4)?.map(Timestamp),
        entry: read_entry(row, 5)?,
        key: optional(row, 10)?,
        next_key: optional(row, 11)?,
        expires_at: row.get::<_, Option<i64>>(12)?.map(Timestamp),
        certificate_name: row.get(13)?,
    })
}

/// A column whose text is parsed, if it has one.
fn optional<T>(row: &rusqlite::Row<'_>, column: usize) -> rusqlite::Result<Option<T>>
where
    T: FromStr<Err: std::error::Error + Send + Sync + 'static>,
{
    match row.get_ref(column)? {
        ValueRef::Null => Ok(None),
        _ => parsed(row, column).map(Some),
    }
}

/// The columns [`ENTRY`] from `first` on.
pub(crate) fn read_entry(row: &rusqlite::Row<'_>, first: usize) -> rusqlite::Result<Entry> {
    let (vms, storage): (String, Option<String>) = (row.get(first)?, row.get(first + 2)?);
    Ok(Entry {
        // Anything could be written there once; what is no pattern of names fits none.
        vms: vms.parse().unwrap_or_else(|_| VmPatterns::none()),
        quota_bytes: row.get(first + 1)?,
        storage: storage.map(PathBuf::from),
        bandwidth_bytes_per_s: row.get(first + 3)?,
        group: optional(row, first + 4)?,
    })
}

impl PeerRow {
    /// A peer of which nothing but its certificate is known yet.
    pub(crate) fn new(name: String, address: String, fingerprint: Fingerprint, entry: Entry) -> Self {
        Self {
            name,
            address,
            fingerprint,
            key: None,
            next_key: None,
            expires_at: None,
            certificate_name: None,
            entry,
            since: now(),
            revoked_at: None,
        }
    }

    /// By what it is known.
    pub(crate) fn pin(&self) -> Pin {
        Pin {
            fingerprint: self.fingerprint,
            key: self.key,
            next_key: self.next_key,
            name: self.certificate_name.clone(),
        }
    }

    /// Whether a certificate that it has shown tells something new. An older one for the same key does not: it comes
    /// over connections that were open when it was renewed.
    pub(crate) fn is_news(&self, shown: &Shown) -> bool {
        let is_other = self.fingerprint != shown.fingerprint;
        let is_later = self.expires_at.is_none_or(|known| is_other && shown.expires_at >= known);
        self.key != Some(shown.key) || is_later
    }

    /// The row with what a certificate tells that the peer has shown.
    pub(crate) fn having_shown(self, shown: &Shown) -> Self {
        let next_key = self.next_key.filter(|next| *next != shown.key);
        let (fingerprint, key, expires_at) = (shown.fingerprint, Some(shown.key), Some(shown.expires_at));
        Self { fingerprint, key, next_key, expires_at, ..self }
    }

    /// Whether people trust it now.
    pub(crate) fn is_trusted(&self) -> bool {
        self.revoked_at.is_none()
    }

    /// Writes the peer down. A site that is invited again, under another name or with another certificate for its key too,
    /// keeps one entry.
    pub(crate) fn put(&self, tx: &Transaction<'_>) -> rusqlite::Result<()> {
        let (fingerprint, entry) = (self.fingerprint.to_string(), &self.entry);
        let key = self.key.map(|key| key.to_string());
        tx.execute(
            "DELETE FROM peers WHERE fingerprint = ?1 OR name = ?2 OR key = ?3",
            params![fingerprint, self.name, key],
        )?;
        tx.execute(
            "INSERT INTO peers (name, address, fingerprint, since, revoked_at, vms, quota_bytes, storage, bandwidth,
                 trust_group, key, next_key, expires_at, certificate_name)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14)",
            params![
                self.name,
                self.address,
                fingerprint,
                self.since.0,
                self.revoked_at.map(|at| at.0),
                entry.vms.to_string(),
                entry.quota_bytes,
                text(entry.storage.as_deref()),
                entry.bandwidth_bytes_per_s,
                entry.group.as_ref().map(GroupName::as_str),
                key,
                self.next_key.map(|key| key.to_string()),
                self.expires_at.map(|at| at.0),
                self.certificate_name,
            ],
        )?;
        Ok(())
    }
}

/// A path as a column holds it; those that are no text are turned away before ([`prepare_storage`]).
pub(crate) fn text(path: Option<&Path>) -> Option<String> {
    path.map(|path| path.to_string_lossy().into_owned())
}

/// What a person says of an entry.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct EntryChange {
    /// Which VMs the peer may replicate to this site.
    #[serde(default)]
    pub vms: Option<VmPatterns>,
    /// The folder of its new replicas.
    #[serde(default)]
    pub storage: Change<PathBuf>,
    /// What its replicas may take up here, in bytes.
    #[serde(default)]
    pub quota_bytes: Change<u64>,
    /// How fast its logs are taken, in bytes per second.
    #[serde(default)]
    pub bandwidth_bytes_per_s: Change<u64>,
    /// Its trust group.
    #[serde(default)]
    pub group: Change<GroupName>,
    /// The name for which a certificate of our CA must be, for the CA to decide which one is its own.
    #[serde(default)]
    pub certificate_name: Change<String>,
}

impl EntryChange {
    /// The certificate name that `before` becomes.
    pub(crate) fn certificate_name(&self, before: Option<String>) -> Result<Option<String>, Failure> {
        if let Change::Set(name) = &self.certificate_name {
            wire::check_certificate_name(name).map_err(|why| Failure::new(Code::Usage, why))?;
        }
        Ok(self.certificate_name.clone().of(before))
    }

    /// The entry that `before` becomes, with its folder made.
    pub(crate) fn apply(self, before: Entry) -> Result<Entry, Failure> {
        let Self { vms, storage, quota_bytes, bandwidth_bytes_per_s, group, certificate_name: _ } = self;
        if let Change::Set(folder) = &storage {
            prepare_storage(folder)?;
        }
        Ok(Entry {
            vms: vms.unwrap_or(before.vms),
            storage: storage.of(before.storage),
            quota_bytes: quota_bytes.of(before.quota_bytes),
            bandwidth_bytes_per_s: bandwidth_bytes_per_s.of(before.bandwidth_bytes_per_s),
            group: group.of(before.group),
        })
    }
}

/// Makes the folder that replicas are to go to, for this site alone, and finds out now whether it can be written to.
fn prepare_storage(folder: &Path) -> Result<(), Failure> {
    if !folder.is_absolute() || folder.to_str().is_none() {
        let message = format!("{} cannot be a storage folder; name a whole path, in UTF-8", folder.display());
        return Err(Failure::new(Code::Usage, message));
    }
    make_folder(folder, 0o700)?;
    let probe = folder.join(format!(".afterimage-{}", std::process::id()));
    let written = OpenOptions::new().write(true).create(true).truncate(true).open(&probe);
    written
        .and_then(|_| std::fs::remove_file(&probe))
        .map_err(|error| Failure::io("write to the storage folder", folder, &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_said_stays_and_what_is_cleared_goes() {
        let dir = tempfile::tempdir().unwrap();
        let storage = dir.path().join("a/b");
        let before =
            Entry { quota_bytes: Some(7), group: Some("depots".parse().unwrap()), ..Entry::default() };
        let change = EntryChange {
            vms: Some("web-*".parse().unwrap()),
            storage: Change::Set(storage.clone()),
            group: Change::Clear,
            ..EntryChange::default()
        };
        let after = change.apply(before.clone()).unwrap();
        let expected = Entry {
            vms: "web-*".parse().unwrap(),
            storage: Some(storage.clone()),
            quota_bytes: Some(7),
            bandwidth_bytes_per_s: None,
            group: None,
        };
        assert_eq!(after, expected);
        assert_eq!(std::fs::read_dir(&storage).unwrap().count(), 0, "nothing of the probe stays");
        assert_eq!(EntryChange::default().apply(before.clone()).unwrap(), before);
    }

    #[test]
    fn a_folder_that_replicas_cannot_be_made_in_is_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "mine").unwrap();
        for (folder, code) in [(file.as_path(), Code::Io), (Path::new("replicas"), Code::Usage)] {
            let change = EntryChange { storage: Change::Set(folder.into()), ..EntryChange::default() };
            assert_eq!(change.apply(Entry::default()).unwrap_err().code, code, "{}", folder.display());
        }
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "mine");
    }
}
