//! One connection to a peer: TCP, TLS with its pinned certificate, HTTP/1.1.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Limited};
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use rustls::CertificateError;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;

use crate::error::{Error, ErrorKind, Result};
use crate::outgoing::{Outgoing, Progress};
use crate::trust::Distrust;
use crate::{socket, tls};

/// How long TCP and TLS together may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection that takes one request at a time.
pub(crate) struct Connection {
    http: SendRequest<Outgoing>,
    /// When it last answered.
    used: Instant,
}

impl Connection {
    /// Connects and checks who is there.
    pub async fn open(connector: &TlsConnector, address: &str) -> Result<Self> {
        match timeout(CONNECT_TIMEOUT, Self::connect(connector, address)).await {
            Ok(outcome) => outcome,
            Err(_) => {
                let message = format!("no connection within {} s", CONNECT_TIMEOUT.as_secs());
                Err(Error::new(ErrorKind::Timeout, message))
            }
        }
    }

    async fn connect(connector: &TlsConnector, address: &str) -> Result<Self> {
        let tcp = TcpStream::connect(address)
            .await
            .and_then(socket::prepare)
            .map_err(|error| Error::link(format!("cannot connect: {error}")).caused_by(error))?;
        let stream = connector
            .connect_with(tls::server_name(), tcp, |tls| tls.set_buffer_limit(Some(socket::TLS_BUFFER_BYTES)))
            .await
            .map_err(tls_error)?;
        let (http, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| broken(&error))?;
        // Ends by itself when `http` is dropped or the peer hangs up; what went wrong is told to `http`.
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection to a peer broke");
            }
        });
        Ok(Self { http, used: Instant::now() })
    }

    /// Whether it can be used again.
    pub fn is_fresh(&self, idle_max: Duration) -> bool {
        self.http.is_ready() && self.used.elapsed() < idle_max
    }

    /// Sends a request and reads the whole answer, of at most `bytes_max`. `patience` is how long nothing may
    /// move, in either direction.
    pub async fn exchange(
        &mut self,
        request: Request<Outgoing>,
        progress: &Progress,
        patience: Duration,
        bytes_max: usize,
    ) -> Result<(StatusCode, Bytes)> {
        self.http.ready().await.map_err(|error| broken(&error))?;
        let response = in_time(self.http.send_request(request), progress, patience).await?;
        let response = response.map_err(|error| broken(&error))?;
        let (head, body) = response.into_parts();
        progress.touch();
        let body = in_time(Limited::new(body, bytes_max).collect(), progress, patience).await?;
        let body = body.map_err(|error| match error.downcast_ref::<http_body_util::LengthLimitError>() {
            Some(_) => Error::protocol(format!("its answer is longer than {bytes_max} bytes")),
            None => Error::link(format!("its answer broke off: {error}")),
        })?;
        self.used = Instant::now();
        Ok((head.status, body.to_bytes()))
    }
}

/// Waits for `future` for as long as something moves.
async fn in_time<T>(future: impl Future<Output = T>, progress: &Progress, patience: Duration) -> Result<T> {
    let mut future = std::pin::pin!(future);
    loop {
        let deadline = progress.last() + patience;
        match tokio::time::timeout_at(deadline, future.as_mut()).await {
            Ok(value) => return Ok(value),
            Err(_) if progress.last() + patience > deadline => {}
            Err(_) => {
                let message = format!("no answer within {} s", patience.as_secs_f32());
                return Err(Error::new(ErrorKind::Timeout, message));
            }
        }
    }
}

fn broken(error: &hyper::Error) -> Error {
    let mut message = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        message = format!("{message}: {cause}");
        source = cause.source();
    }
    if error.is_parse() {
        return Error::protocol(format!("it does not speak HTTP as expected: {message}"));
    }
    Error::link(format!("the connection broke: {message}"))
}

/// Tells a wrong certificate from a handshake that failed for another reason, and both from a broken link.
fn tls_error(error: std::io::Error) -> Error {
    let Some(tls) = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) else {
        return Error::link(format!("the connection broke in the TLS handshake: {error}")).caused_by(error);
    };
    match tls {
        rustls::Error::InvalidCertificate(CertificateError::Other(other)) => {
            let distrust = other.0.downcast_ref::<Distrust>();
            let message = distrust.map_or_else(|| tls.to_string(), ToString::to_string);
            if matches!(distrust, Some(Distrust::NotToday { .. })) {
                return Error::new(ErrorKind::CertificateNotToday, message);
            }
            let advice = "was its identity made anew, or does somebody else answer at that address? If it is its own, invite it again with --replace, or accept its invite with --replace";
            Error::new(ErrorKind::WrongCertificate, format!("{message}; {advice}"))
        }
        rustls::Error::InvalidCertificate(_) => Error::new(
            ErrorKind::WrongCertificate,
            format!("it does not prove that its certificate is its own: {tls}"),
        ),
        _ => Error::protocol(format!("the TLS handshake failed: {tls}; is that an Afterimage site?")),
    }
}

/// A connector for one peer.
pub(crate) fn connector(config: rustls::ClientConfig) -> TlsConnector {
    TlsConnector::from(Arc::new(config))
}
