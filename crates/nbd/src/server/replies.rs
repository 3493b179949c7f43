//! Replies on their way out. What a reply holds of the connection's memory is given back once it is written.

use std::io;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use crate::codec::{ChunkHeader, ChunkKind, Errno, ErrorChunk, HoleChunk, ReplyHeader, StatusChunk};

/// Replies gathered into one write to the socket, and the payload up to which one is copied for that.
const GATHER_REPLIES: usize = 32;
const GATHER_BYTES: usize = 16 << 10;
/// Words about a failure are cut there; the protocol allows four times as many.
const WORDS_BYTES_MAX: usize = 1024;

/// A reply, or a chunk of one.
#[derive(Debug)]
pub(super) struct Reply {
    head: Vec<u8>,
    payload: Bytes,
    /// Memory that the payload, and that of the replies before it, holds.
    memory: Option<OwnedSemaphorePermit>,
}

impl Reply {
    /// A whole simple reply.
    pub fn simple(cookie: u64, error: Option<Errno>, payload: Bytes) -> Self {
        let head = ReplyHeader::encode_simple(cookie, error).to_vec();
        Self { head, payload, memory: None }
    }

    pub fn data(cookie: u64, offset: u64, payload: Bytes, done: bool) -> Self {
        let len = ChunkKind::DATA_PREFIX_BYTES + payload.len() as u32;
        let header = ChunkHeader { done, kind: ChunkKind::Data, cookie, len };
        let head = [&header.encode()[..], &offset.to_be_bytes()].concat();
        Self { head, payload, memory: None }
    }

    pub fn hole(cookie: u64, offset: u64, len: u32, done: bool) -> Self {
        let payload = HoleChunk { offset, len }.encode();
        Self::chunk(cookie, ChunkKind::Hole, payload, done)
    }

    pub fn status(cookie: u64, status: &StatusChunk) -> Self {
        Self::chunk(cookie, ChunkKind::Status, status.encode(), true)
    }

    /// The end of a reply that has nothing to say.
    pub fn none(cookie: u64) -> Self {
        Self::chunk(cookie, ChunkKind::None, Vec::new(), true)
    }

    /// A failure, with words for a person.
    pub fn error(cookie: u64, errno: Errno, words: &str) -> Self {
        let message = words[..words.floor_char_boundary(WORDS_BYTES_MAX)].to_owned();
        let chunk = ErrorChunk { errno, message, offset: None };
        Self::chunk(cookie, chunk.kind(), chunk.encode(), true)
    }

    fn chunk(cookie: u64, kind: ChunkKind, payload: Vec<u8>, done: bool) -> Self {
        let header = ChunkHeader { done, kind, cookie, len: payload.len() as u32 };
        Self { head: header.encode().to_vec(), payload: payload.into(), memory: None }
    }

    /// Gives the memory back when it is written.
    pub fn holding(self, memory: OwnedSemaphorePermit) -> Self {
        Self { memory: Some(memory), ..self }
    }
}

/// Writes replies until there can be no more, or the client does not take them for as long as `stall`.
pub(super) async fn write_replies(
    mut output: impl AsyncWrite + Unpin,
    mut replies: mpsc::Receiver<Reply>,
    stall: Duration,
) -> io::Result<()> {
    let mut batch = Vec::with_capacity(GATHER_REPLIES);
    let mut gathered = BytesMut::new();
    while replies.recv_many(&mut batch, GATHER_REPLIES).await > 0 {
        for reply in batch.drain(..) {
            gathered.extend_from_slice(&reply.head);
            if reply.payload.len() <= GATHER_BYTES {
                gathered.extend_from_slice(&reply.payload);
            } else {
                put(&mut output, &mut gathered.split().chain(reply.payload), stall).await?;
            }
            drop(reply.memory);
        }
        put(&mut output, &mut gathered.split(), stall).await?;
        output.flush().await?;
    }
    output.shutdown().await
}

async fn put(
    output: &mut (impl AsyncWrite + Unpin),
    bytes: &mut impl Buf,
    stall: Duration,
) -> io::Result<()> {
    // Each bit that the client takes gives it time anew: a slow client is not a dead one.
    while bytes.has_remaining() {
        let written = tokio::time::timeout(stall, output.write_buf(bytes)).await;
        if written.map_err(|_| stalled("the client does not take its replies"))?? == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
    }
    Ok(())
}

pub(super) fn stalled(words: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, words)
}
