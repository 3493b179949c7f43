//! One moment over all disks, while a guest writes; also when I/O threads serve the disks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use model::LogNumber;

use crate::support::{Nbd, Process, assert_same, daemon, image, replicate, try_connect};

const DISKS: usize = 2;
const BLOCKS: u64 = 64;

/// Write `n` goes to disk `n % 2`; the place on it wanders. One write is outstanding at a time, so the
/// disks are always what a prefix of all writes made of them.
fn place(n: u64) -> (usize, u64) {
    (n as usize % DISKS, (n / DISKS as u64).wrapping_mul(29) % BLOCKS * 65536 / 4)
}

fn write_on(mut disks: [Nbd; DISKS], stop: &AtomicBool) -> u64 {
    let mut n = 1;
    while !stop.load(Ordering::Relaxed) {
        let (disk, offset) = place(n);
        disks[disk].write(offset, &n.to_be_bytes().repeat(64));
        n += 1;
    }
    n - 1
}

/// The number of writes that the images are a prefix of.
fn prefix(images: &[Vec<u8>]) -> u64 {
    let stamp = |disk: usize, offset: u64| {
        let offset = usize::try_from(offset).unwrap();
        u64::from_be_bytes(images[disk][offset..offset + 8].try_into().unwrap())
    };
    let round = BLOCKS * DISKS as u64;
    let last = (1..=round).map(place).map(|(disk, offset)| stamp(disk, offset)).max().unwrap();
    for n in last.saturating_sub(round - 1).max(1)..=last {
        let (disk, offset) = place(n);
        assert_eq!(stamp(disk, offset), n, "write {n} of {last} is not in the image of disk {disk}");
    }
    last
}

async fn every_moment_is_a_prefix(process: Process) {
    let stop = Arc::new(AtomicBool::new(false));
    let writer = thread::spawn({
        let disks = [process.guest("a"), process.guest("b")];
        let stop = stop.clone();
        move || write_on(disks, &stop)
    });
    let vm = process.vm().await;
    let disks = vm.resolve(&["a".into(), "b".into()]).await.unwrap();
    let mut replica = vec![vec![]; DISKS];
    let mut before = 0;
    for k in 0..12 {
        let base = (k > 0).then_some(k);
        let capture = vm.begin_capture(process.request(&disks, base, k + 1)).await.unwrap();
        replicate(&mut replica, &capture);
        assert_same(&replica, &capture);
        let images: Vec<_> = capture.disks.iter().map(image).collect();
        let writes = prefix(&images);
        assert!(writes >= before);
        before = writes;
        vm.end_reading(capture).await.unwrap();
        vm.commit(&disks, base.map(LogNumber), LogNumber(k + 1)).await.unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    assert!(writer.join().unwrap() >= before && before > 0);
}

#[tokio::test]
async fn with_disks_in_the_main_loop() {
    every_moment_is_a_prefix(daemon(&[]).await).await;
}

/// Before QEMU 8.2 reading such disks kills the guest (an assertion of its NBD server): nothing is begun.
#[tokio::test]
async fn with_disks_in_io_threads() {
    let process = daemon(&[
        "--object",
        "iothread,id=io-a",
        "--object",
        "iothread,id=io-b",
        "--export",
        "nbd,id=guest-a,node-name=a,name=a,writable=on,iothread=io-a,fixed-iothread=on",
        "--export",
        "nbd,id=guest-b,node-name=b,name=b,writable=on,iothread=io-b,fixed-iothread=on",
    ])
    .await;
    match try_connect(process.address()).await {
        Err(error @ qemu::Error::IoThreads { .. }) => {
            let message = error.to_string();
            assert!(message.contains("QEMU 7.") || message.contains("QEMU 8."), "{message}");
            assert!(message.contains("io-a, io-b"), "{message}");
        }
        Ok(_) => every_moment_is_a_prefix(process).await,
        Err(error) => panic!("{error}"),
    }
}
