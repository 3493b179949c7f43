//! A guest that does everything a disk can take, one thing at a time, and remembers in which order.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use nbd::Client;
use rig::{Result, StorageDaemon, Trouble, noise};

use super::{Dice, SECTOR_BYTES};

/// The longest write, in sectors.
const WRITE_SECTORS_MAX: u64 = 512;
/// Where it writes on each disk: at the start and at the very end.
const HEAD_BYTES: u64 = 8 << 20;
const TAIL_BYTES: u64 = 1 << 20;

/// What a step does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// Writes bytes that were never written before.
    Write,
    /// Writes zeros.
    Zero,
    /// Discards.
    Discard,
}

/// One step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// On which disk.
    pub disk: usize,
    /// What.
    pub act: Act,
    /// From which byte.
    pub offset: u64,
    /// How many bytes.
    pub len: u64,
}

/// A thread that makes random steps over a daemon's NBD exports; never two at once.
pub struct Guest {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<()>>>,
}

#[derive(Default)]
struct Shared {
    /// Every step begun.
    steps: Mutex<Vec<Step>>,
    stop: AtomicBool,
}

impl Guest {
    /// Starts, with `pause` between two steps.
    pub fn start(daemon: &StorageDaemon, seed: u64, pause: Duration) -> Self {
        let shared = Arc::new(Shared::default());
        let mut run = Run {
            shared: shared.clone(),
            socket: daemon.nbd(),
            names: daemon.names().map(str::to_owned).collect(),
            dice: Dice::new(seed),
            pause,
        };
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.map_err(|error| Trouble(error.to_string()))?;
            runtime.block_on(run.steps()).map_err(|error| Trouble(format!("the guest: {error}")))
        });
        Self { shared, thread: Some(thread) }
    }

    /// How many steps were begun; all but the last have been made, and it perhaps.
    #[must_use]
    pub fn begun(&self) -> usize {
        self.shared.steps().len()
    }

    /// Stops after a flush of every disk, and gives all its steps in their order.
    pub fn stop(mut self) -> Result<Vec<Step>> {
        self.shared.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().expect("it is stopped once").join();
        ended.map_err(|_| Trouble("the guest's thread panicked".into()))??;
        Ok(self.shared.steps().clone())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

impl Shared {
    fn steps(&self) -> std::sync::MutexGuard<'_, Vec<Step>> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the guest's thread works with.
struct Run {
    shared: Arc<Shared>,
    socket: PathBuf,
    names: Vec<String>,
    dice: Dice,
    pause: Duration,
}

impl Run {
    async fn steps(&mut self) -> nbd::Result<()> {
        let mut disks = Vec::new();
        for name in &self.names {
            disks.push(Client::connect(&self.socket, name, &[]).await?);
        }
        while !self.shared.stop.load(Ordering::Relaxed) {
            let step = self.next_step(&disks);
            let number = {
                let mut steps = self.shared.steps();
                steps.push(step);
                steps.len() as u64
            };
            let disk = &disks[step.disk];
            match step.act {
                Act::Write => disk.write(step.offset, &contents(number, step.len)).await?,
                Act::Zero => disk.write_zeroes(step.offset, step.len).await?,
                Act::Discard => disk.trim(step.offset, step.len).await?,
            }
            if self.dice.below(16) == 0 {
                disk.flush().await?;
            }
            tokio::time::sleep(self.pause).await;
        }
        for disk in &disks {
            disk.flush().await?;
        }
        Ok(())
    }

    fn next_step(&mut self, disks: &[Client]) -> Step {
        let disk = self.dice.below(disks.len() as u64) as usize;
        let size_bytes = disks[disk].size_bytes();
        let act = match self.dice.below(10) {
            0..=6 => Act::Write,
            7 | 8 => Act::Zero,
            _ => Act::Discard,
        };
        let area = if self.dice.below(4) > 0 { 0..HEAD_BYTES } else { size_bytes - TAIL_BYTES..size_bytes };
        let sectors = (area.end - area.start) / SECTOR_BYTES;
        let len = self.dice.sectors(WRITE_SECTORS_MAX);
        let first = self.dice.below(sectors - len + 1);
        Step { disk, act, offset: area.start + first * SECTOR_BYTES, len: len * SECTOR_BYTES }
    }
}

/// What a step writes: its number at the start of each sector, so that none writes what another did, and
/// then noise or one byte again and again.
fn contents(number: u64, len: u64) -> Vec<u8> {
    let mut bytes =
        if number.is_multiple_of(3) { vec![number as u8; len as usize] } else { noise(number * 2 + 1, len) };
    for sector in bytes.chunks_mut(SECTOR_BYTES as usize) {
        sector[..8].copy_from_slice(&number.to_le_bytes());
    }
    bytes
}
