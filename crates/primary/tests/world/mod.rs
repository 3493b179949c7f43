//! A small world for a cycle: a guest and a replica in memory, and a link between them that can be made to
//! fail. Everything in it is decided by a seed and by tokio's clock.
#![allow(dead_code, reason = "each test file uses its part")]

pub mod guest;
mod replica;

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use catalog::Catalog;
use model::{CycleBackoff, HealthThresholds, Timestamp, VmId};
use primary::ports::Ports;
use primary::{
    Compress, Config, Failure, FailureCode, Monitor, Primary, ProtectRequest, Relationship, Settings, Shared,
};
use tokio::time::Instant;

pub use guest::{BLOCK, Guest, Vm};
#[allow(unused_imports, reason = "each test file uses its part")]
pub use replica::{Fault, Link, Replica};

/// Everything that there is. Clones are the same world.
#[derive(Clone)]
pub struct World(Arc<Mutex<State>>);

pub struct State {
    pub vm: Vm,
    pub replica: Replica,
    chance: u64,
    began: Option<Instant>,
}

impl World {
    /// A guest with disks of these sizes, partly written, and an empty replica.
    pub fn new(seed: u64, sizes: &[usize]) -> Self {
        let mut state =
            State { vm: Vm::new(sizes), replica: Replica::default(), chance: seed | 1, began: None };
        for _ in 0..600 {
            state.guest_writes();
        }
        Self(Arc::new(Mutex::new(state)))
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// A primary over this world, with what the catalog remembers of earlier ones.
    pub fn primary(&self, catalog: &Path) -> Arc<Shared<World>> {
        Shared::open(Catalog::open(catalog).unwrap(), config(), self.clone()).unwrap()
    }

    /// A whole primary's side over this world.
    pub fn site(&self, catalog: &Path) -> Primary<World> {
        let site = Primary::open(Catalog::open(catalog).unwrap(), config(), self.clone()).unwrap();
        site.start().unwrap();
        site
    }

    /// The relationship as it is after the primary has been started again.
    pub fn reload(&self, catalog: &Path) -> Relationship<World> {
        let mut all = Relationship::load(&self.primary(catalog)).unwrap();
        assert_eq!(all.len(), 1);
        all.remove(0)
    }
}

impl State {
    /// A number below `bound`, by xorshift.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.chance ^= self.chance << 13;
        self.chance ^= self.chance >> 7;
        self.chance ^= self.chance << 17;
        self.chance % bound
    }

    /// The guest writes somewhere: a few blocks of data, now and then of zeros.
    pub fn guest_writes(&mut self) {
        if self.vm.quiet {
            return;
        }
        let disk = self.below(self.vm.disks.len() as u64) as usize;
        let blocks = self.vm.disks[disk].data.len() as u64 / BLOCK as u64;
        let at = self.below(blocks);
        let count = (1 + self.below(8)).min(blocks - at);
        let byte = if self.below(4) == 0 { 0 } else { 1 + self.below(255) as u8 };
        self.vm.disks[disk].write(at, count, byte);
    }
}

impl Ports for World {
    type Guest = Guest;
    type Remote = Link;

    async fn connect(&self, _vm: VmId, _settings: &Settings) -> Result<Guest, Failure> {
        Ok(Guest { world: self.clone(), boot: self.lock().vm.boot })
    }

    async fn is_off(&self, _settings: &Settings) -> bool {
        false
    }

    fn remote(&self, peer: &str) -> Option<Link> {
        (peer == "head-office").then(|| Link(self.clone()))
    }

    fn now(&self) -> Timestamp {
        let now = Instant::now();
        let began = *self.lock().began.get_or_insert(now);
        Timestamp(1_000_000_000_000_000).plus(now - began)
    }

    fn random_id(&self) -> Result<[u8; 16], Failure> {
        let mut state = self.lock();
        Ok(std::array::from_fn(|_| state.below(256) as u8))
    }
}

fn config() -> Config {
    Config {
        site_name: "branch".into(),
        compression_level: 1,
        compress: Compress::Inline,
        initial_log_bytes: 1 << 20,
        interval_min_s: 5,
        backoff: CycleBackoff::default(),
        patience: Duration::from_secs(10),
        thresholds: HealthThresholds::default(),
        cycles_at_once: 1,
        ahead_from_bytes: 1,
    }
}

pub fn request() -> ProtectRequest {
    ProtectRequest {
        name: "web".parse().unwrap(),
        settings: Settings {
            monitor: Monitor::Socket("/nowhere/qmp".into()),
            nbd: None,
            nodes: Vec::new(),
            peer: "head-office".into(),
            interval: Duration::from_secs(30),
            points: 4,
            app_every: Some(Duration::from_secs(3600)),
            guest_agent: Some("/nowhere/agent".into()),
            bandwidth_bytes_per_s: None,
            sign_of_life: None,
            excluded: Vec::new(),
            relocating: None,
            resync: model::ResyncPolicy::Automatic,
        },
        initial: model::InitialStart::Now,
    }
}

pub fn broken(what: &str) -> Failure {
    Failure::transient(FailureCode::Link, what)
}

/// Runs on one thread with a clock that stands unless everybody waits for it.
pub fn alone<T>(story: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap()
        .block_on(story)
}
