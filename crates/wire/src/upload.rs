//! Uploads one log: in segments, one on its way while the next is collected, over any number of breaks.
//!
//! ```text
//!  write ─▶ collected ──full──▶ in flight ──acknowledged──▶ forgotten
//!                                   │ the link breaks
//!                                   ▼
//!                     ask how far it came (within `patience`) ─▶ go on from there
//! ```
//!
//! In memory: the segment that is collected, the one in flight, and what the caller is just handing over.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use model::{LogId, LogNumber, VmId};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::client::Client;
use crate::error::{Error, Result};
use crate::limiter::RateLimiter;
use crate::limits::SEGMENT_BYTES;
use crate::messages::{UploadState, codes};
use crate::outgoing::Pieces;

/// Under a limit a segment lasts about this long: what a break costs, and how fresh the replica's count is.
const SEGMENT_TIME: Duration = Duration::from_secs(1);
/// No segment is smaller (but the last): each costs one round trip.
const SEGMENT_BYTES_MIN: usize = 64 * 1024;
/// Between two tries over a broken link.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// The upload of one log. After an error it is of no more use; what the replica has of it, it forgets.
#[derive(Debug)]
pub struct Uploader {
    way: Arc<Way>,
    segment_bytes: usize,
    collected: Pieces,
    /// The log's offset of the first byte collected.
    offset: u64,
    in_flight: Option<JoinHandle<Result<()>>>,
    failed: Option<Error>,
}

/// How segments get to the replica.
#[derive(Debug)]
struct Way {
    client: Arc<Client>,
    log: (VmId, LogNumber, LogId),
    patience: Duration,
    limiter: Option<RateLimiter>,
}

/// A part of the log that is kept until it is acknowledged.
struct Segment {
    offset: u64,
    pieces: Pieces,
    last: bool,
}

impl Segment {
    fn end(&self) -> u64 {
        self.offset + self.pieces.len() as u64
    }

    /// At most `max` bytes from `offset` of the log on, and whether they end the log.
    fn part(&self, offset: u64, max: usize) -> (Pieces, bool) {
        let from = usize::try_from(offset - self.offset).unwrap_or(usize::MAX).min(self.pieces.len());
        let to = from.saturating_add(max).min(self.pieces.len());
        (self.pieces.slice(from..to), self.last && to == self.pieces.len())
    }
}

/// A link that has been broken for some time.
struct Outage {
    until: Instant,
    pause: Duration,
}

impl Uploader {
    /// Begins the upload of a log. A broken link is tried again for as long as `patience`, counted anew each
    /// time that the upload gets on.
    #[must_use]
    pub fn new(
        client: Arc<Client>,
        vm: VmId,
        number: LogNumber,
        id: LogId,
        patience: Duration,
        limiter: Option<RateLimiter>,
    ) -> Self {
        let at_limit = limiter.as_ref().map(|limiter| limiter.bytes_in(SEGMENT_TIME));
        let segment_bytes = at_limit
            .map_or(SEGMENT_BYTES, |bytes| usize::try_from(bytes).unwrap_or(usize::MAX))
            .clamp(SEGMENT_BYTES_MIN, SEGMENT_BYTES);
        Self {
            way: Arc::new(Way { client, log: (vm, number, id), patience, limiter }),
            segment_bytes,
            collected: Pieces::default(),
            offset: 0,
            in_flight: None,
            failed: None,
        }
    }

    /// Takes the next bytes of the log. Waits while a segment is collected and one is on its way. An upload
    /// whose `write` was cancelled has lost bytes and must be dropped.
    pub async fn write(&mut self, mut bytes: Bytes) -> Result<()> {
        if self.in_flight.as_ref().is_some_and(JoinHandle::is_finished) {
            self.settle().await?;
        }
        self.check()?;
        while self.collected.len() + bytes.len() >= self.segment_bytes {
            self.collected.push(bytes.split_to(self.segment_bytes - self.collected.len()));
            self.settle().await?;
            self.send(false);
        }
        self.collected.push(bytes);
        Ok(())
    }

    /// Sends the rest; done once the replica has the whole log durable.
    pub async fn finish(mut self) -> Result<()> {
        self.settle().await?;
        self.send(true);
        self.settle().await
    }

    /// Puts what is collected on its way; nothing may be on its way yet.
    fn send(&mut self, last: bool) {
        let segment = Segment { offset: self.offset, pieces: std::mem::take(&mut self.collected), last };
        self.offset = segment.end();
        let way = self.way.clone();
        self.in_flight = Some(tokio::spawn(async move { way.deliver(&segment).await }));
    }

    /// Waits for what is on its way.
    async fn settle(&mut self) -> Result<()> {
        if let Some(task) = &mut self.in_flight {
            let outcome = task.await;
            self.in_flight = None;
            let outcome =
                outcome.unwrap_or_else(|error| Err(Error::link(format!("the upload stopped: {error}"))));
            self.failed = outcome.err();
        }
        self.check()
    }

    fn check(&self) -> Result<()> {
        self.failed.clone().map_or(Ok(()), Err)
    }
}

impl Drop for Uploader {
    fn drop(&mut self) {
        if let Some(task) = &self.in_flight {
            task.abort();
        }
    }
}

impl Way {
    /// Delivers a segment; done when the replica has acknowledged all of it.
    async fn deliver(&self, segment: &Segment) -> Result<()> {
        let mut at = segment.offset;
        let mut part_max = SEGMENT_BYTES;
        let mut outage: Option<Outage> = None;
        loop {
            let (part, is_last) = segment.part(at, part_max);
            let end = at + part.len() as u64;
            let answer = self.client.append(self.log, at, part, is_last, self.limiter.as_ref()).await;
            match answer {
                Ok(state) => {
                    self.expect(state, end, is_last)?;
                    if end == segment.end() {
                        return Ok(());
                    }
                    (at, outage) = (end, None);
                    part_max = (part_max * 2).min(SEGMENT_BYTES);
                }
                Err(error) if is_worth_another_try(&error) => {
                    let broken = outage.get_or_insert_with(|| Outage::new(self.patience));
                    let state = self.ask(broken, error).await?;
                    if self.resume(segment, state)? {
                        return Ok(());
                    }
                    if state.offset > at {
                        outage = None;
                    }
                    at = state.offset;
                    // A link that breaks within each large part may carry smaller ones.
                    part_max = (part_max / 2).max(SEGMENT_BYTES_MIN);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Asks how far the replica is, until it answers or patience ends with the last error.
    async fn ask(&self, outage: &mut Outage, mut error: Error) -> Result<UploadState> {
        loop {
            tracing::debug!(%error, "the upload is interrupted");
            if Instant::now() + outage.pause > outage.until {
                return Err(error);
            }
            tokio::time::sleep(outage.pause).await;
            outage.pause = (outage.pause * 2).min(PAUSE_MAX);
            let (vm, number, id) = self.log;
            let question = self.client.upload_state(vm, number, id);
            error = match tokio::time::timeout_at(outage.until, question).await {
                Ok(Ok(state)) => return Ok(state),
                Ok(Err(error)) if is_worth_another_try(&error) => error,
                Ok(Err(error)) => return Err(error),
                Err(_) => return Err(error),
            };
        }
    }

    /// Whether what the replica has by now ends the segment; an error if there is no way to go on.
    fn resume(&self, segment: &Segment, state: UploadState) -> Result<bool> {
        if state.durable {
            return if segment.last {
                Ok(true)
            } else {
                Err(self.protocol("it holds a log durable that is not yet sent"))
            };
        }
        if state.offset < segment.offset {
            let message = format!(
                "the replica lost the beginning of the log: it has {} bytes and had acknowledged {}; the next cycle sends it anew",
                state.offset, segment.offset
            );
            return Err(Error::link(message).at(self.client.address(), "upload"));
        }
        if state.offset > segment.end() {
            return Err(self.protocol("it has more of the log than was sent"));
        }
        Ok(state.offset == segment.end() && !segment.last)
    }

    fn expect(&self, state: UploadState, end: u64, is_last: bool) -> Result<()> {
        match state {
            UploadState { durable: true, .. } if is_last => Ok(()),
            UploadState { offset, durable: false } if offset == end && !is_last => Ok(()),
            _ => Err(self.protocol(&format!("it answers {state:?} to bytes up to {end} (last: {is_last})"))),
        }
    }

    fn protocol(&self, message: &str) -> Error {
        Error::protocol(message).at(self.client.address(), "upload")
    }
}

impl Outage {
    fn new(patience: Duration) -> Self {
        Self { until: Instant::now() + patience, pause: PAUSE_MIN }
    }
}

/// Whether the way failed, or only the moment: what the replica judged of the log itself is final.
fn is_worth_another_try(error: &Error) -> bool {
    const OF_THE_MOMENT: [&str; 4] = [codes::BUSY, codes::WRONG_OFFSET, codes::TRUNCATED, codes::TOO_SLOW];
    error.is_broken_link() || OF_THE_MOMENT.iter().any(|code| error.has_code(code))
}
