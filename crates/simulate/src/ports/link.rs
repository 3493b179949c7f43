//! The way to the replica: calls that are lost, whose answers are lost, that come twice, or late.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use model::{Head, VmId};
use primary::ports::{
    DigestRequest, HandOver, HandedOver, LogUpload, Offer, RelationshipStatus, Remote, Report, Upload,
};
use primary::{Failure, FailureCode};
use replica::{DiskSize, Store, UploadState};

use super::{PRIMARY, SimPorts, failure};
use crate::chance::Chance;
use crate::clock::Time;
use crate::power::Power;

/// A broken upload is tried again so often.
const TRIES: u32 = 4;
/// A call takes about this long.
const CALL_TIME: Duration = Duration::from_millis(20);

/// What the two sites think of each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Trust {
    /// All is well.
    #[default]
    Full,
    /// The primary does not know the replica (any more).
    Unknown,
    /// A certificate is not the one that was pinned.
    Certificate,
    /// The replica does not let this primary replicate the VM.
    Authorization,
}

/// The replica's end of the line: its store, while the site lives.
pub type ReplicaEnd = Arc<Mutex<Option<Store>>>;

/// A call that comes late: after its caller has given it up.
type Late = Box<dyn FnOnce(&Store) + Send>;

/// A line between two sites; clones share it.
#[derive(Clone)]
pub struct Line(Arc<Mutex<LineState>>);

/// What the line is like.
pub struct LineState {
    /// Nothing gets through.
    pub down: bool,
    /// Of a hundred calls, so many go wrong in some way.
    pub trouble: u64,
    /// What the sites think of each other.
    pub trust: Trust,
    /// The largest piece of a log that goes in one call.
    pub segment_bytes: u64,
    /// Bytes that were sent.
    pub sent_bytes: u64,
    /// Calls that went wrong.
    pub lost: u64,
    /// Calls that come late.
    pub late_made: u64,
    late: Vec<Late>,
    chance: Chance,
    end: ReplicaEnd,
    power: Power,
    time: Time,
}

/// What becomes of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Delivered,
    Lost,
    AnswerLost,
    Twice,
    Slow,
    Late,
}

impl Line {
    /// A line to `end`.
    #[must_use]
    pub fn new(end: ReplicaEnd, power: Power, time: Time, seed: u64) -> Self {
        Self(Arc::new(Mutex::new(LineState {
            down: false,
            trouble: 0,
            trust: Trust::Full,
            segment_bytes: 1 << 20,
            sent_bytes: 0,
            lost: 0,
            late_made: 0,
            late: Vec::new(),
            chance: Chance::new(seed),
            end,
            power,
            time,
        })))
    }

    /// Looks at it, or changes it.
    pub fn lock(&self) -> MutexGuard<'_, LineState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets calls arrive that are late. Gives how many there were.
    pub fn deliver_late(&self) -> usize {
        let (late, end) = {
            let mut line = self.lock();
            (std::mem::take(&mut line.late), line.end.clone())
        };
        let count = late.len();
        let store = end.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(store) = store {
            late.into_iter().for_each(|call| call(&store));
        }
        count
    }

    fn fate(&self) -> Fate {
        let mut line = self.lock();
        line.time.pass(CALL_TIME);
        if line.down {
            line.lost += 1;
            return Fate::Lost;
        }
        let trouble = line.trouble;
        if !line.chance.percent(trouble) {
            return Fate::Delivered;
        }
        line.lost += 1;
        [Fate::Lost, Fate::AnswerLost, Fate::Twice, Fate::Slow, Fate::Late][line.chance.place(5)]
    }

    fn store(&self) -> Option<Store> {
        let end = self.lock().end.clone();
        end.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The way to the replica's site.
#[derive(Clone)]
pub struct SimRemote {
    pub(super) ports: SimPorts,
}

/// What a call does at the replica.
type Call<T> = Arc<dyn Fn(&Store) -> replica::Result<T> + Send + Sync>;

impl SimRemote {
    async fn call<T>(&self, call: Call<T>) -> Result<T, Failure>
    where
        T: Send + 'static,
    {
        let SimPorts { line, turns, .. } = &self.ports;
        turns.pass().await;
        let lost = || Err(failure(FailureCode::Link, "the link broke"));
        match line.lock().trust {
            Trust::Certificate => return Err(lasting(FailureCode::Certificate)),
            Trust::Authorization => return Err(lasting(FailureCode::NotAuthorized)),
            Trust::Full | Trust::Unknown => {}
        }
        let fate = line.fate();
        match fate {
            Fate::Lost => return lost(),
            Fate::Slow => turns.wait(12).await,
            Fate::Late => {
                let late: Late = Box::new(move |store| drop(call(store)));
                let mut line = line.lock();
                line.late_made += 1;
                line.late.push(late);
                return lost();
            }
            _ => {}
        }
        let Some(store) = line.store() else { return lost() };
        let mut answer = call(&store);
        if fate == Fate::Twice {
            answer = call(&store);
        }
        drop(store);
        let died = line.lock().power.is_down();
        turns.pass().await;
        // A site that has died at this call has not answered it.
        if fate == Fate::AnswerLost || died {
            return lost();
        }
        answer.map_err(|error| refused(error.into_refused()))
    }
}

fn lasting(code: FailureCode) -> Failure {
    Failure { code, message: "the sites do not trust each other".into(), transient: false }
}

fn refused(refused: replica::Refused) -> Failure {
    Failure { code: FailureCode::ReplicaRefused, message: refused.message, transient: refused.transient }
}

fn to_store(offer: &Offer) -> replica::Offer {
    let disk = |disk: &primary::ports::OfferedDisk| DiskSize {
        name: disk.name.clone(),
        size_bytes: disk.size_bytes,
    };
    replica::Offer {
        vm: offer.vm,
        name: offer.vm_name.clone(),
        disks: offer.disks.iter().map(disk).collect(),
        interval: Duration::from_secs(offer.interval_s),
        points: offer.points,
        primary_name: offer.primary_name.clone(),
        definition: offer.definition.clone(),
        phase: offer.phase.clone(),
        paused: offer.paused,
        generation: offer.generation,
        media: None,
        pins: offer.pins.clone(),
        group: offer.group.clone(),
    }
}

impl Remote for SimRemote {
    type Upload = SimUpload;

    async fn offer(&self, offer: &Offer) -> Result<RelationshipStatus, Failure> {
        let offer = to_store(offer);
        let standing = self.call(Arc::new(move |store| store.offer(PRIMARY, offer.clone()))).await?;
        Ok(RelationshipStatus {
            durable: standing.head.number,
            durable_id: standing.head.id,
            phase: standing.phase,
            refused: standing.refused.map(to_wire),
            bandwidth_bytes_per_s: None,
        })
    }

    async fn report(&self, vm: VmId, report: &Report) -> Result<(), Failure> {
        // No world has a group: nothing is announced.
        let Report { phase, error, paused, .. } = report.clone();
        let call: Call<()> =
            Arc::new(move |store| store.report(PRIMARY, vm, phase.clone(), error.clone(), paused));
        self.call(call).await
    }

    async fn withdraw(&self, vm: VmId) -> Result<(), Failure> {
        self.call(Arc::new(move |store| store.withdraw(PRIMARY, vm))).await
    }

    async fn hand_over(&self, vm: VmId, newest: &HandOver) -> Result<HandedOver, Failure> {
        let HandOver { number, id, done } = *newest;
        let newest = Head { number, id };
        self.call(Arc::new(move |store| store.hand_over(PRIMARY, vm, newest, done))).await?;
        Ok(HandedOver { disks: Vec::new() })
    }

    async fn digests(&self, vm: VmId, request: &DigestRequest) -> Result<Vec<[u8; 16]>, Failure> {
        let DigestRequest { disk, offset, len, block_bytes } = request.clone();
        self.call(Arc::new(move |store| store.digests(PRIMARY, vm, &disk, offset, len, block_bytes))).await
    }

    fn upload(&self, log: LogUpload<'_>) -> SimUpload {
        self.ports.truth.sent(log.vm, log.head.id);
        SimUpload { remote: self.clone(), vm: log.vm, head: log.head, bytes: Vec::new(), there: 0 }
    }
}

/// A log on its way, in pieces.
pub struct SimUpload {
    remote: SimRemote,
    vm: VmId,
    head: Head,
    bytes: Vec<u8>,
    /// So much the replica is known to have.
    there: u64,
}

impl SimUpload {
    async fn state(&mut self) -> Result<UploadState, Failure> {
        let (vm, Head { number, id }) = (self.vm, self.head);
        self.remote.call(Arc::new(move |store| store.upload_state(PRIMARY, vm, number, id))).await
    }

    /// Sends one piece; true once the log is durable.
    async fn send(&mut self, last: bool) -> Result<UploadState, Failure> {
        let segment_bytes = {
            let mut line = self.remote.ports.line.lock();
            let most = line.segment_bytes;
            line.chance.within(1, most)
        };
        let start = usize::try_from(self.there).unwrap_or(usize::MAX).min(self.bytes.len());
        let end =
            start.saturating_add(usize::try_from(segment_bytes).unwrap_or(usize::MAX)).min(self.bytes.len());
        let (piece, last) = (self.bytes[start..end].to_vec(), last && end == self.bytes.len());
        self.remote.ports.line.lock().sent_bytes += piece.len() as u64;
        let (vm, head, offset, truth) = (self.vm, self.head, start as u64, self.remote.ports.truth.clone());
        let call: Call<UploadState> = Arc::new(move |store| {
            let state = store.append(PRIMARY, vm, head.number, head.id, offset, &piece, last)?;
            if state.durable {
                truth.acked(vm, head);
            }
            Ok(state)
        });
        self.remote.call(call).await
    }

    /// Sends what there is, over some breaks of the line.
    async fn deliver(&mut self, last: bool) -> Result<(), Failure> {
        let mut tries = 0;
        loop {
            if !last && self.there >= self.bytes.len() as u64 {
                return Ok(());
            }
            let mut answer = self.send(last).await;
            while let Err(failure) = answer {
                tries += 1;
                if failure.code != FailureCode::Link || tries >= TRIES {
                    return Err(failure);
                }
                answer = self.state().await;
            }
            let Ok(UploadState { offset, durable }) = answer else { continue };
            if durable {
                return Ok(());
            }
            if offset <= self.there {
                tries += 1;
                if tries >= TRIES {
                    return Err(failure(FailureCode::Link, "the upload does not get on"));
                }
            }
            self.there = offset;
        }
    }
}

impl Upload for SimUpload {
    async fn write(&mut self, bytes: Bytes) -> Result<(), Failure> {
        self.bytes.extend_from_slice(&bytes);
        let early = {
            let mut line = self.remote.ports.line.lock();
            line.chance.one_in(3)
        };
        if early { self.deliver(false).await } else { Ok(()) }
    }

    async fn finish(mut self) -> Result<(), Failure> {
        self.deliver(true).await
    }
}

fn to_wire(refused: replica::Refused) -> wire::Refused {
    let class = if refused.transient { wire::RefusedClass::Busy } else { wire::RefusedClass::Conflict };
    wire::Refused { transient: refused.transient, ..wire::Refused::new(class, refused.code, refused.message) }
}
