//! Who may talk to a site, and what is written down of those who may not.

mod common;

use std::time::Duration;

use common::memory::{MemoryInvite, make_log, site};
use common::raw::{self, RawIdentity};
use common::{Running, identity, log_id, noise, offer, pair, upload, vm};
use model::{DiskName, LogId, LogNumber, Phase, Timestamp};
use wire::{
    Client, DigestRequest, ErrorKind, HandOver, Invite, Report, Secret, Uploader, block_digest, codes,
};

const PATIENCE: Duration = Duration::from_secs(5);

fn now() -> Timestamp {
    Timestamp::from(std::time::SystemTime::now())
}

#[tokio::test]
async fn peers_agree_on_a_relationship_and_compare_disks() {
    let (server, primary) = pair().await;
    let client = server.client(&primary);
    let status = client.offer(&offer(vm(1))).await.unwrap();
    assert_eq!((status.durable, status.durable_id, status.refused), (LogNumber::ZERO, LogId::NONE, None));
    assert_eq!(server.site.state().vms[&vm(1)].offer, offer(vm(1)));

    let report =
        Report { phase: Phase::Replicating, error: Some("no disk".to_owned()), paused: true, moment: None };
    client.report(vm(1), &report).await.unwrap();
    assert_eq!(server.site.state().vms[&vm(1)].report, Some(report));

    let disk = noise(300_000, 7);
    server.site.state().vms.get_mut(&vm(1)).unwrap().disk.clone_from(&disk);
    let name: DiskName = "vda".parse().unwrap();
    let request = DigestRequest { disk: name, offset: 65_536, len: 234_464, block_bytes: 65_536 };
    let digests = client.digests(vm(1), &request).await.unwrap();
    let expected: Vec<_> = disk[65_536..].chunks(65_536).map(block_digest).collect();
    assert_eq!(digests, expected);

    let newest = HandOver { number: LogNumber::ZERO, id: LogId::NONE, done: false };
    let handed = client.hand_over(vm(1), &newest).await.unwrap();
    assert_eq!(handed.disks.len(), offer(vm(1)).disks.len());

    client.withdraw(vm(1)).await.unwrap();
    assert!(server.site.state().vms[&vm(1)].withdrawn);
    assert!(server.site.events().is_empty());
    let other = HandOver { number: LogNumber(7), ..newest };
    assert_eq!(client.hand_over(vm(1), &other).await.unwrap_err().kind(), ErrorKind::Refused);
}

#[tokio::test]
async fn without_a_certificate_it_is_401() {
    let (server, _) = pair().await;
    let head = format!("GET /v1/relationships/{}/logs/1/{} HTTP/1.1", vm(1), log_id(1));
    let answer = raw::ask(&server.address, None, &head, b"").await;
    assert!(answer.starts_with("HTTP/1.1 401 ") && answer.contains("\"no-certificate\""), "{answer}");
    let event = server.site.event(codes::NO_CERTIFICATE);
    assert_eq!((event.status, event.fingerprint, event.vm), (401, None, Some(vm(1))));
    assert_eq!(event.operation, "upload-state");
    assert!(event.remote.unwrap().ip().is_loopback());
}

#[tokio::test]
async fn an_unknown_peer_gets_403_and_a_removed_one_with_its_next_request() {
    let (server, primary) = pair().await;
    let stranger = identity("stranger");
    let error = server.client(&stranger).offer(&offer(vm(9))).await.unwrap_err();
    assert_eq!((error.kind(), error.transient()), (ErrorKind::Forbidden, false));
    assert!(error.to_string().contains(&stranger.fingerprint().to_string()), "{error}");
    let event = server.site.event(codes::UNKNOWN_PEER);
    assert_eq!((event.fingerprint, event.vm, event.peer), (Some(stranger.fingerprint()), Some(vm(9)), None));

    let client = server.client(&primary);
    client.offer(&offer(vm(1))).await.unwrap();
    server.site.remove_peer(primary.fingerprint());
    let error = client.offer(&offer(vm(1))).await.unwrap_err(); // over the connection that is open
    assert_eq!(error.kind(), ErrorKind::Forbidden);
    assert_eq!(server.site.codes(), [codes::UNKNOWN_PEER, codes::UNKNOWN_PEER]);
}

#[tokio::test]
async fn a_peer_that_is_removed_in_the_middle_of_an_upload_hears_why() {
    let (server, primary) = pair().await;
    let client = server.client(&primary);
    let mut upload = upload(&client, PATIENCE, None).await;
    upload.write(noise(5 << 20, 1).into()).await.unwrap();
    common::until("the first segment arrives", || server.site.incoming_bytes(vm(1)) == 4 << 20).await;
    server.site.remove_peer(primary.fingerprint());
    upload.write(noise(2 << 20, 1).into()).await.unwrap();
    assert_eq!(upload.finish().await.unwrap_err().kind(), ErrorKind::Forbidden);
    assert_eq!(server.site.incoming_bytes(vm(1)), 4 << 20);
}

#[tokio::test]
async fn another_peers_vm_is_forbidden() {
    let (server, primary) = pair().await;
    server.client(&primary).offer(&offer(vm(1))).await.unwrap();
    let other = identity("other");
    server.site.add_peer("other", other.fingerprint());
    let client = server.client(&other);
    assert_eq!(client.offer(&offer(vm(1))).await.unwrap_err().kind(), ErrorKind::Forbidden);
    let mut upload = Uploader::new(client, vm(1), LogNumber(1), log_id(1), PATIENCE, None);
    upload.write(make_log(LogId::NONE, b"not mine").into()).await.unwrap();
    assert_eq!(upload.finish().await.unwrap_err().kind(), ErrorKind::Forbidden);
    assert_eq!(server.site.codes(), ["not-authorized", "not-authorized"]);
    let event = server.site.event("not-authorized");
    assert_eq!((event.status, event.peer.as_deref(), event.vm), (403, Some("other"), Some(vm(1))));
    assert_eq!(server.site.incoming_bytes(vm(1)), 0);
}

#[tokio::test]
async fn a_server_with_another_certificate_is_told_nothing() {
    let (server, primary) = pair().await;
    let pinned = identity("elsewhere").fingerprint();
    let client = Client::new(&primary, &server.address, pinned).unwrap();
    let error = client.offer(&offer(vm(1))).await.unwrap_err();
    assert_eq!((error.kind(), error.transient()), (ErrorKind::WrongCertificate, false));
    let message = error.to_string();
    assert!(message.contains(&pinned.to_string()), "{message}");
    assert!(message.contains(&server.fingerprint().to_string()), "{message}");
    assert!(server.site.state().vms.is_empty());
}

#[tokio::test]
async fn older_tls_is_refused() {
    let (server, _) = pair().await;
    let raw = RawIdentity::new();
    let error = raw::connect(&server.address, Some(&raw), &[&rustls::version::TLS12]).await.unwrap_err();
    assert!(error.to_string().contains("ProtocolVersion"), "{error}");
    raw::connect(&server.address, Some(&raw), &[&rustls::version::TLS13]).await.unwrap();
}

#[tokio::test]
async fn what_is_no_site_is_said_to_be_none() {
    let primary = identity("primary");
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let client = Client::new(&primary, &address, primary.fingerprint()).unwrap();
    let greet = async {
        let (mut tcp, _) = listener.accept().await.unwrap();
        tokio::io::AsyncWriteExt::write_all(&mut tcp, b"SSH-2.0-OpenSSH_9.2\r\n").await.unwrap();
        tcp
    };
    let offered = offer(vm(1));
    let (error, _tcp) = tokio::join!(client.offer(&offered), greet);
    assert_eq!(error.as_ref().unwrap_err().kind(), ErrorKind::Protocol, "{error:?}");

    drop(listener);
    let error = client.offer(&offer(vm(1))).await.unwrap_err();
    assert_eq!((error.kind(), error.transient()), (ErrorKind::Link, true));
    assert!(error.to_string().starts_with(&format!("site at {address}: offer: cannot connect")), "{error}");
}

#[tokio::test]
async fn an_invite_works_once_and_in_its_time() {
    let server = Running::start(site()).await;
    let newcomer = identity("branch");
    let invite = |secret: Secret, expires_at| {
        Invite::new(&server.address, server.fingerprint(), secret, expires_at).unwrap()
    };
    let accept = async |invite: &Invite| {
        let line: Invite = invite.to_string().parse().unwrap();
        Client::accept_invite(&newcomer, &line, "branch", "branch.example.org:8443").await
    };
    let later = now().plus(Duration::from_secs(900));
    let (good, late, unknown) =
        (Secret::generate().unwrap(), Secret::generate().unwrap(), Secret::generate().unwrap());
    server.site.state().invites.extend([
        MemoryInvite { hash: good.hash(), expires_at: later, used: false },
        MemoryInvite { hash: late.hash(), expires_at: now(), used: false },
    ]);

    for wrong in [invite(unknown, later), invite(late.clone(), later)] {
        let error = accept(&wrong).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Forbidden);
        assert!(error.has_code(codes::BAD_INVITE), "{error}");
    }
    let error = accept(&invite(late, now())).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invite, "it is not even sent: {error}");
    assert_eq!(server.site.codes(), [codes::BAD_INVITE; 2]);
    assert_eq!(server.client(&newcomer).offer(&offer(vm(1))).await.unwrap_err().kind(), ErrorKind::Forbidden);

    let good = invite(good, later);
    assert_eq!(accept(&good).await.unwrap().site.name, "replica");
    let (name, address, fingerprint) = {
        let state = server.site.state();
        let known = &state.newcomers[0];
        (known.name.clone(), known.address.clone(), known.fingerprint)
    };
    assert_eq!((name.as_str(), address.as_str()), ("branch", "branch.example.org:8443"));
    assert_eq!(fingerprint, newcomer.fingerprint());
    server.client(&newcomer).offer(&offer(vm(1))).await.unwrap();

    let error = accept(&good).await.unwrap_err();
    assert!(error.to_string().contains("was used already"), "{error}");
    assert_eq!(server.site.state().newcomers.len(), 1);
}

#[tokio::test]
async fn an_invite_cannot_be_accepted_without_a_certificate_or_under_a_bad_name() {
    let server = Running::start(site()).await;
    let secret = String::from(Secret::generate().unwrap());
    let body = |name: &str, address: &str| {
        serde_json::json!({ "secret": secret, "name": name, "address": address }).to_string()
    };
    let ask = async |identity: Option<&RawIdentity>, body: String| {
        let head = format!("POST /v1/peers HTTP/1.1\r\nContent-Length: {}", body.len());
        raw::ask(&server.address, identity, &head, body.as_bytes()).await
    };
    let answer = ask(None, body("branch", "h:1")).await;
    assert!(answer.starts_with("HTTP/1.1 401 "), "{answer}");
    let raw = RawIdentity::new();
    for bad in [
        body("../etc", "h:1"),
        body("\u{1b}[2J", "h:1"),
        body("branch", "h"),
        body("branch", "h:0"),
        "{".to_owned(),
    ] {
        let answer = ask(Some(&raw), bad).await;
        assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("\"bad-body\""), "{answer}");
    }
    assert!(server.site.state().newcomers.is_empty());
    assert_eq!(server.site.event(codes::BAD_BODY).fingerprint, Some(raw.fingerprint()));
}
