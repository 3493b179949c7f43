//! Asks a peer.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode, header};
use model::{LogId, LogNumber, Timestamp, VmId, VmName};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio_rustls::TlsConnector;

use crate::certificate::Shown;
use crate::connection::{Connection, connector};
use crate::error::{Error, ErrorKind, Result};
use crate::identity::{Fingerprint, Identity};
use crate::invite::Invite;
use crate::limiter::RateLimiter;
use crate::limits::JSON_BYTES_MAX;
use crate::messages::{
    DigestRequest, ErrorBody, HandOver, HandedOver, InStep, Introduction, Offer, RelationshipStatus,
    Relocate, Relocation, Report, SiteInfo, TakeOver, TakenOver, UploadState, check_site_name, tidy,
};
use crate::outgoing::{Outgoing, Pieces, Progress};
use crate::succession::NextKey;
use crate::tls::{self, KnownServer};
use crate::trust::{Ca, Pin};

/// How long a peer may think about a question, and about one that makes it read a disk.
const ANSWER_TIME: Duration = Duration::from_secs(60);
const DIGESTS_TIME: Duration = Duration::from_secs(300);
/// How long nothing may move while a segment is sent and taken.
const SEGMENT_TIME: Duration = Duration::from_secs(120);
/// How long a peer may take to make a log durable. A peer that is gone shows much sooner, in its silence.
const DURABLE_TIME: Duration = Duration::from_secs(15 * 60);
/// Idle connections that are kept, and for how long; less than a server keeps them.
const IDLE_MAX: usize = 4;
const IDLE_TIME: Duration = Duration::from_secs(45);

/// A peer to talk to. Share it in an `Arc`: it keeps connections open between requests.
pub struct Client {
    address: String,
    connector: TlsConnector,
    idle: Mutex<Vec<Connection>>,
    seen: Arc<Mutex<Option<Shown>>>,
}

/// What came of an invite.
#[derive(Debug, Clone)]
pub struct Accepted {
    /// What the site that made it says of itself.
    pub site: SiteInfo,
    /// Its certificate.
    pub shown: Option<Shown>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("address", &self.address).finish_non_exhaustive()
    }
}

/// What is sent, and what it may cost.
struct Question<'a> {
    method: Method,
    path: String,
    operation: &'a str,
    body: Pieces,
    limiter: Option<&'a RateLimiter>,
    patience: Duration,
    answer_bytes_max: usize,
    /// Whether asking twice does no harm: then a connection that had died unnoticed is no failure.
    repeatable: bool,
}

impl<'a> Question<'a> {
    fn new(method: Method, path: String, operation: &'a str) -> Self {
        Self {
            method,
            path,
            operation,
            body: Pieces::default(),
            limiter: None,
            patience: ANSWER_TIME,
            answer_bytes_max: JSON_BYTES_MAX,
            repeatable: true,
        }
    }

    fn json<T: Serialize>(mut self, body: &T) -> Result<Self> {
        let bytes = serde_json::to_vec(body).map_err(|error| Error::protocol(error.to_string()))?;
        if bytes.len() > JSON_BYTES_MAX {
            let message = format!(
                "{} of {} bytes cannot be sent: {JSON_BYTES_MAX} at most",
                self.operation,
                bytes.len()
            );
            return Err(Error::protocol(message));
        }
        self.body = bytes.into();
        Ok(self)
    }
}

impl Client {
    /// A client for the peer at `address` (`host:port`) with this certificate; connects when it is needed.
    pub fn new(identity: &Identity, address: impl Into<String>, peer: Fingerprint) -> Result<Self> {
        Self::knowing(identity, address, peer.into(), None)
    }

    /// The same for a peer that is known by more, or by other things, than one certificate.
    pub fn knowing(
        identity: &Identity,
        address: impl Into<String>,
        pin: Pin,
        ca: Option<Ca>,
    ) -> Result<Self> {
        let seen: Arc<Mutex<Option<Shown>>> = Arc::default();
        let config = tls::client_config(identity, KnownServer { pin, ca, seen: seen.clone() })
            .map_err(|error| Error::protocol(format!("TLS cannot be set up: {error}")))?;
        Ok(Self { address: address.into(), connector: connector(config), idle: Mutex::default(), seen })
    }

    /// The certificate that the peer has shown last, on a connection that was trusted.
    #[must_use]
    pub fn seen(&self) -> Option<Shown> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Tells the peer which key this site will have next.
    pub async fn announce(&self, next: &NextKey) -> Result<()> {
        let question = Question::new(Method::POST, "/v1/next-key".to_owned(), "announce a key");
        self.ask(question.json(next)?).await.map(drop)
    }

    /// Where the peer is.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Brings an invite to the site that made it: from then on that site trusts ours, which calls itself
    /// `name` and can be reached at `address`.
    pub async fn accept_invite(
        identity: &Identity,
        invite: &Invite,
        name: &str,
        address: &str,
    ) -> Result<Accepted> {
        let unusable = |error: &dyn fmt::Display| Error::new(ErrorKind::Invite, error.to_string());
        invite.check_time(Timestamp::from(std::time::SystemTime::now())).map_err(|error| unusable(&error))?;
        let client = Self::new(identity, invite.address.as_str(), invite.fingerprint)?;
        let introduction = Introduction {
            secret: invite.secret.clone(),
            name: name.to_owned(),
            address: address.to_owned(),
        };
        let question = Question {
            repeatable: false,
            ..Question::new(Method::POST, "/v1/peers".to_owned(), "accepting its invite")
                .json(&introduction)?
        };
        let site: SiteInfo = client.ask_json(question).await?;
        check_site_name(&site.name).map_err(|error| Error::protocol(error.to_string()))?;
        Ok(Accepted { site, shown: client.seen() })
    }

    /// Offers a relationship, or says again what it is, and hears what the replica has.
    pub async fn offer(&self, offer: &Offer) -> Result<RelationshipStatus> {
        let question = Question::new(Method::PUT, relationship(offer.vm), "offer").json(offer)?;
        self.ask_json(question).await
    }

    /// Tells where this site stands with the VM.
    pub async fn report(&self, vm: VmId, report: &Report) -> Result<()> {
        let path = format!("{}/report", relationship(vm));
        self.ask(Question::new(Method::POST, path, "report").json(report)?).await.map(drop)
    }

    /// Tells that the VM is no longer protected from here.
    pub async fn withdraw(&self, vm: VmId) -> Result<()> {
        self.ask(Question::new(Method::DELETE, relationship(vm), "withdraw")).await.map(drop)
    }

    /// Gives a VM that is off to the replica's site.
    pub async fn hand_over(&self, vm: VmId, newest: &HandOver) -> Result<HandedOver> {
        let path = format!("{}/hand-over", relationship(vm));
        let mut handed: HandedOver =
            self.ask_json(Question::new(Method::POST, path, "hand over").json(newest)?).await?;
        handed.tidy();
        Ok(handed)
    }

    /// Becomes the primary of a VM whose replica is there, in the place of another site of the same trust group.
    /// With `in_step` nothing is compared: the chain there has all that there is.
    pub async fn take_over(&self, vm_name: &VmName, in_step: Option<InStep>) -> Result<TakenOver> {
        let wanted = TakeOver { vm_name: vm_name.clone(), in_step };
        let question = Question::new(Method::POST, "/v1/take-over".to_owned(), "take over").json(&wanted)?;
        self.ask_json(question).await
    }

    /// Has the replica of a VM moved from there to another site; asks how far that is.
    pub async fn relocate(&self, vm: VmId, wanted: &Relocate) -> Result<Relocation> {
        let path = format!("{}/relocate", relationship(vm));
        let mut relocation: Relocation =
            self.ask_json(Question::new(Method::POST, path, "relocate").json(wanted)?).await?;
        relocation.tidy();
        Ok(relocation)
    }

    /// The digests of a stretch of a disk in the replica's newest state.
    pub async fn digests(&self, vm: VmId, request: &DigestRequest) -> Result<Vec<[u8; 16]>> {
        let bytes = usize::try_from(request.digests().saturating_mul(16)).unwrap_or(usize::MAX);
        let path = format!("{}/digests", relationship(vm));
        let question = Question {
            patience: DIGESTS_TIME,
            answer_bytes_max: bytes.max(JSON_BYTES_MAX),
            ..Question::new(Method::POST, path, "digests").json(request)?
        };
        let answer = self.ask(question).await?;
        let (digests, rest) = answer.as_chunks::<16>();
        if answer.len() != bytes || !rest.is_empty() {
            let message = format!("{} bytes of digests came where {bytes} were asked for", answer.len());
            return Err(Error::protocol(message).at(&self.address, "digests"));
        }
        Ok(digests.to_vec())
    }

    /// How much of a log the replica has.
    pub async fn upload_state(&self, vm: VmId, number: LogNumber, id: LogId) -> Result<UploadState> {
        self.ask_json(Question::new(Method::GET, log(vm, number, id), "asking how far the upload is")).await
    }

    /// Sends the next bytes of a log.
    pub(crate) async fn append(
        &self,
        (vm, number, id): (VmId, LogNumber, LogId),
        offset: u64,
        bytes: Pieces,
        last: bool,
        limiter: Option<&RateLimiter>,
    ) -> Result<UploadState> {
        let path = format!("{}?offset={offset}&last={last}", log(vm, number, id));
        let question = Question {
            body: bytes,
            limiter,
            patience: if last { DURABLE_TIME } else { SEGMENT_TIME },
            repeatable: false,
            ..Question::new(Method::PATCH, path, "upload")
        };
        self.ask_json(question).await
    }

    async fn ask_json<T: DeserializeOwned>(&self, question: Question<'_>) -> Result<T> {
        let operation = question.operation;
        let answer = self.ask(question).await?;
        serde_json::from_slice(&answer).map_err(|error| {
            Error::protocol(format!("its answer is not what is expected: {error}"))
                .at(&self.address, operation)
        })
    }

    async fn ask(&self, question: Question<'_>) -> Result<Bytes> {
        let (status, body) =
            self.exchange(&question).await.map_err(|error| error.at(&self.address, question.operation))?;
        judge(status, body).map_err(|error| error.at(&self.address, question.operation))
    }

    /// Over a connection that is open, if there is one.
    async fn exchange(&self, question: &Question<'_>) -> Result<(StatusCode, Bytes)> {
        if let Some(connection) = self.idle_connection() {
            match self.exchange_over(connection, question).await {
                Err(error) if question.repeatable && error.kind() == ErrorKind::Link => {}
                outcome => return outcome,
            }
        }
        self.exchange_over(Connection::open(&self.connector, &self.address).await?, question).await
    }

    async fn exchange_over(
        &self,
        mut connection: Connection,
        question: &Question<'_>,
    ) -> Result<(StatusCode, Bytes)> {
        let progress = Progress::new();
        let body = Outgoing::new(question.body.clone(), question.limiter.cloned(), progress.clone());
        let request = Request::builder()
            .method(&question.method)
            .uri(&question.path)
            .header(header::HOST, &self.address)
            .header(header::USER_AGENT, concat!("afterimage/", env!("CARGO_PKG_VERSION")))
            .body(body)
            .map_err(|error| Error::protocol(format!("{:?} cannot be asked: {error}", self.address)))?;
        let answer =
            connection.exchange(request, &progress, question.patience, question.answer_bytes_max).await?;
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < IDLE_MAX {
            idle.push(connection);
        }
        Ok(answer)
    }

    /// The connection used last that still lives; those that do not are dropped.
    fn idle_connection(&self) -> Option<Connection> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain(|connection| connection.is_fresh(IDLE_TIME));
        idle.pop()
    }
}

fn relationship(vm: VmId) -> String {
    format!("/v1/relationships/{vm}")
}

fn log(vm: VmId, number: LogNumber, id: LogId) -> String {
    format!("{}/logs/{number}/{id}", relationship(vm))
}

/// Makes an error of an answer that is none.
fn judge(status: StatusCode, body: Bytes) -> Result<Bytes> {
    if status.is_success() {
        return Ok(body);
    }
    let kind = match status {
        StatusCode::UNAUTHORIZED => ErrorKind::Unauthorized,
        StatusCode::FORBIDDEN => ErrorKind::Forbidden,
        _ => ErrorKind::Refused,
    };
    match serde_json::from_slice::<ErrorBody>(&body) {
        Ok(mut body) => {
            tidy(&mut body.error.message);
            tidy(&mut body.error.code);
            Err(Error::refusal(kind, body.error))
        }
        Err(_) => Err(Error::protocol(format!(
            "it answers {status} and gives no reason; is that an Afterimage site of this version?"
        ))),
    }
}
