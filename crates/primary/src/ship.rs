//! Ships what was read: encodes it into one or more logs and uploads them until the replica has made
//! each durable.

use std::time::Duration;

use bytes::Bytes;
use log::{Encoder, Footer, Header};
use model::{
    Consistency, CyclePlan, Head, LogAttempt, LogClass, LogId, LogNumber, Progress, Purpose, Timestamp, VmId,
};
use tokio::sync::mpsc;
use wire::RateLimiter;

use crate::error::{Failure, FailureCode};
use crate::folder::{MediaFolder, MediaUpload};
use crate::ports::{LogUpload, Ports, Remote, Upload};
use crate::read::Item;

/// A log is cut when it holds this many bytes of data or this many extents: bounds its index in memory
/// on both sides (16 bytes per extent) and what a broken upload costs. The cycle goes on in the next log.
const LOG_DATA_BYTES_MAX: u64 = 4 << 30;
const LOG_EXTENTS_MAX: usize = 1 << 20;

/// What is common to all logs of a cycle.
pub(crate) struct Cycle<'a, P: Ports> {
    pub ports: &'a P,
    pub carrier: Carrier<'a, P::Remote>,
    pub vm: VmId,
    /// Those that join last. A point's own log names the disks that it has, and only those.
    pub disks: Vec<log::DiskInfo>,
    pub plan: CyclePlan,
    pub moment: Timestamp,
    pub consistency: Consistency,
}

/// What logs go by.
pub(crate) enum Carrier<'a, R> {
    /// The line to the replica.
    Line { remote: &'a R, limiter: Option<&'a RateLimiter>, patience: Duration },
    /// Media that are carried there.
    Media(&'a MediaFolder),
}

impl<R: Remote> Carrier<'_, R> {
    fn upload(&self, vm: VmId, head: Head) -> Carried<R::Upload> {
        match *self {
            Self::Line { remote, limiter, patience } => {
                Carried::ByLine(remote.upload(LogUpload { vm, head, patience, limiter }))
            }
            Self::Media(folder) => Carried::ByMedia(Box::new(folder.upload(head))),
        }
    }
}

/// A log on its way by either.
enum Carried<U> {
    ByLine(U),
    ByMedia(Box<MediaUpload>),
}

impl<U: Upload> Upload for Carried<U> {
    async fn write(&mut self, bytes: Bytes) -> Result<(), Failure> {
        match self {
            Self::ByLine(upload) => upload.write(bytes).await,
            Self::ByMedia(upload) => upload.write(bytes).await,
        }
    }

    async fn finish(self) -> Result<(), Failure> {
        match self {
            Self::ByLine(upload) => upload.finish().await,
            Self::ByMedia(upload) => upload.finish().await,
        }
    }
}

/// What a cycle shipped.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Shipment {
    pub logs: u32,
    pub log_bytes: u64,
    pub data_bytes: u64,
    pub zero_bytes: u64,
}

/// Where the cycle writes down which log it is about to have made durable.
pub(crate) trait Ledger: Send {
    /// So much is covered of each disk that joins, in their order, once this cycle has ended. Gives how many of all
    /// disks the VM's points have then.
    fn joined(&mut self, covered: &[u64]) -> usize;
    fn about_to_finish(&mut self, attempt: LogAttempt) -> impl Future<Output = Result<(), Failure>> + Send;
    fn durable(
        &mut self,
        attempt: LogAttempt,
        makes_point: bool,
    ) -> impl Future<Output = Result<(), Failure>> + Send;
}

impl<P: Ports> Cycle<'_, P> {
    /// Ships everything that arrives in `items` until its end.
    pub async fn ship(
        &self,
        mut items: mpsc::Receiver<Item>,
        ledger: &mut impl Ledger,
    ) -> Result<Shipment, Failure> {
        let mut shipment = Shipment::default();
        let mut predecessor = self.plan.predecessor;
        let mut number = self.plan.next;
        let mut disks = &self.disks[..];
        let mut log = self.begin(self.next_head(number)?, predecessor, disks)?;
        while let Some(item) = items.recv().await {
            let ends = match &item {
                Item::Record(_) => log.is_full(),
                Item::Joined(_) => true,
                Item::End(_) => false,
            };
            if let Item::Joined(covered) = &item {
                disks = &self.disks[..ledger.joined(covered)];
            }
            if ends {
                let head = log.head;
                log.finish(self, None, ledger, &mut shipment).await?;
                (number, predecessor) = (number.next(), head.id);
                log = self.begin(self.next_head(number)?, predecessor, disks)?;
            }
            match item {
                Item::Record(record) => log.record(record.finish().await?).await?,
                Item::Joined(_) => {}
                Item::End(progress) => {
                    log.finish(self, Some(progress), ledger, &mut shipment).await?;
                    return Ok(shipment);
                }
            }
        }
        Err(Failure::transient(FailureCode::Stopped, "reading ended before its end"))
    }

    fn next_head(&self, number: LogNumber) -> Result<Head, Failure> {
        Ok(Head { number, id: LogId::from_bytes(self.ports.random_id()?) })
    }

    fn begin(
        &self,
        head: Head,
        predecessor: LogId,
        disks: &[log::DiskInfo],
    ) -> Result<OpenLog<UploadOf<P>>, Failure> {
        let header = Header {
            vm: self.vm,
            id: head.id,
            number: head.number,
            predecessor,
            moment: self.moment,
            purpose: self.plan.purpose,
            disks: disks.to_vec(),
        };
        let encoder = Encoder::new(Vec::new(), &header).map_err(encode_failure)?;
        let upload = self.carrier.upload(self.vm, head);
        Ok(OpenLog { head, encoder, upload })
    }

    /// The class of the cycle's last log: a pass makes a point only when it has covered everything.
    fn class(&self, progress: Progress) -> LogClass {
        let complete =
            self.plan.purpose == Purpose::Changes || progress.covered_bytes == progress.total_bytes;
        if complete { LogClass::Point(self.consistency) } else { LogClass::Partial }
    }
}

type UploadOf<P> = Carried<<<P as Ports>::Remote as Remote>::Upload>;

struct OpenLog<U> {
    head: Head,
    encoder: Encoder<Vec<u8>>,
    upload: U,
}

impl<U: Upload> OpenLog<U> {
    fn is_full(&self) -> bool {
        self.encoder.raw_bytes() >= LOG_DATA_BYTES_MAX || self.encoder.extents() >= LOG_EXTENTS_MAX
    }

    async fn record(&mut self, record: log::EncodedRecord) -> Result<(), Failure> {
        self.encoder.record(record).map_err(encode_failure)?;
        self.drain().await
    }

    /// Passes on what the encoder has written so far.
    async fn drain(&mut self) -> Result<(), Failure> {
        let written = std::mem::take(self.encoder.get_mut());
        self.upload.write(Bytes::from(written)).await
    }

    /// Ends the log and waits until it is durable. `end` is given for the cycle's last log.
    async fn finish<P: Ports>(
        mut self,
        cycle: &Cycle<'_, P>,
        end: Option<Progress>,
        ledger: &mut impl Ledger,
        shipment: &mut Shipment,
    ) -> Result<(), Failure> {
        self.drain().await?;
        let class = end.map_or(LogClass::Partial, |progress| cycle.class(progress));
        let footer = Footer { class, progress: end.unwrap_or_default() };
        let (summary, rest) = self.encoder.finish(footer).map_err(encode_failure)?;
        self.upload.write(Bytes::from(rest)).await?;
        let attempt = LogAttempt {
            head: self.head,
            tracking: cycle.plan.next,
            ends_cycle: end.is_some(),
            progress: end,
        };
        // Before the replica can make it durable: if its answer is lost, this tells whose log it is.
        ledger.about_to_finish(attempt).await?;
        self.upload.finish().await?;
        ledger.durable(attempt, class.point().is_some()).await?;
        shipment.logs += 1;
        shipment.log_bytes += summary.total_bytes;
        shipment.data_bytes += summary.data_bytes;
        shipment.zero_bytes += summary.zero_bytes;
        Ok(())
    }
}

fn encode_failure(error: log::Error) -> Failure {
    Failure::lasting(FailureCode::Encode, format!("the log could not be encoded: {error}"))
}
