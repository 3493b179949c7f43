//! What people do about peers: invite, accept, allow, show, remove.

use model::VmName;
use serde_json::{Value, json};
use wire::Invite;

use crate::clock::rfc3339;
use crate::commands::Site;
use crate::entry::EntryChange;
use crate::events::Event;
use crate::failure::{Code, Failure};
use crate::peers::no_such_peer;
use crate::usage::used_bytes;

impl Site {
    pub(crate) async fn invite(
        &self,
        name: &VmName,
        change: EntryChange,
        replace: bool,
    ) -> Result<Value, Failure> {
        let invite = self.peers.invite(name, change, replace, self.config.advertised()?).await?;
        Ok(json!({ "invite": invite.to_string(), "expires_at": rfc3339(invite.expires_at), "peer": name }))
    }

    pub(crate) async fn accept(
        &self,
        line: &str,
        change: EntryChange,
        replace: bool,
    ) -> Result<Value, Failure> {
        let unusable = |error: &dyn std::fmt::Display| Failure::new(Code::Invite, error.to_string());
        let invite: Invite = line.parse().map_err(|error| unusable(&error))?;
        let own_address = self.config.advertised()?;
        let accepted =
            wire::Client::accept_invite(self.peers.identity(), &invite, &self.config.name, &own_address)
                .await;
        let accepted = accepted.map_err(|error| match error.kind() {
            wire::ErrorKind::Invite | wire::ErrorKind::Forbidden => unusable(&error),
            _ => Failure { transient: error.transient(), ..Failure::new(Code::Peer, error.to_string()) },
        })?;
        let certificate = (invite.fingerprint, accepted.shown);
        let peer =
            self.peers.add(accepted.site.name, invite.address.clone(), certificate, change, replace).await?;
        self.take_up_again(&peer.name).await;
        Ok(json!({ "name": peer.name, "address": peer.address, "fingerprint": peer.fingerprint }))
    }

    /// What stood still because the two sites did not trust each other goes on.
    async fn take_up_again(&self, peer: &str) {
        use primary::FailureCode::{Certificate, NotAuthorized, UnknownPeer};
        for vm in self.primary.status().into_iter().filter(|vm| vm.settings.peer == peer) {
            let stood_still = vm.error.is_some_and(|error| {
                !error.transient && matches!(error.code, Certificate | NotAuthorized | UnknownPeer)
            });
            if stood_still
                && !vm.paused
                && let Err(error) = self.primary.resume(&vm.name).await
            {
                tracing::warn!(vm = %vm.name, %error, "it could not be resumed");
            }
        }
    }

    pub(crate) async fn remove_peer(&self, name: &str) -> Result<Value, Failure> {
        self.peers.remove(name).await?;
        Ok(json!({ "removed": name, "vms_without_peer": self.protected_at(name) }))
    }

    pub(crate) async fn revoke_peer(&self, name: &str) -> Result<Value, Failure> {
        let row = self.peers.revoke(name).await?;
        let what = format!("{name} was revoked: nothing of it is taken, and nothing is sent to it");
        self.events.note(Event::new("peer-revoked", what).peer(name)).await;
        let replicas: Vec<VmName> =
            self.store.of_peer(name).into_iter().filter_map(|vm| self.store.name(vm)).collect();
        Ok(json!({
            "revoked": name, "revoked_at": row.revoked_at.map(rfc3339), "replicas": replicas,
            "protected": self.protected_at(name),
        }))
    }

    pub(crate) async fn list_peers(&self) -> Result<Value, Failure> {
        self.take_up_news().await;
        Ok(json!({ "peers": self.peers.list(), "warnings": self.certificate_warnings() }))
    }

    pub(crate) async fn allow(&self, name: &str, change: EntryChange) -> Result<Value, Failure> {
        self.peers.allow(name, change).await?;
        self.show_peer(name).await
    }

    pub(crate) async fn show_peer(&self, name: &str) -> Result<Value, Failure> {
        self.take_up_news().await;
        let row = self.peers.get(name).ok_or_else(|| no_such_peer(name))?;
        let peer = row.name.clone();
        let (used, mut replicas) = self
            .store
            .run(move |store| {
                let names = store.of_peer(&peer).into_iter().filter_map(|vm| store.name(vm));
                (used_bytes(store, &peer), names.map(String::from).collect::<Vec<_>>())
            })
            .await;
        replicas.sort();
        let left = row.entry.left_bytes(used);
        let mut shown = json!(row);
        shown["used_bytes"] = json!(used);
        shown["left_bytes"] = json!(left);
        shown["replicas"] = json!(replicas);
        shown["protected"] = json!(self.protected_at(name));
        Ok(shown)
    }

    /// The VMs that are replicated, or passed on, from here to a peer.
    fn protected_at(&self, peer: &str) -> Vec<String> {
        let vms = self.primary.status().into_iter().chain(self.extensions.status());
        vms.filter(|vm| vm.settings.peer == peer).map(|vm| vm.name.to_string()).collect()
    }
}
