//! The sites that this one trusts, by the fingerprints of their certificates, and the invites that make them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use catalog::{Catalog, OptionalExtension, params, rusqlite};
use model::VmName;
use model::authorization::Entry;
use steps::durable_step;
use wire::{Client, Fingerprint, Identity, Invite, RateLimiter, Secret, SecretHash};

use crate::clock::now;
use crate::entry::{ALL_PEERS, ENTRY, EntryChange, PeerRow, TABLES, read_entry, read_peer, text};
use crate::failure::{Code, Failure};

/// How long an invite is good for.
pub const INVITE_TIME: Duration = Duration::from_secs(15 * 60);

/// All peers; kept in memory, because every request asks.
pub struct Peers {
    catalog: Catalog,
    identity: Identity,
    known: Mutex<BTreeMap<String, Known>>,
}

struct Known {
    row: PeerRow,
    client: Arc<Client>,
    /// What all its uploads share.
    limiter: Option<RateLimiter>,
}

impl Peers {
    /// Reads them.
    pub fn open(catalog: Catalog, identity: Identity) -> Result<Self, Failure> {
        catalog.migrate("peers", TABLES)?;
        let rows = catalog.read(|c| {
            c.prepare(ALL_PEERS)?.query_map([], read_peer)?.collect::<rusqlite::Result<Vec<_>>>()
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

    /// An invite for a site that will be called `name`. A peer that is trusted is invited again only to be replaced, and
    /// keeps what `change` says nothing of; so does one that was revoked.
    pub async fn invite(
        &self,
        name: &VmName,
        change: EntryChange,
        replace: bool,
        address: String,
    ) -> Result<Invite, Failure> {
        let before = self.get(name.as_str());
        if !replace && before.as_ref().is_some_and(PeerRow::is_trusted) {
            return Err(Failure::new(
                Code::Exists,
                format!(
                    "a peer named {name} exists already; choose another name, change what it may do with 'afterimage peer allow {name}', or invite it again with --replace if its identity was made anew"
                ),
            ));
        }
        let entry = change.apply(before.map_or_else(Entry::default, |peer| peer.entry))?;
        let secret = Secret::generate().map_err(|error| Failure::new(Code::Internal, error.to_string()))?;
        let expires_at = now().plus(INVITE_TIME);
        let invite = Invite::new(address, self.identity.fingerprint(), secret, expires_at)
            .map_err(|error| Failure::new(Code::Config, error.to_string()))?;
        let (hash, name) = (String::from(invite.secret.hash()), name.to_string());
        durable_step("site::invite::writing");
        self.catalog
            .change(move |tx| {
                tx.execute("DELETE FROM invites WHERE expires_at < ?1", [now().0])?;
                tx.execute(
                    &format!("INSERT INTO invites (secret_hash, name, expires_at, {ENTRY}) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)"),
                    params![
                        hash,
                        name,
                        expires_at.0,
                        entry.vms.to_string(),
                        entry.quota_bytes,
                        text(entry.storage.as_deref()),
                        entry.bandwidth_bytes_per_s,
                        entry.group.as_ref().map(model::GroupName::as_str)
                    ],
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
                        &format!("SELECT name, expires_at, {ENTRY} FROM invites WHERE secret_hash = ?1"),
                        [&hash],
                        |row| Ok((row.get(0)?, row.get::<_, i64>(1)?, read_entry(row, 2)?)),
                    )
                    .optional()?;
                tx.execute("DELETE FROM invites WHERE secret_hash = ?1", [&hash])?;
                let since = now();
                match invite {
                    Some((name, expires_at, entry)) if expires_at >= since.0 => {
                        let row = PeerRow { name, address, fingerprint, entry, since, revoked_at: None };
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

    /// Makes the site that invited us a peer. Another one of its name is replaced only if a person says so.
    pub async fn add(
        &self,
        name: String,
        address: String,
        fingerprint: Fingerprint,
        change: EntryChange,
        replace: bool,
    ) -> Result<PeerRow, Failure> {
        let before = self.get(&name);
        let is_other = |peer: &PeerRow| peer.fingerprint != fingerprint && peer.is_trusted();
        if !replace && before.as_ref().is_some_and(is_other) {
            return Err(Failure::new(
                Code::Exists,
                format!(
                    "another peer is named {name} already; if that site has a new identity, ask for a new invite and accept it with --replace, which keeps the relationships; else 'afterimage peer remove {name}' first"
                ),
            ));
        }
        let entry = change.apply(before.map_or_else(Entry::default, |peer| peer.entry))?;
        let row = PeerRow { name, address, fingerprint, entry, since: now(), revoked_at: None };
        let written = row.clone();
        durable_step("site::peer::adding");
        self.catalog.change(move |tx| written.put(tx)).await?;
        durable_step("site::peer::added");
        self.keep(row.clone())?;
        Ok(row)
    }

    /// Changes what a peer may do here, from its next request on.
    pub async fn allow(&self, name: &str, change: EntryChange) -> Result<PeerRow, Failure> {
        let before = self.get(name).ok_or_else(|| no_such_peer(name))?;
        let row = PeerRow { entry: change.apply(before.entry.clone())?, ..before };
        self.replace(row).await
    }

    async fn replace(&self, row: PeerRow) -> Result<PeerRow, Failure> {
        let written = row.clone();
        durable_step("site::peer::changing");
        self.catalog.change(move |tx| written.put(tx)).await?;
        durable_step("site::peer::changed");
        self.keep(row.clone())?;
        Ok(row)
    }

    /// The folder that new replicas of a peer go to, if it is not the site's own.
    pub fn storage(&self, name: &str) -> Option<PathBuf> {
        self.lock().get(name)?.row.entry.storage.clone()
    }

    /// All such folders.
    pub fn storages(&self) -> Vec<PathBuf> {
        self.lock().values().filter_map(|known| known.row.entry.storage.clone()).collect()
    }

    /// How fast a peer's logs are taken, if they are not taken as they come.
    pub fn limiter(&self, name: &str) -> Option<RateLimiter> {
        self.lock().get(name)?.limiter.clone()
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
        let limiter = row.entry.bandwidth_bytes_per_s.map(RateLimiter::new);
        Ok(Self { row, client: Arc::new(client), limiter })
    }
}

impl primary::PeerClients for Peers {
    fn client(&self, peer: &str) -> Option<Arc<Client>> {
        self.lock().get(peer).map(|known| known.client.clone())
    }
}

/// No peer has this name.
pub(crate) fn no_such_peer(name: &str) -> Failure {
    Failure::new(
        Code::NoSuchPeer,
        format!("no peer is named {name}; 'afterimage peer list' shows the ones there are"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::Change;

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
        let name: VmName = "branch".parse().unwrap();
        let change = EntryChange {
            vms: Some("web-*".parse().unwrap()),
            quota_bytes: Change::Set(7 << 20),
            ..EntryChange::default()
        };
        let invite = inviter.invite(&name, change, false, "h:1".into()).await.unwrap();
        let fingerprint = guest.identity.fingerprint();
        let admit = || inviter.admit(invite.secret.hash(), fingerprint, "b:1".into());
        let row = admit().await.unwrap();
        assert_eq!((row.name.as_str(), row.entry.quota_bytes), ("branch", Some(7 << 20)));
        assert!(row.entry.vms.fits("web-1") && !row.entry.vms.fits("db"));
        assert_eq!(admit().await.unwrap_err().code, Code::Invite);
        assert_eq!(inviter.by_fingerprint(&fingerprint), Some(row.clone()));
        let again = inviter.invite(&name, EntryChange::default(), false, "h:1".into()).await;
        assert_eq!(again.unwrap_err().code, Code::Exists);
        inviter.remove("branch").await.unwrap();
        assert_eq!(inviter.by_fingerprint(&fingerprint), None);
        assert_eq!(inviter.remove("branch").await.unwrap_err().code, Code::NoSuchPeer);
    }
}
