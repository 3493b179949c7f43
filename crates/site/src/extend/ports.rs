//! Where a relationship that passes a replica on finds what it needs: the store, the peers, the clock.

use std::sync::Arc;

use model::{Timestamp, VmId};
use primary::ports::Ports;
use primary::{Failure, FailureCode, Monitor, PeerClients, Settings, WireRemote};
use replica::Store;

use crate::extend::guest::ReplicaGuest;

/// The replicas of this site, and the peers over HTTPS.
pub(crate) struct ReplicaPorts {
    pub store: Store,
    pub peers: Arc<dyn PeerClients>,
}

impl Ports for ReplicaPorts {
    type Guest = ReplicaGuest;
    type Remote = WireRemote;

    fn serves(settings: &Settings) -> bool {
        settings.monitor == Monitor::Replica
    }

    async fn connect(&self, vm: VmId, settings: &Settings) -> Result<ReplicaGuest, Failure> {
        let Some(name) = self.store.name(vm) else { return Err(gone(&vm.to_string(), &settings.peer)) };
        let guest = ReplicaGuest::new(self.store.clone(), vm, name);
        if guest.there().await?.failed_over {
            return Err(gone(guest.name(), &settings.peer));
        }
        Ok(guest)
    }

    async fn is_off(&self, _settings: &Settings) -> bool {
        true
    }

    fn remote(&self, peer: &str) -> Option<WireRemote> {
        self.peers.client(peer).map(WireRemote::new)
    }

    fn now(&self) -> Timestamp {
        crate::clock::now()
    }

    fn random_id(&self) -> Result<[u8; 16], Failure> {
        primary::random_id()
    }
}

/// There is no replica any more: nothing that changes now can be passed on.
fn gone(name: &str, peer: &str) -> Failure {
    let message = format!(
        "{name} is no replica here any more (it was failed over to this site for good, or removed), so nothing is passed on to {peer}; 'afterimage failover reverse {name} --to {peer}' replicates the VM that runs here there, 'afterimage unextend {name}' ends this"
    );
    Failure::lasting(FailureCode::Replica, message)
}
