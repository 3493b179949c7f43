//! A replica's site in memory. A log here is: the id of its predecessor, anything, the BLAKE3 of both.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use model::{LogId, LogNumber, Phase, Timestamp, VmId};
use wire::{
    ClientIdentity, DigestRequest, Endpoint, Fingerprint, HandOver, HandedOver, HandedOverDisk, Newcomer,
    Offer, OfferedDisk, Peer, RateLimiter, Refused, RefusedClass, RelationshipStatus, Report, SecretHash,
    SiteInfo, UploadState, WireEvent, block_digest, codes,
};

/// What happens between a log's bytes being taken and the answer.
type Hook = Box<dyn Fn() + Send + Sync>;

#[derive(Default)]
pub struct MemorySite {
    state: Mutex<State>,
    before_answer: Mutex<Option<(bool, Hook)>>,
}

#[derive(Default)]
pub struct State {
    peers: HashMap<Fingerprint, String>,
    pub invites: Vec<MemoryInvite>,
    pub newcomers: Vec<Newcomer>,
    pub vms: HashMap<VmId, MemoryVm>,
    pub events: Vec<WireEvent>,
    pub appends: usize,
    /// How many bytes of logs there is room for.
    pub room: Option<usize>,
    /// How fast segments are read.
    pub pace: Option<RateLimiter>,
}

pub struct MemoryInvite {
    pub hash: SecretHash,
    pub expires_at: Timestamp,
    pub used: bool,
}

pub struct MemoryVm {
    owner: Fingerprint,
    pub offer: Offer,
    pub report: Option<Report>,
    pub incoming: Option<(LogId, Vec<u8>)>,
    pub logs: Vec<(LogId, Vec<u8>)>,
    pub disk: Vec<u8>,
    pub withdrawn: bool,
}

/// A log of the format above.
pub fn make_log(predecessor: LogId, content: &[u8]) -> Vec<u8> {
    let mut log = [predecessor.as_bytes(), content].concat();
    log.extend_from_slice(blake3::hash(&log).as_bytes());
    log
}

impl MemorySite {
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub fn add_peer(&self, name: &str, fingerprint: Fingerprint) {
        self.state().peers.insert(fingerprint, name.to_owned());
    }

    pub fn remove_peer(&self, fingerprint: Fingerprint) {
        self.state().peers.remove(&fingerprint);
    }

    /// Runs `hook` once, after the next append (or the next last one) was done and before it is answered.
    pub fn before_answer(&self, only_last: bool, hook: impl Fn() + Send + Sync + 'static) {
        *self.before_answer.lock().unwrap() = Some((only_last, Box::new(hook)));
    }

    pub fn logs(&self, vm: VmId) -> Vec<Vec<u8>> {
        self.state().vms[&vm].logs.iter().map(|(_, log)| log.clone()).collect()
    }

    pub fn incoming_bytes(&self, vm: VmId) -> usize {
        let state = self.state();
        state.vms.get(&vm).and_then(|vm| vm.incoming.as_ref()).map_or(0, |(_, bytes)| bytes.len())
    }

    pub fn events(&self) -> Vec<WireEvent> {
        self.state().events.clone()
    }

    pub fn codes(&self) -> Vec<String> {
        self.state().events.iter().map(|event| event.code.clone()).collect()
    }

    pub fn event(&self, code: &str) -> WireEvent {
        let events = self.events();
        events
            .iter()
            .find(|event| event.code == code)
            .unwrap_or_else(|| panic!("no {code} in {events:?}"))
            .clone()
    }
}

impl State {
    fn vm(&mut self, peer: &Peer, vm: VmId) -> Result<&mut MemoryVm, Refused> {
        let known = self.vms.get_mut(&vm).ok_or_else(|| {
            Refused::new(RefusedClass::NotFound, "unknown-vm", format!("VM {vm} was not offered here"))
        })?;
        if known.owner == peer.fingerprint {
            return Ok(known);
        }
        Err(Refused::forbidden("not-authorized", format!("{} may not do that to VM {vm}", peer.name)))
    }
}

impl MemoryVm {
    fn head(&self) -> (LogNumber, LogId) {
        (LogNumber(self.logs.len() as u64), self.logs.last().map_or(LogId::NONE, |(id, _)| *id))
    }

    fn upload_state(&self, id: LogId) -> UploadState {
        if let Some((_, log)) = self.logs.last().filter(|(last, _)| *last == id) {
            return UploadState { offset: log.len() as u64, durable: true };
        }
        let incoming = self.incoming.as_ref().filter(|(incoming, _)| *incoming == id);
        UploadState { offset: incoming.map_or(0, |(_, bytes)| bytes.len() as u64), durable: false }
    }

    fn append(&mut self, number: LogNumber, id: LogId, offset: u64, bytes: &[u8]) -> Result<(), Refused> {
        let (head, _) = self.head();
        if number != head.next() {
            let message = format!("log {number} does not follow {head}");
            return Err(Refused::conflict("wrong-number", message));
        }
        if self.incoming.as_ref().is_none_or(|(incoming, _)| *incoming != id) {
            self.incoming = Some((id, Vec::new()));
        }
        let (_, has) = self.incoming.as_mut().unwrap();
        if has.len() as u64 != offset {
            return Err(Refused::wrong_offset(has.len() as u64, offset));
        }
        has.extend_from_slice(bytes);
        Ok(())
    }

    fn finish(&mut self) -> Result<UploadState, Refused> {
        let (_, predecessor) = self.head();
        let (id, log) = self.incoming.take().unwrap();
        let Some((content, checksum)) = log.split_last_chunk::<32>() else {
            return Err(Refused::conflict("wrong-checksum", "the log is shorter than its checksum"));
        };
        if blake3::hash(content).as_bytes() != checksum {
            return Err(Refused::conflict("wrong-checksum", "the log's checksum is not right"));
        }
        if content.get(..16) != Some(predecessor.as_bytes()) {
            return Err(Refused::conflict("wrong-predecessor", "the log does not continue this chain"));
        }
        self.logs.push((id, log));
        Ok(self.upload_state(id))
    }
}

impl Endpoint for MemorySite {
    async fn find_peer(&self, who: &ClientIdentity) -> Result<Option<Peer>, Refused> {
        let known = |fingerprint| Some((fingerprint, self.state().peers.get(&fingerprint)?.clone()));
        let found = who.fingerprint.and_then(known);
        Ok(found.map(|(fingerprint, name)| Peer { name, fingerprint }))
    }

    async fn accept_invite(&self, newcomer: Newcomer) -> Result<SiteInfo, Refused> {
        let now = Timestamp::from(std::time::SystemTime::now());
        let mut state = self.state();
        let invite = state.invites.iter_mut().find(|invite| invite.hash.matches(&newcomer.secret));
        let why = match invite {
            None => "is not one of this site's",
            Some(invite) if invite.used => "was used already",
            Some(invite) if invite.expires_at <= now => "has expired",
            Some(invite) => {
                invite.used = true;
                state.peers.insert(newcomer.fingerprint, newcomer.name.clone());
                state.newcomers.push(newcomer);
                return Ok(SiteInfo { name: "replica".to_owned(), version: "1".to_owned() });
            }
        };
        Err(Refused::forbidden(codes::BAD_INVITE, format!("the invite {why}; ask for a new one")))
    }

    async fn offer(&self, peer: &Peer, offer: Offer) -> Result<RelationshipStatus, Refused> {
        let mut state = self.state();
        let vm = state.vms.entry(offer.vm).or_insert_with(|| MemoryVm {
            owner: peer.fingerprint,
            offer: offer.clone(),
            report: None,
            incoming: None,
            logs: Vec::new(),
            disk: Vec::new(),
            withdrawn: false,
        });
        if vm.owner != peer.fingerprint {
            return Err(Refused::forbidden("not-authorized", format!("VM {} is another peer's", offer.vm)));
        }
        vm.offer = offer;
        let (durable, durable_id) = vm.head();
        Ok(RelationshipStatus {
            durable,
            durable_id,
            phase: Phase::Replicating,
            refused: None,
            bandwidth_bytes_per_s: None,
        })
    }

    async fn report(&self, peer: &Peer, vm: VmId, report: Report) -> Result<(), Refused> {
        self.state().vm(peer, vm)?.report = Some(report);
        Ok(())
    }

    async fn withdraw(&self, peer: &Peer, vm: VmId) -> Result<(), Refused> {
        self.state().vm(peer, vm)?.withdrawn = true;
        Ok(())
    }

    async fn hand_over(&self, peer: &Peer, vm: VmId, newest: HandOver) -> Result<HandedOver, Refused> {
        let mut state = self.state();
        let vm = state.vm(peer, vm)?;
        if vm.head() != (newest.number, newest.id) {
            return Err(Refused::new(RefusedClass::Conflict, "wrong-number", "another log is the newest"));
        }
        let path =
            |disk: &OfferedDisk| HandedOverDisk { name: disk.name.clone(), path: format!("/{}", disk.name) };
        Ok(HandedOver { disks: vm.offer.disks.iter().map(path).collect() })
    }

    async fn upload_state(
        &self,
        peer: &Peer,
        vm: VmId,
        _number: LogNumber,
        id: LogId,
    ) -> Result<UploadState, Refused> {
        Ok(self.state().vm(peer, vm)?.upload_state(id))
    }

    fn pace(&self, _peer: &Peer) -> Option<RateLimiter> {
        self.state().pace.clone()
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
        let answer = {
            let mut state = self.state();
            state.appends += 1;
            if let Some(room) = state.room.as_mut() {
                let Some(left) = room.checked_sub(bytes.len()) else {
                    let message = "there is no room for this log";
                    return Err(Refused::new(RefusedClass::NoSpace, "no-space", message).retry_after(60));
                };
                *room = left;
            }
            let vm = state.vm(peer, vm)?;
            vm.append(number, id, offset, &bytes)?;
            if last { vm.finish()? } else { vm.upload_state(id) }
        };
        let hook = self.before_answer.lock().unwrap().take_if(|(only_last, _)| last || !*only_last);
        if let Some((_, hook)) = hook {
            hook();
        }
        Ok(answer)
    }

    async fn digests(&self, peer: &Peer, vm: VmId, request: DigestRequest) -> Result<Vec<u8>, Refused> {
        let mut state = self.state();
        let disk = &state.vm(peer, vm)?.disk;
        let (from, len) = (request.offset as usize, request.len as usize);
        let stretch = disk.get(from..from + len).ok_or_else(|| {
            Refused::new(RefusedClass::Invalid, "out-of-bounds", "the stretch is past the end of the disk")
        })?;
        Ok(stretch.chunks(request.block_bytes as usize).flat_map(block_digest).collect())
    }

    async fn note(&self, event: WireEvent) {
        self.state().events.push(event);
    }
}

/// A site in an `Arc`, as `router` wants it.
pub fn site() -> Arc<MemorySite> {
    Arc::default()
}
