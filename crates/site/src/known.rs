//! A peer in memory, where every request looks: how it is recognized, and the way to it.

use std::sync::Arc;
use std::time::Instant;

use model::Timestamp;
use wire::{Ca, Client, ClientIdentity, Distrust, Fingerprint, Identity, KeyId, RateLimiter};

use crate::entry::PeerRow;
use crate::failure::{Code, Failure};

/// A peer as requests need it.
pub(crate) struct Known {
    pub row: PeerRow,
    pub client: Arc<Client>,
    /// What all its uploads share.
    pub limiter: Option<RateLimiter>,
    /// The key that it has just given up, and until when connections that are open go on with it.
    pub former: Option<(KeyId, Instant)>,
}

/// Who somebody is that has shown a certificate.
pub(crate) enum Recognized {
    /// A peer, and whether the certificate tells something new of it.
    Peer(PeerRow, bool),
    /// One whose rights were taken back.
    Revoked(PeerRow),
    /// One by its name, whose certificate is not good today.
    NotToday(PeerRow, Distrust),
    /// Nobody that is known.
    Nobody,
}

impl Known {
    pub fn new(row: PeerRow, identity: &Identity, ca: Option<Ca>) -> Result<Self, Failure> {
        let client = client(&row, identity, ca)?;
        let limiter = row.entry.bandwidth_bytes_per_s.map(RateLimiter::new);
        Ok(Self { row, client, limiter, former: None })
    }

    /// Whether it is this one, and whether the certificate tells something new of it.
    pub fn check(&self, who: &ClientIdentity, ca: Option<&Ca>, now: Timestamp) -> Result<bool, Distrust> {
        let Some(shown) = who.shown.as_deref() else {
            // It cannot be read; it can be the one that was pinned all the same.
            let shown = who.fingerprint.unwrap_or(Fingerprint::from_bytes([0; 32]));
            let is_pinned = self.row.certificate_name.is_none() && shown == self.row.fingerprint;
            let other = Distrust::Other { shown, pinned: self.row.fingerprint };
            return is_pinned.then_some(false).ok_or(other);
        };
        let is_former = |(key, until): (KeyId, Instant)| key == shown.key && Instant::now() < until;
        if self.row.certificate_name.is_none() && self.former.is_some_and(is_former) {
            return Ok(false);
        }
        self.row.pin().check(shown, ca, now).map(|()| self.row.is_news(shown))
    }
}

/// The way to a peer.
pub(crate) fn client(row: &PeerRow, identity: &Identity, ca: Option<Ca>) -> Result<Arc<Client>, Failure> {
    let client = Client::knowing(identity, row.address.as_str(), row.pin(), ca);
    client.map(Arc::new).map_err(|error| Failure::new(Code::Peer, error.to_string()))
}
