//! The control socket: how the command line talks to a running site.
//!
//! `DIR/control.sock` (mode 0600: who may open it may do everything) speaks HTTP: a [`Request`] goes in as
//! JSON, lines of JSON come out ([`Line`]) while the command runs. A caller that goes away ends nothing that
//! was begun.

use std::convert::Infallible;
use std::fs::{File, Permissions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::routing::post;
use axum::{Json, Router};
use bytes::Bytes;
use futures::StreamExt;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::failure::{Code, Failure};
use crate::request::{Line, Progress, Request};

/// Lines waiting for a caller that reads slowly; progress beyond that is dropped.
const LINES_WAITING: usize = 16;
/// The longest line that a caller takes, in bytes.
const LINE_BYTES_MAX: usize = 64 << 20;

/// Where a site in `dir` listens for commands.
#[must_use]
pub fn socket(dir: &Path) -> PathBuf {
    dir.join("control.sock")
}

/// Tells a waiting caller how far a command is.
#[derive(Clone)]
pub struct Reporter(mpsc::Sender<Line>);

impl Reporter {
    /// For a command that nobody waits for.
    pub(crate) fn to_nobody() -> Self {
        Self(mpsc::channel(1).0)
    }

    /// Says how far it is; dropped if the caller does not read.
    pub fn progress(&self, message: impl Into<String>, done_bytes: u64, total_bytes: u64) {
        let _ =
            self.0.try_send(Line::Progress(Progress { message: message.into(), done_bytes, total_bytes }));
    }
}

/// Who carries commands out.
pub(crate) trait Commands: Send + Sync + 'static {
    fn run(
        self: Arc<Self>,
        request: Request,
        reporter: Reporter,
    ) -> impl Future<Output = Result<serde_json::Value, Failure>> + Send;
}

/// Listens until `stop`. Fails if another site runs in the folder.
pub(crate) async fn listen(path: &Path) -> Result<UnixListener, Failure> {
    if UnixStream::connect(path).await.is_ok() {
        let folder = path.parent().unwrap_or(path).display();
        return Err(Failure::new(Code::AlreadyRunning, format!("a site is already running in {folder}")));
    }
    let failed = |what: &str, error: std::io::Error| Failure::io(what, path, &error);
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed("remove", error)),
        _ => {}
    }
    bind_private(path).map_err(|error| failed("listen on", error))
}

/// Commands that may wait for the site to accept them.
const BACKLOG: i32 = 128;

/// A socket that is at no moment open to others: its file gets the mode that the socket has when it is bound.
fn bind_private(path: &Path) -> std::io::Result<UnixListener> {
    let socket = File::from(OwnedFd::from(Socket::new(Domain::UNIX, Type::STREAM, None)?));
    socket.set_permissions(Permissions::from_mode(0o600))?;
    let socket = Socket::from(OwnedFd::from(socket));
    socket.bind(&SockAddr::unix(path)?)?;
    socket.set_nonblocking(true)?;
    socket.listen(BACKLOG)?;
    UnixListener::from_std(OwnedFd::from(socket).into())
}

pub(crate) async fn serve<C: Commands>(listener: UnixListener, commands: Arc<C>, stop: CancellationToken) {
    let router = Router::new().route("/v1/command", post(command::<C>)).with_state(commands);
    let served = axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned()).await;
    if let Err(error) = served {
        tracing::error!(%error, "the control socket failed");
    }
}

async fn command<C: Commands>(State(commands): State<Arc<C>>, Json(request): Json<Request>) -> Body {
    let (lines, waiting) = mpsc::channel(LINES_WAITING);
    let reporter = Reporter(lines.clone());
    // A task of its own: a caller that goes away does not cancel it.
    tokio::spawn(async move {
        let line = match commands.run(request, reporter).await {
            Ok(result) => Line::Result(result),
            Err(failure) => Line::Error(failure),
        };
        let _ = lines.send(line).await;
    });
    let lines =
        futures::stream::unfold(waiting, |mut waiting| async { Some((waiting.recv().await?, waiting)) });
    Body::from_stream(lines.map(|line| {
        let mut text = serde_json::to_vec(&line).expect("a line can be written as JSON");
        text.push(b'\n');
        Ok::<_, Infallible>(Bytes::from(text))
    }))
}

/// Asks the site that runs in `dir`, and passes on how far it is.
pub async fn ask(
    dir: &Path,
    request: &Request,
    mut progress: impl FnMut(Progress),
) -> Result<serde_json::Value, Failure> {
    let path = socket(dir);
    let stream = UnixStream::connect(&path).await.map_err(|error| not_running(dir, &error))?;
    let broken = |error: &dyn std::fmt::Display| {
        let message = format!("the site in {} went away before its answer: {error}", dir.display());
        Failure::transient(Code::NotRunning, message)
    };
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| broken(&error))?;
    let connection = tokio::spawn(connection);
    let body = serde_json::to_vec(request).expect("a request can be written as JSON");
    let post = http::Request::post("/v1/command")
        .header(http::header::HOST, "site")
        .header(http::header::CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(body)))
        .expect("a well-formed request");
    let response = sender.send_request(post).await.map_err(|error| broken(&error))?;
    if !response.status().is_success() {
        let message =
            format!("the running site does not know this command ({}); restart it", response.status());
        return Err(Failure::new(Code::Internal, message));
    }
    let mut body = response.into_body();
    let mut pending = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| broken(&error))?;
        pending.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
        while let Some(end) = pending.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = pending.drain(..=end).collect();
            match serde_json::from_slice(&line).map_err(|error| broken(&error))? {
                Line::Progress(now) => progress(now),
                Line::Result(value) => {
                    connection.abort();
                    return Ok(value);
                }
                Line::Error(failure) => return Err(failure),
            }
        }
        if pending.len() > LINE_BYTES_MAX {
            return Err(broken(&"its answer does not end"));
        }
    }
    Err(broken(&"it ended without an answer"))
}

fn not_running(dir: &Path, error: &std::io::Error) -> Failure {
    if let Err(failure) = Config::load(dir)
        && failure.code == Code::NoSite
    {
        return failure;
    }
    let dir = dir.display();
    let message =
        format!("the site in {dir} is not running ({error}); start it with 'afterimage --dir {dir} serve'");
    Failure::transient(Code::NotRunning, message)
}
