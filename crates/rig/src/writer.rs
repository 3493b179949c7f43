//! A guest that writes: one write outstanding, numbered, for ever.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use nbd::Client;
use tokio::runtime::{Builder, Runtime};
use witness::{Action, Checker, Script, Violation, Write};

use crate::{Result, StorageDaemon, Trouble, doing};

/// A thread that performs a script over a daemon's NBD exports.
pub struct Writer {
    script: Arc<Script>,
    begun: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<u64>>,
}

impl Writer {
    /// Starts to write, from write `from` on (1 for the first), with `pause` between two writes.
    pub fn start(daemon: &StorageDaemon, script: Arc<Script>, from: u64, pause: Duration) -> Result<Self> {
        let begun = Arc::new(AtomicU64::new(from - 1));
        let stop = Arc::new(AtomicBool::new(false));
        let guest = Guest {
            script: script.clone(),
            begun: begun.clone(),
            stop: stop.clone(),
            socket: daemon.nbd(),
            names: daemon.names().map(str::to_owned).collect(),
            pause,
        };
        let (ready, started) = mpsc::channel();
        let thread = std::thread::spawn(move || guest.run(from, &ready));
        started.recv().unwrap_or_else(|_| Err(Trouble("the writer's thread ended".into())))?;
        Ok(Self { script, begun, stop, thread: Some(thread) })
    }

    /// The number of the newest write begun.
    #[must_use]
    pub fn begun(&self) -> u64 {
        self.begun.load(Ordering::SeqCst)
    }

    /// Stops, and gives the number to go on with: all before it have happened, and it perhaps.
    #[must_use]
    pub fn stop(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        let joined = self.thread.take().map(JoinHandle::join);
        joined.and_then(std::result::Result::ok).unwrap_or_else(|| self.begun())
    }

    /// The state that raw images show (in the disks' order).
    pub fn state_of_files(&self, paths: &[impl AsRef<Path>]) -> std::result::Result<u64, Violation> {
        state_of_files(&self.script, self.begun(), paths)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// What the writer's thread works with.
struct Guest {
    script: Arc<Script>,
    begun: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    socket: PathBuf,
    names: Vec<String>,
    pause: Duration,
}

impl Guest {
    /// Writes until it is stopped; the number to go on with.
    fn run(&self, from: u64, ready: &mpsc::Sender<Result<()>>) -> u64 {
        let connected = runtime().and_then(|runtime| {
            let disks = runtime.block_on(self.connect())?;
            Ok((runtime, disks))
        });
        match connected {
            Ok((runtime, disks)) => {
                let _ = ready.send(Ok(()));
                runtime.block_on(self.write(&disks, from))
            }
            Err(error) => {
                let _ = ready.send(Err(error));
                from
            }
        }
    }

    async fn connect(&self) -> Result<Vec<Client>> {
        let mut disks = Vec::new();
        for name in &self.names {
            let client = Client::connect(&self.socket, name, &[]).await;
            disks.push(client.map_err(doing(self.socket.display()))?);
        }
        Ok(disks)
    }

    async fn write(&self, disks: &[Client], from: u64) -> u64 {
        let mut number = from;
        while !self.stop.load(Ordering::Relaxed) {
            let write = self.script.write(number);
            self.begun.store(number, Ordering::SeqCst);
            if perform(&disks[write.disk], &self.script, &write).await.is_err() {
                return number; // the daemon was killed: this write may or may not have happened
            }
            number += 1;
            if !self.pause.is_zero() {
                tokio::time::sleep(self.pause).await;
            }
        }
        number
    }
}

async fn perform(disk: &Client, script: &Script, write: &Write) -> std::result::Result<(), nbd::Error> {
    match write.action {
        Action::Zero => disk.write_zeroes(write.offset, write.len).await,
        Action::Data => disk.write(write.offset, &script.data(write)).await,
    }
}

fn runtime() -> Result<Runtime> {
    Builder::new_current_thread().enable_all().build().map_err(doing("starting a runtime"))
}

/// The state of a script that raw images show (in the disks' order).
pub fn state_of_files(
    script: &Script,
    begun: u64,
    paths: &[impl AsRef<Path>],
) -> std::result::Result<u64, Violation> {
    let files = paths.iter().map(std::fs::File::open).collect::<std::io::Result<Vec<_>>>()?;
    Checker::new(script).state(begun, |disk, offset, buffer| files[disk].read_exact_at(buffer, offset))
}

/// The export and the socket of an NBD address as Afterimage gives them: `nbd+unix:///EXPORT?socket=PATH`.
pub fn nbd_address(uri: &str) -> Result<(&str, &Path)> {
    let parts = uri.strip_prefix("nbd+unix:///").and_then(|rest| rest.split_once("?socket="));
    let (export, socket) = parts.ok_or_else(|| Trouble(format!("not an NBD address: {uri}")))?;
    Ok((export, Path::new(socket)))
}

/// The state that NBD exports show (`nbd+unix:///NAME?socket=PATH`, in the disks' order).
pub fn state_of_exports(script: &Script, begun: u64, uris: &[&str]) -> std::result::Result<u64, Violation> {
    let runtime = runtime().map_err(std::io::Error::other)?;
    let mut disks = Vec::new();
    for uri in uris {
        let (name, socket) = nbd_address(uri).map_err(std::io::Error::other)?;
        let client = runtime.block_on(Client::connect(socket, name, &[]));
        disks.push(client.map_err(std::io::Error::other)?);
    }
    Checker::new(script).state(begun, |disk, offset, buffer| {
        let bytes =
            runtime.block_on(disks[disk].read(offset, buffer.len() as u64)).map_err(std::io::Error::other)?;
        buffer.copy_from_slice(&bytes);
        Ok(())
    })
}

/// Bytes that do not compress, the same for the same seed.
#[must_use]
pub fn noise(seed: u64, len: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = vec![0; usize::try_from(len).expect("noise fits in memory")];
    for word in bytes.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes()[..word.len()]);
    }
    bytes
}

/// Fills a part of a daemon's disk with noise, as fast as it goes, and flushes it.
pub fn fill(daemon: &StorageDaemon, name: &str, offset: u64, len: u64, seed: u64) -> Result<()> {
    const STEP: u64 = 1 << 20;
    let runtime = runtime()?;
    let socket = daemon.nbd();
    let failed = || doing::<nbd::Error>(format!("filling disk {name}"));
    let disk = runtime.block_on(Client::connect(&socket, name, &[])).map_err(failed())?;
    for (step, at) in (offset..offset + len).step_by(STEP as usize).enumerate() {
        let bytes = noise(seed.wrapping_mul(0x9E37_79B9) + step as u64 * 2, STEP.min(offset + len - at));
        runtime.block_on(disk.write(at, &bytes)).map_err(failed())?;
    }
    runtime.block_on(disk.flush()).map_err(failed())
}

/// Writes bytes to a daemon's disk, and flushes it.
pub fn write(daemon: &StorageDaemon, name: &str, offset: u64, bytes: &[u8]) -> Result<()> {
    let failed = || doing::<nbd::Error>(format!("writing to disk {name}"));
    runtime()?.block_on(async {
        let disk = Client::connect(&daemon.nbd(), name, &[]).await.map_err(failed())?;
        disk.write(offset, bytes).await.map_err(failed())?;
        disk.flush().await.map_err(failed())
    })
}

/// A boot sector that writes `words` to the first serial port, byte by byte, and halts: the smallest guest that can be
/// seen to boot.
///
/// # Panics
/// If the words are too long for it.
#[must_use]
pub fn boot_sector(words: &str) -> [u8; 512] {
    const CODE: [u8; 21] = [
        0x31, 0xc0, // xor ax, ax
        0x8e, 0xd8, // mov ds, ax
        0xbe, 0x15, 0x7c, // mov si, 0x7c15: the words
        0xba, 0xf8, 0x03, // mov dx, 0x3f8: the port
        0xac, // lodsb
        0x08, 0xc0, // or al, al
        0x74, 0x03, // jz to hlt
        0xee, // out dx, al
        0xeb, 0xf8, // jmp to lodsb
        0xf4, // hlt
        0xeb, 0xfd, // jmp to hlt
    ];
    let mut sector = [0; 512];
    sector[..CODE.len()].copy_from_slice(&CODE);
    sector[CODE.len()..][..words.len()].copy_from_slice(words.as_bytes());
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}
