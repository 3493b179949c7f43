//! The sites that this one trusts, what they may do here, and the invites that make them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use catalog::{Catalog, OptionalExtension, params, rusqlite};
use model::VmName;
use model::authorization::Entry;
use steps::durable_step;
use wire::{
    Ca, Client, ClientIdentity, Distrust, Fingerprint, Identity, Invite, KeyId, RateLimiter, Secret,
    SecretHash, Shown,
};

use crate::clock::now;
use crate::entry::{ALL_PEERS, ENTRY, EntryChange, PeerRow, TABLES, read_entry, read_peer, text};
use crate::failure::{Code, Failure};
use crate::known::{Known, Recognized, client};

/// So long connections that were open go on with a key that their peer has given up.
const FORMER_KEY_TIME: Duration = Duration::from_secs(10 * 60);

/// How long an invite is good for.
pub const INVITE_TIME: Duration = Duration::from_secs(15 * 60);

/// All peers; kept in memory, because every request asks.
pub struct Peers {
    catalog: Catalog,
    identity: Identity,
    /// The CA that decides for the entries with a certificate name.
    ca: RwLock<Option<Ca>>,
    known: Mutex<BTreeMap<String, Known>>,
}

impl Peers {
    /// Reads them.
    pub fn open(catalog: Catalog, identity: Identity, ca: Option<Ca>) -> Result<Self, Failure> {
        catalog.migrate("peers", TABLES)?;
        let rows = catalog.read(|c| {
            c.prepare(ALL_PEERS)?.query_map([], read_peer)?.collect::<rusqlite::Result<Vec<_>>>()
        })?;
        let known =
            rows.into_iter().map(|row| Ok((row.name.clone(), Known::new(row, &identity, ca.clone())?)));
        let known = known.collect::<Result<_, Failure>>()?;
        Ok(Self { catalog, identity, ca: RwLock::new(ca), known: Mutex::new(known) })
    }

    /// All of them, by name.
    pub fn list(&self) -> Vec<PeerRow> {
        self.lock().values().map(|known| known.row.clone()).collect()
    }

    /// Who somebody is, by what was shown on the connection.
    pub(crate) fn recognize(&self, who: &ClientIdentity) -> Recognized {
        let (ca, now) = (self.ca(), now());
        let mut found = Recognized::Nobody;
        for known in self.lock().values() {
            match known.check(who, ca.as_ref(), now) {
                Ok(_) if !known.row.is_trusted() => return Recognized::Revoked(known.row.clone()),
                Ok(is_news) => return Recognized::Peer(known.row.clone(), is_news),
                Err(why @ Distrust::NotToday { .. }) => found = Recognized::NotToday(known.row.clone(), why),
                Err(_) => {}
            }
        }
        found
    }

    /// Remembers the certificate that a peer has shown.
    pub(crate) async fn learn(&self, name: &str, shown: &Shown) -> Result<(), Failure> {
        let Some(before) = self.get(name).filter(|row| row.is_news(shown)) else { return Ok(()) };
        let former = before.key.filter(|key| *key != shown.key);
        self.rewrite(before.having_shown(shown)).await?;
        if let (Some(key), Some(known)) = (former, self.lock().get_mut(name)) {
            known.former = Some((key, Instant::now() + FORMER_KEY_TIME));
        }
        Ok(())
    }

    /// The certificates that peers have shown to us and that tell something new.
    pub(crate) fn news(&self) -> Vec<(PeerRow, Shown)> {
        let seen = |known: &Known| Some((known.row.clone(), known.client.seen()?));
        let all: Vec<_> = self.lock().values().filter_map(seen).collect();
        all.into_iter().filter(|(row, shown)| row.is_news(shown)).collect()
    }

    /// Whether this site or a peer is known by that key now.
    pub(crate) fn is_known(&self, key: KeyId) -> bool {
        self.identity.shown().key == key || self.lock().values().any(|known| known.row.key == Some(key))
    }

    /// What the trusted peer with this key is called here.
    pub(crate) fn named_by_key(&self, key: KeyId) -> Option<String> {
        let peers = self.lock();
        let mut trusted = peers.values().filter(|known| known.row.is_trusted());
        trusted.find(|known| known.row.key == Some(key)).map(|known| known.row.name.clone())
    }

    /// Remembers the key that a peer will have next.
    pub(crate) async fn announced(&self, name: &str, next: KeyId) -> Result<(), Failure> {
        match self.get(name) {
            Some(row) if row.next_key != Some(next) => {
                self.rewrite(PeerRow { next_key: Some(next), ..row }).await.map(drop)
            }
            _ => Ok(()),
        }
    }

    /// Takes back all that a peer may do here. Its entry stays, and so does what it has replicated.
    pub async fn revoke(&self, name: &str) -> Result<PeerRow, Failure> {
        let row = self.get(name).ok_or_else(|| no_such_peer(name))?;
        let revoked_at = row.revoked_at.or_else(|| Some(now()));
        self.rewrite(PeerRow { revoked_at, ..row }).await
    }

    /// The peers that are trusted, and the ways to them.
    pub(crate) fn trusted(&self) -> Vec<(String, Arc<Client>)> {
        let peers = self.lock();
        let trusted = peers.values().filter(|known| known.row.is_trusted());
        trusted.map(|known| (known.row.name.clone(), known.client.clone())).collect()
    }

    /// The CA of this site's people.
    pub(crate) fn ca(&self) -> Option<Ca> {
        self.ca.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Has the CA, or another one, decide from now on.
    pub(crate) fn set_ca(&self, ca: Ca) -> Result<(), Failure> {
        *self.ca.write().unwrap_or_else(PoisonError::into_inner) = Some(ca);
        self.connect_anew()
    }

    /// Gives up the connections that are open and idle: new ones show what is true now.
    pub(crate) fn connect_anew(&self) -> Result<(), Failure> {
        let ca = self.ca();
        for known in self.lock().values_mut() {
            known.client = client(&known.row, &self.identity, ca.clone())?;
        }
        Ok(())
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
        shown: Option<&Shown>,
        address: String,
    ) -> Result<PeerRow, Failure> {
        let shown = shown.cloned();
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
                match invite {
                    Some((name, expires_at, entry)) if expires_at >= now().0 => {
                        let before = "SELECT certificate_name FROM peers WHERE name = ?1";
                        let certificate_name =
                            tx.query_row(before, [&name], |row| row.get(0)).optional()?.flatten();
                        let row = PeerRow::new(name, address, fingerprint, entry);
                        let row = PeerRow { certificate_name, ..row };
                        let row = shown.iter().fold(row, PeerRow::having_shown);
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
        (fingerprint, shown): (Fingerprint, Option<Shown>),
        change: EntryChange,
        replace: bool,
    ) -> Result<PeerRow, Failure> {
        let before = self.get(&name);
        let key = shown.as_ref().map(|shown| shown.key);
        let is_other = |peer: &PeerRow| {
            peer.fingerprint != fingerprint && (peer.key.is_none() || peer.key != key) && peer.is_trusted()
        };
        if !replace && before.as_ref().is_some_and(is_other) {
            return Err(Failure::new(
                Code::Exists,
                format!(
                    "another peer is named {name} already; if that site has a new identity, ask for a new invite and accept it with --replace, which keeps the relationships; else 'afterimage peer remove {name}' first"
                ),
            ));
        }
        let certificate_name =
            change.certificate_name(before.as_ref().and_then(|peer| peer.certificate_name.clone()))?;
        let entry = change.apply(before.map_or_else(Entry::default, |peer| peer.entry))?;
        let row = PeerRow { certificate_name, ..PeerRow::new(name, address, fingerprint, entry) };
        let row = shown.iter().fold(row, PeerRow::having_shown);
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
        let certificate_name = change.certificate_name(before.certificate_name.clone())?;
        let entry = change.apply(before.entry.clone())?;
        self.rewrite(PeerRow { entry, certificate_name, ..before }).await
    }

    async fn rewrite(&self, row: PeerRow) -> Result<PeerRow, Failure> {
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
        let known = Known::new(row, &self.identity, self.ca())?;
        let mut all = self.lock();
        let is_it = |other: &PeerRow| {
            other.fingerprint == known.row.fingerprint || (other.key.is_some() && other.key == known.row.key)
        };
        all.retain(|_, other| !is_it(&other.row));
        all.insert(known.row.name.clone(), known);
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl primary::PeerClients for Peers {
    /// None for one that was revoked, either.
    fn client(&self, peer: &str) -> Option<Arc<Client>> {
        self.lock().get(peer).filter(|known| known.row.is_trusted()).map(|known| known.client.clone())
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
    use model::Change;

    use super::*;

    #[tokio::test]
    async fn an_invite_is_good_once() {
        let dir = tempfile::tempdir().unwrap();
        let open = |name: &str| {
            let folder = dir.path().join(name);
            std::fs::create_dir_all(&folder).unwrap();
            let identity = Identity::create(&folder, name).unwrap();
            Peers::open(Catalog::open(folder.join("catalog.sqlite")).unwrap(), identity, None).unwrap()
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
        let admit = || inviter.admit(invite.secret.hash(), fingerprint, None, "b:1".into());
        let row = admit().await.unwrap();
        assert_eq!((row.name.as_str(), row.entry.quota_bytes), ("branch", Some(7 << 20)));
        assert!(row.entry.vms.fits("web-1") && !row.entry.vms.fits("db"));
        assert_eq!(admit().await.unwrap_err().code, Code::Invite);
        let recognized = || {
            let who = ClientIdentity {
                remote: "127.0.0.1:1".parse().unwrap(),
                fingerprint: Some(fingerprint),
                shown: Some(guest.identity.shown()),
            };
            inviter.recognize(&who)
        };
        assert!(matches!(recognized(), Recognized::Peer(peer, true) if peer == row));
        inviter.learn("branch", &guest.identity.shown()).await.unwrap();
        assert!(matches!(recognized(), Recognized::Peer(peer, false) if peer.key.is_some()));
        let again = inviter.invite(&name, EntryChange::default(), false, "h:1".into()).await;
        assert_eq!(again.unwrap_err().code, Code::Exists);
        inviter.revoke("branch").await.unwrap();
        assert!(matches!(recognized(), Recognized::Revoked(_)));
        inviter.invite(&name, EntryChange::default(), false, "h:1".into()).await.unwrap();
        inviter.remove("branch").await.unwrap();
        assert!(matches!(recognized(), Recognized::Nobody));
        assert_eq!(inviter.remove("branch").await.unwrap_err().code, Code::NoSuchPeer);
    }
}
