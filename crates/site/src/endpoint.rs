//! The site as its peers see it: who may do what to which VM, and on to the store.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use model::authorization::Act;
use model::{Head, LogId, LogNumber, VmId};
use replica::Store;
use wire::{
    Announced, ClientIdentity, DigestRequest, Endpoint, HandOver, HandedOver, HandedOverDisk, InStep, KeyId,
    Newcomer, Offer, OfferedMedia, Peer, RateLimiter, Refused, RefusedClass, RelationshipStatus, Relocate,
    Relocation, Report, SiteInfo, TakeOver, TakenOver, UploadState, WireEvent, codes,
};

use crate::authority::{Authority, revoked};
use crate::commands::Site;
use crate::events::{Event, Events};
use crate::known::Recognized;
use crate::peers::Peers;

/// When a peer may ask again whose certificate is not good today.
const NOT_TODAY_RETRY_S: u64 = 300;

/// What peers talk to.
pub(crate) struct SiteEndpoint {
    name: String,
    peers: Arc<Peers>,
    events: Events,
    store: Store,
    authority: Authority,
    vms_per_peer: usize,
    site: Arc<Site>,
}

impl SiteEndpoint {
    pub fn new(site: Arc<Site>) -> Self {
        Self {
            name: site.config.name.clone(),
            peers: site.peers.clone(),
            events: site.events.clone(),
            store: site.store.clone(),
            authority: Authority::new(
                site.config.name.clone(),
                site.peers.clone(),
                site.store.clone(),
                Arc::default(),
            ),
            vms_per_peer: site.config.replica.vms_per_peer,
            site,
        }
    }

    /// Calls the store, which reads and writes files, on a thread that may wait.
    async fn store<T: Send + 'static>(
        &self,
        peer: &Peer,
        call: impl FnOnce(&Store, &str) -> replica::Result<T> + Send + 'static,
    ) -> Result<T, Refused> {
        let peer = peer.name.clone();
        self.store.run(move |store| call(store, &peer)).await.map_err(|error| refused(error.into_refused()))
    }
}

/// The store's refusals as they travel.
pub(crate) fn refused(refused: replica::Refused) -> Refused {
    let class = match refused.code {
        "no-space" => RefusedClass::NoSpace,
        "forbidden" => RefusedClass::Forbidden,
        "no-such-vm" => RefusedClass::NotFound,
        _ if refused.transient => RefusedClass::Busy,
        _ => RefusedClass::Conflict,
    };
    Refused {
        transient: refused.transient,
        retry_after_s: refused.retry_after.map(|after| after.as_secs()),
        ..Refused::new(class, refused.code, refused.message)
    }
}

fn offered(offer: Offer) -> replica::Offer {
    replica::Offer {
        vm: offer.vm,
        name: offer.vm_name,
        disks: offer
            .disks
            .into_iter()
            .map(|disk| replica::DiskSize { name: disk.name, size_bytes: disk.size_bytes })
            .collect(),
        interval: Duration::from_secs(offer.interval_s),
        points: offer.points,
        primary_name: offer.primary_name,
        definition: offer.definition,
        phase: offer.phase,
        paused: offer.paused,
        generation: offer.generation,
        media: offer.media.map(|OfferedMedia { set, key, logs }| replica::Awaited { set, key, logs }),
        group: offer.group,
        pins: offer.pins,
    }
}

impl Endpoint for SiteEndpoint {
    async fn find_peer(&self, who: &ClientIdentity) -> Result<Option<Peer>, Refused> {
        match self.peers.recognize(who) {
            Recognized::Nobody => Ok(None),
            Recognized::Revoked(row) => Err(revoked(&self.name, &row.name)),
            Recognized::NotToday(row, why) => {
                let message = format!("site {} does not take {} for itself: {why}", self.name, row.name);
                Err(Refused::forbidden(codes::CERTIFICATE_NOT_TODAY, message).retry_after(NOT_TODAY_RETRY_S))
            }
            Recognized::Peer(row, is_news) => {
                if let (true, Some(shown)) = (is_news, &who.shown) {
                    self.site.learn(&row, shown).await;
                }
                Ok(Some(Peer { name: row.name, fingerprint: row.fingerprint }))
            }
        }
    }

    async fn announce(&self, peer: &Peer, next: KeyId) -> Result<(), Refused> {
        if self.peers.is_known(next) {
            return Err(Refused::conflict("key-taken", "that key is somebody's already"));
        }
        let remembered = self.peers.announced(&peer.name, next).await;
        remembered.map_err(|failure| Refused::new(RefusedClass::Internal, "internal", failure.message))?;
        let what = format!("{} will have another key: {next}", peer.name);
        self.events.note(Event::new("peer-key-announced", what).peer(&peer.name)).await;
        Ok(())
    }

    async fn accept_invite(&self, newcomer: Newcomer) -> Result<SiteInfo, Refused> {
        let Newcomer { secret, address, fingerprint, shown, .. } = newcomer;
        let admitted = self.peers.admit(secret.hash(), fingerprint, shown.as_deref(), address).await;
        admitted.map_err(|failure| Refused::forbidden(codes::BAD_INVITE, failure.message))?;
        Ok(SiteInfo { name: self.name.clone(), version: env!("CARGO_PKG_VERSION").to_owned() })
    }

    async fn offer(&self, peer: &Peer, offer: Offer) -> Result<RelationshipStatus, Refused> {
        self.authority.check_offer(peer, offer.vm, &offer.vm_name)?;
        self.authority.check_count(peer, offer.vm, self.vms_per_peer).await?;
        let offer = offered(offer);
        self.site.turn_round(peer, &offer).await?;
        let standing = self.store(peer, |store, peer| store.offer(peer, offer)).await?;
        Ok(RelationshipStatus {
            durable: standing.head.number,
            durable_id: standing.head.id,
            phase: standing.phase,
            refused: standing.refused.map(refused),
            bandwidth_bytes_per_s: self.peers.limiter(&peer.name).map(|limiter| limiter.bytes_per_s()),
        })
    }

    async fn report(&self, peer: &Peer, vm: VmId, report: Report) -> Result<(), Refused> {
        self.authority.check(peer, Act::Use, vm)?;
        let Report { phase, error, paused, moment } = report;
        if let Some(Announced { number, id, moment }) = moment {
            let log = Head { number, id };
            return self.store(peer, move |store, peer| store.announce(peer, vm, log, moment)).await;
        }
        self.store(peer, move |store, peer| store.report(peer, vm, phase, error, paused)).await
    }

    async fn withdraw(&self, peer: &Peer, vm: VmId) -> Result<(), Refused> {
        self.authority.check(peer, Act::Withdraw, vm)?;
        self.store(peer, move |store, peer| store.withdraw(peer, vm)).await
    }

    async fn hand_over(&self, peer: &Peer, vm: VmId, newest: HandOver) -> Result<HandedOver, Refused> {
        self.authority.check(peer, Act::Use, vm)?;
        let HandOver { number, id, done } = newest;
        let newest = Head { number, id };
        let disks = self.store(peer, move |store, peer| store.hand_over(peer, vm, newest, done)).await?;
        if !disks.is_empty() {
            let shown = self.site.exports.show_failover(vm).await;
            shown.map_err(|failure| Refused::new(RefusedClass::Busy, "failover", failure.message))?;
            self.site.watch_completion(vm);
            let name = self.store.name(vm).map(String::from).unwrap_or_default();
            let what = format!("handed over by {} with everything; it can be started here", peer.name);
            self.events.note(Event::new("failover", what).vm(name)).await;
        }
        let disk = |disk: replica::FailoverDisk| HandedOverDisk {
            name: disk.name,
            path: disk.overlay.display().to_string(),
        };
        Ok(HandedOver { disks: disks.into_iter().map(disk).collect() })
    }

    async fn take_over(&self, peer: &Peer, wanted: TakeOver) -> Result<TakenOver, Refused> {
        let (vm, before) = self.authority.check_take_over(peer, &wanted.vm_name)?;
        let in_step = wanted.in_step.map(|InStep { there, here }| replica::InStep { there, here });
        let (generation, head) =
            self.store(peer, move |store, peer| store.take_over(peer, vm, in_step)).await?;
        if before != peer.name {
            let what = format!("taken over from {before}: {} is its primary now", peer.name);
            self.events.note(Event::new("taken-over", what).vm(&wanted.vm_name).peer(&peer.name)).await;
        }
        Ok(TakenOver { vm, generation, head: Some(head) })
    }

    async fn relocate(&self, peer: &Peer, vm: VmId, wanted: Relocate) -> Result<Relocation, Refused> {
        self.authority.check(peer, Act::Use, vm)?;
        self.site.relocate_replica(peer, vm, wanted).await
    }

    async fn upload_state(
        &self,
        peer: &Peer,
        vm: VmId,
        number: LogNumber,
        id: LogId,
    ) -> Result<UploadState, Refused> {
        self.authority.check(peer, Act::Use, vm)?;
        let state = self.store(peer, move |store, peer| store.upload_state(peer, vm, number, id)).await?;
        Ok(UploadState { offset: state.offset, durable: state.durable })
    }

    async fn append(
        &self,
        peer: &Peer,
        vm: VmId,
        number: LogNumber,
        id: LogId,
        offset: u64,
        bytes: Bytes,
        last: bool,
    ) -> Result<UploadState, Refused> {
        self.authority.check(peer, Act::Use, vm)?;
        self.authority.check_quota(peer, vm, bytes.len() as u64).await?;
        let end = offset.saturating_add(bytes.len() as u64);
        let append =
            move |store: &Store, peer: &str| store.append(peer, vm, number, id, offset, &bytes, last);
        let state = self.store(peer, append).await?;
        if !state.durable && state.offset != end {
            return Err(Refused::wrong_offset(state.offset, offset));
        }
        Ok(UploadState { offset: state.offset, durable: state.durable })
    }

    fn pace(&self, peer: &Peer) -> Option<RateLimiter> {
        self.peers.limiter(&peer.name)
    }

    async fn digests(&self, peer: &Peer, vm: VmId, request: DigestRequest) -> Result<Vec<u8>, Refused> {
        self.authority.check(peer, Act::Use, vm)?;
        let DigestRequest { disk, offset, len, block_bytes } = request;
        let digests =
            move |store: &Store, peer: &str| store.digests(peer, vm, &disk, offset, len, block_bytes);
        Ok(self.store(peer, digests).await?.concat())
    }

    async fn note(&self, event: WireEvent) {
        let who = match (&event.peer, event.remote) {
            (Some(peer), Some(remote)) => format!("{peer} ({remote})"),
            (Some(peer), None) => peer.clone(),
            (None, Some(remote)) => remote.to_string(),
            (None, None) => "-".into(),
        };
        let message = format!("{} was answered with {}: {}", event.operation, event.status, event.message);
        let noted = Event::new(&event.code, message).peer(who);
        let noted = match event.vm {
            Some(vm) => {
                let name = self.store.name(vm).map(String::from);
                noted.vm(name.unwrap_or_else(|| vm.to_string()))
            }
            None => noted,
        };
        // Whoever asked is answered all the same when the catalog's disk is slow.
        let _ = tokio::time::timeout(Duration::from_secs(2), self.events.note(noted)).await;
    }
}
