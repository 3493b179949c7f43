//! Whether a peer may: the rules of `model::authorization`, asked with what this site knows, and answered in words.
//!
//! Asked at every request, so that rights which were narrowed are narrowed at once.

use std::sync::Arc;

use model::authorization::{Act, Asked, Denied, OverQuota, Owner, decide};
use model::{VmId, VmName};
use replica::Store;
use wire::{Peer, Refused, RefusedClass};

use crate::peers::Peers;
use crate::usage::Usage;

/// When a peer that is beyond its quota may ask again.
const QUOTA_RETRY_S: u64 = 60;

/// Who may do what at this site.
pub(crate) struct Authority {
    site_name: String,
    peers: Arc<Peers>,
    store: Store,
    usage: Arc<Usage>,
}

impl Authority {
    pub fn new(site_name: String, peers: Arc<Peers>, store: Store, usage: Arc<Usage>) -> Self {
        Self { site_name, peers, store, usage }
    }

    /// Whether a peer may do that to a VM that is here. One that is not is the store's to refuse.
    pub fn check(&self, peer: &Peer, act: Act, vm: VmId) -> Result<(), Refused> {
        match self.store.whose(vm) {
            Some((name, owner)) => self.decide(peer, act, &name, Some(&owner)),
            None => Ok(()),
        }
    }

    /// Whether a peer may offer a VM of this name: one that is here and its own, or a new one.
    pub fn check_offer(&self, peer: &Peer, vm: VmId, name: &VmName) -> Result<(), Refused> {
        let owner = self.store.whose(vm).map(|(_, owner)| owner);
        self.decide(peer, Act::Offer, name, owner.as_deref())?;
        match self.check_take_over(peer, name) {
            Ok((taken, other)) if taken != vm && other != peer.name => {
                let message = format!(
                    "site {} has a replica of VM {name}, which {other} protects; if the VM was moved, 'afterimage protect {name} --take-over' makes it {}'s; else protect this one under another name",
                    self.site_name, peer.name
                );
                Err(Refused::conflict("name-taken", message))
            }
            // Nobody has it, or somebody whom this peer has nothing to do with: that is the store's to refuse.
            _ => Ok(()),
        }
    }

    /// Whether a peer may become the primary of a VM that is here; which VM that is, and whose it is now.
    pub fn check_take_over(&self, peer: &Peer, name: &VmName) -> Result<(VmId, String), Refused> {
        let found = self.store.find(name).and_then(|vm| Some((vm, self.store.whose(vm)?.1)));
        self.decide(peer, Act::TakeOver, name, found.as_ref().map(|(_, owner)| owner.as_str()))?;
        found.ok_or_else(|| self.denied(peer, name, Denied::NoSuchVm))
    }

    fn decide(&self, peer: &Peer, act: Act, vm: &VmName, owner: Option<&str>) -> Result<(), Refused> {
        let Some(row) = self.peers.get(&peer.name) else {
            return Err(self.denied(peer, vm, Denied::NotAllowed));
        };
        let group = owner.and_then(|owner| self.peers.get(owner)).and_then(|row| row.entry.group);
        let asked = Asked {
            peer: &peer.name,
            entry: &row.entry,
            revoked: row.revoked_at.is_some(),
            act,
            vm,
            owner: owner.map(|peer| Owner { peer, group: group.as_ref() }),
        };
        decide(&asked).map_err(|denied| self.denied(peer, vm, denied))
    }

    fn denied(&self, peer: &Peer, vm: &VmName, denied: Denied) -> Refused {
        let (site, peer) = (&self.site_name, &peer.name);
        let (code, message) = match denied {
            Denied::Revoked => return revoked(site, peer),
            Denied::NotAllowed => (
                "not-authorized",
                format!(
                    "site {site} does not let {peer} replicate a VM named {vm}; 'afterimage peer allow {peer} --vms PATTERNS' there lets it"
                ),
            ),
            Denied::Foreign => (
                "forbidden",
                format!(
                    "VM {vm} here belongs to another peer than {peer}; only the site that protects it may send for it"
                ),
            ),
            Denied::OtherGroup => (
                "forbidden",
                format!(
                    "VM {vm} belongs to another peer, and {peer} is in no trust group with it at site {site}; 'afterimage peer allow PEER --group NAME' there, for both, puts them into one"
                ),
            ),
            Denied::NoSuchVm => {
                let message = format!("site {site} has no replica of a VM named {vm}");
                return Refused::new(RefusedClass::NotFound, "no-such-vm", message);
            }
        };
        Refused::forbidden(code, message)
    }

    /// Refuses what would take a peer beyond its quota. What had arrived of the log goes: it would take up the room that
    /// the next, smaller one may find.
    pub async fn check_quota(&self, peer: &Peer, vm: VmId, more_bytes: u64) -> Result<(), Refused> {
        let Some(row) = self.peers.get(&peer.name).filter(|row| row.entry.quota_bytes.is_some()) else {
            return Ok(());
        };
        let usage = self.usage.clone();
        let checked = self.store.run(move |store| {
            let over = match usage.admit(store, &row, more_bytes) {
                Ok(()) => return Ok(()),
                Err(over) => over,
            };
            if let Err(error) = store.give_up_upload(&row.name, vm) {
                tracing::warn!(%vm, %error, "a log that is beyond a quota stays until the next one begins");
            }
            usage.forget(&row.name);
            Err((over, store.name(vm).map(String::from).unwrap_or_else(|| vm.to_string())))
        });
        checked.await.map_err(|(over, name)| self.over_quota(&peer.name, &name, over))
    }

    fn over_quota(&self, peer: &str, vm: &str, over: OverQuota) -> Refused {
        let OverQuota { quota_bytes, used_bytes, more_bytes } = over;
        let message = format!(
            "a log of VM {vm} is not taken: the replicas of {peer} take up {} MiB of the {} MiB that site {} gives it, and {} MiB more are to come. Raise it there with 'afterimage peer allow {peer} --quota SIZE', or free some ('peer show {peer}' tells what takes it up). Nothing is lost, and replication goes on by itself",
            used_bytes >> 20,
            quota_bytes >> 20,
            self.site_name,
            more_bytes.div_ceil(1 << 20),
        );
        Refused::new(RefusedClass::NoSpace, "quota", message).retry_after(QUOTA_RETRY_S)
    }

    /// Refuses more VMs of a peer than `most`.
    pub async fn check_count(&self, peer: &Peer, vm: VmId, most: usize) -> Result<(), Refused> {
        if self.store.name(vm).is_some() {
            return Ok(());
        }
        let name = peer.name.clone();
        let count = self.store.run(move |store| store.of_peer(&name).len()).await;
        if count < most {
            return Ok(());
        }
        let message = format!(
            "{} has {count} VMs at site {}, and no more are taken; see 'vms-per-peer' in its config.toml",
            peer.name, self.site_name
        );
        Err(Refused::forbidden("too-many-vms", message))
    }
}

/// What a peer whose rights were taken back is told, whatever it asks.
pub(crate) fn revoked(site: &str, peer: &str) -> Refused {
    let message = format!(
        "site {site} has revoked {peer}: nothing of it is taken. What was replicated stays; 'afterimage peer invite {peer}' there and 'afterimage peer accept' here bring it back"
    );
    Refused::forbidden(wire::codes::REVOKED, message)
}
