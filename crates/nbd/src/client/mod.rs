//! The client: one export over one connection, many requests in flight.

mod assembly;
mod connection;
mod negotiate;
mod pool;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, mpsc};

pub use self::pool::Pool;

use self::assembly::{Assembly, Outcome};
use self::connection::{Frame, Shared, drive};
use crate::codec::{
    BlockSizes, Command, DecodeError, ExportFlags, ListedExport, PAYLOAD_BYTES_MAX, Request, StatusExtent,
};
use crate::error::{Cause, Error, ErrorKind, Result};

/// How long a server may take over the handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(30);
/// Requests in flight on one connection; further ones wait. Above what QEMU works on at once (16).
const IN_FLIGHT_MAX: usize = 64;
/// The longest range of one trim, write-zeroes or block status request: well within 32 bits and aligned.
const RANGE_BYTES_MAX: u64 = 1 << 30;
/// The most block status requests that one range is asked for with: a server that answers in crumbs is
/// told from one that makes progress.
const STATUS_REQUESTS_MAX: usize = 1 << 16;

/// An export of a server. Cheap to clone: clones share the connection, which is closed when the last is gone.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    export: String,
    size_bytes: u64,
    flags: ExportFlags,
    block_sizes: Option<BlockSizes>,
    contexts: Vec<String>,
    context_ids: Arc<[u32]>,
    payload_bytes_max: u32,
    places: Arc<Semaphore>,
    frames: mpsc::UnboundedSender<Frame>,
    shared: Arc<Shared>,
}

impl Client {
    /// Opens an export of the server that listens on a unix socket, with those of the metadata contexts
    /// that the server has (see [`Client::contexts`]).
    pub async fn connect(path: impl AsRef<Path>, export: &str, contexts: &[&str]) -> Result<Self> {
        let stream = dial(path.as_ref(), export).await?;
        Self::from_stream(stream, export, contexts).await
    }

    /// The same over a stream that is connected already.
    pub async fn from_stream<S>(mut stream: S, export: &str, contexts: &[&str]) -> Result<Self>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let agreed = in_time(export, negotiate::open(&mut stream, export, contexts)).await?;
        let (frames, outgoing) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared::default());
        let (input, output) = tokio::io::split(stream);
        tokio::spawn(drive(input, output, outgoing, shared.clone(), agreed.structured));
        let (context_ids, contexts) =
            agreed.contexts.into_iter().map(|context| (context.id, context.name)).unzip();
        let context_ids: Vec<u32> = context_ids;
        let payload_bytes_max =
            agreed.block_sizes.map_or(PAYLOAD_BYTES_MAX, |sizes| sizes.maximum.min(PAYLOAD_BYTES_MAX));
        Ok(Self {
            inner: Arc::new(Inner {
                export: export.to_owned(),
                size_bytes: agreed.size_bytes,
                flags: agreed.flags,
                block_sizes: agreed.block_sizes,
                contexts,
                context_ids: context_ids.into(),
                payload_bytes_max,
                places: Arc::new(Semaphore::new(IN_FLIGHT_MAX)),
                frames,
                shared,
            }),
        })
    }

    /// The exports of the server that listens on a unix socket.
    pub async fn list(path: impl AsRef<Path>) -> Result<Vec<ListedExport>> {
        let mut stream = dial(path.as_ref(), "").await?;
        in_time("", negotiate::list(&mut stream)).await
    }

    /// The export's name.
    #[must_use]
    pub fn export(&self) -> &str {
        &self.inner.export
    }

    /// The export's size.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.inner.size_bytes
    }

    /// What the export can do.
    #[must_use]
    pub fn flags(&self) -> ExportFlags {
        self.inner.flags
    }

    /// Whether writes are refused.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.inner.flags.has(ExportFlags::READ_ONLY)
    }

    /// Whether a flush on one connection covers the writes of others.
    #[must_use]
    pub fn is_multi_conn(&self) -> bool {
        self.inner.flags.has(ExportFlags::CAN_MULTI_CONN)
    }

    /// The sizes of requests that the server likes, if it says.
    #[must_use]
    pub fn block_sizes(&self) -> Option<BlockSizes> {
        self.inner.block_sizes
    }

    /// The metadata contexts that the server has, of those asked for and in that order.
    #[must_use]
    pub fn contexts(&self) -> &[String] {
        &self.inner.contexts
    }

    /// Where a metadata context stands among [`Client::contexts`].
    pub fn context(&self, name: &str) -> Result<usize> {
        let found = self.inner.contexts.iter().position(|context| context == name);
        found.ok_or_else(|| {
            let kind = ErrorKind::NotOffered(format!("the metadata context {name}"));
            self.error(kind, "block status", None)
        })
    }

    /// Requests in flight.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        IN_FLIGHT_MAX - self.inner.places.available_permits()
    }

    /// Whether the connection has ended.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.inner.shared.ended().is_some()
    }

    /// Reads. At most 32 MiB at once; larger buffers are the caller's, see [`Client::read_into`].
    pub async fn read(&self, offset: u64, len: u64) -> Result<Bytes> {
        if len > u64::from(PAYLOAD_BYTES_MAX) {
            let (what, max) = ("a read", PAYLOAD_BYTES_MAX.into());
            return Err(self.error(ErrorKind::TooLong { what, len, max }, "read", Some(offset)));
        }
        if len <= self.inner.payload_bytes_max.into() {
            return self.read_one(offset, len).await.map(Bytes::from);
        }
        let mut buffer = vec![0; len as usize];
        self.read_into(offset, &mut buffer).await?;
        Ok(buffer.into())
    }

    /// Fills a buffer of any length.
    pub async fn read_into(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.check_range("read", offset, buffer.len() as u64)?;
        let mut at = offset;
        for piece in buffer.chunks_mut(self.inner.payload_bytes_max as usize) {
            piece.copy_from_slice(&self.read_one(at, piece.len() as u64).await?);
            at += piece.len() as u64;
        }
        Ok(())
    }

    async fn read_one(&self, offset: u64, len: u64) -> Result<Vec<u8>> {
        self.check_range("read", offset, len)?;
        if len == 0 {
            return Ok(Vec::new());
        }
        let (request, assembly) =
            (self.request(Command::READ, offset, len), Assembly::read(offset, len as u32));
        match self.call("read", request, Bytes::new(), assembly).await? {
            Outcome::Data(bytes) => Ok(bytes),
            _ => unreachable!("a read's assembly gives data"),
        }
    }

    /// Writes.
    pub async fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.check_write("write", None, offset, bytes.len() as u64)?;
        let mut at = offset;
        for piece in bytes.chunks(self.inner.payload_bytes_max as usize) {
            let request = self.request(Command::WRITE, at, piece.len() as u64);
            self.call("write", request, Bytes::copy_from_slice(piece), Assembly::done()).await?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// Makes a range read as zeros.
    pub async fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        let offered = Some(ExportFlags::SEND_WRITE_ZEROES);
        self.range_command("write zeroes", Command::WRITE_ZEROES, offered, offset, len).await
    }

    /// Says that a range is no longer needed. What is read there afterwards is not known.
    pub async fn trim(&self, offset: u64, len: u64) -> Result<()> {
        self.range_command("trim", Command::TRIM, Some(ExportFlags::SEND_TRIM), offset, len).await
    }

    /// Waits until everything written before is on stable storage.
    pub async fn flush(&self) -> Result<()> {
        if !self.inner.flags.has(ExportFlags::SEND_FLUSH) {
            return Err(self.error(ErrorKind::NotOffered("the flush command".to_owned()), "flush", None));
        }
        self.call("flush", self.request(Command::FLUSH, 0, 0), Bytes::new(), Assembly::done()).await.map(drop)
    }

    async fn range_command(
        &self,
        operation: &'static str,
        command: Command,
        offered: Option<u16>,
        offset: u64,
        len: u64,
    ) -> Result<()> {
        self.check_write(operation, offered, offset, len)?;
        let mut at = offset;
        while at < offset + len {
            let piece = RANGE_BYTES_MAX.min(offset + len - at);
            self.call(operation, self.request(command, at, piece), Bytes::new(), Assembly::done()).await?;
            at += piece;
        }
        Ok(())
    }

    /// What the metadata contexts say of a range: one list per context, in the order of
    /// [`Client::contexts`], each covering the whole range. Meant for ranges of up to some GiB: the answer
    /// is held in memory.
    pub async fn block_status(&self, offset: u64, len: u64) -> Result<Vec<Vec<StatusExtent>>> {
        let mut lists = vec![Vec::new(); self.inner.contexts.len()];
        let mut at = offset;
        let mut requests = 0;
        self.check_range("block status", offset, len)?;
        while at < offset + len {
            requests += 1;
            if requests > STATUS_REQUESTS_MAX {
                let error = DecodeError::Invalid("block status is answered in crumbs");
                return Err(self.error(ErrorKind::Protocol(error), "block status", Some(at)));
            }
            let (covered, answers) = self.block_status_some(at, offset + len - at).await?;
            for (list, answer) in lists.iter_mut().zip(answers) {
                answer.into_iter().for_each(|extent| push_merged(list, extent));
            }
            at += covered;
        }
        Ok(lists)
    }

    /// One request of block status: how many bytes from `offset` the server told of in every context
    /// (at least one, at most `len`), and the extents of just these.
    pub async fn block_status_some(&self, offset: u64, len: u64) -> Result<(u64, Vec<Vec<StatusExtent>>)> {
        self.check_range("block status", offset, len)?;
        if self.inner.contexts.is_empty() {
            let kind = ErrorKind::NotOffered("any of the metadata contexts asked for".to_owned());
            return Err(self.error(kind, "block status", Some(offset)));
        }
        if len == 0 {
            return Ok((0, vec![Vec::new(); self.inner.contexts.len()]));
        }
        let len = len.min(RANGE_BYTES_MAX);
        let assembly = Assembly::status(offset, len as u32, self.inner.context_ids.clone());
        let request = self.request(Command::BLOCK_STATUS, offset, len);
        let Outcome::Status(mut lists) = self.call("block status", request, Bytes::new(), assembly).await?
        else {
            unreachable!("a block status' assembly gives extents")
        };
        let told = |list: &Vec<StatusExtent>| list.iter().map(|extent| extent.len).sum::<u64>();
        let covered = lists.iter().map(told).min().unwrap_or(0);
        // What only some contexts tell of is asked for again: the lists end at one place.
        for list in &mut lists {
            assembly::clip(list, covered);
        }
        Ok((covered, lists))
    }

    async fn call(
        &self,
        operation: &'static str,
        request: Request,
        payload: Bytes,
        assembly: Assembly,
    ) -> Result<Outcome> {
        let inner = &self.inner;
        let place = inner.places.clone().acquire_owned().await.expect("the places are never closed");
        let failed = |cause: Cause| cause.error(&inner.export, operation, Some(request.offset));
        let outcome = inner.shared.send(&inner.frames, request, payload, assembly, place).map_err(failed)?;
        match inner.shared.outcome(outcome).await.map_err(failed)? {
            Outcome::Failed(error) => {
                let kind = ErrorKind::Answered { errno: error.errno, message: error.message };
                Err(self.error(kind, operation, error.offset.or(Some(request.offset))))
            }
            outcome => Ok(outcome),
        }
    }

    /// The cookie is filled in when the request is sent.
    const fn request(&self, command: Command, offset: u64, len: u64) -> Request {
        Request { flags: 0, command, cookie: 0, offset, len: len as u32 }
    }

    fn check_write(
        &self,
        operation: &'static str,
        offered: Option<u16>,
        offset: u64,
        len: u64,
    ) -> Result<()> {
        if self.is_read_only() {
            return Err(self.error(ErrorKind::ReadOnly, operation, Some(offset)));
        }
        if !offered.is_none_or(|flag| self.inner.flags.has(flag)) {
            let kind = ErrorKind::NotOffered(format!("the {operation} command"));
            return Err(self.error(kind, operation, Some(offset)));
        }
        self.check_range(operation, offset, len)
    }

    fn check_range(&self, operation: &'static str, offset: u64, len: u64) -> Result<()> {
        let size_bytes = self.inner.size_bytes;
        if offset.checked_add(len).is_some_and(|end| end <= size_bytes) {
            return Ok(());
        }
        Err(self.error(ErrorKind::OutOfBounds { len, size_bytes }, operation, Some(offset)))
    }

    fn error(&self, kind: ErrorKind, operation: &'static str, offset: Option<u64>) -> Error {
        Cause::from(kind).error(&self.inner.export, operation, offset)
    }
}

impl AsRef<Self> for Client {
    fn as_ref(&self) -> &Self {
        self
    }
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client")
            .field("export", &self.inner.export)
            .field("size_bytes", &self.inner.size_bytes)
            .field("flags", &self.inner.flags)
            .field("contexts", &self.inner.contexts)
            .finish_non_exhaustive()
    }
}

async fn dial(path: &Path, export: &str) -> Result<UnixStream> {
    UnixStream::connect(path).await.map_err(|error| Error {
        kind: ErrorKind::Connect(path.display().to_string()),
        export: export.to_owned(),
        operation: "connect",
        offset: None,
        source: Some(Arc::new(error)),
    })
}

async fn in_time<T>(
    export: &str,
    handshake: impl Future<Output = std::result::Result<T, Cause>>,
) -> Result<T> {
    let result = match tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await {
        Ok(result) => result,
        Err(_) => Err(ErrorKind::HandshakeTimeout(HANDSHAKE_TIMEOUT.as_secs()).into()),
    };
    result.map_err(|cause| cause.error(export, "connect", None))
}

/// Appends an extent, joined with the last one if their statuses are the same.
pub(crate) fn push_merged(list: &mut Vec<StatusExtent>, extent: StatusExtent) {
    match list.last_mut() {
        Some(last) if last.flags == extent.flags => last.len += extent.len,
        _ => list.push(extent),
    }
}
