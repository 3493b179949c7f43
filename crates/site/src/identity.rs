//! This site's certificate, and what its peers' tell: renewed before they end, replaced without losing a relationship,
//! spoken of when the end is near.

use std::path::{Path, PathBuf};
use std::time::Duration;

use model::{Expiry, Timestamp, expiry, human_duration};
use serde::Serialize;
use serde_json::{Value, json};
use steps::durable_step;
use wire::{Ca, Identity, IdentityError, NextKey, RENEW_BEFORE, Shown};

use crate::clock::{now, rfc3339, serialize_moment};
use crate::commands::Site;
use crate::entry::PeerRow;
use crate::events::Event;
use crate::failure::{Code, Failure};
use crate::init::write_new;

const CA_FILE: &str = "identity.ca";
/// How often certificates are looked at.
const LOOK: Duration = Duration::from_secs(3600);

/// The end of a certificate is near, or past.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct CertificateWarning {
    /// `certificate-ends` or `certificate-ended`.
    pub code: &'static str,
    /// The peer whose certificate it is; none for this site's own.
    pub peer: Option<String>,
    /// Its end.
    #[serde(serialize_with = "serialize_moment")]
    pub expires_at: Timestamp,
    /// What that means, and what to do.
    pub message: String,
}

/// The CA that people have named, if they have.
pub(crate) fn load_ca(dir: &Path) -> Result<Option<Ca>, Failure> {
    let path = dir.join(CA_FILE);
    if path.exists() { Ca::load(&path).map(Some).map_err(unusable) } else { Ok(None) }
}

fn unusable(error: IdentityError) -> Failure {
    let code = if matches!(error, IdentityError::Issued) { Code::Usage } else { Code::Io };
    Failure::new(code, error.to_string())
}

impl Site {
    /// Renews this site's certificate in time, and takes up what peers have shown; until it is aborted.
    pub(crate) async fn watch_certificates(&self) {
        loop {
            let shown = self.peers.identity().shown();
            let is_due = shown.left(now()).is_none_or(|left| left < RENEW_BEFORE);
            if is_due
                && shown.is_self_made
                && let Err(failure) = self.renew().await
            {
                let what = format!("this site's certificate cannot be renewed: {}", failure.message);
                self.events.note(Event::new("certificate-not-renewed", what)).await;
            }
            self.take_up_news().await;
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Remembers the certificates that peers have shown where this site has asked them.
    pub(crate) async fn take_up_news(&self) {
        for (row, shown) in self.peers.news() {
            self.learn(&row, &shown).await;
        }
    }

    /// Remembers a certificate that a peer has shown.
    pub(crate) async fn learn(&self, row: &PeerRow, shown: &Shown) {
        if let Err(failure) = self.peers.learn(&row.name, shown).await {
            // It is trusted all the same; the next request tries again.
            tracing::warn!(peer = row.name, error = %failure, "a peer's certificate could not be written down");
            return;
        }
        let until = rfc3339(shown.expires_at);
        let what = match row.key {
            None => return,
            Some(key) if key == shown.key => {
                format!("{} has a new certificate, good until {until}", row.name)
            }
            Some(_) => format!(
                "{} has another key now ({}); its certificate is good until {until}",
                row.name, shown.key
            ),
        };
        self.events.note(Event::new("peer-certificate", what).peer(&row.name)).await;
    }

    pub(crate) fn identity_shown(&self) -> Value {
        let shown = self.peers.identity().shown();
        json!({
            "fingerprint": shown.fingerprint, "key": shown.key, "expires_at": rfc3339(shown.expires_at),
            "issued_by": if shown.is_self_made { "itself" } else { "a CA" }, "has_ca": self.peers.ca().is_some(),
        })
    }

    /// A new certificate for the key that there is: peers know it again by the key.
    pub(crate) async fn renew(&self) -> Result<Value, Failure> {
        self.peers.identity().renew(&self.dir, &self.config.name).map_err(unusable)?;
        self.peers.connect_anew()?;
        let until = rfc3339(self.peers.identity().shown().expires_at);
        let what = format!("this site's certificate was made anew over its key; it is good until {until}");
        self.events.note(Event::new("certificate-renewed", what)).await;
        Ok(self.identity_shown())
    }

    /// Another key, with a certificate that this site makes for it.
    pub(crate) async fn new_key(&self, force: bool) -> Result<Value, Failure> {
        let next = Identity::prepare_new(&self.dir, &self.config.name).map_err(unusable)?;
        self.become_known_as(&next, force).await
    }

    /// A certificate that people have, a CA that they trust, or both.
    pub(crate) async fn use_certificate(
        &self,
        pair: Option<(PathBuf, PathBuf)>,
        ca: Option<PathBuf>,
        force: bool,
    ) -> Result<Value, Failure> {
        if let Some(path) = ca {
            let loaded = Ca::load(&path).map_err(unusable)?;
            let pem = std::fs::read(&path).map_err(|error| Failure::io("read", &path, &error))?;
            durable_step("site::identity::ca-writing");
            write_new(&self.dir.join(CA_FILE), &pem, 0o600)?;
            durable_step("site::identity::ca-written");
            self.peers.set_ca(loaded)?;
        }
        let Some((certificate, key)) = pair else { return Ok(self.identity_shown()) };
        let next = Identity::prepare_from(&self.dir, &certificate, &key).map_err(unusable)?;
        if let Expiry::Past { ago } = expiry(next.shown().expires_at, now()) {
            let message =
                format!("the certificate {} has ended {} ago", certificate.display(), human_duration(ago));
            return Err(Failure::new(Code::Usage, message));
        }
        self.become_known_as(&next, force).await
    }

    /// Tells every peer the key that this site will have, by the one that they know, and only then shows it. Whoever cannot
    /// be told would not know the site any more.
    async fn become_known_as(&self, next: &Identity, force: bool) -> Result<Value, Failure> {
        let (key, before) = (next.shown().key, self.peers.identity().shown().key);
        let (mut told, mut missed) = (Vec::new(), Vec::new());
        if key != before {
            let announced = NextKey::of(next, before);
            let announced = announced.map_err(|error| Failure::new(Code::Usage, error.to_string()))?;
            for (name, client) in self.peers.trusted() {
                match client.announce(&announced).await {
                    Ok(()) => told.push(name),
                    Err(error) => missed.push((name, error.to_string())),
                }
            }
        }
        if let (Some((name, why)), false) = (missed.first(), force) {
            let message = format!(
                "the identity stays as it is, because {} of {} peers cannot be told of the new one ({name}: {why}). Run this again when all can be reached, or with --force: those that are missed must then be made peers anew, with 'afterimage peer invite NAME --replace'",
                missed.len(),
                missed.len() + told.len(),
            );
            return Err(Failure::transient(Code::Peer, message));
        }
        self.peers.identity().adopt_next(&self.dir).map_err(unusable)?;
        self.peers.connect_anew()?;
        let missed: Vec<String> = missed.into_iter().map(|(name, _)| name).collect();
        let what =
            format!("this site has another key now ({key}); told: {told:?}, to be invited anew: {missed:?}");
        self.events.note(Event::new("identity-changed", what)).await;
        let mut shown = self.identity_shown();
        shown["told"] = json!(told);
        shown["missed"] = json!(missed);
        Ok(shown)
    }

    /// What is to be said of certificates whose end is near or past: this site's, and those that peers have shown last.
    pub(crate) fn certificate_warnings(&self) -> Vec<CertificateWarning> {
        let own = self.peers.identity().shown();
        let means = if own.is_self_made {
            "it could not be renewed: 'afterimage events' says why, 'afterimage identity renew' tries again"
        } else {
            "get a new one from your CA and install it with 'afterimage identity use --cert FILE --key FILE'; peers that know this site by its name take nothing of it after that"
        };
        let of_peer = |row: PeerRow| {
            let means = match row.certificate_name {
                Some(_) => "its people must install a new one; nothing of it is taken after that",
                None => {
                    "its site renews it by itself when it runs and is of a version that does; it is known by its key, so replication goes on"
                }
            };
            warning(Some(row.name), row.expires_at?, means)
        };
        let peers = self.peers.list().into_iter().filter(PeerRow::is_trusted);
        warning(None, own.expires_at, means).into_iter().chain(peers.filter_map(of_peer)).collect()
    }
}

fn warning(peer: Option<String>, expires_at: Timestamp, means: &str) -> Option<CertificateWarning> {
    let whose = peer.as_ref().map_or_else(|| "this site".to_owned(), Clone::clone);
    let (code, when) = match expiry(expires_at, now()) {
        Expiry::Far => return None,
        Expiry::Soon { left } => ("certificate-ends", format!("ends in {}", human_duration(left))),
        Expiry::Past { ago } => ("certificate-ended", format!("has ended {} ago", human_duration(ago))),
    };
    let message = format!("the certificate of {whose} {when}: {means}");
    Some(CertificateWarning { code, peer, expires_at, message })
}
