//! What one core does per second: `cargo run --release -p afterimage-log --example throughput [FILE]`.
//!
//! With a file, its first 256 MiB are the disk; without, a mix of text, noise and zeros.

use std::error::Error;
use std::hint::black_box;
use std::io::{Cursor, Read};
use std::time::{Duration, Instant};

use log::{Batcher, Encoder, Footer, Header, Verifier, decode_record, read_index};
use model::{Consistency, LogClass, LogId, LogNumber, Progress, Purpose, Timestamp, VmId};

const DISK_BYTES: usize = 256 << 20;
const PIECE_BYTES: usize = 512 * 1024;
/// As a body arrives from the network.
const FEED_BYTES: usize = 256 * 1024;
const LEVEL: i32 = 1;

fn main() -> Result<(), Box<dyn Error>> {
    let disk = match std::env::args().nth(1) {
        Some(path) => {
            let mut disk = Vec::new();
            std::fs::File::open(path)?.take(DISK_BYTES as u64).read_to_end(&mut disk)?;
            disk
        }
        None => mixed_disk(),
    };
    let mb = disk.len() as f64 / 1e6;
    println!("{mb:.0} MB of disk, one thread, zstd level {LEVEL}");
    let report = |what: &str, mb: f64, time: Duration| {
        println!("{what:34}{:8.0} MB/s", mb / time.as_secs_f64());
    };

    // As the primary does it, record by record, each stage with its own stopwatch.
    let [mut batching, mut compressing, mut writing] = [Duration::ZERO; 3];
    let mut batcher = Batcher::new(0);
    let mut encoder = Encoder::new(Vec::new(), &header(disk.len() as u64)?)?;
    let mut log = vec![0xff; disk.len() + disk.len() / 64];
    log.clear();
    for (place, piece) in disk.chunks(PIECE_BYTES).enumerate() {
        let started = Instant::now();
        let raw = batcher.data((place * PIECE_BYTES) as u64, piece);
        batching += started.elapsed();
        let started = Instant::now();
        let records: Vec<_> = raw.into_iter().map(|record| record.encode(LEVEL)).collect();
        compressing += started.elapsed();
        for record in records {
            let started = Instant::now();
            encoder.record(record)?;
            writing += started.elapsed();
            log.append(encoder.get_mut());
        }
    }
    for record in batcher.finish() {
        encoder.record(record.encode(LEVEL))?;
    }
    let class = LogClass::Point(Consistency::Crash);
    let (summary, mut rest) = encoder.finish(Footer { class, progress: Progress::default() })?;
    log.append(&mut rest);
    let (data_mb, log_mb) = (summary.data_bytes as f64 / 1e6, log.len() as f64 / 1e6);
    report("batch (find zeros, pack), of disk", mb, batching);
    report("compress and CRC, of data", data_mb, compressing);
    report("write (index, BLAKE3), of log", log_mb, writing);

    let started = Instant::now();
    let mut verifier = Verifier::new();
    for piece in log.chunks(FEED_BYTES) {
        verifier.feed(piece)?;
    }
    black_box(verifier.finish()?);
    report("verify while it arrives, of log", log_mb, started.elapsed());

    let started = Instant::now();
    let meta = read_index(&mut Cursor::new(&log))?;
    println!("{:34}{:8.1} ms", "read the index", started.elapsed().as_secs_f64() * 1e3);

    let started = Instant::now();
    let mut out = Vec::new();
    for entry in &meta.index.records {
        let range = entry.file_range();
        decode_record(entry, &log[range.start as usize..range.end as usize], &mut out)?;
        black_box(&out);
    }
    report("decode, of data", data_mb, started.elapsed());

    println!(
        "log: {log_mb:.1} MB for {data_mb:.0} MB of data and {:.0} MB of zeros; {} records, {} extents",
        summary.zero_bytes as f64 / 1e6,
        summary.records,
        summary.extents
    );
    Ok(())
}

fn header(size_bytes: u64) -> Result<Header, Box<dyn Error>> {
    Ok(Header {
        vm: VmId::from_bytes([1; 16]),
        id: LogId::from_bytes([2; 16]),
        number: LogNumber(1),
        predecessor: LogId::NONE,
        moment: Timestamp(0),
        purpose: Purpose::Initial,
        disks: vec![log::DiskInfo { name: "vda".parse()?, size_bytes }],
    })
}

/// Stretches of 64 KiB: half of them text of random words, a quarter noise, a quarter with zero blocks.
fn mixed_disk() -> Vec<u8> {
    const WORDS: [&str; 16] = [
        "log", "record", "extent", "replica", "0x00ff", "moment", "the", "of", "a", "disk", "chain", "view",
        "point", "bitmap", "{\"id\":", "\n",
    ];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut disk = Vec::with_capacity(DISK_BYTES);
    while disk.len() < DISK_BYTES {
        let end = disk.len() + 64 * 1024;
        match random() % 4 {
            0 | 1 => {
                while disk.len() < end {
                    let chosen = random();
                    disk.extend_from_slice(WORDS[(chosen % 16) as usize].as_bytes());
                    disk.extend_from_slice((chosen >> 40).to_string().as_bytes());
                }
            }
            2 => disk.extend((0..8192).flat_map(|_| random().to_le_bytes())),
            _ => {
                disk.extend_from_slice(&[0; 48 * 1024]);
                disk.extend((0..2048).flat_map(|_| random().to_le_bytes()));
            }
        }
        disk.truncate(end);
    }
    disk
}
