//! Logs get to the replica whole, once, over every kind of break.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::memory::make_log;
use common::proxy::Proxy;
use common::{log_id, noise, offer, pair, upload, vm};
use model::{LogId, LogNumber};
use proptest::prelude::*;
use wire::{Client, ErrorKind, Limits, RateLimiter, SEGMENT_BYTES, Uploader, codes};

const PATIENCE: Duration = Duration::from_secs(10);

/// Hands a log over in pieces, as an encoder does.
async fn write_all(upload: &mut Uploader, log: &[u8], piece: usize) -> wire::Result<()> {
    for piece in log.chunks(piece) {
        upload.write(Bytes::copy_from_slice(piece)).await?;
    }
    Ok(())
}

#[tokio::test]
async fn logs_of_all_sizes_arrive_as_they_were() {
    let (server, primary) = pair().await;
    let client = server.client(&primary);
    client.offer(&offer(vm(1))).await.unwrap();
    let mut predecessor = LogId::NONE;
    let segment = SEGMENT_BYTES - 48; // what is around the content
    for (at, len) in
        [0, 1, 70_000, segment - 1, segment, segment + 1, 3 * segment + 5].into_iter().enumerate()
    {
        let log = make_log(predecessor, &noise(len, at as u64));
        let (number, id) = (LogNumber(at as u64 + 1), log_id(at as u8 + 1));
        let mut upload = Uploader::new(client.clone(), vm(1), number, id, PATIENCE, None);
        write_all(&mut upload, &log, 300_000).await.unwrap();
        upload.finish().await.unwrap();
        assert_eq!(server.site.logs(vm(1)).last(), Some(&log), "{len} bytes");
        let status = client.offer(&offer(vm(1))).await.unwrap();
        assert_eq!((status.durable, status.durable_id), (number, id));
        predecessor = id;
    }
    assert!(server.site.events().is_empty());
}

#[tokio::test]
async fn a_piece_larger_than_a_segment_is_cut() {
    let (server, primary) = pair().await;
    let mut upload = upload(&server.client(&primary), PATIENCE, None).await;
    let log = make_log(LogId::NONE, &noise(11_000_000, 3));
    upload.write(log.clone().into()).await.unwrap();
    upload.finish().await.unwrap();
    assert_eq!(server.site.logs(vm(1)), [log]);
    assert_eq!(server.site.state().appends, 3);
}

async fn survives_cuts(cuts: Vec<usize>, len: usize) {
    let (server, primary) = pair().await;
    let proxy = Proxy::start(&server.address, cuts.iter().copied()).await;
    let client = Arc::new(Client::new(&primary, &proxy.address, server.fingerprint()).unwrap());
    server.client(&primary).offer(&offer(vm(1))).await.unwrap();
    let log = make_log(LogId::NONE, &noise(len, 5));
    let mut upload = Uploader::new(client, vm(1), LogNumber(1), log_id(1), PATIENCE, None);
    write_all(&mut upload, &log, 250_000).await.unwrap();
    upload.finish().await.unwrap();
    assert!(server.site.logs(vm(1)) == [log], "the log differs after cuts at {cuts:?}");
    let codes = server.site.codes();
    let allowed = [codes::TRUNCATED, codes::WRONG_OFFSET];
    assert!(codes.iter().all(|code| allowed.contains(&code.as_str())), "{codes:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    /// Each of the first connections is cut after some bytes: in the handshake, in a head, in a body.
    #[test]
    fn an_upload_goes_on_wherever_it_is_cut(
        cuts in prop::collection::vec(prop_oneof![1_usize..4000, 4000_usize..5_000_000], 0..5),
        len in 0_usize..9_000_000,
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(survives_cuts(cuts, len));
    }
}

#[tokio::test]
async fn a_lost_answer_to_the_last_segment_is_asked_for() {
    let (server, primary) = pair().await;
    let proxy = Proxy::start(&server.address, []).await;
    let client = Arc::new(Client::new(&primary, &proxy.address, server.fingerprint()).unwrap());
    let mut upload = upload(&client, PATIENCE, None).await;
    let log = make_log(LogId::NONE, &noise(5_000_000, 9));
    server.site.before_answer(true, proxy.knife());
    write_all(&mut upload, &log, 250_000).await.unwrap();
    upload.finish().await.unwrap();
    assert_eq!(server.site.logs(vm(1)), [log]);
    assert_eq!(server.site.state().appends, 2, "nothing is sent twice");
    assert_eq!(proxy.connections(), 2);
}

#[tokio::test]
async fn a_lost_answer_in_the_middle_does_not_send_bytes_twice() {
    let (server, primary) = pair().await;
    let proxy = Proxy::start(&server.address, []).await;
    let client = Arc::new(Client::new(&primary, &proxy.address, server.fingerprint()).unwrap());
    let mut upload = upload(&client, PATIENCE, None).await;
    let log = make_log(LogId::NONE, &noise(9_000_000, 9));
    server.site.before_answer(false, proxy.knife());
    write_all(&mut upload, &log, 250_000).await.unwrap();
    upload.finish().await.unwrap();
    assert_eq!(server.site.logs(vm(1)), [log]);
    assert_eq!(server.site.state().appends, 3);
    assert!(server.site.events().is_empty());
}

#[tokio::test]
async fn the_replicas_site_restarts_in_the_middle() {
    let (server, primary) = pair().await;
    let site = server.site.clone();
    let mut upload = upload(&server.client(&primary), PATIENCE, None).await;
    let log = make_log(LogId::NONE, &noise(14_000_000, 2));
    let (first, second) = log.split_at(9_000_000);
    write_all(&mut upload, first, 250_000).await.unwrap();
    common::until("two segments arrive", || site.incoming_bytes(vm(1)) == 2 * SEGMENT_BYTES).await;
    let stopped = server.stop().await;
    // This goes into a closed port.
    upload.write(Bytes::copy_from_slice(second)).await.unwrap();
    let (finished, _server) = tokio::join!(upload.finish(), async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        stopped.start().await
    });
    finished.unwrap();
    assert_eq!(site.logs(vm(1)), [log]);
}

#[tokio::test]
async fn a_site_that_stays_away_ends_the_upload_when_patience_ends() {
    let (server, primary) = pair().await;
    let client = server.client(&primary);
    let mut upload = upload(&client, Duration::from_millis(300), None).await;
    server.stop().await;
    upload.write(make_log(LogId::NONE, b"late").into()).await.unwrap();
    let error = upload.finish().await.unwrap_err();
    assert_eq!((error.kind(), error.transient()), (ErrorKind::Link, true), "{error}");
    assert!(error.to_string().starts_with(&format!("site at {}: ", client.address())), "{error}");
}

#[tokio::test]
async fn a_replica_that_lost_the_beginning_ends_the_upload() {
    let (server, primary) = pair().await;
    let site = server.site.clone();
    let mut upload = upload(&server.client(&primary), PATIENCE, None).await;
    let log = make_log(LogId::NONE, &noise(14_000_000, 2));
    write_all(&mut upload, &log[..9_000_000], 250_000).await.unwrap();
    common::until("two segments arrive", || site.incoming_bytes(vm(1)) == 2 * SEGMENT_BYTES).await;
    site.state().vms.get_mut(&vm(1)).unwrap().incoming = None;
    let outcome = write_all(&mut upload, &log[9_000_000..], 250_000).await;
    let error = match outcome {
        Ok(()) => upload.finish().await.unwrap_err(),
        Err(error) => error,
    };
    assert_eq!((error.kind(), error.transient()), (ErrorKind::Link, true));
    assert!(error.to_string().contains("lost the beginning"), "{error}");
    assert!(site.logs(vm(1)).is_empty());
}

#[tokio::test]
async fn a_refusal_ends_the_upload_at_once_and_for_good() {
    let (server, primary) = pair().await;
    let mut upload = upload(&server.client(&primary), Duration::from_secs(600), None).await;
    server.site.state().room = Some(SEGMENT_BYTES + 1);
    let log = make_log(LogId::NONE, &noise(20_000_000, 2));
    let started = Instant::now();
    let error = write_all(&mut upload, &log, 250_000).await.unwrap_err();
    assert!(started.elapsed() < Duration::from_secs(60), "it does not wait for room");
    assert_eq!((error.kind(), error.transient()), (ErrorKind::Refused, true));
    let refused = error.refused().unwrap();
    assert_eq!((refused.code.as_str(), refused.retry_after_s), ("no-space", Some(60)));
    assert_eq!(upload.write(Bytes::from_static(b"x")).await.unwrap_err().kind(), ErrorKind::Refused);
    assert_eq!(upload.finish().await.unwrap_err().kind(), ErrorKind::Refused);
    assert_eq!(server.site.codes(), ["no-space"]);
    assert_eq!(server.site.event("no-space").status, 507);
}

#[tokio::test]
async fn a_log_that_does_not_belong_is_refused_and_noted() {
    let (server, primary) = pair().await;
    let client = server.client(&primary);
    client.offer(&offer(vm(1))).await.unwrap();
    let send = async |number: u64, log: Vec<u8>| {
        let mut upload = Uploader::new(client.clone(), vm(1), LogNumber(number), log_id(1), PATIENCE, None);
        upload.write(log.into()).await.unwrap();
        upload.finish().await
    };
    let mut damaged = make_log(LogId::NONE, b"content");
    damaged[20] ^= 1;
    for (number, log, code) in [
        (2, make_log(LogId::NONE, b"content"), "wrong-number"),
        (1, make_log(log_id(7), b"content"), "wrong-predecessor"),
        (1, damaged, "wrong-checksum"),
    ] {
        let error = send(number, log).await.unwrap_err();
        assert_eq!((error.kind(), error.transient()), (ErrorKind::Refused, false), "{code}");
        assert!(error.has_code(code), "{error}");
        assert_eq!(server.site.event(code).status, 409);
        assert!(server.site.logs(vm(1)).is_empty(), "{code}");
    }
    send(1, make_log(LogId::NONE, b"content")).await.unwrap();
}

#[tokio::test]
async fn an_upload_that_is_dropped_stops_and_another_log_of_that_number_can_come() {
    let (server, primary) = pair().await;
    let client = server.client(&primary);
    let slow = RateLimiter::new(1_000_000);
    let mut given_up = upload(&client, PATIENCE, Some(slow)).await;
    given_up.write(noise(3_000_000, 1).into()).await.unwrap();
    drop(given_up);
    let log = make_log(LogId::NONE, b"the next cycle's");
    let mut upload = Uploader::new(client, vm(1), LogNumber(1), log_id(2), PATIENCE, None);
    upload.write(log.clone().into()).await.unwrap();
    upload.finish().await.unwrap();
    assert_eq!(server.site.logs(vm(1)), [log]);
}

#[tokio::test]
async fn a_limit_holds_for_all_uploads_that_share_it() {
    let (server, primary) = pair().await;
    let limiter = RateLimiter::new(1_000_000);
    let started = Instant::now();
    let mut uploads = Vec::new();
    for n in 1..=2 {
        let client = server.client(&primary);
        client.offer(&offer(vm(n))).await.unwrap();
        let mut upload =
            Uploader::new(client, vm(n), LogNumber(1), log_id(n), PATIENCE, Some(limiter.clone()));
        uploads.push(tokio::spawn(async move {
            upload.write(make_log(LogId::NONE, &noise(600_000, 1)).into()).await.unwrap();
            upload.finish().await
        }));
    }
    for upload in uploads {
        upload.await.unwrap().unwrap();
    }
    // From below only: how fast it is on a busy machine is not ours to say; the limiter's own tests do.
    assert!(started.elapsed() > Duration::from_millis(1000), "{:?}", started.elapsed());
}

/// Who does not keep to a limit, because nobody told it or because it does not care, is read no faster all the same; and
/// not hung up on for the time in which it was kept waiting.
#[tokio::test]
async fn a_sender_without_a_limit_is_read_at_the_servers() {
    let primary = common::identity("primary");
    let site = common::memory::site();
    site.add_peer("primary", primary.fingerprint());
    site.state().pace = Some(RateLimiter::new(4_000_000));
    let impatient = Limits { segment_body: Duration::from_millis(500), ..Limits::default() };
    let server = common::Running::start_with(site, impatient).await;
    let mut upload = upload(&server.client(&primary), PATIENCE, None).await;
    let log = make_log(LogId::NONE, &noise(9_000_000, 5));
    let started = Instant::now();
    upload.write(log.clone().into()).await.unwrap();
    upload.finish().await.unwrap();
    let took = started.elapsed().as_secs_f64();
    assert!(took > 1.8, "9 MB at 4 MB/s took {took} s");
    assert_eq!(server.site.logs(vm(1)), [log]);
}
