//! One connection in transmission: requests go out as they come, replies find their request by cookie.
//!
//! One task drives both directions. When it ends, for whatever reason, the reason is kept and everybody who
//! waits, or comes later, gets it: nobody waits for a dead server.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::sync::{OwnedSemaphorePermit, SetOnce, mpsc, oneshot};

use super::assembly::{Assembly, Outcome};
use crate::codec::{
    ChunkHeader, ChunkKind, Command, DecodeError, ErrorChunk, HoleChunk, ReplyHeader, Request, StatusChunk,
};
use crate::error::{Cause, ErrorKind};

/// Holds a reply's header and a small payload; larger payloads bypass it.
const READ_BUFFER_BYTES: usize = 8 << 10;
/// Requests gathered into one write to the socket, and the payload up to which one is gathered.
const GATHER_REQUESTS: usize = 32;
const GATHER_BYTES: usize = 16 << 10;

/// A request on its way out.
pub(super) struct Frame {
    header: [u8; Request::BYTES],
    payload: Bytes,
}

struct Waiting {
    assembly: Assembly,
    answer: oneshot::Sender<Outcome>,
    /// The request's place among those in flight, given back when its reply is whole: a caller that goes
    /// away does not make room.
    _place: OwnedSemaphorePermit,
}

/// What the callers and the driving task share.
#[derive(Default)]
pub(super) struct Shared {
    waiting: Mutex<Requests>,
    ended: SetOnce<Cause>,
}

#[derive(Default)]
struct Requests {
    next_cookie: u64,
    by_cookie: HashMap<u64, Waiting>,
}

impl Shared {
    /// Why the connection has ended, if it has.
    pub(super) fn ended(&self) -> Option<&Cause> {
        self.ended.get()
    }

    /// Sends a request; its outcome comes out of the receiver. Does not wait, so that a caller that is
    /// dropped leaves either nothing or a whole request behind.
    pub(super) fn send(
        &self,
        frames: &mpsc::UnboundedSender<Frame>,
        mut request: Request,
        payload: Bytes,
        assembly: Assembly,
        place: OwnedSemaphorePermit,
    ) -> Result<oneshot::Receiver<Outcome>, Cause> {
        let (answer, outcome) = oneshot::channel();
        {
            let mut requests = self.requests();
            // Looked at under the lock under which the end of the connection empties the map.
            if let Some(cause) = self.ended.get() {
                return Err(cause.clone());
            }
            request.cookie = requests.next_cookie;
            requests.next_cookie += 1;
            requests.by_cookie.insert(request.cookie, Waiting { assembly, answer, _place: place });
        }
        // A closed channel means that the connection has just ended: the receiver tells.
        let _ = frames.send(Frame { header: request.encode(), payload });
        Ok(outcome)
    }

    /// Waits for a request's outcome, or for the reason why it will not come.
    pub(super) async fn outcome(&self, outcome: oneshot::Receiver<Outcome>) -> Result<Outcome, Cause> {
        match outcome.await {
            Ok(outcome) => Ok(outcome),
            Err(_) => Err(self.ended.wait().await.clone()),
        }
    }

    fn end(&self, cause: Cause) {
        // Only the first reason is kept; there is one driver, so there is only one.
        let _ = self.ended.set(cause);
        self.requests().by_cookie.clear();
    }

    fn requests(&self) -> MutexGuard<'_, Requests> {
        // Nothing panics while it is held; if something did, the map would still be whole.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, cookie: u64) -> Result<Waiting, DecodeError> {
        let found = self.requests().by_cookie.remove(&cookie);
        found.ok_or(DecodeError::Invalid("a reply came to a request that is not in flight"))
    }

    fn put_back(&self, cookie: u64, waiting: Waiting) {
        self.requests().by_cookie.insert(cookie, waiting);
    }
}

/// Tells those who wait even if the driving task is dropped, as at the end of its runtime.
struct EndsOnDrop(Arc<Shared>);

impl Drop for EndsOnDrop {
    fn drop(&mut self) {
        if self.0.ended().is_none() {
            self.0.end(ErrorKind::Disconnected.into());
        }
    }
}

/// Drives a connection until all its clients are gone or it breaks.
pub(super) async fn drive(
    input: impl AsyncRead + Unpin,
    output: impl AsyncWrite + Unpin,
    frames: mpsc::UnboundedReceiver<Frame>,
    shared: Arc<Shared>,
    structured: bool,
) {
    let shared = EndsOnDrop(shared);
    let input = BufReader::with_capacity(READ_BUFFER_BYTES, input);
    let cause = tokio::select! {
        cause = receive(input, &shared.0, structured) => cause,
        cause = transmit(output, frames) => cause,
    };
    shared.0.end(cause);
}

async fn transmit(mut output: impl AsyncWrite + Unpin, mut frames: mpsc::UnboundedReceiver<Frame>) -> Cause {
    let result: std::io::Result<()> = async {
        let mut batch = Vec::with_capacity(GATHER_REQUESTS);
        let mut bytes = Vec::new();
        while frames.recv_many(&mut batch, GATHER_REQUESTS).await > 0 {
            for frame in batch.drain(..) {
                bytes.extend_from_slice(&frame.header);
                if frame.payload.len() <= GATHER_BYTES {
                    bytes.extend_from_slice(&frame.payload);
                } else {
                    output.write_all(&bytes).await?;
                    bytes.clear();
                    output.write_all(&frame.payload).await?;
                }
            }
            output.write_all(&bytes).await?;
            output.flush().await?;
            bytes.clear();
        }
        // All clients are gone: say good-bye, so that the server does not log a broken connection.
        let request = Request { flags: 0, command: Command::DISCONNECT, cookie: 0, offset: 0, len: 0 };
        output.write_all(&request.encode()).await?;
        output.shutdown().await
    }
    .await;
    result.err().map_or(ErrorKind::Disconnected.into(), Cause::from)
}

async fn receive(mut input: impl AsyncRead + Unpin, shared: &Shared, structured: bool) -> Cause {
    loop {
        if let Err(cause) = receive_one(&mut input, shared, structured).await {
            return cause;
        }
    }
}

/// Takes in one reply, or one chunk of one.
async fn receive_one(
    input: &mut (impl AsyncRead + Unpin),
    shared: &Shared,
    structured: bool,
) -> Result<(), Cause> {
    let mut magic = [0; ReplyHeader::MAGIC_BYTES];
    input.read_exact(&mut magic).await?;
    let mut rest = [0; ReplyHeader::REST_BYTES_MAX];
    let rest = &mut rest[..ReplyHeader::rest_bytes(magic)?];
    input.read_exact(rest).await?;
    match ReplyHeader::decode(rest)? {
        ReplyHeader::Simple { cookie, error } => {
            let mut waiting = shared.take(cookie)?;
            if let Some(errno) = error {
                waiting.assembly.fail(ErrorChunk { errno, message: String::new(), offset: None });
            } else if let Some(buffer) = waiting.assembly.whole_read() {
                if structured {
                    return Err(DecodeError::Invalid(
                        "a read has a simple reply after structured ones were agreed",
                    )
                    .into());
                }
                input.read_exact(buffer).await?;
            }
            answer(waiting)
        }
        ReplyHeader::Chunk(_) if !structured => {
            Err(DecodeError::Invalid("a structured reply came without having been agreed").into())
        }
        ReplyHeader::Chunk(chunk) => {
            let mut waiting = shared.take(chunk.cookie)?;
            receive_chunk(input, chunk, &mut waiting.assembly).await?;
            if chunk.done {
                answer(waiting)
            } else {
                shared.put_back(chunk.cookie, waiting);
                Ok(())
            }
        }
    }
}

/// Takes in a chunk's payload, whose length the header's decoder has checked.
async fn receive_chunk(
    input: &mut (impl AsyncRead + Unpin),
    chunk: ChunkHeader,
    assembly: &mut Assembly,
) -> Result<(), Cause> {
    if chunk.kind == ChunkKind::Data {
        let offset = input.read_u64().await?;
        let buffer = assembly.data(offset, (chunk.len - ChunkKind::DATA_PREFIX_BYTES) as usize)?;
        input.read_exact(buffer).await?;
        return Ok(());
    }
    let mut payload = vec![0; chunk.len as usize];
    input.read_exact(&mut payload).await?;
    match chunk.kind {
        ChunkKind::Hole => assembly.hole(HoleChunk::decode(&payload)?)?,
        ChunkKind::Status => assembly.extents(StatusChunk::decode(&payload)?)?,
        ChunkKind::Error | ChunkKind::ErrorOffset | ChunkKind::OtherError(_) => {
            assembly.fail(ErrorChunk::decode(chunk.kind, &payload)?);
        }
        ChunkKind::None if chunk.done => {}
        ChunkKind::None | ChunkKind::Data => {
            return Err(DecodeError::Invalid("an empty chunk came that is not the last").into());
        }
    }
    Ok(())
}

fn answer(waiting: Waiting) -> Result<(), Cause> {
    let outcome = waiting.assembly.finish()?;
    // The caller may have gone away: then nobody wants to know.
    let _ = waiting.answer.send(outcome);
    Ok(())
}
