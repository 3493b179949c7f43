//! The replica: disks in memory that take each log as soon as it is whole; and the link to it.

use std::future::pending;
use std::io::Cursor;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use log::RecordReader;
use model::{Head, Phase, Progress, VmId};
use primary::ports::{
    self, DigestRequest, HandOver, HandedOver, LogUpload, Offer, OfferedMedia, RelationshipStatus, Remote,
    Report,
};
use primary::{Failure, FailureCode};
use tokio::sync::Notify;

use super::{World, broken};

/// What the link does to the next upload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It breaks before the log is whole.
    Break,
    /// The log arrives; the link breaks before the answer does.
    LoseAnswer,
    /// The log arrives; the answer is never heard.
    Hang,
}

/// What the replica's site has.
pub struct Replica {
    pub disks: Vec<(model::DiskName, Vec<u8>)>,
    /// The disks that the newest point has.
    pub of_point: Vec<model::DiskName>,
    pub durable: Head,
    pub phase: Phase,
    /// Every log, in order.
    pub logs: Vec<Vec<u8>>,
    pub reported: Vec<Report>,
    pub withdrawn: bool,
    pub handed_over: bool,
    pub digests_asked: u64,
    pub fault: Option<Fault>,
    /// The media that it waits for, as it was last told.
    pub media: Option<OfferedMedia>,
    /// Nothing gets there.
    pub unreachable: bool,
    /// Told when an upload hangs.
    pub hangs: Arc<Notify>,
}

impl Default for Replica {
    fn default() -> Self {
        Self {
            disks: Vec::new(),
            of_point: Vec::new(),
            durable: Head::EMPTY,
            phase: Phase::InitialReplication { progress: Progress::default() },
            logs: Vec::new(),
            reported: Vec::new(),
            withdrawn: false,
            handed_over: false,
            digests_asked: 0,
            fault: None,
            media: None,
            unreachable: false,
            hangs: Arc::default(),
        }
    }
}

impl Replica {
    pub fn data(&self) -> Vec<Vec<u8>> {
        self.disks.iter().map(|(_, data)| data.clone()).collect()
    }

    /// Verifies a log, takes it into the disks, and keeps it.
    fn take(&mut self, bytes: Vec<u8>) {
        let verified = log::verify(&mut &bytes[..]).expect("what was sent is a whole log");
        let header = &verified.header;
        assert_eq!(header.number, self.durable.number.next(), "the log continues the chain");
        assert_eq!(header.predecessor, self.durable.id, "the log continues the chain");
        let places: Vec<usize> = header.disks.iter().map(|disk| self.place(disk)).collect();
        let mut reader = RecordReader::open(Cursor::new(&bytes)).unwrap();
        let mut place = 0;
        while let Some(record) = reader.record(place).unwrap() {
            let disk = &mut self.disks[places[usize::from(record.entry.disk)]].1;
            for (extent, data) in record.pieces() {
                let there = &mut disk[extent.offset as usize..extent.end() as usize];
                match data {
                    Some(data) => there.copy_from_slice(data),
                    None => there.fill(0),
                }
            }
            place += 1;
        }
        let footer = &verified.footer;
        let makes_point = footer.class.point().is_some();
        if makes_point {
            self.of_point = header.disks.iter().map(|disk| disk.name.clone()).collect();
        }
        self.phase = model::phase_after(header.purpose, makes_point, footer.progress, &self.phase);
        self.durable = Head { number: header.number, id: header.id };
        if header.purpose != model::Purpose::Initial {
            self.media = None;
        }
        self.logs.push(bytes);
    }
}

impl Replica {
    /// Opens the next log of a set of media, and takes it.
    pub fn import(&mut self, dir: &Path, vm: VmId) {
        let OfferedMedia { set, key, .. } = self.media.clone().expect("it waits for media");
        let number = self.durable.number.next();
        let file = std::fs::read(dir.join(media::log_file(number))).unwrap();
        let header = media::Header::decode(&file).unwrap();
        header.check(media::Kind::Log, set, vm, number).unwrap();
        let (mut opener, mut log) = (media::Opener::new(&key, &header), Vec::new());
        opener.push(&file[media::HEADER_BYTES..], &mut log).unwrap();
        opener.finish(&mut log).unwrap();
        self.take(log);
    }

    /// Where a log's disk is; a new one, or the new end of one that has grown, is zeros.
    fn place(&mut self, disk: &log::DiskInfo) -> usize {
        let found = self.disks.iter().position(|(name, _)| *name == disk.name);
        let place = found.unwrap_or_else(|| {
            self.disks.push((disk.name.clone(), Vec::new()));
            self.disks.len() - 1
        });
        self.disks[place].1.resize(disk.size_bytes as usize, 0);
        place
    }
}

/// The way to the replica.
#[derive(Clone)]
pub struct Link(pub World);

impl Remote for Link {
    type Upload = Upload;

    async fn offer(&self, offer: &Offer) -> Result<RelationshipStatus, Failure> {
        let replica = &mut self.0.lock().replica;
        if replica.unreachable {
            return Err(broken("the link is down"));
        }
        replica.media = offer.media.clone();
        if replica.disks.is_empty() {
            let empty = offer.disks.iter().map(|d| (d.name.clone(), vec![0; d.size_bytes as usize]));
            replica.disks = empty.collect();
        }
        let Head { number, id } = replica.durable;
        Ok(RelationshipStatus {
            durable: number,
            durable_id: id,
            phase: replica.phase.clone(),
            refused: None,
            bandwidth_bytes_per_s: None,
        })
    }

    async fn report(&self, _vm: VmId, report: &Report) -> Result<(), Failure> {
        self.0.lock().replica.reported.push(report.clone());
        Ok(())
    }

    async fn withdraw(&self, _vm: VmId) -> Result<(), Failure> {
        self.0.lock().replica.withdrawn = true;
        Ok(())
    }

    async fn hand_over(&self, _vm: VmId, newest: &HandOver) -> Result<HandedOver, Failure> {
        let mut world = self.0.lock();
        if newest.done && !world.replica.handed_over {
            return Err(Failure::lasting(FailureCode::ReplicaRefused, "it was not handed over"));
        }
        assert_eq!(world.replica.durable, Head { number: newest.number, id: newest.id });
        world.replica.handed_over = true;
        Ok(HandedOver { disks: Vec::new() })
    }

    async fn digests(&self, _vm: VmId, request: &DigestRequest) -> Result<Vec<[u8; 16]>, Failure> {
        let replica = &mut self.0.lock().replica;
        replica.digests_asked += request.digests();
        let (_, data) = replica.disks.iter().find(|(name, _)| *name == request.disk).unwrap();
        let stretch = &data[request.offset as usize..][..request.len as usize];
        Ok(stretch.chunks(request.block_bytes as usize).map(wire::block_digest).collect())
    }

    fn upload(&self, log: LogUpload<'_>) -> Upload {
        Upload { world: self.0.clone(), head: log.head, sent: Vec::new() }
    }
}

/// A log on its way.
pub struct Upload {
    world: World,
    head: Head,
    sent: Vec<u8>,
}

impl ports::Upload for Upload {
    async fn write(&mut self, bytes: Bytes) -> Result<(), Failure> {
        tokio::time::sleep(Duration::from_micros(bytes.len() as u64 / 100)).await;
        self.sent.extend_from_slice(&bytes);
        Ok(())
    }

    async fn finish(self) -> Result<(), Failure> {
        let fault = self.world.lock().replica.fault.take();
        if fault == Some(Fault::Break) {
            return Err(broken("the link broke"));
        }
        self.world.lock().replica.take(self.sent);
        assert_eq!(self.world.lock().replica.durable, self.head);
        match fault {
            Some(Fault::LoseAnswer) => Err(broken("the link broke before the answer")),
            Some(Fault::Hang) => {
                let hangs = self.world.lock().replica.hangs.clone();
                hangs.notify_one();
                pending().await
            }
            _ => Ok(()),
        }
    }
}
