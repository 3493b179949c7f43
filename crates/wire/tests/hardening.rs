//! What a server makes of those who do not keep to the rules.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::memory::{MemorySite, site};
use common::raw::{self, RawIdentity};
use common::{Running, SOON, log_id, offer, vm};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use wire::{Limits, SEGMENT_BYTES, codes};

const SHORT: Duration = Duration::from_millis(150);

/// A site that knows one peer, who has offered a VM, and has little patience.
async fn impatient() -> (Running, RawIdentity) {
    let raw = RawIdentity::new();
    let site = known(&raw);
    let limits = Limits { handshake: SHORT, head: SHORT, body_idle: SHORT, ..Limits::default() };
    let server = Running::start_with(site, limits).await;
    let offer = serde_json::to_string(&offer(vm(1))).unwrap();
    let head = format!("PUT /v1/relationships/{} HTTP/1.1\r\nContent-Length: {}", vm(1), offer.len());
    let answer = raw::ask(&server.address, Some(&raw), &head, offer.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    (server, raw)
}

fn known(raw: &RawIdentity) -> Arc<MemorySite> {
    let site = site();
    site.add_peer("raw", raw.fingerprint());
    site
}

fn patch(length: impl std::fmt::Display) -> String {
    let (vm, log) = (vm(1), log_id(1));
    format!(
        "PATCH /v1/relationships/{vm}/logs/1/{log}?offset=0&last=false HTTP/1.1\r\nContent-Length: {length}"
    )
}

#[tokio::test]
async fn a_body_that_breaks_off_is_noted_and_leaves_no_byte() {
    let (server, raw) = impatient().await;
    let mut stream = raw::tls(&server.address, Some(&raw)).await;
    stream.write_all(format!("{}\r\nHost: site\r\n\r\n", patch(100_000)).as_bytes()).await.unwrap();
    stream.write_all(&[7; 60_000]).await.unwrap();
    stream.flush().await.unwrap();
    drop(stream);
    common::until("it is noted", || server.site.codes() == [codes::TRUNCATED]).await;
    let event = server.site.event(codes::TRUNCATED);
    assert_eq!((event.peer.as_deref(), event.vm, event.operation), (Some("raw"), Some(vm(1)), "append"));
    assert_eq!((server.site.incoming_bytes(vm(1)), server.site.state().appends), (0, 0));
}

#[tokio::test]
async fn bodies_are_refused_by_their_length_before_they_are_read() {
    let (server, raw) = impatient().await;
    let at = &server.address;
    let answer = raw::ask(at, Some(&raw), &patch(SEGMENT_BYTES + 1), b"").await;
    assert!(answer.starts_with("HTTP/1.1 413 ") && answer.contains("\"too-large\""), "{answer}");
    let answer = raw::ask(at, Some(&raw), &patch(1_u64 << 50), b"").await;
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    let chunked = patch(0).replace("Content-Length: 0", "Transfer-Encoding: chunked");
    let answer = raw::ask(at, Some(&raw), &chunked, b"3\r\nabc\r\n0\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 411 "), "{answer}");
    let json = format!("PUT /v1/relationships/{} HTTP/1.1\r\nContent-Length: {}", vm(1), (1 << 20) + 1);
    let answer = raw::ask(at, Some(&raw), &json, b"{").await;
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    let codes = server.site.codes();
    assert_eq!(codes, [codes::TOO_LARGE, codes::TOO_LARGE, codes::NO_LENGTH, codes::TOO_LARGE]);
    assert_eq!(server.site.state().appends, 0);
}

#[tokio::test]
async fn a_segment_of_the_largest_size_is_taken() {
    let (server, raw) = impatient().await;
    let answer = raw::ask(&server.address, Some(&raw), &patch(SEGMENT_BYTES), &vec![1; SEGMENT_BYTES]).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(answer.ends_with(&format!("{{\"offset\":{SEGMENT_BYTES},\"durable\":false}}")), "{answer}");
}

#[tokio::test]
async fn the_slow_are_hung_up_on() {
    let (server, raw) = impatient().await;
    let mut nothing = TcpStream::connect(&server.address).await.unwrap();
    let end =
        tokio::time::timeout(SOON, nothing.read(&mut [0; 16])).await.expect("no handshake, no connection");
    assert!(matches!(end, Ok(0) | Err(_)));

    raw::rest(raw::tls(&server.address, Some(&raw)).await).await; // asks nothing

    let mut half_a_head = raw::tls(&server.address, Some(&raw)).await;
    half_a_head.write_all(b"GET /v1/peers HTTP/1.1\r\nHost: ").await.unwrap();
    half_a_head.flush().await.unwrap();
    raw::rest(half_a_head).await;

    let mut half_a_body = raw::tls(&server.address, Some(&raw)).await;
    half_a_body.write_all(format!("{}\r\nHost: site\r\n\r\n", patch(1000)).as_bytes()).await.unwrap();
    half_a_body.write_all(&[1; 500]).await.unwrap();
    half_a_body.flush().await.unwrap();
    let answer = raw::rest(half_a_body).await;
    assert!(answer.starts_with("HTTP/1.1 408 ") && answer.contains("500 of its 1000"), "{answer}");
    assert_eq!(server.site.codes(), [codes::TOO_SLOW]);
    assert_eq!(server.site.state().appends, 0);
}

#[tokio::test]
async fn names_with_tricks_are_no_ids() {
    let (server, raw) = impatient().await;
    let (vm, log) = (vm(1), log_id(1));
    let bad = [
        format!("/v1/relationships/..%2f..%2fetc/logs/1/{log}"),
        format!("/v1/relationships/%2e%2e/logs/1/{log}"),
        format!("/v1/relationships/%2e/logs/1/{log}"),
        format!("/v1/relationships/{vm}/logs/%2e%2e/{log}"),
        format!("/v1/relationships/{vm}/logs/-1/{log}"),
        format!("/v1/relationships/{vm}/logs/18446744073709551616/{log}"),
        format!("/v1/relationships/{vm}/logs/1/..%5cx"),
        format!("/v1/relationships/{vm}/logs/1/{log}%00"),
        format!("/v1/relationships/{vm}/logs/1/%ff%fe"),
        format!("/v1/relationships/{vm}x/logs/1/{log}"),
    ];
    for path in &bad {
        let answer = raw::ask(&server.address, Some(&raw), &format!("GET {path} HTTP/1.1"), b"").await;
        assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("\"bad-id\""), "{path}: {answer}");
    }
    assert_eq!(server.site.codes(), vec![codes::BAD_ID; bad.len()]);
    // The path is taken as it is: nothing is normalized into an address that there is.
    for path in
        [format!("/v1/relationships/../relationships/{vm}/logs/1/{log}"), format!("/v1//relationships/{vm}")]
    {
        let answer = raw::ask(&server.address, Some(&raw), &format!("GET {path} HTTP/1.1"), b"").await;
        assert!(answer.starts_with("HTTP/1.1 404 "), "{path}: {answer}");
    }
    let query = patch(0).replace("offset=0", "offset=-1");
    let answer = raw::ask(&server.address, Some(&raw), &query, b"").await;
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
}

#[tokio::test]
async fn too_many_digests_are_not_given() {
    let (server, raw) = impatient().await;
    for (offset, len, block_bytes) in
        [(0_u64, 1_u64 << 40, 65_536_u64), (0, 1 << 20, 0), (0, 4096, 1), (u64::MAX, 4096, 4096)]
    {
        let body =
            serde_json::json!({ "disk": "vda", "offset": offset, "len": len, "block_bytes": block_bytes });
        let body = body.to_string();
        let path = format!("/v1/relationships/{}/digests", vm(1));
        let head = format!("POST {path} HTTP/1.1\r\nContent-Length: {}", body.len());
        let answer = raw::ask(&server.address, Some(&raw), &head, body.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("\"bad-body\""), "{answer}");
    }
}

#[tokio::test]
async fn segments_beyond_the_limit_are_refused_for_now() {
    let raw = RawIdentity::new();
    let limits = Limits { segments: 1, segment_turn: SHORT, ..Limits::default() };
    let server = Running::start_with(known(&raw), limits).await;
    let mut slow = raw::tls(&server.address, Some(&raw)).await;
    slow.write_all(format!("{}\r\nHost: site\r\n\r\n", patch(1000)).as_bytes()).await.unwrap();
    slow.flush().await.unwrap();
    tokio::time::sleep(SHORT).await;
    let answer = raw::ask(&server.address, Some(&raw), &patch(3), b"abc").await;
    assert!(
        answer.starts_with("HTTP/1.1 503 ") && answer.to_lowercase().contains("retry-after: 1"),
        "{answer}"
    );
}

#[tokio::test]
async fn a_server_that_ends_lets_a_request_end() {
    let raw = RawIdentity::new();
    let limits = Limits { shutdown: SOON, ..Limits::default() };
    let server = Running::start_with(known(&raw), limits).await;
    let body = serde_json::to_string(&offer(vm(1))).unwrap();
    let head = format!(
        "PUT /v1/relationships/{} HTTP/1.1\r\nContent-Length: {}\r\nHost: site\r\n\r\n",
        vm(1),
        body.len()
    );
    let mut stream = raw::tls(&server.address, Some(&raw)).await;
    let _idle = raw::tls(&server.address, Some(&raw)).await;
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.flush().await.unwrap();
    tokio::time::sleep(SHORT).await; // the head is there
    let address = server.address.clone();
    let stopping = tokio::spawn(server.stop());
    common::until("nobody new gets in", || std::net::TcpStream::connect(&address).is_err()).await;
    stream.write_all(body.as_bytes()).await.unwrap();
    stream.flush().await.unwrap();
    let answer = raw::rest(stream).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    tokio::time::timeout(SOON, stopping).await.expect("it ends once the request has ended").unwrap();
}
