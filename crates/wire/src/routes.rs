//! The endpoints under `/v1`: who may come in, what was asked for, and what to answer.
//!
//! ```text
//! request ─▶ certificate? ─▶ peer? ─▶ ids ─▶ body ─▶ Endpoint ─▶ answer
//!              │ 401          │ 403    │ 400   │ 4xx     │ Refused
//!              └──────────────┴────────┴───────┴─────────┴──▶ Endpoint::note ─▶ {"error": ...}
//! ```

use std::future::Future;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{FromRequestParts, RawPathParams, Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use http::{HeaderValue, StatusCode, header, request};
use model::VmId;
use serde::Serialize;

use crate::attempts::{Attempts, Verdict};
use crate::body::drain;
use crate::doors::{Place, network};
use crate::endpoint::{ClientIdentity, Endpoint, Peer, WireEvent};
use crate::handlers::{
    accept_invite, announce, append, digests, hand_over, offer, relocate, report, take_over, upload_state,
    withdraw,
};
use crate::identity::Fingerprint;
use crate::limits::Limits;
use crate::locks::VmLocks;
use crate::messages::{ErrorBody, Refused, RefusedClass, codes, tidy};
use crate::shares::Shares;

/// The routes through which peers talk to `endpoint`, to be served by [`crate::serve`], merged with others.
pub fn router<E: Endpoint>(endpoint: Arc<E>) -> Router {
    router_with(endpoint, Limits::default())
}

/// [`router`] with other limits than the default ones.
pub fn router_with<E: Endpoint>(endpoint: Arc<E>, limits: Limits) -> Router {
    let site = Arc::new(Site {
        segments: Shares::new(limits.segments),
        digests: Shares::new(limits.digests),
        wrong_secrets: Attempts::new(limits.wrong_secrets, MINUTE),
        notes: Attempts::new(limits.notes, MINUTE),
        locks: VmLocks::default(),
        endpoint,
        limits,
    });
    type Of<E> = State<Arc<Site<E>>>;
    use Admit::{AnyCertificate, Peers};
    Router::new()
        .route(
            "/v1/peers",
            post(|site: Of<E>, r| answer(site.0, "accept-invite", AnyCertificate, r, accept_invite)),
        )
        .route("/v1/next-key", post(|site: Of<E>, r| answer(site.0, "announce", Peers, r, announce)))
        .route("/v1/take-over", post(|site: Of<E>, r| answer(site.0, "take-over", Peers, r, take_over)))
        .route(
            "/v1/relationships/{vm}",
            put(|site: Of<E>, r| answer(site.0, "offer", Peers, r, offer))
                .delete(|site: Of<E>, r| answer(site.0, "withdraw", Peers, r, withdraw)),
        )
        .route(
            "/v1/relationships/{vm}/report",
            post(|site: Of<E>, r| answer(site.0, "report", Peers, r, report)),
        )
        .route(
            "/v1/relationships/{vm}/hand-over",
            post(|site: Of<E>, r| answer(site.0, "hand-over", Peers, r, hand_over)),
        )
        .route(
            "/v1/relationships/{vm}/relocate",
            post(|site: Of<E>, r| answer(site.0, "relocate", Peers, r, relocate)),
        )
        .route(
            "/v1/relationships/{vm}/digests",
            post(|site: Of<E>, r| answer(site.0, "digests", Peers, r, digests)),
        )
        .route(
            "/v1/relationships/{vm}/logs/{number}/{id}",
            get(|site: Of<E>, r| answer(site.0, "upload-state", Peers, r, upload_state))
                .patch(|site: Of<E>, r| answer(site.0, "append", Peers, r, append)),
        )
        .with_state(site)
}

/// What all requests share.
pub(crate) struct Site<E> {
    pub endpoint: Arc<E>,
    pub limits: Limits,
    pub segments: Shares,
    pub digests: Shares,
    pub wrong_secrets: Attempts<IpAddr>,
    notes: Attempts<Who>,
    pub locks: VmLocks,
}

/// What attempts are counted in.
const MINUTE: Duration = Duration::from_secs(60);

/// Whose refusals are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Who {
    Peer(Fingerprint),
    Network(IpAddr),
    /// Not even an address is known: the request did not come over a socket.
    Nobody,
}

/// Who may ask.
#[derive(Clone, Copy)]
enum Admit {
    Peers,
    AnyCertificate,
}

/// A refusal, and the status that carries it.
#[derive(Debug)]
pub(crate) struct Denied {
    pub status: StatusCode,
    pub refused: Refused,
}

impl From<Refused> for Denied {
    fn from(refused: Refused) -> Self {
        Self { status: refused.class.status(), refused }
    }
}

/// One request, as far as it is understood.
pub(crate) struct Call<E> {
    pub site: Arc<Site<E>>,
    operation: &'static str,
    pub client: Option<ClientIdentity>,
    pub peer: Option<Peer>,
    vm: Option<VmId>,
    /// The named parts of the path, decoded and not trusted.
    ids: Vec<(String, String)>,
    pub parts: request::Parts,
}

/// Answers a request in a task of its own: a call into the endpoint that has begun is not cancelled when
/// the connection breaks, and what broke is still noted.
async fn answer<E, F, Fut>(
    site: Arc<Site<E>>,
    operation: &'static str,
    admit: Admit,
    request: Request,
    handler: F,
) -> Response
where
    E: Endpoint,
    F: FnOnce(Arc<Call<E>>, Body) -> Fut + Send + 'static,
    Fut: Future<Output = Result<Response, Denied>> + Send + 'static,
{
    let (mut parts, body) = request.into_parts();
    let client = parts.extensions.get::<ClientIdentity>().cloned();
    let params = RawPathParams::from_request_parts(&mut parts, &()).await;
    let ids = params.iter().flatten().map(|(name, text)| (name.to_owned(), text.to_owned())).collect();
    let mut call = Call { site, operation, client, peer: None, vm: None, ids, parts };
    let task = tokio::spawn(async move {
        if let Err(denied) = call.admit(admit).await {
            drain(body).await;
            let mut response = call.deny(denied).await;
            // Whoever is nobody here has no use for the connection.
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            return response;
        }
        let call = Arc::new(call);
        match handler(call.clone(), body).await {
            Ok(response) => response,
            Err(denied) => call.deny(denied).await,
        }
    });
    task.await.unwrap_or_else(|error| {
        tracing::error!(operation, %error, "a request could not be answered");
        let message = "the site failed while it answered; its journal says why";
        respond(&Refused::new(RefusedClass::Internal, "internal", message).into())
    })
}

impl<E: Endpoint> Call<E> {
    /// Finds out who asks, and whether it may.
    async fn admit(&mut self, admit: Admit) -> Result<(), Denied> {
        self.vm = self.id("vm").ok(); // for the event; a handler asks again
        let Some(fingerprint) = self.fingerprint() else {
            let refused = Refused::forbidden(codes::NO_CERTIFICATE, "a client certificate is needed");
            return Err(Denied { status: StatusCode::UNAUTHORIZED, refused });
        };
        if matches!(admit, Admit::Peers) {
            let found = match &self.client {
                Some(client) => self.site.endpoint.find_peer(client).await?,
                None => None,
            };
            self.peer = Some(found.ok_or_else(|| unknown_peer(fingerprint))?);
            if let Some(place) = self.parts.extensions.get::<Arc<Place>>() {
                place.is_of(fingerprint);
            }
        }
        Ok(())
    }

    /// The certificate that was shown.
    pub fn fingerprint(&self) -> Option<Fingerprint> {
        self.client.as_ref().and_then(|client| client.fingerprint)
    }

    /// The peer that asks.
    pub fn peer(&self) -> Result<&Peer, Denied> {
        let unknown = || Refused::forbidden(codes::UNKNOWN_PEER, "this is for peers only").into();
        self.peer.as_ref().ok_or_else(unknown)
    }

    /// A named part of the path.
    pub fn id<T: FromStr>(&self, name: &str) -> Result<T, Denied> {
        let text = self.ids.iter().find(|(key, _)| key == name).map_or("", |(_, text)| text);
        text.parse().map_err(|_| {
            let shown: String = text.chars().take(80).collect();
            bad_id(format!("{shown:?} in the address is not a {name}"))
        })
    }

    /// The network that the request came from.
    pub fn network(&self) -> Option<IpAddr> {
        self.client.as_ref().map(|client| network(client.remote.ip()))
    }

    fn who(&self) -> Who {
        match (&self.peer, self.network()) {
            (Some(peer), _) => Who::Peer(peer.fingerprint),
            (None, Some(network)) => Who::Network(network),
            (None, None) => Who::Nobody,
        }
    }

    async fn deny(&self, mut denied: Denied) -> Response {
        // What a stranger wrote may stand in it.
        tidy(&mut denied.refused.message);
        if let Verdict::Yes { kept_back } = self.site.notes.count(self.who()) {
            self.note(&denied, kept_back).await;
        }
        respond(&denied)
    }

    async fn note(&self, denied: &Denied, kept_back: u32) {
        let mut message = denied.refused.message.clone();
        if kept_back > 0 {
            message.push_str(&format!(" ({kept_back} more refusals before this one were not written down)"));
        }
        let event = WireEvent {
            remote: self.client.as_ref().map(|client| client.remote),
            fingerprint: self.fingerprint(),
            peer: self.peer.as_ref().map(|peer| peer.name.clone()),
            vm: self.vm,
            operation: self.operation,
            status: denied.status.as_u16(),
            code: denied.refused.code.clone(),
            message,
        };
        tracing::debug!(?event, "refused");
        self.site.endpoint.note(event).await;
    }
}

fn unknown_peer(fingerprint: Fingerprint) -> Refused {
    let message = format!(
        "the certificate {fingerprint} is of no peer of this site (any more); 'afterimage peer invite' here and 'afterimage peer accept' there make it one"
    );
    Refused::forbidden(codes::UNKNOWN_PEER, message)
}

/// The address names nothing that can be.
pub(crate) fn bad_id(message: String) -> Denied {
    Refused::new(RefusedClass::Invalid, codes::BAD_ID, message).into()
}

/// An answer in JSON.
pub(crate) fn json<T: Serialize>(status: StatusCode, value: &T) -> Response {
    match serde_json::to_vec(value) {
        Ok(body) => (status, [(header::CONTENT_TYPE, "application/json")], body).into_response(),
        Err(error) => {
            tracing::error!(%error, "an answer could not be written as JSON");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

fn respond(denied: &Denied) -> Response {
    let mut response = json(denied.status, &ErrorBody { error: denied.refused.clone() });
    if let Some(seconds) = denied.refused.retry_after_s {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}
