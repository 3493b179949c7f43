//! What a peer may ask over HTTP, from the router on: addresses, queries, bodies.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, LazyLock};

use axum::Router;
use axum::body::Body;
use bytes::Bytes;
use http::{Method, Request};
use http_body_util::BodyExt;
use model::{LogId, LogNumber, Phase, VmId};
use tower::ServiceExt;
use wire::{
    ClientIdentity, DigestRequest, Endpoint, Fingerprint, HandOver, HandedOver, Identity, KeyId, Newcomer,
    Offer, Peer, Refused, RefusedClass, RelationshipStatus, Report, Shown, SiteInfo, TakeOver, TakenOver,
    UploadState, WireEvent, check_site_name,
};

use crate::stream::block_on;

/// The first byte chooses the endpoint, the second the parts of its address; the rest is the body.
pub(crate) fn http(data: &[u8]) {
    let [which, parts, body @ ..] = data else { return };
    let request = request(*which, *parts, body);
    block_on(async {
        let response = ROUTER.clone().oneshot(request).await.expect("a router does not fail");
        let status = response.status();
        let answer = response.into_body().collect().await.expect("an answer has an end").to_bytes();
        assert_ne!(status.as_u16(), 500, "{}", String::from_utf8_lossy(&answer));
        if status.is_client_error() && !matches!(status.as_u16(), 404 | 405) {
            let refusal: serde_json::Value = serde_json::from_slice(&answer).expect("a refusal is JSON");
            assert!(refusal["error"]["code"].is_string(), "{refusal}");
        }
    });
}

fn request(which: u8, parts: u8, body: &[u8]) -> Request<Body> {
    let (vm, id) = (VmId::from_bytes([1; 16]), LogId::from_bytes([2; 16]));
    // With some of the bits the address is made of the body's first line.
    let line = body.split(|&byte| byte == b'\n').next().unwrap_or_default();
    let own: String = line.iter().map(|byte| format!("%{byte:02x}")).take(100).collect();
    let part = |bit: u8, usual: String| if parts & bit == 0 { usual } else { own.clone() };
    let vm = part(1, vm.to_string());
    let number = part(2, "1".into());
    let id = part(4, id.to_string());
    let query = if parts & 8 == 0 {
        "offset=0&last=true".to_owned()
    } else {
        line.iter()
            .filter(|byte| byte.is_ascii_graphic() && **byte != b'#')
            .map(|&byte| char::from(byte))
            .collect()
    };
    let (method, path) = match which % 8 {
        0 if parts & 64 != 0 => (Method::POST, "/v1/next-key".to_owned()),
        0 if parts & 128 != 0 => (Method::POST, "/v1/take-over".to_owned()),
        0 => (Method::POST, "/v1/peers".to_owned()),
        1 => (Method::PUT, format!("/v1/relationships/{vm}")),
        2 => (Method::DELETE, format!("/v1/relationships/{vm}")),
        3 => (Method::POST, format!("/v1/relationships/{vm}/report")),
        4 if parts & 64 != 0 => (Method::POST, format!("/v1/relationships/{vm}/hand-over")),
        4 => (Method::POST, format!("/v1/relationships/{vm}/digests")),
        5 => (Method::GET, format!("/v1/relationships/{vm}/logs/{number}/{id}")),
        6 => (Method::PATCH, format!("/v1/relationships/{vm}/logs/{number}/{id}?{query}")),
        _ => (Method::GET, format!("/{own}?{query}")),
    };
    let mut request = Request::builder().method(method).uri(path);
    if parts & 16 != 0 {
        request = request.header("content-encoding", "gzip");
    }
    let mut request =
        request.body(Body::from(body.to_vec())).unwrap_or_else(|_| Request::new(Body::from(body.to_vec())));
    let fingerprint = (parts & 32 == 0).then(|| Fingerprint::from_bytes([3; 32]));
    let remote = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
    let shown = fingerprint.map(|_| SHOWN.clone());
    request.extensions_mut().insert(ClientIdentity { remote, fingerprint, shown });
    request
}

/// What the peer shows; its key is forgotten at once.
static SHOWN: LazyLock<Arc<Shown>> = LazyLock::new(|| {
    let dir = tempfile::tempdir().expect("a folder");
    let identity = Identity::create(dir.path(), "branch").expect("an identity");
    identity.shown().clone()
});

static ROUTER: LazyLock<Router> = LazyLock::new(|| wire::router(Arc::new(Stub)));

/// A site that believes everything and checks what it was promised.
struct Stub;

impl Endpoint for Stub {
    async fn find_peer(&self, who: &ClientIdentity) -> Result<Option<Peer>, Refused> {
        Ok(who.fingerprint.map(|fingerprint| Peer { name: "branch".into(), fingerprint }))
    }

    async fn accept_invite(&self, newcomer: Newcomer) -> Result<SiteInfo, Refused> {
        check_site_name(&newcomer.name).expect("names are checked before");
        assert!(newcomer.address.len() <= 255 && newcomer.address.contains(':'));
        Ok(SiteInfo { name: "head".into(), version: "1".into() })
    }

    async fn offer(&self, _peer: &Peer, offer: Offer) -> Result<RelationshipStatus, Refused> {
        offer.check().expect("offers are checked before");
        let again = serde_json::to_vec(&offer).expect("an offer can be written");
        assert_eq!(serde_json::from_slice::<Offer>(&again).expect("and read"), offer);
        let (durable, durable_id) = (LogNumber::ZERO, LogId::NONE);
        Ok(RelationshipStatus {
            durable,
            durable_id,
            phase: Phase::Replicating,
            refused: None,
            bandwidth_bytes_per_s: None,
        })
    }

    async fn report(&self, _peer: &Peer, _vm: VmId, report: Report) -> Result<(), Refused> {
        let again = serde_json::to_vec(&report).expect("a report can be written");
        assert_eq!(serde_json::from_slice::<Report>(&again).expect("and read"), report);
        Ok(())
    }

    async fn announce(&self, _peer: &Peer, next: KeyId) -> Result<(), Refused> {
        panic!("{next} was believed, and the key of before has never signed anything");
    }

    async fn take_over(&self, _peer: &Peer, wanted: TakeOver) -> Result<TakenOver, Refused> {
        assert!(!wanted.vm_name.as_str().contains('/'), "names are checked before");
        Ok(TakenOver { vm: VmId::from_bytes([1; 16]), generation: 2, head: None })
    }

    async fn withdraw(&self, _peer: &Peer, _vm: VmId) -> Result<(), Refused> {
        Ok(())
    }

    async fn hand_over(&self, _peer: &Peer, _vm: VmId, _newest: HandOver) -> Result<HandedOver, Refused> {
        Ok(HandedOver { disks: Vec::new() })
    }

    async fn upload_state(
        &self,
        _peer: &Peer,
        _vm: VmId,
        _number: LogNumber,
        _id: LogId,
    ) -> Result<UploadState, Refused> {
        Ok(UploadState { offset: 0, durable: false })
    }

    async fn append(
        &self,
        _peer: &Peer,
        _vm: VmId,
        _number: LogNumber,
        _id: LogId,
        offset: u64,
        bytes: Bytes,
        last: bool,
    ) -> Result<UploadState, Refused> {
        let end = offset.checked_add(bytes.len() as u64).expect("segments end before the end of numbers");
        Ok(UploadState { offset: end, durable: last })
    }

    async fn digests(&self, _peer: &Peer, _vm: VmId, request: DigestRequest) -> Result<Vec<u8>, Refused> {
        let digests = usize::try_from(request.digests()).expect("bounded");
        assert!(digests as u64 <= wire::DIGESTS_MAX && request.offset.checked_add(request.len).is_some());
        if request.disk.as_str() == "none" {
            return Err(Refused::new(RefusedClass::NotFound, "no-such-disk", "no such disk"));
        }
        Ok(vec![0; 16 * digests])
    }

    async fn note(&self, event: WireEvent) {
        assert!(event.message.len() < 4096 && !event.message.contains('\u{1b}'), "{event:?}");
    }
}
