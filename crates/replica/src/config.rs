//! How a store behaves; what the site's config file sets.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use model::{HealthThresholds, Timestamp};

use crate::layers::Layers;

/// Where the store reads the time; tests bring their own.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> Timestamp + Send + Sync>);

impl Clock {
    /// The system's clock.
    #[must_use]
    pub fn system() -> Self {
        Self::from_fn(|| Timestamp::from(SystemTime::now()))
    }

    /// A clock that asks `now`.
    pub fn from_fn(now: impl Fn() -> Timestamp + Send + Sync + 'static) -> Self {
        Self(Arc::new(now))
    }

    /// The present moment.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        (self.0)()
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Clock")
    }
}

/// Where the store takes chance from; tests bring their own.
#[derive(Clone)]
pub struct Chance(Arc<Fill>);

type Fill = dyn Fn(&mut [u8]) -> io::Result<()> + Send + Sync;

impl Chance {
    /// The system's.
    #[must_use]
    pub fn system() -> Self {
        Self::from_fn(|bytes| getrandom::fill(bytes).map_err(io::Error::other))
    }

    /// Chance that `fill` makes.
    pub fn from_fn(fill: impl Fn(&mut [u8]) -> io::Result<()> + Send + Sync + 'static) -> Self {
        Self(Arc::new(fill))
    }

    /// Bytes that nobody can foresee.
    pub fn bytes<const N: usize>(&self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        (self.0)(&mut bytes).map(|()| bytes)
    }
}

impl fmt::Debug for Chance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Chance")
    }
}

/// How a store behaves.
#[derive(Debug, Clone)]
pub struct Config {
    /// The site's folder; VMs are kept below `vms/` in it unless their storage was moved.
    pub dir: PathBuf,
    /// Other folders that replicas were made in ([`crate::Store::ask_where_replicas_go`]): what completed failovers have
    /// left there is tidied up too. Default none.
    pub storages: Vec<PathBuf>,
    /// New logs are refused with `no-space` when less than this is free where they would go, so that
    /// applies, the catalog and everything else on that file system can still work. Default 256 MiB.
    pub free_reserve_bytes: u64,
    /// How many VMs are maintained (applied, compacted) at once by the background workers; with 0 nothing
    /// happens but by [`crate::Store::maintain`]. Default 1.
    pub workers: usize,
    /// Threads that decode and write within one apply. Default 2.
    pub apply_threads: usize,
    /// An apply or a merge plans for at most this many extents at once (about 100 bytes each while it
    /// plans). Default 524,288.
    pub plan_extents_max: usize,
    /// How many of the newest points stay in any case when hourly points are kept. Default 10.
    pub recent_points: usize,
    /// When health turns.
    pub health: HealthThresholds,
    /// No hold lasts longer. Default 24 h.
    pub hold_max: Duration,
    /// A barrier that is not given back ends by itself after this. Default 15 min.
    pub barrier_max: Duration,
    /// A failed apply is tried again after this, or, where only space was missing, after a `tick`. Default 5 min.
    pub retry_failed_after: Duration,
    /// How often the workers look at every VM, whatever arrives. Default 10 s.
    pub tick: Duration,
    /// Each open view keeps at most this much of decoded records. Default 16 MiB.
    pub view_cache_bytes: usize,
    /// The zstd level of merged logs. Default 1.
    pub merge_level: i32,
    /// The file system that all of it is on. Default the operating system's.
    pub files: files::Shared,
    /// The clock.
    pub clock: Clock,
    /// Where the names of holds come from.
    pub chance: Chance,
    /// Who makes the writable layers of a failover. Default `qemu-img`.
    pub layers: Layers,
    /// Where the site shows what lies below those layers, over NBD. Default `run/nbd.sock` in `dir`.
    pub nbd_socket: PathBuf,
}

impl Config {
    /// The defaults, for a site in `dir`.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        let dir = dir.into();
        Self {
            nbd_socket: dir.join("run/nbd.sock"),
            dir,
            storages: Vec::new(),
            free_reserve_bytes: 256 << 20,
            workers: 1,
            apply_threads: 2,
            plan_extents_max: 1 << 19,
            recent_points: 10,
            health: HealthThresholds::default(),
            hold_max: Duration::from_secs(24 * 3600),
            barrier_max: Duration::from_secs(15 * 60),
            retry_failed_after: Duration::from_secs(5 * 60),
            tick: Duration::from_secs(10),
            view_cache_bytes: 16 << 20,
            merge_level: 1,
            files: Arc::new(files::Os),
            clock: Clock::system(),
            chance: Chance::system(),
            layers: Layers::qemu_img(),
        }
    }
}
