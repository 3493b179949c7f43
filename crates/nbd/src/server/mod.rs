//! The server: exports on a unix socket.
//!
//! What a client can hold is bounded, whatever it sends: [`Limits`] says by how much. Memory is given back
//! as replies are taken from the socket, so a client that asks and does not read stands still by itself.
//! A disk's calls run on blocking threads, of which one server uses a bounded number.

mod buffers;
mod exports;
mod negotiate;
mod replies;
mod requests;
mod session;
mod socket;

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::buffers::Buffers;
use self::exports::Exports;
use self::session::Session;
use self::socket::SocketFile;
use crate::disk::Disk;
use crate::error::{Cause, Error, ErrorKind, Result};

/// After a failure to accept (too many open files) others get a while to go away.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// What clients can hold of a server.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Connections at once; further ones are closed.
    pub connections: usize,
    /// Requests of one connection that are worked on at once; further ones wait in the socket.
    pub requests: usize,
    /// Calls to disks at once, of all connections.
    pub disk_calls: usize,
    /// How long a negotiation may take.
    pub handshake: Duration,
    /// How long a client may stop in the middle of a request or a reply. Between requests it may be still for
    /// as long as it likes.
    pub stall: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 64,
            requests: 16,
            disk_calls: 64,
            handshake: Duration::from_secs(15),
            stall: Duration::from_secs(120),
        }
    }
}

/// Longer reads and writes go to the disk in pieces, cut at multiples of this.
const PIECE_BYTES: u64 = 256 << 10;
/// Bytes of payload that one connection can hold.
const CONNECTION_BYTES: usize = 4 << 20;
/// Bytes of payload that go in one piece, because the client knows no structured replies or wants no
/// fragments, and are too many for that; for all connections together.
const WHOLE_BYTES: usize = 64 << 20;

/// Exports on a unix socket. Cheap to clone; the socket goes with the last clone.
#[derive(Clone)]
pub struct Server {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    socket: SocketFile,
    listener: Mutex<Option<UnixListener>>,
}

/// What connections use.
struct Shared {
    exports: Exports,
    limits: Limits,
    connections: Arc<Semaphore>,
    disk_calls: Arc<Semaphore>,
    whole_bytes: Arc<Semaphore>,
    buffers: Arc<Buffers>,
    ended: CancellationToken,
    tasks: TaskTracker,
}

impl Server {
    /// Makes a socket that only this user can connect to. A socket that a dead server left there is replaced.
    /// Clients can connect from now on, and are answered from [`Server::serve`] on.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn bind(path: impl AsRef<Path>) -> Result<Self> {
        Self::bind_with(path, Limits::default())
    }

    /// The same with other limits.
    pub fn bind_with(path: impl AsRef<Path>, limits: Limits) -> Result<Self> {
        let path = path.as_ref();
        let (socket, listener) = SocketFile::bind(path).map_err(|error| Error {
            kind: ErrorKind::Listen(path.display().to_string()),
            export: String::new(),
            operation: "listen",
            offset: None,
            source: Some(Arc::new(error)),
        })?;
        let shared = Shared {
            exports: Exports::default(),
            limits,
            connections: Arc::new(Semaphore::new(limits.connections)),
            disk_calls: Arc::new(Semaphore::new(limits.disk_calls.max(1))),
            whole_bytes: Arc::new(Semaphore::new(WHOLE_BYTES)),
            buffers: Arc::default(),
            ended: CancellationToken::new(),
            tasks: TaskTracker::new(),
        };
        let listener = Mutex::new(Some(listener));
        Ok(Self { inner: Arc::new(Inner { shared: Arc::new(shared), socket, listener }) })
    }

    /// The socket's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.inner.socket.path
    }

    /// What other programs call an export of this server.
    #[must_use]
    pub fn uri(&self, name: &str) -> String {
        // Percent-encodes what a URI's path and query cannot hold, or would split on.
        let encode = |bytes: &[u8], keep: &[u8]| -> String {
            let one = |&byte: &u8| match byte {
                b if b.is_ascii_alphanumeric() || keep.contains(&b) => char::from(b).to_string(),
                b => format!("%{b:02X}"),
            };
            bytes.iter().map(one).collect()
        };
        let path = std::os::unix::ffi::OsStrExt::as_bytes(self.path().as_os_str());
        format!("nbd+unix:///{}?socket={}", encode(name.as_bytes(), b"-._~"), encode(path, b"-._~/"))
    }

    /// Shows a disk under a name. It is open to clients at once.
    pub fn add(&self, name: &str, disk: Arc<dyn Disk>) -> Result<()> {
        let shared = &self.inner.shared;
        shared.exports.add(name, disk, shared.ended.child_token())
    }

    /// Shows it no longer: its connections are ended, and when this returns no call to the disk is under way
    /// and the server has let go of it. Gives whether there was such an export.
    pub async fn remove(&self, name: &str) -> bool {
        self.inner.shared.exports.remove(name).await
    }

    /// Whether a client has it open.
    #[must_use]
    pub fn is_used(&self, name: &str) -> bool {
        self.inner.shared.exports.is_used(name)
    }

    /// The names of the exports, in order.
    #[must_use]
    pub fn exports(&self) -> Vec<String> {
        self.inner.shared.exports.names()
    }

    /// Answers clients until `shutdown`, then ends their connections and waits until no call to a disk is
    /// under way. The server ends with this: it can be served once.
    pub async fn serve(&self, shutdown: impl Future<Output = ()>) -> Result<()> {
        let taken = self.inner.listener.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(listener) = taken else {
            return Err(Cause::from(ErrorKind::Served).error("", "serve", None));
        };
        let _stops = Stops(&self.inner);
        tokio::select! {
            never = accept(&self.inner.shared, &listener) => match never {},
            () = shutdown => {}
        }
        drop(listener);
        self.inner.stop();
        self.inner.shared.tasks.close();
        self.inner.shared.tasks.wait().await;
        Ok(())
    }

    /// Answers one client over any stream, until the connection ends. It counts as a connection of the server.
    pub async fn serve_stream<S>(&self, stream: S)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        if let Some(connection) = self.inner.shared.connection() {
            self.inner.shared.tasks.track_future(connection.serve(stream)).await;
        }
    }
}

impl Inner {
    fn stop(&self) {
        self.socket.remove();
        self.shared.ended.cancel();
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Stops the server even if [`Server::serve`] is dropped half-way.
struct Stops<'a>(&'a Inner);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

async fn accept(shared: &Arc<Shared>, listener: &UnixListener) -> std::convert::Infallible {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => match shared.connection() {
                Some(connection) => drop(shared.tasks.spawn(connection.serve(stream))),
                None => tracing::warn!(
                    connections = shared.limits.connections,
                    "an NBD client was turned away: too many connections"
                ),
            },
            Err(error) => {
                tracing::warn!(%error, "an NBD client could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// A client's place among the connections.
struct Connection {
    shared: Arc<Shared>,
    _place: OwnedSemaphorePermit,
}

impl Shared {
    fn connection(self: &Arc<Self>) -> Option<Connection> {
        let place = self.connections.clone().try_acquire_owned().ok()?;
        Some(Connection { shared: self.clone(), _place: place })
    }
}

impl Connection {
    async fn serve<S>(self, mut stream: S)
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let negotiation = negotiate::negotiate(&mut stream, &self.shared.exports);
        let agreed = tokio::select! {
            () = self.shared.ended.cancelled() => return,
            agreed = tokio::time::timeout(self.shared.limits.handshake, negotiation) => agreed,
        };
        let agreed = match agreed {
            Ok(Ok(Some(agreed))) => agreed,
            Ok(Ok(None)) => return,
            Ok(Err(error)) => {
                tracing::debug!(%error, "an NBD client did not get through the negotiation");
                return;
            }
            Err(_) => {
                tracing::debug!("an NBD client did not finish the negotiation in time");
                return;
            }
        };
        let export = agreed.opened.export.name.clone();
        tracing::debug!(%export, "an NBD client has opened an export");
        match Session::new(self.shared.clone(), agreed).run(stream).await {
            Ok(()) => tracing::debug!(%export, "an NBD client has gone"),
            Err(error) => tracing::debug!(%export, %error, "an NBD connection broke"),
        }
    }
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server")
            .field("path", &self.path())
            .field("exports", &self.exports())
            .finish_non_exhaustive()
    }
}
