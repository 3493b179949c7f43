//! What this machine can do at most: the rates of its disk, its memory and its cores at each thing that a byte
//! must go through. A figure's share of the limit is the time that the bytes would take if nothing else had to
//! be done, all cores were always busy and the slowest of disk and cores alone counted.

use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;
use std::time::Instant;

use anyhow::Context;
use sha2::{Digest, Sha256};

use crate::image::{self, MIB};
use crate::measure::{median, run as timed, settle};
use crate::table::Table;
use crate::{Arguments, say};

/// Bytes that each of the cores' rates is measured with, out of the realistic image.
const SAMPLE_MIB: usize = 256;
/// Bytes that the disk's rates are measured with.
const DISK_BYTES: u64 = 2 << 30;
/// zstd's level in backups, and in logs.
const BACKUP_LEVEL: i32 = 3;
const LOG_LEVEL: i32 = 1;

/// Rates in bytes per second; those of cores are of one.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    cores: f64,
    disk_read: f64,
    disk_write: f64,
    memory_copy: f64,
    sha256: f64,
    blake3: f64,
    aes: f64,
    compress_backup: f64,
    compress_log: f64,
    decompress: f64,
    /// What is left of a byte of the sample.
    backup_ratio: f64,
    log_ratio: f64,
    /// One block written and synced, in seconds.
    sync_s: f64,
}

impl Limits {
    /// Those of this machine, measured when they are first asked for.
    pub fn of(arguments: &Arguments) -> anyhow::Result<&'static Self> {
        static LIMITS: OnceLock<Limits> = OnceLock::new();
        if let Some(limits) = LIMITS.get() {
            return Ok(limits);
        }
        say("measuring what this machine can do at most");
        let measured = Self::measure(arguments)?;
        Ok(LIMITS.get_or_init(|| measured))
    }

    fn measure(arguments: &Arguments) -> anyhow::Result<Self> {
        let path = arguments.dir.join("limits.raw");
        image::excerpt(&arguments.image()?, &path, SAMPLE_MIB)?;
        let sample = std::fs::read(&path)?;
        let (compress_backup, backup_ratio) = compress(&sample, BACKUP_LEVEL)?;
        let (compress_log, log_ratio) = compress(&sample, LOG_LEVEL)?;
        let mut copy = vec![0; sample.len()];
        let limits = Self {
            cores: std::thread::available_parallelism().map_or(1.0, |cores| cores.get() as f64),
            disk_read: read_rate(&path)?,
            disk_write: write_rate(&path)?,
            memory_copy: rate(sample.len(), || copy.copy_from_slice(black_box(&sample))),
            sha256: rate(sample.len(), || {
                black_box(Sha256::digest(&sample));
            }),
            blake3: rate(sample.len(), || {
                black_box(blake3::hash(&sample));
            }),
            aes: rate(sample.len(), || seal(&sample)),
            compress_backup,
            compress_log,
            decompress: decompress(&sample)?,
            backup_ratio,
            log_ratio,
            sync_s: sync_time(&path)?,
        };
        std::fs::remove_file(&path)?;
        Ok(limits)
    }

    /// All of `bytes` of a disk read, hashed, compressed, sealed and packed in restic's format, in seconds.
    pub fn backup_s(&self, bytes: f64) -> f64 {
        let packed = bytes * self.backup_ratio;
        let cores =
            bytes / self.sha256 + bytes / self.compress_backup + packed / self.aes + packed / self.sha256;
        (cores / self.cores).max(bytes / self.disk_read).max(packed / self.disk_write)
    }

    /// The way back: opened, decompressed, its digest checked, written.
    pub fn restore_s(&self, bytes: f64) -> f64 {
        let packed = bytes * self.backup_ratio;
        let cores = packed / self.aes + bytes / self.decompress + bytes / self.sha256;
        (cores / self.cores).max(packed / self.disk_read).max(bytes / self.disk_write)
    }

    /// A delta read, compressed, hashed on both sides, sealed and opened by TLS, written and synced, in bytes per
    /// second; `ratio` is what is left of a byte in the log.
    pub fn replicate_rate(&self, ratio: f64) -> f64 {
        let cores = 1.0 / self.compress_log + ratio * (2.0 / self.blake3 + 2.0 / self.aes);
        1.0 / (cores / self.cores).max(1.0 / self.disk_read).max(ratio / self.disk_write)
    }

    /// Bytes per second that a file takes, synced.
    pub fn write_rate(&self) -> f64 {
        self.disk_write
    }

    /// What is left of a byte of realistic data in a log.
    pub fn log_ratio(&self) -> f64 {
        self.log_ratio
    }

    /// The rates themselves, as rows.
    pub fn rows(&self, table: &mut Table) {
        for (what, rate) in [
            ("disk, sequential reads past the cache", self.disk_read),
            ("disk, sequential writes, synced", self.disk_write),
            ("memory copy", self.memory_copy),
            ("SHA-256", self.sha256),
            ("BLAKE3", self.blake3),
            ("AES-256-CTR and Poly1305", self.aes),
            ("zstd of backups (level 3)", self.compress_backup),
            ("zstd of logs (level 1)", self.compress_log),
            ("zstd, decompression", self.decompress),
        ] {
            table.figure(format!("limit: {what}"), rate / 1e6, "MB/s", None);
        }
        table.figure("limit: one block written and synced", self.sync_s * 1e3, "ms", None);
        table.note(&format!(
            "limits: cores' rates are of one of {:.0}, over {SAMPLE_MIB} MiB of the realistic image, of which zstd leaves \
             {:.0} % in a backup and {:.0} % in a log",
            self.cores,
            self.backup_ratio * 100.0,
            self.log_ratio * 100.0
        ));
    }
}

/// Runs the part.
pub fn run(arguments: &Arguments, table: &mut Table) -> anyhow::Result<()> {
    Limits::of(arguments)?.rows(table);
    Ok(())
}

/// The median of three, so that the first touch of memory does not count.
fn rate(bytes: usize, mut work: impl FnMut()) -> f64 {
    let seconds = [(); 3].map(|()| {
        let started = Instant::now();
        work();
        started.elapsed().as_secs_f64()
    });
    bytes as f64 / median(&seconds)
}

fn seal(sample: &[u8]) {
    use aes256ctr_poly1305aes::aead::{AeadInPlace, generic_array::GenericArray};
    let cipher = aes256ctr_poly1305aes::Aes256CtrPoly1305Aes::new(GenericArray::from_slice(&[7; 64]));
    let mut piece = vec![0; MIB];
    for bytes in sample.chunks_exact(MIB) {
        piece.copy_from_slice(bytes);
        let sealed = cipher.encrypt_in_place_detached(GenericArray::from_slice(&[1; 16]), &[], &mut piece);
        black_box(sealed.expect("a piece can be sealed"));
    }
}

fn compress(sample: &[u8], level: i32) -> anyhow::Result<(f64, f64)> {
    let mut compressor = zstd::bulk::Compressor::new(level)?;
    let mut left = 0;
    let rate = rate(sample.len(), || {
        left = sample
            .chunks(MIB)
            .map(|piece| compressor.compress(piece).map_or(MIB, |packed| packed.len()))
            .sum();
    });
    Ok((rate, left as f64 / sample.len() as f64))
}

fn decompress(sample: &[u8]) -> anyhow::Result<f64> {
    let packed: Vec<Vec<u8>> = sample
        .chunks(MIB)
        .map(|piece| zstd::bulk::compress(piece, BACKUP_LEVEL))
        .collect::<Result<_, _>>()?;
    let mut decompressor = zstd::bulk::Decompressor::new()?;
    let mut piece = vec![0; MIB];
    Ok(rate(sample.len(), || {
        for packed in &packed {
            let _ = black_box(decompressor.decompress_to_buffer(packed, &mut piece));
        }
    }))
}

/// The file is written three times: from the second time on over what is there, as a base is.
fn write_rate(beside: &Path) -> anyhow::Result<f64> {
    let path = beside.with_extension("written");
    let (of, count) = (format!("of={}", path.display()), format!("count={}", DISK_BYTES >> 22));
    let rate = dd_rate(DISK_BYTES, &["if=/dev/zero", &of, &count, "conv=fsync,notrunc"])?;
    std::fs::remove_file(&path)?;
    Ok(rate)
}

fn read_rate(path: &Path) -> anyhow::Result<f64> {
    let from = format!("if={}", path.display());
    dd_rate((SAMPLE_MIB * MIB) as u64, &[&from, "of=/dev/null", "iflag=direct"])
}

/// The median of three.
fn dd_rate(bytes: u64, arguments: &[&str]) -> anyhow::Result<f64> {
    let mut seconds = Vec::new();
    for _ in 0..3 {
        settle()?;
        seconds.push(timed(Command::new("dd").arg("bs=4M").args(arguments))?.seconds);
    }
    Ok(bytes as f64 / median(&seconds))
}

fn sync_time(beside: &Path) -> anyhow::Result<f64> {
    let path = beside.with_extension("synced");
    let file = File::create(&path).with_context(|| path.display().to_string())?;
    let mut seconds = Vec::new();
    for n in 0..200 {
        let started = Instant::now();
        file.write_all_at(&[n as u8; 4096], n * 4096)?;
        file.sync_data()?;
        seconds.push(started.elapsed().as_secs_f64());
    }
    std::fs::remove_file(&path)?;
    Ok(median(&seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        cores: 2.0,
        disk_read: 2e9,
        disk_write: 1e9,
        memory_copy: 1e10,
        sha256: 2e9,
        blake3: 4e9,
        aes: 2e9,
        compress_backup: 0.5e9,
        compress_log: 1e9,
        decompress: 2e9,
        backup_ratio: 0.5,
        log_ratio: 0.5,
        sync_s: 0.001,
    };

    #[test]
    fn the_slowest_of_disk_and_cores_is_the_limit() {
        // Cores: (1/2 + 2 + 1/4 + 1/4) / 2 = 1.5 s for 1 GB; disk: 0.5 s.
        assert!((LIMITS.backup_s(1e9) - 1.5).abs() < 1e-9);
        // Cores: (1/4 + 1/2 + 1/2) / 2 = 0.625 s; disk writes: 1 s.
        assert!((LIMITS.restore_s(1e9) - 1.0).abs() < 1e-9);
        // Cores: (1 + 0.5 * (0.5 + 1)) / 2 = 0.875 s for 1 GB.
        assert!((LIMITS.replicate_rate(0.5) - 1e9 / 0.875).abs() < 1.0);
        let slow = Limits { disk_read: 1e8, ..LIMITS };
        assert!((slow.backup_s(1e9) - 10.0).abs() < 1e-9);
    }

    #[test]
    fn rates_are_measured_of_what_is_done() {
        let sample = vec![7; 4 * MIB];
        let (rate, left) = compress(&sample, 1).unwrap();
        assert!(rate > 1e6 && left < 0.01);
        assert!(decompress(&sample).unwrap() > 1e6);
        assert!(super::rate(1 << 20, || seal(&sample[..MIB])) > 1e6);
    }
}
