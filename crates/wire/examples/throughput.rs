//! How fast an upload goes over loopback, with both ends in this process:
//! `cargo run --release -p afterimage-wire --example throughput [MB]`. Also shows what a limit makes of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use model::{LogId, LogNumber, Phase, VmId};
use wire::{
    Client, ClientIdentity, DigestRequest, Endpoint, Identity, Newcomer, Offer, Peer, RateLimiter, Refused,
    RelationshipStatus, Report, SiteInfo, UploadState, Uploader, WireEvent,
};

/// As an encoder hands over its records.
const WRITE_BYTES: usize = 256 * 1024;

/// Counts what arrives and keeps nothing.
struct Sink;

impl Endpoint for Sink {
    async fn find_peer(&self, who: &ClientIdentity) -> Result<Option<Peer>, Refused> {
        Ok(who.fingerprint.map(|fingerprint| Peer { name: "source".to_owned(), fingerprint }))
    }

    async fn accept_invite(&self, _newcomer: Newcomer) -> Result<SiteInfo, Refused> {
        Ok(SiteInfo { name: "sink".to_owned(), version: "0".to_owned() })
    }

    async fn offer(&self, _peer: &Peer, _offer: Offer) -> Result<RelationshipStatus, Refused> {
        let (durable, durable_id) = (LogNumber::ZERO, LogId::NONE);
        Ok(RelationshipStatus {
            durable,
            durable_id,
            phase: Phase::Replicating,
            refused: None,
            bandwidth_bytes_per_s: None,
        })
    }

    async fn report(&self, _peer: &Peer, _vm: VmId, _report: Report) -> Result<(), Refused> {
        Ok(())
    }

    async fn withdraw(&self, _peer: &Peer, _vm: VmId) -> Result<(), Refused> {
        Ok(())
    }

    async fn hand_over(&self, _: &Peer, _: VmId, _: wire::HandOver) -> Result<wire::HandedOver, Refused> {
        Ok(wire::HandedOver { disks: Vec::new() })
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
        Ok(UploadState { offset: offset + bytes.len() as u64, durable: last })
    }

    async fn digests(&self, _peer: &Peer, _vm: VmId, _request: DigestRequest) -> Result<Vec<u8>, Refused> {
        Ok(Vec::new())
    }

    async fn note(&self, event: WireEvent) {
        eprintln!("{event:?}");
    }
}

async fn upload(client: &Arc<Client>, megabytes: u64, limiter: Option<RateLimiter>) -> f64 {
    let (vm, id) = (VmId::from_bytes([1; 16]), LogId::from_bytes([2; 16]));
    let piece = Bytes::from((0..WRITE_BYTES).map(|at| (at * 31 % 251) as u8).collect::<Vec<_>>());
    let started = Instant::now();
    let mut upload = Uploader::new(client.clone(), vm, LogNumber(1), id, Duration::from_secs(5), limiter);
    for _ in 0..megabytes * 1_000_000 / WRITE_BYTES as u64 {
        upload.write(piece.clone()).await.expect("the sink takes everything");
    }
    upload.finish().await.expect("the sink takes everything");
    megabytes as f64 / started.elapsed().as_secs_f64()
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let megabytes = std::env::args().nth(1).map_or(Ok(2000), |text| text.parse())?;
    let dirs = [tempfile::tempdir()?, tempfile::tempdir()?];
    let (sink, source) =
        (Identity::create(dirs[0].path(), "sink")?, Identity::create(dirs[1].path(), "source")?);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?.to_string();
    let fingerprint = sink.fingerprint();
    tokio::spawn(async move {
        wire::serve(listener, &sink, wire::router(Arc::new(Sink)), std::future::pending()).await
    });
    let client = Arc::new(Client::new(&source, address, fingerprint)?);
    let mut rates = Vec::new();
    for _ in 0..5 {
        rates.push(upload(&client, megabytes, None).await);
    }
    rates.sort_by(f64::total_cmp);
    println!(
        "upload of {megabytes} MB, median of 5: {:.0} MB/s ({:.0} to {:.0})",
        rates[2], rates[0], rates[4]
    );
    let limited = upload(&client, 50, Some(RateLimiter::new(20_000_000))).await;
    println!("limited to 20 MB/s: {limited:.1} MB/s");
    Ok(())
}
