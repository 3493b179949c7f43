//! One client with one export, after the negotiation.
//!
//! One future takes requests in, one writes replies; between them each request is a task of its own, so
//! that replies go out as they are ready. At the end the socket is closed at once, and then the calls to the
//! disk that are still under way are waited for.

use std::io;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::task::TaskTracker;

use super::exports::Use;
use super::negotiate::Agreed;
use super::replies::{Reply, write_replies};
use super::requests::Requests;
use super::{CONNECTION_BYTES, Shared};
use crate::codec::Errno;
use crate::disk::Disk;

/// Replies that wait for the socket; those with a payload are bounded by its memory as well.
const REPLIES_QUEUED: usize = 64;

/// What the requests of a connection share.
pub(super) struct Session {
    pub shared: Arc<Shared>,
    pub opened: Use,
    pub structured: bool,
    pub allocation: bool,
    pub tasks: TaskTracker,
    memory: Arc<Semaphore>,
    places: Arc<Semaphore>,
}

impl Session {
    pub fn new(shared: Arc<Shared>, agreed: Agreed) -> Arc<Self> {
        let Agreed { opened, structured, allocation } = agreed;
        let places = Arc::new(Semaphore::new(shared.limits.requests.max(1)));
        let memory = Arc::new(Semaphore::new(CONNECTION_BYTES));
        Arc::new(Self { shared, opened, structured, allocation, tasks: TaskTracker::new(), memory, places })
    }

    /// Answers requests until the client goes away, breaks the protocol or stalls, or the export is removed.
    pub async fn run<S>(self: Arc<Self>, stream: S) -> io::Result<()>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (input, output) = tokio::io::split(stream);
        let (replies, outgoing) = mpsc::channel(REPLIES_QUEUED);
        let requests = Requests { session: self.clone(), replies };
        let result = tokio::select! {
            result = both(requests.take_all(input), write_replies(output, outgoing, self.shared.limits.stall)) => result,
            () = self.opened.export.ended.cancelled() => Ok(()),
        };
        self.tasks.close();
        self.tasks.wait().await;
        result
    }

    /// A place among the requests worked on.
    pub async fn place(&self) -> OwnedSemaphorePermit {
        self.places.clone().acquire_owned().await.expect("places are never closed")
    }

    /// Room for that many bytes of payload.
    pub async fn memory(&self, bytes: usize) -> OwnedSemaphorePermit {
        let from = if bytes <= CONNECTION_BYTES { &self.memory } else { &self.shared.whole_bytes };
        from.clone().acquire_many_owned(bytes as u32).await.expect("memory is never closed")
    }

    /// Calls the disk on a blocking thread.
    pub async fn call<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&dyn Disk) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let call = self.shared.disk_calls.clone().acquire_owned().await.expect("calls are never closed");
        let session = self.clone();
        let called = self.tasks.spawn_blocking(move || {
            let _call = call;
            work(&*session.opened.export.disk)
        });
        called.await.unwrap_or_else(|error| {
            tracing::error!(export = %self.opened.export.name, %error, "a call to a disk did not end well");
            Err(io::Error::other("the disk failed"))
        })
    }
}

/// Both directions: when the client has said all, what it asked is answered still.
async fn both(
    reading: impl Future<Output = io::Result<()>>,
    writing: impl Future<Output = io::Result<()>>,
) -> io::Result<()> {
    tokio::pin!(writing);
    tokio::select! {
        read = reading => {
            read?;
            writing.await
        }
        wrote = &mut writing => wrote,
    }
}

/// What is known of one request while it is worked on, and where its replies go.
pub(super) struct Answer {
    pub session: Arc<Session>,
    pub replies: mpsc::Sender<Reply>,
    pub cookie: u64,
    /// The request's place, until it is answered.
    pub _place: OwnedSemaphorePermit,
}

impl Answer {
    /// Sends a reply; whether anybody is there to take it.
    pub async fn send(&self, reply: Reply) -> bool {
        self.replies.send(reply).await.is_ok()
    }

    /// Says that it is done, or why not.
    pub async fn done(self, outcome: io::Result<()>) {
        match outcome {
            Ok(()) => drop(self.send(Reply::simple(self.cookie, None, bytes::Bytes::new())).await),
            Err(error) => self.failed(&error).await,
        }
    }

    pub async fn failed(self, error: &io::Error) {
        tracing::debug!(export = %self.session.opened.export.name, %error, "an NBD request failed");
        self.refused(errno_of(error), &error.to_string()).await;
    }

    pub async fn refused(self, errno: Errno, words: &str) {
        let reply = if self.session.structured {
            Reply::error(self.cookie, errno, words)
        } else {
            Reply::simple(self.cookie, Some(errno), bytes::Bytes::new())
        };
        self.send(reply).await;
    }
}

/// The protocol's number for a failure: it has few.
fn errno_of(error: &io::Error) -> Errno {
    use nix::errno::Errno as Os;
    match error.raw_os_error().map(Os::from_raw) {
        Some(Os::EPERM | Os::EACCES | Os::EROFS) => Errno::EPERM,
        Some(Os::ENOMEM) => Errno::ENOMEM,
        Some(Os::EINVAL) => Errno::EINVAL,
        Some(Os::ENOSPC | Os::EDQUOT | Os::EFBIG) => Errno::ENOSPC,
        Some(Os::EOVERFLOW) => Errno::EOVERFLOW,
        Some(Os::ENOTSUP) => Errno::ENOTSUP,
        Some(Os::ESHUTDOWN) => Errno::ESHUTDOWN,
        Some(_) => Errno::EIO,
        None if error.kind() == io::ErrorKind::StorageFull => Errno::ENOSPC,
        None if error.kind() == io::ErrorKind::PermissionDenied => Errno::EPERM,
        None => Errno::EIO,
    }
}
