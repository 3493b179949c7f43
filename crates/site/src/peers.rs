//! The sites that this one trusts, by the fingerprints of their certificates, and the invites that make them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use catalog::column::parsed;
use catalog::{Catalog, OptionalExtension, Transaction, params, rusqlite};
use model::{Timestamp, VmName};
use serde::Serialize;
use steps::durable_step;
use wire::{Client, Fingerprint, Identity, Invite, Secret, SecretHash};

use crate::clock::{now, serialize_moment};
use crate::failure::{Code, Failure};

const TABLES: &[&str] = &["
    CREATE TABLE peers (
        name        TEXT PRIMARY KEY,
        address     TEXT NOT NULL,
        fingerprint TEXT NOT NULL UNIQUE,
        vms         TEXT NOT NULL,      -- which VMs it may replicate to this site: a pattern
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
"];

/// How long an invite is good for.
pub const INVITE_TIME: Duration = Duration::from_secs(15 * 60);

/// A site that this one trusts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PeerRow {
    /// What it is called here.
    pub name: String,
    /// Where it listens.
    pub address: String,
    /// Its certificate.
    pub fingerprint: Fingerprint,
    /// Which VMs it may replicate to this site.
    pub vms: String,
    /// How much its replicas may take up at this site; none for as much as there is.
    pub quota_bytes: Option<u64>,
    /// Since when.
    #[serde(serialize_with = "serialize_moment")]
    pub since: Timestamp,
}

/// All peers; kept in memory, because every request asks.
pub struct Peers {
    catalog: Catalog,
    identity: Identity,
    known: Mutex<BTreeMap<String, Known>>,
}

struct Known {
    row: PeerRow,
    client: Arc<Client>,
}

impl Peers {
    /// Reads them.
    pub fn open(catalog: Catalog, identity: Identity) -> Result<Self, Failure> {
        catalog.migrate("peers", TABLES)?;
        let rows = catalog.read(|c| {
            c.prepare("SELECT name, address, fingerprint, vms, since, quota_bytes FROM peers")?
                .query_map([], read_peer)?
                .collect::<rusqlite::Result<Vec<_>>>()
        })?;
        let known = rows.into_iter().map(|row| Ok((row.name.clone(), Known::new(row, &identity)?)));
        let known = known.collect::<Result<_, Failure>>()?;
        Ok(Self { catalog, identity, known: Mutex::new(known) })
    }

    /// All of them, by name.
    pub fn list(&self) -> Vec<PeerRow> {
        self.lock().values().map(|known| known.row.clone()).collect()
    }

    /// The peer with this certificate.
    pub fn by_fingerprint(&self, fingerprint: &Fingerprint) -> Option<PeerRow> {
        self.lock()
            .values()
            .find(|known| known.row.fingerprint == *fingerprint)
            .map(|known| known.row.clone())
    }

    /// This site's identity.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The peer of this name.
    pub fn get(&self, name: &str) -> Option<PeerRow> {
        self.lock().get(name).map(|known| known.row.clone())
    }

    /// An invite for a site that will be called `name`.
    pub async fn invite(
        &self,
        name: &VmName,
        vms: &str,
        quota_bytes: Option<u64>,
        address: String,
    ) -> Result<Invite, Failure> {
        if self.get(name.as_str()).is_some() {
            return Err(Failure::new(
                Code::Exists,
                format!(
                    "a peer named {name} exists already; choose another name, or 'afterimage peer remove {name}'"
                ),
            ));
        }
        let secret = Secret::generate().map_err(|error| Failure::new(Code::Internal, error.to_string()))?;
        let expires_at = now().plus(INVITE_TIME);
        let invite = Invite::new(address, self.identity.fingerprint(), secret, expires_at)
            .map_err(|error| Failure::new(Code::Config, error.to_string()))?;
        let (hash, name, vms) = (String::from(invite.secret.hash()), name.to_string(), vms.to_owned());
        durable_step("site::invite::writing");
        self.catalog
            .change(move |tx| {
                tx.execute("DELETE FROM invites WHERE expires_at < ?1", [now().0])?;
                tx.execute(
                    "INSERT INTO invites VALUES (?1, ?2, ?3, ?4, ?5)",
                    params![hash, name, vms, expires_at.0, quota_bytes],
                )
            })
            .await?;
        durable_step("site::invite::written");
        Ok(invite)
    }

    /// Takes an invite that we made out of the list, if it is there and good, and makes its bearer a peer.
    pub async fn admit(
        &self,
        secret: SecretHash,
        fingerprint: Fingerprint,
        address: String,
    ) -> Result<PeerRow, Failure> {
        let unknown = || {
            Failure::new(
                Code::Invite,
                "this invite is not known here: it was used, has expired, or is another site's; ask for a new one",
            )
        };
        let hash = String::from(secret);
        // A guess costs a look into memory, not a write to the disk.
        let known = "SELECT 1 FROM invites WHERE secret_hash = ?1";
        if self.catalog.read(|c| c.query_row(known, [&hash], |_| Ok(())).optional())?.is_none() {
            return Err(unknown());
        }
        durable_step("site::peer::admitting");
        let row = self
            .catalog
            .change(move |tx| {
                let invite = tx
                    .query_row(
                        "SELECT name, vms, expires_at, quota_bytes FROM invites WHERE secret_hash = ?1",
                        [&hash],
                        |row| Ok((row.get(0)?, row.get(1)?, row.get::<_, i64>(2)?, row.get(3)?)),
                    )
                    .optional()?;
                tx.execute("DELETE FROM invites WHERE secret_hash = ?1", [&hash])?;
                let since = now();
                match invite {
                    Some((name, vms, expires_at, quota_bytes)) if expires_at >= since.0 => {
                        let row = PeerRow { name, address, fingerprint, vms, quota_bytes, since };
                        row.put(tx)?;
                        Ok(Some(row))
                    }
                    _ => Ok(None),
                }
            })
            .await?;
        durable_step("site::peer::admitted");
        let row = row.ok_or_else(unknown)?;
        self.keep(row.clone())?;
        Ok(row)
    }

    /// Makes the site that invited us a peer.
    pub async fn add(
        &self,
        name: String,
        address: String,
        fingerprint: Fingerprint,
    ) -> Result<PeerRow, Failure> {
        let row = PeerRow { name, address, fingerprint, vms: "*".into(), quota_bytes: None, since: now() };
        let taken = self.get(&row.name).filter(|peer| peer.fingerprint != fingerprint);
        if let Some(peer) = taken {
            return Err(Failure::new(
                Code::Exists,
                format!(
                    "another peer is named {} already; 'afterimage peer remove {}' first, and ask for a new invite",
                    peer.name, peer.name
                ),
            ));
        }
        let written = row.clone();
        durable_step("site::peer::adding");
        self.catalog.change(move |tx| written.put(tx)).await?;
        durable_step("site::peer::added");
        self.keep(row.clone())?;
        Ok(row)
    }

    /// Ends the trust in a peer.
    pub async fn remove(&self, name: &str) -> Result<(), Failure> {
        if self.lock().remove(name).is_none() {
            return Err(no_such_peer(name));
        }
        let name = name.to_owned();
        durable_step("site::peer::removing");
        self.catalog.change(move |tx| tx.execute("DELETE FROM peers WHERE name = ?1", [name])).await?;
        durable_step("site::peer::removed");
        Ok(())
    }

    fn keep(&self, row: PeerRow) -> Result<(), Failure> {
        let known = Known::new(row, &self.identity)?;
        let mut all = self.lock();
        all.retain(|_, other| other.row.fingerprint != known.row.fingerprint);
        all.insert(known.row.name.clone(), known);
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn new(row: PeerRow, identity: &Identity) -> Result<Self, Failure> {
        let client = Client::new(identity, row.address.as_str(), row.fingerprint);
        let client = client.map_err(|error| Failure::new(Code::Peer, error.to_string()))?;
        Ok(Self { row, client: Arc::new(client) })
    }
}

impl primary::PeerClients for Peers {
    fn client(&self, peer: &str) -> Option<Arc<Client>> {
        self.lock().get(peer).map(|known| known.client.clone())
    }
}

impl PeerRow {
    /// Writes the peer down. A site that is invited again, under another name too, keeps one entry.
    fn put(&self, tx: &Transaction<'_>) -> rusqlite::Result<()> {
        let fingerprint = self.fingerprint.to_string();
        tx.execute("DELETE FROM peers WHERE fingerprint = ?1 OR name = ?2", [&fingerprint, &self.name])?;
        tx.execute(
            "INSERT INTO peers VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
            params![self.name, self.address, fingerprint, self.vms, self.since.0, self.quota_bytes],
        )?;
        Ok(())
    }

    /// Whether the peer may replicate a VM of this name to this site.
    #[must_use]
    pub fn may_send(&self, vm: &str) -> bool {
        matches(&self.vms, vm)
    }
}

/// No peer has this name.
pub(crate) fn no_such_peer(name: &str) -> Failure {
    Failure::new(
        Code::NoSuchPeer,
        format!("no peer is named {name}; 'afterimage peer list' shows the ones there are"),
    )
}

fn read_peer(row: &rusqlite::Row<'_>) -> rusqlite::Result<PeerRow> {
    Ok(PeerRow {
        name: row.get(0)?,
        address: row.get(1)?,
        fingerprint: parsed(row, 2)?,
        vms: row.get(3)?,
        since: Timestamp(row.get(4)?),
        quota_bytes: row.get(5)?,
    })
}

/// Whether `text` fits a pattern in which `*` stands for anything.
fn matches(pattern: &str, text: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == text,
        Some((head, rest)) => text.strip_prefix(head).is_some_and(|tail| {
            (0..=tail.len()).filter(|&at| tail.is_char_boundary(at)).any(|at| matches(rest, &tail[at..]))
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_whole_names_with_stars() {
        for (pattern, name, fits) in [
            ("*", "web", true),
            ("web", "web", true),
            ("web", "web-2", false),
            ("web-*", "web-2", true),
            ("*-prod", "db-prod", true),
            ("*-prod", "db-prod-2", false),
            ("a*b*c", "a-b-b-c", true),
            ("", "web", false),
        ] {
            assert_eq!(matches(pattern, name), fits, "{pattern} {name}");
        }
    }

    #[tokio::test]
    async fn an_invite_is_good_once() {
        let dir = tempfile::tempdir().unwrap();
        let open = |name: &str| {
            let folder = dir.path().join(name);
            std::fs::create_dir_all(&folder).unwrap();
            let identity = Identity::create(&folder, name).unwrap();
            Peers::open(Catalog::open(folder.join("catalog.sqlite")).unwrap(), identity).unwrap()
        };
        let (inviter, guest) = (open("head"), open("branch"));
        let invite =
            inviter.invite(&"branch".parse().unwrap(), "web-*", Some(7 << 20), "h:1".into()).await.unwrap();
        let fingerprint = guest.identity.fingerprint();
        let admit = || inviter.admit(invite.secret.hash(), fingerprint, "b:1".into());
        let row = admit().await.unwrap();
        assert_eq!(
            (row.name.as_str(), row.vms.as_str(), row.quota_bytes),
            ("branch", "web-*", Some(7 << 20))
        );
        assert!(row.may_send("web-1") && !row.may_send("db"));
        assert_eq!(admit().await.unwrap_err().code, Code::Invite);
        assert_eq!(inviter.by_fingerprint(&fingerprint), Some(row.clone()));
        assert_eq!(
            inviter.invite(&"branch".parse().unwrap(), "*", None, "h:1".into()).await.unwrap_err().code,
            Code::Exists
        );
        inviter.remove("branch").await.unwrap();
        assert_eq!(inviter.by_fingerprint(&fingerprint), None);
        assert_eq!(inviter.remove("branch").await.unwrap_err().code, Code::NoSuchPeer);
    }
}
