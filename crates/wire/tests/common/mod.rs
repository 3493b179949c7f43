//! Two sites in one process: a small one in memory that does what a replica's must, and ways to talk to it.
#![allow(dead_code, reason = "each test file uses a part of it")]

pub mod memory;
pub mod proxy;
pub mod raw;

use std::sync::Arc;
use std::time::Duration;

use model::{LogId, LogNumber, Phase, VmId};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use wire::{Client, Fingerprint, Identity, Limits, Offer, OfferedDisk, RateLimiter, Uploader};

use memory::MemorySite;

/// Long enough for a machine that does something else beside; nothing waits so long when all is well.
pub const SOON: Duration = Duration::from_secs(20);

/// A new identity; its files are gone with the call.
pub fn identity(name: &str) -> Identity {
    let dir = tempfile::tempdir().unwrap();
    Identity::create(dir.path(), name).unwrap()
}

/// A server that runs.
pub struct Running {
    pub address: String,
    pub identity: Identity,
    pub site: Arc<MemorySite>,
    pub limits: Limits,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<std::io::Result<()>>,
}

impl Running {
    pub async fn start(site: Arc<MemorySite>) -> Self {
        Self::start_with(site, Limits { shutdown: Duration::from_millis(100), ..Limits::default() }).await
    }

    pub async fn start_with(site: Arc<MemorySite>, limits: Limits) -> Self {
        Self::start_at("127.0.0.1:0", identity("replica"), site, limits).await
    }

    async fn start_at(address: &str, identity: Identity, site: Arc<MemorySite>, limits: Limits) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (stop, stopped) = oneshot::channel();
        let app = wire::router_with(site.clone(), limits.clone());
        let (ours, with) = (identity.clone(), limits.clone());
        let task = tokio::spawn(async move {
            wire::serve_with(listener, &ours, app, with, async move { drop(stopped.await) }).await
        });
        Self { address, identity, site, limits, stop: Some(stop), task }
    }

    /// Ends as a site does that is told to end.
    pub async fn stop(mut self) -> Stopped {
        self.stop.take().unwrap().send(()).unwrap();
        self.task.await.unwrap().unwrap();
        Stopped { address: self.address, identity: self.identity, site: self.site, limits: self.limits }
    }

    pub fn client(&self, identity: &Identity) -> Arc<Client> {
        Arc::new(Client::new(identity, &self.address, self.fingerprint()).unwrap())
    }

    pub fn fingerprint(&self) -> Fingerprint {
        self.identity.fingerprint()
    }
}

/// A server that ran.
pub struct Stopped {
    address: String,
    identity: Identity,
    site: Arc<MemorySite>,
    limits: Limits,
}

impl Stopped {
    /// Begins again, at the same address, with what it had.
    pub async fn start(self) -> Running {
        Running::start_at(&self.address, self.identity, self.site, self.limits).await
    }
}

/// A replica's site that knows one primary, and that primary.
pub async fn pair() -> (Running, Identity) {
    let primary = identity("primary");
    let site = Arc::new(MemorySite::default());
    site.add_peer("primary", primary.fingerprint());
    (Running::start(site).await, primary)
}

pub fn vm(byte: u8) -> VmId {
    VmId::from_bytes([byte; 16])
}

pub fn log_id(byte: u8) -> LogId {
    LogId::from_bytes([byte; 16])
}

pub fn offer(vm: VmId) -> Offer {
    Offer {
        vm,
        vm_name: "web".parse().unwrap(),
        disks: vec![OfferedDisk { name: "vda".parse().unwrap(), size_bytes: 1 << 20 }],
        interval_s: 30,
        points: 4,
        primary_name: "primary".to_owned(),
        definition: serde_json::json!({ "machine": "q35" }),
        phase: Phase::Replicating,
        error: None,
        paused: false,
        generation: 1,
        media: None,
        pins: Vec::new(),
        group: None,
    }
}

/// An upload of log 1, after the VM was offered.
pub async fn upload(client: &Arc<Client>, patience: Duration, limiter: Option<RateLimiter>) -> Uploader {
    client.offer(&offer(vm(1))).await.unwrap();
    Uploader::new(client.clone(), vm(1), LogNumber(1), log_id(1), patience, limiter)
}

/// Bytes that do not repeat soon, so that a piece out of place is seen.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Waits until something holds.
pub async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let waited = tokio::time::timeout(SOON, async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    assert!(waited.await.is_ok(), "{what}");
}
