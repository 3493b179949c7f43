//! What those can do who are nobody here, and what a peer can do that means harm: certificates that are not
//! theirs, floods, guesses, texts.

mod common;

use std::time::Duration;

use common::memory::site;
use common::raw::{self, RawIdentity};
use common::{Running, SOON, log_id, offer, vm};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;
use wire::{Limits, codes};

const SHORT: Duration = Duration::from_millis(150);

async fn server_of(peer: &RawIdentity, limits: Limits) -> Running {
    let site = site();
    site.add_peer("peer", peer.fingerprint());
    Running::start_with(site, limits).await
}

fn state_of(byte: u8) -> String {
    format!("GET /v1/relationships/{}/logs/1/{} HTTP/1.1", vm(byte), log_id(1))
}

async fn put(server: &Running, peer: &RawIdentity, body: &str) -> String {
    let head = format!("PUT /v1/relationships/{} HTTP/1.1\r\nContent-Length: {}", vm(1), body.len());
    raw::ask(&server.address, Some(peer), &head, body.as_bytes()).await
}

fn offered() -> serde_json::Value {
    serde_json::to_value(offer(vm(1))).unwrap()
}

#[tokio::test]
async fn a_certificate_without_its_key_opens_nothing() {
    let peer = RawIdentity::new();
    let server = server_of(&peer, Limits::default()).await;
    let thief = peer.with_key_of(&RawIdentity::new());
    assert_eq!(thief.fingerprint(), peer.fingerprint());
    // In TLS 1.3 the client has ended its part when the server finds out: it hears so when it reads.
    let answer = match raw::connect(&server.address, Some(&thief), &[&rustls::version::TLS13]).await {
        Ok(mut stream) => {
            let _ = stream.write_all(format!("{}\r\nHost: site\r\n\r\n", state_of(1)).as_bytes()).await;
            raw::rest(stream).await
        }
        Err(_) => String::new(),
    };
    assert_eq!(answer, "", "not even a refusal: there is no connection");
    assert!(server.site.events().is_empty());
}

/// Dates mean nothing: trust begins with an invite and ends with `peer remove`, not at a date that one of two
/// clocks believes in. So an expired certificate is what any other is: its fingerprint.
#[tokio::test]
async fn an_expired_certificate_is_known_or_not_like_any_other() {
    let expired = RawIdentity::expired();
    let server = server_of(&RawIdentity::new(), Limits::default()).await;
    let answer = raw::ask(&server.address, Some(&expired), &state_of(1), b"").await;
    assert!(answer.starts_with("HTTP/1.1 403 ") && answer.contains("\"unknown-peer\""), "{answer}");
    server.site.add_peer("old", expired.fingerprint());
    let answer = put(&server, &expired, &offered().to_string()).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    server.site.remove_peer(expired.fingerprint());
    let answer = put(&server, &expired, &offered().to_string()).await;
    assert!(answer.starts_with("HTTP/1.1 403 "), "{answer}");
}

/// Connections that say nothing, as many as asked for.
async fn flood(address: &str, connections: usize) -> Vec<TcpStream> {
    let mut open = Vec::with_capacity(connections);
    for _ in 0..connections {
        open.push(TcpStream::connect(address).await.unwrap());
    }
    open
}

async fn asked(stream: &mut TlsStream<TcpStream>) -> bool {
    let head = format!("{}\r\nHost: site\r\n\r\n", state_of(1));
    let mut answer = vec![0; 64 << 10];
    let asked = async {
        stream.write_all(head.as_bytes()).await?;
        stream.flush().await?;
        stream.read(&mut answer).await
    };
    let done = tokio::time::timeout(SOON, asked).await.expect("an answer, or an end");
    done.is_ok_and(|bytes| answer[..bytes].starts_with(b"HTTP/1.1 ") && answer[..bytes].ends_with(b"}"))
}

#[tokio::test]
async fn a_flood_of_idle_connections_keeps_no_peer_out() {
    let peer = RawIdentity::new();
    let server = server_of(&peer, Limits { connections: 8, ..Limits::default() }).await;
    let mut known = raw::tls(&server.address, Some(&peer)).await;
    assert!(asked(&mut known).await);
    let _idle = flood(&server.address, 200).await;
    let started = tokio::time::Instant::now();
    let answer = put(&server, &peer, &offered().to_string()).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(
        started.elapsed() < Limits::default().handshake / 2,
        "nobody waited for the idle to be hung up on"
    );
    let _more = flood(&server.address, 200).await;
    assert!(asked(&mut known).await, "the peer's connection, idle since before the flood, was not cut");
}

#[tokio::test]
async fn one_peer_cannot_take_all_the_room_for_segments() {
    let (greedy, modest) = (RawIdentity::new(), RawIdentity::new());
    let limits = Limits { segments: 4, segment_turn: SHORT, ..Limits::default() };
    let server = server_of(&greedy, limits).await;
    server.site.add_peer("modest", modest.fingerprint());
    let patch = |vm_byte: u8, length: usize| {
        format!(
            "PATCH /v1/relationships/{}/logs/1/{}?offset=0&last=false HTTP/1.1\r\nContent-Length: {length}",
            vm(vm_byte),
            log_id(1)
        )
    };
    let mut slow = Vec::new();
    for byte in 1..=4 {
        let mut stream = raw::tls(&server.address, Some(&greedy)).await;
        let head = format!("{}\r\nHost: site\r\n\r\n", patch(byte, 1000));
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.flush().await.unwrap();
        slow.push(stream);
    }
    tokio::time::sleep(SHORT).await;
    let answer = raw::ask(&server.address, Some(&greedy), &patch(9, 3), b"abc").await;
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    let mut offered = offered();
    offered["vm"] = serde_json::json!(vm(8));
    let head = format!("PUT /v1/relationships/{} HTTP/1.1\r\nContent-Length: ", vm(8));
    let body = offered.to_string();
    raw::ask(&server.address, Some(&modest), &format!("{head}{}", body.len()), body.as_bytes()).await;
    let answer = raw::ask(&server.address, Some(&modest), &patch(8, 3), b"abc").await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

#[tokio::test]
async fn who_guesses_secrets_is_not_listened_to_for_a_while() {
    let limits = Limits { wrong_secrets: 3, ..Limits::default() };
    let server = Running::start_with(site(), limits).await;
    let stranger = RawIdentity::new();
    let body =
        serde_json::json!({ "secret": "A".repeat(43), "name": "branch", "address": "h:1" }).to_string();
    let head = format!("POST /v1/peers HTTP/1.1\r\nContent-Length: {}", body.len());
    for _ in 0..3 {
        let answer = raw::ask(&server.address, Some(&stranger), &head, body.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 403 ") && answer.contains("\"bad-invite\""), "{answer}");
    }
    // Another certificate does not help: it costs nothing to make one.
    let answer = raw::ask(&server.address, Some(&RawIdentity::new()), &head, body.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 429 ") && answer.contains("\"too-many-attempts\""), "{answer}");
    assert!(answer.to_lowercase().contains("retry-after: "), "{answer}");
    assert!(server.site.state().newcomers.is_empty());
}

#[tokio::test]
async fn refusals_do_not_flood_the_events_and_their_texts_are_short() {
    let server = Running::start_with(site(), Limits { notes: 5, ..Limits::default() }).await;
    let stranger = RawIdentity::new();
    // An answer that quotes what was sent: 900 kB of it, and what clears a terminal.
    let body = serde_json::json!(format!("\u{1b}[2J{}", "x".repeat(900_000))).to_string();
    let head = format!("POST /v1/peers HTTP/1.1\r\nContent-Length: {}", body.len());
    for _ in 0..8 {
        let answer = raw::ask(&server.address, Some(&stranger), &head, body.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 400 ") && answer.len() < 2000, "{} bytes", answer.len());
    }
    let events = server.site.events();
    assert_eq!(events.len(), 5);
    for event in events {
        assert!(event.message.len() < 1100 && !event.message.contains('\u{1b}'), "{}", event.message);
    }
}

#[tokio::test]
async fn offers_of_what_no_vm_can_be_are_refused() {
    let peer = RawIdentity::new();
    let server = server_of(&peer, Limits::default()).await;
    let disk = |name: &str, size: u64| serde_json::json!({ "name": name, "size_bytes": size });
    let many: Vec<_> = (0..257).map(|n| disk(&format!("d{n}"), 1)).collect();
    let large: Vec<_> = (0..5).map(|n| disk(&format!("d{n}"), 64 << 40)).collect();
    let cases = [
        ("disks", serde_json::json!([disk("vda", 1 << 63)]), "TiB"),
        ("disks", serde_json::json!([disk("vda", u64::MAX), disk("vdb", u64::MAX)]), "TiB"),
        ("disks", serde_json::json!(large), "TiB"),
        ("disks", serde_json::json!(many), "257"),
        ("disks", serde_json::json!([disk("vda", 1), disk("vda", 2)]), "two disks"),
        ("disks", serde_json::json!([disk("../../etc/passwd", 1)]), "disk name"),
        ("disks", serde_json::json!([disk("/dev/sda", 1)]), "disk name"),
        ("vm_name", serde_json::json!("../../root"), "VM name"),
        ("vm_name", serde_json::json!("a\u{0}b"), "VM name"),
        ("primary_name", serde_json::json!("\u{1b}]0;owned\u{7}"), "site name"),
        ("interval_s", serde_json::json!(u64::MAX), "interval"),
        ("interval_s", serde_json::json!(0), "interval"),
        ("points", serde_json::json!(256), "points"),
    ];
    for (field, value, why) in cases {
        let mut offer = offered();
        offer[field] = value;
        let answer = put(&server, &peer, &offer.to_string()).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{field}: {answer}");
        assert!(why == "points" || answer.contains(why), "{field}: {answer}");
        assert!(!answer.contains('\u{1b}'));
    }
    assert!(server.site.state().vms.is_empty());
    // A text that is only shown is taken, without what would control a terminal.
    let mut offer = offered();
    offer["error"] = serde_json::json!(format!("\u{1b}[2Jno {}", "disk ".repeat(1000)));
    offer["phase"] = serde_json::json!({"phase": "resync-required", "why": {"reason": "chain-broken", "detail": "\u{9b}1m"}});
    assert!(put(&server, &peer, &offer.to_string()).await.starts_with("HTTP/1.1 200 "));
    let kept = serde_json::to_string(&server.site.state().vms[&vm(1)].offer).unwrap();
    assert!(kept.contains("[2Jno disk") && !kept.contains("\\u001b") && !kept.contains('\u{9b}'), "{kept}");
    assert!(kept.len() < 2000);
}

/// 1 MiB that would become 1 GiB: bodies are what they are, nothing is unpacked.
#[tokio::test]
async fn a_body_that_says_it_is_compressed_is_not_unpacked() {
    let peer = RawIdentity::new();
    let server = server_of(&peer, Limits::default()).await;
    let bomb = [&[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3][..], &[0; 100_000]].concat();
    for encoding in ["gzip", "deflate", "br", "zstd"] {
        let head = format!(
            "PUT /v1/relationships/{} HTTP/1.1\r\nContent-Encoding: {encoding}\r\nContent-Length: {}",
            vm(1),
            bomb.len()
        );
        let answer = raw::ask(&server.address, Some(&peer), &head, &bomb).await;
        assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("\"bad-body\""), "{answer}");
    }
    let (vm, log) = (vm(1), log_id(1));
    let head = format!(
        "PATCH /v1/relationships/{vm}/logs/1/{log}?offset={}&last=false HTTP/1.1\r\nContent-Length: 3",
        u64::MAX
    );
    let answer = raw::ask(&server.address, Some(&peer), &head, b"abc").await;
    assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains(codes::BAD_ID), "{answer}");
}

#[tokio::test]
async fn two_requests_in_one_and_lengths_that_contradict_are_refused() {
    let peer = RawIdentity::new();
    let server = server_of(&peer, Limits::default()).await;
    let path = format!("/v1/relationships/{}", vm(1));
    let smuggled = format!("DELETE {path} HTTP/1.1\r\nHost: site\r\n\r\n");
    for head in [
        format!("PUT {path} HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked"),
        format!("PUT {path} HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6"),
        format!("PUT {path} HTTP/1.1\r\nContent-Length: +5"),
        format!("PUT {path} HTTP/1.1\r\nContent-Length: 5\r\n Content-Length: 0"),
    ] {
        let answer =
            raw::ask(&server.address, Some(&peer), &head, format!("0\r\n\r\n{smuggled}").as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 4"), "{head}: {answer}");
        assert_eq!(
            answer.matches("HTTP/1.1 ").count(),
            1,
            "what followed was not taken as a request: {answer}"
        );
    }
    assert!(server.site.state().vms.is_empty());
}
