//! A writable layer against a byte array, through our client and our server.

mod support;

use std::path::Path;
use std::sync::Arc;

use nbd::{Client, CowDisk, Disk, FileDisk, StatusExtent};
use proptest::prelude::*;
use support::{Ours, layer_file, pattern, sparse_file};

/// A little over one page of the bitmap, and no whole number of blocks.
const SIZE: u64 = (16 << 20) + 9 * 4096 + 700;
const BLOCK: u64 = 4096;

#[derive(Debug, Clone)]
enum Step {
    Write {
        offset: u64,
        len: u64,
        byte: u8,
    },
    Zero {
        offset: u64,
        len: u64,
    },
    Trim {
        offset: u64,
        len: u64,
    },
    Flush,
    /// The server is killed and a new one takes over the layer.
    Crash,
}

/// Ranges near places where something changes: blocks, pages of the bitmap, holes of the base, the end.
fn range() -> impl Strategy<Value = (u64, u64)> {
    let place = prop_oneof![
        (0..10u64, 0..BLOCK).prop_map(|(block, byte)| block * BLOCK + byte),
        (0..50_000u64).prop_map(|before| (16 << 20) - 15_000 + before),
        0..SIZE,
    ];
    let len = prop_oneof![4 => 1..3 * BLOCK, 2 => Just(BLOCK), 1 => 1..600_000u64, 1 => 1..9_000_000u64];
    (place, len, any::<bool>()).prop_map(|(offset, len, aligned)| {
        let (offset, len) =
            if aligned { (offset - offset % BLOCK, len.next_multiple_of(BLOCK)) } else { (offset, len) };
        let offset = offset.min(SIZE - 1);
        (offset, len.min(SIZE - offset))
    })
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (range(), 1..=255u8).prop_map(|((offset, len), byte)| Step::Write { offset, len, byte }),
        2 => range().prop_map(|(offset, len)| Step::Zero { offset, len }),
        2 => range().prop_map(|(offset, len)| Step::Trim { offset, len }),
        2 => Just(Step::Flush),
        2 => Just(Step::Crash),
    ];
    prop::collection::vec(step, 1..16)
}

/// What each byte may be: one value, unless writes were not flushed before a crash.
struct Model {
    now: Vec<u8>,
    flushed: Vec<u8>,
    since: Vec<Vec<u8>>,
}

impl Model {
    fn change(&mut self, offset: u64, len: u64, byte: u8) {
        self.now[offset as usize..(offset + len) as usize].fill(byte);
        self.since.push(self.now.clone());
    }

    fn flush(&mut self) {
        self.flushed.clone_from(&self.now);
        self.since.clear();
    }

    /// After a crash, each byte is as it was at the last flush or after a write since. What is found is so from now on.
    fn crash(&mut self, found: &[u8]) {
        for (at, &byte) in found.iter().enumerate() {
            let possible = byte == self.flushed[at] || self.since.iter().any(|later| later[at] == byte);
            assert!(possible, "byte {at} is {byte}, was {} at the flush", self.flushed[at]);
        }
        self.now.copy_from_slice(found);
        self.since.clear();
        self.since.push(self.now.clone());
    }
}

fn layered(folder: &Path) -> CowDisk {
    let base = Arc::new(FileDisk::open(folder.join("base")).unwrap());
    CowDisk::new(base, layer_file(&folder.join("layer"))).unwrap()
}

async fn whole(client: &Client) -> Vec<u8> {
    let mut bytes = vec![0xee; SIZE as usize];
    client.read_into(0, &mut bytes).await.unwrap();
    bytes
}

async fn run(steps: Vec<Step>) {
    let ours = Ours::start();
    let base = ours.folder.path().join("base");
    sparse_file(&base, SIZE, &[(8192, 9000), ((16 << 20) - 5000, 30_000), (SIZE - 700, 700)]);
    let bytes = std::fs::read(&base).unwrap();
    let mut model = Model { now: bytes.clone(), flushed: bytes.clone(), since: Vec::new() };
    ours.show("disk", layered(ours.folder.path()));
    let mut client = ours.connect("disk").await;
    for step in steps {
        match step {
            Step::Write { offset, len, byte } => {
                client.write(offset, &vec![byte; len as usize]).await.unwrap();
                model.change(offset, len, byte);
            }
            Step::Zero { offset, len } => {
                client.write_zeroes(offset, len).await.unwrap();
                model.change(offset, len, 0);
            }
            Step::Trim { offset, len } => {
                client.trim(offset, len).await.unwrap();
                // Only whole blocks are given up; they read as zeros.
                let end = offset + len;
                let start = offset.next_multiple_of(BLOCK);
                let end = if end == SIZE { end } else { end - end % BLOCK };
                model.change(start, end.saturating_sub(start), 0);
            }
            Step::Flush => {
                client.flush().await.unwrap();
                model.flush();
            }
            Step::Crash => {
                assert!(ours.server.remove("disk").await);
                ours.show("disk", layered(ours.folder.path()));
                client = ours.connect("disk").await;
                model.crash(&whole(&client).await);
            }
        }
    }
    let found = whole(&client).await;
    assert!(found == model.now);
    let mut at = 0;
    for extent in &client.block_status(0, SIZE).await.unwrap()[0] {
        if extent.has(StatusExtent::ZERO) {
            assert!(found[at as usize..(at + extent.len) as usize].iter().all(|&byte| byte == 0));
        }
        at += extent.len;
    }
    assert_eq!(at, SIZE);
    assert!(std::fs::read(&base).unwrap() == bytes, "the disk below is as it was");
    ours.stop().await;
}

#[test]
fn a_layer_is_a_disk() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let config = ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() };
    let mut runner = proptest::test_runner::TestRunner::new(config);
    runner
        .run(&steps(), |steps| {
            runtime.block_on(run(steps));
            Ok(())
        })
        .unwrap();
}

/// A disk that takes its time, so that whoever could get between a read and what is made of it does.
struct Slow(FileDisk);

impl Disk for Slow {
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        self.0.read_at(offset, buffer)?;
        std::thread::sleep(std::time::Duration::from_millis(2));
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn parts_of_one_block_written_at_once_are_all_kept() {
    let ours = Ours::start();
    let base = ours.folder.path().join("base");
    sparse_file(&base, SIZE, &[(0, 1 << 20)]);
    let base = Arc::new(Slow(FileDisk::open(base).unwrap()));
    let layer = layer_file(&ours.folder.path().join("layer"));
    ours.show("disk", CowDisk::new(base, layer).unwrap());
    let clients = [ours.connect("disk").await, ours.connect("disk").await];
    // Sectors of 512 bytes: eight make a block; the last of each is left as it was.
    let writes = (0..512u64).filter(|sector| sector % 8 != 7).map(|sector| {
        let client = clients[sector as usize % 2].clone();
        tokio::spawn(async move { client.write(sector * 512, &[sector as u8; 512]).await })
    });
    for write in writes.collect::<Vec<_>>() {
        write.await.unwrap().unwrap();
    }
    let found = clients[0].read(0, 256 << 10).await.unwrap();
    for (sector, bytes) in found.chunks(512).enumerate() {
        if sector % 8 == 7 {
            assert_eq!(bytes, pattern(sector as u64 * 512, 512));
        } else {
            assert_eq!(bytes, [sector as u8; 512]);
        }
    }
}

#[test]
fn a_layer_takes_no_more_room_than_was_written() {
    use std::os::unix::fs::MetadataExt;
    let folder = support::folder();
    // 8 TiB: what was not written costs nothing, in the file or in memory.
    let size = 8 << 40;
    sparse_file(&folder.path().join("base"), size, &[]);
    let disk = layered(folder.path());
    for place in 0..100 {
        disk.write_at(place * (80 << 30) + 100, &[1; 50]).unwrap();
    }
    assert_eq!(disk.written_bytes(), 100 * BLOCK);
    disk.flush().unwrap();
    let room = std::fs::metadata(folder.path().join("layer")).unwrap().blocks() * 512;
    assert!(room < 2 << 20, "{room}");
    drop(disk);
    let disk = layered(folder.path());
    assert_eq!(disk.written_bytes(), 100 * BLOCK);
    let mut bytes = [0; 52];
    disk.read_at(99 * (80 << 30) + 99, &mut bytes).unwrap();
    assert_eq!((bytes[0], bytes[1], bytes[50], bytes[51]), (0, 1, 1, 0));
    disk.trim(0, 90 << 30).unwrap();
    disk.flush().unwrap();
}

#[test]
fn a_file_that_is_no_layer_of_this_disk_is_left_alone() {
    let folder = support::folder();
    sparse_file(&folder.path().join("base"), SIZE, &[]);
    let layer = folder.path().join("layer");
    let base = || Arc::new(FileDisk::open(folder.path().join("base")).unwrap());
    let refused = |expected: std::io::ErrorKind| {
        let error = CowDisk::new(base(), layer_file(&layer)).unwrap_err();
        assert_eq!(error.kind(), expected, "{error}");
    };
    std::fs::write(&layer, b"something else").unwrap();
    refused(std::io::ErrorKind::InvalidData);
    assert_eq!(std::fs::read(&layer).unwrap(), b"something else");
    // A layer over a disk of another size.
    std::fs::remove_file(&layer).unwrap();
    let other = folder.path().join("other");
    sparse_file(&other, SIZE + 4096, &[]);
    let over_other = CowDisk::new(Arc::new(FileDisk::open(&other).unwrap()), layer_file(&layer)).unwrap();
    refused(std::io::ErrorKind::ResourceBusy);
    drop(over_other);
    refused(std::io::ErrorKind::InvalidData);
    // One that was only begun.
    let len = std::fs::metadata(&layer).unwrap().len();
    std::fs::File::create(&layer).unwrap().set_len(len).unwrap();
    CowDisk::new(Arc::new(FileDisk::open(&other).unwrap()), layer_file(&layer)).unwrap();
}

#[test]
fn a_layer_is_free_once_it_is_dropped_even_while_programs_are_started() {
    let folder = support::folder();
    sparse_file(&folder.path().join("base"), SIZE, &[]);
    let done = std::sync::atomic::AtomicBool::new(false);
    // A child has all our files until it has become the program it is to be.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                support::run("true", &[]);
            }
        });
        let opened = std::panic::catch_unwind(|| (0..2000).for_each(|_| drop(layered(folder.path()))));
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        opened.unwrap();
    });
}
