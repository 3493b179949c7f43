//! The old primary's side of a reverse: what was protected here becomes the replica of the VM that runs elsewhere now.
//!
//! ```text
//! an offer of a VM protected here, of a newer generation ─▶ from the peer that has its replica? ─▶ off here?
//!    ─▶ its disks copied as seeds ("busy" meanwhile) ─▶ no primary any more ─▶ the compare can begin
//! ```
//!
//! Cut off anywhere, the next offer begins again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use model::VmId;
use replica::Seed;
use wire::{Peer, Refused, RefusedClass};

use crate::commands::Site;
use crate::events::Event;

/// When the other site may ask again.
const RETRY_S: u64 = 2;

/// The VMs that are just turned round, and how that failed last.
#[derive(Default)]
pub(crate) struct Turns(Mutex<BTreeMap<VmId, Option<String>>>);

impl Turns {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<VmId, Option<String>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn not_yet(code: &str, message: String) -> Refused {
    Refused { transient: true, ..Refused::new(RefusedClass::Busy, code, message).retry_after(RETRY_S) }
}

impl Site {
    /// Turns a VM round that is protected here, if it is and the offer is of its time after that. Until that is done,
    /// the offer is refused for now.
    pub(crate) async fn turn_round(
        self: &Arc<Self>,
        peer: &Peer,
        offer: &replica::Offer,
    ) -> Result<(), Refused> {
        let Some(ours) = self.primary.status().into_iter().find(|status| status.vm == offer.vm) else {
            return Ok(());
        };
        let name = ours.name.clone();
        if ours.settings.peer != peer.name {
            let message = format!("VM {name} is protected here by another site than {}", peer.name);
            return Err(Refused::forbidden("not-authorized", message));
        }
        if offer.generation <= ours.generation {
            let message = format!(
                "VM {name} is protected at both sites (generation {} here, {} there); 'afterimage unprotect' at the one that does not run it",
                ours.generation, offer.generation
            );
            return Err(Refused::new(RefusedClass::Conflict, "two-primaries", message));
        }
        match self.turns.lock().remove(&offer.vm) {
            None => {}
            Some(Some(why)) => {
                let message = format!("the old disks of VM {name} cannot be used as a seed: {why}");
                return Err(not_yet("seed", message));
            }
            Some(None) => {
                self.turns.lock().insert(offer.vm, None);
                return Err(not_yet("seed", format!("the old disks of VM {name} are being copied")));
            }
        }
        let off = self.primary.stand_down(&name).await.map_err(|error| not_yet("busy", error.to_string()))?;
        if !off {
            let message = format!(
                "VM {name} still runs at site {}; shut it down there: it was failed over, and runs twice now",
                self.config.name
            );
            return Err(not_yet("still-running", message));
        }
        let seed = |disk: &primary::KnownDisk| {
            let image = disk.image.clone().filter(|image| image.path.is_file())?;
            Some(Seed { disk: disk.name.clone(), path: image.path, format: image.format })
        };
        let seeds: Vec<Seed> = ours.disks.iter().filter_map(seed).collect();
        self.turns.lock().insert(offer.vm, None);
        let (site, peer, offer) = (self.clone(), peer.name.clone(), offer.clone());
        tokio::spawn(async move { site.seed(peer, offer, seeds).await });
        Err(not_yet("seed", format!("the old disks of VM {name} are being copied")))
    }

    async fn seed(&self, peer: String, offer: replica::Offer, seeds: Vec<Seed>) {
        let (vm, name) = (offer.vm, offer.name.clone());
        let made = self.store.run(move |store| store.create_seeded(&peer, &offer, &seeds)).await;
        let outcome = match made {
            Ok(()) => self.primary.forget(&name).await.map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        match outcome {
            Ok(()) => {
                self.turns.lock().remove(&vm);
                let what = "runs at the other site now; its replica is here";
                self.events.note(Event::new("failover-reversed", what).vm(&name)).await;
            }
            Err(why) => {
                let what = format!("its old disks cannot be used as a seed: {why}");
                self.events.note(Event::new("seed-failed", what).vm(&name)).await;
                self.turns.lock().insert(vm, Some(why));
            }
        }
    }
}
