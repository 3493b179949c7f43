//! The one HTTPS port of a site: accepts connections, finds out who is there, hands requests to the router.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::BufReader;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tower::ServiceExt;

use crate::certificate::Shown;
use crate::doors::{Doors, Place};
use crate::endpoint::ClientIdentity;
use crate::identity::{Fingerprint, Identity};
use crate::limits::Limits;
use crate::socket;
use crate::tls;

/// After the system refused a connection for want of files or memory: long enough to let others end.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Serves `app` on `listener` until `shutdown`; then lets running requests end, within a limit.
///
/// Each request has a [`ClientIdentity`] among its extensions.
pub async fn serve(
    listener: TcpListener,
    identity: &Identity,
    app: Router,
    shutdown: impl Future<Output = ()> + Send,
) -> io::Result<()> {
    serve_with(listener, identity, app, Limits::default(), shutdown).await
}

/// [`serve`] with other limits than the default ones.
pub async fn serve_with(
    listener: TcpListener,
    identity: &Identity,
    app: Router,
    limits: Limits,
    shutdown: impl Future<Output = ()> + Send,
) -> io::Result<()> {
    let config = tls::server_config(identity).map_err(io::Error::other)?;
    let (ending, ends) = watch::channel(false);
    let host = Host { acceptor: TlsAcceptor::from(Arc::new(config)), app, limits, ends };
    let mut connections = JoinSet::new();
    tokio::select! {
        () = accept_all(&listener, &host, &mut connections) => {}
        () = shutdown => {}
    }
    drop(listener);
    let _ = ending.send(true);
    let all = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(host.limits.shutdown, all).await.is_err() {
        tracing::warn!(connections = connections.len(), "connections did not end in time and are cut");
    }
    Ok(())
}

/// What every connection needs.
#[derive(Clone)]
struct Host {
    acceptor: TlsAcceptor,
    app: Router,
    limits: Limits,
    ends: watch::Receiver<bool>,
}

async fn accept_all(listener: &TcpListener, host: &Host, connections: &mut JoinSet<()>) {
    let doors = Doors::new(host.limits.connections);
    loop {
        while connections.try_join_next().is_some() {}
        match listener.accept().await {
            Ok((tcp, remote)) => {
                let host = host.clone();
                let place = Arc::new(doors.enter(remote.ip()));
                let number = place.number();
                let task = connections.spawn(async move { host.connection(tcp, remote, place).await });
                doors.runs(number, task);
            }
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Whether accepting failed because of the connection that was to be accepted, not of this process.
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

type Stream = TlsStream<BufReader<TcpStream>>;

impl Host {
    async fn connection(mut self, tcp: TcpStream, remote: SocketAddr, place: Arc<Place>) {
        let handshake = tokio::time::timeout(self.limits.handshake, self.shake_hands(tcp));
        match handshake.await {
            Ok(Ok(stream)) => {
                let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
                let fingerprint = chain.first().map(Fingerprint::of);
                let shown = Shown::of(chain).map(Arc::new);
                self.requests(stream, ClientIdentity { remote, fingerprint, shown }, place).await;
            }
            Ok(Err(error)) => tracing::debug!(%remote, %error, "no TLS"),
            Err(_) => tracing::debug!(%remote, "the TLS handshake took too long"),
        }
    }

    async fn shake_hands(&self, tcp: TcpStream) -> io::Result<Stream> {
        let tcp = socket::prepare(tcp)?;
        self.acceptor.accept_with(tcp, |tls| tls.set_buffer_limit(Some(socket::TLS_BUFFER_BYTES))).await
    }

    async fn requests(&mut self, stream: Stream, client: ClientIdentity, place: Arc<Place>) {
        let app = self.app.clone();
        let remote = client.remote;
        let service = service_fn(move |request: http::Request<Incoming>| {
            let mut request = request.map(Body::new);
            request.extensions_mut().insert(client.clone());
            request.extensions_mut().insert(place.clone());
            app.clone().oneshot(request)
        });
        let mut http = hyper::server::conn::http1::Builder::new();
        http.timer(TokioTimer::new()).header_read_timeout(self.limits.head);
        let mut connection = pin!(http.serve_connection(TokioIo::new(stream), service));
        let ending = async { drop(self.ends.wait_for(|ends| *ends).await) };
        let outcome = tokio::select! {
            outcome = connection.as_mut() => outcome,
            () = ending => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = outcome {
            tracing::debug!(%remote, %error, "a connection broke");
        }
    }
}
