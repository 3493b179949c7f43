//! The way to the replica's site.

use std::sync::Arc;
use std::time::Duration;

use model::{Head, VmId};
use wire::{Client, RateLimiter, Uploader};

use crate::error::{Failure, FailureCode};

/// Finds the client for a peer; the site implements it from its table of peers.
pub trait PeerClients: Send + Sync {
    /// The client for the peer of this name; none if there is no such peer (any more).
    fn client(&self, peer: &str) -> Option<Arc<Client>>;
}

/// One relationship's way to its replica: the peer's client and the relationship's bandwidth limit.
#[derive(Clone)]
pub(crate) struct Link {
    pub client: Arc<Client>,
    pub limiter: Option<RateLimiter>,
}

impl Link {
    pub fn upload(&self, vm: VmId, head: Head, patience: Duration) -> Uploader {
        Uploader::new(self.client.clone(), vm, head.number, head.id, patience, self.limiter.clone())
    }
}

/// Sorts what the link says into what may clear by itself and what may not.
pub(crate) fn link_failure(error: &wire::Error) -> Failure {
    let message = error.to_string();
    match error.kind() {
        wire::ErrorKind::WrongCertificate => Failure::lasting(FailureCode::Certificate, message),
        // Our certificate is not (or no longer) one that the replica's site trusts.
        wire::ErrorKind::Forbidden if error.has_code(wire::codes::UNKNOWN_PEER) => {
            Failure::lasting(FailureCode::Certificate, message)
        }
        wire::ErrorKind::Unauthorized => Failure::lasting(FailureCode::Certificate, message),
        wire::ErrorKind::Forbidden => Failure::lasting(FailureCode::NotAuthorized, message),
        wire::ErrorKind::Refused => {
            Failure { code: FailureCode::ReplicaRefused, message, transient: error.transient() }
        }
        _ => Failure::transient(FailureCode::Link, message),
    }
}
