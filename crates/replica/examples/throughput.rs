//! What receiving, applying and reading cost: `cargo run --release --example throughput -- DIR [MIB]`.
//!
//! Sequential data that does not compress; `dd conv=fsync` of as many bytes is run beside it. Bytes written
//! are those of /proc/self/io.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use catalog::Catalog;
use log::{Batcher, DiskInfo, Encoder, Footer, Header};
use model::gate::Access;
use model::{Consistency, LogClass, LogId, LogNumber, Phase, Progress, Purpose, Timestamp, VmId};
use replica::{Config, DiskSize, Offer, Step, Store};

const VM: VmId = VmId::from_bytes([7; 16]);
const PEER: &str = "bench";
const MIB: u64 = 1 << 20;

fn main() {
    let mut args = std::env::args().skip(1);
    let parent = PathBuf::from(args.next().expect("a folder to work in"));
    let mib: u64 = args.next().map_or(1024, |mib| mib.parse().expect("a number of MiB"));
    let dir = parent.join("replica-throughput");
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).expect("the folder can be made");
    let catalog = Catalog::open(dir.join("catalog.sqlite")).expect("a catalog");
    let store = Store::open(catalog, Config { workers: 0, ..Config::new(&dir) }).expect("a store");
    store.offer(PEER, offer(mib * MIB)).expect("it is taken");
    println!("| what | MiB/s | written by this process / changed |");
    println!("|---|---|---|");
    let mut predecessor = LogId::NONE;
    for number in 1..=3_u64 {
        let (header, log) = make_log(number, predecessor, mib * MIB);
        predecessor = header.id;
        show("receive", mib, || {
            for (place, part) in log.chunks(4 << 20).enumerate() {
                let offset = place as u64 * (4 << 20);
                let last = offset + part.len() as u64 == log.len() as u64;
                store.append(PEER, VM, header.number, header.id, offset, part, last).expect("taken");
            }
        });
        drop(log);
        if number == 1 {
            dd(&dir, mib);
        }
        show("apply", mib, || while store.maintain(VM).expect("applied") != Step::Idle {});
        let admitted = store.admit(VM, Access::Pinned, header.number).expect("admitted");
        let view = store.open_view(admitted).expect("a view");
        show("read a view of the base", mib, || read(&view, mib));
    }
    let (header, log) = make_log(4, predecessor, mib * MIB);
    for (place, part) in log.chunks(4 << 20).enumerate() {
        let offset = place as u64 * (4 << 20);
        let last = offset + part.len() as u64 == log.len() as u64;
        store.append(PEER, VM, header.number, header.id, offset, part, last).expect("taken");
    }
    drop(log);
    let view =
        store.open_view(store.admit(VM, Access::Pinned, header.number).expect("admitted")).expect("a view");
    show("read a view through a log", mib, || read(&view, mib));
    drop(view);
    let name = "vda".parse().expect("a name");
    show("digests", mib, || drop(store.digests(PEER, VM, &name, 0, mib * MIB, 65536).expect("digests")));
    let _ = std::fs::remove_dir_all(&dir);
}

fn show(what: &str, mib: u64, work: impl FnOnce()) {
    let (written, started) = (written_bytes(), Instant::now());
    work();
    let (seconds, written) = (started.elapsed().as_secs_f64(), written_bytes() - written);
    println!("| {what} | {:.0} | {:.3} |", mib as f64 / seconds, written as f64 / (mib * MIB) as f64);
}

fn read(view: &replica::ConsistentView, mib: u64) {
    let name = "vda".parse().expect("a name");
    let mut buf = vec![0; 1 << 20];
    (0..mib).for_each(|place| view.read_at(&name, place * MIB, &mut buf).expect("read"));
}

fn dd(dir: &Path, mib: u64) {
    let target = dir.join("dd");
    // As noise as the log's: from a file that is in memory.
    let source = dir.join("noise");
    std::fs::write(&source, noise(9, mib * MIB)).expect("written");
    std::fs::File::open(&source).and_then(|file| file.sync_all()).expect("synced");
    show("dd conv=fsync", mib, || {
        let status = Command::new("dd")
            .arg(format!("if={}", source.display()))
            .arg(format!("of={}", target.display()))
            .args(["bs=1M", "conv=fsync", "status=none"])
            .status();
        assert!(status.is_ok_and(|status| status.success()), "dd failed");
    });
    let _ = (std::fs::remove_file(source), std::fs::remove_file(target));
}

fn make_log(number: u64, predecessor: LogId, bytes: u64) -> (Header, Vec<u8>) {
    let header = Header {
        vm: VM,
        id: LogId::from_bytes([u8::try_from(number).unwrap_or(0); 16]),
        number: LogNumber(number),
        predecessor,
        moment: Timestamp::from(std::time::SystemTime::now()),
        purpose: if number == 1 { Purpose::Initial } else { Purpose::Changes },
        disks: vec![DiskInfo { name: "vda".parse().expect("a name"), size_bytes: bytes }],
    };
    let mut encoder = Encoder::new(Vec::new(), &header).expect("a log");
    let mut batcher = Batcher::new(0);
    let data = noise(number, bytes);
    let mut records = Vec::new();
    for (place, part) in data.chunks(1 << 20).enumerate() {
        records.extend(batcher.data(place as u64 * MIB, part));
        records.drain(..).for_each(|record| encoder.record(record.encode(1)).expect("encoded"));
    }
    batcher.finish().into_iter().for_each(|record| encoder.record(record.encode(1)).expect("encoded"));
    let footer = Footer { class: LogClass::Point(Consistency::Crash), progress: Progress::default() };
    (header, encoder.finish(footer).expect("a log").1)
}

/// Bytes that do not compress.
fn noise(seed: u64, bytes: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = (0..bytes / 8).flat_map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.collect()
}

fn offer(bytes: u64) -> Offer {
    Offer {
        vm: VM,
        name: "bench".parse().expect("a name"),
        disks: vec![DiskSize { name: "vda".parse().expect("a name"), size_bytes: bytes }],
        interval: Duration::from_secs(30),
        points: 0,
        primary_name: "bench".into(),
        definition: serde_json::Value::Null,
        phase: Phase::InitialReplication { progress: Progress::default() },
        paused: false,
        generation: 1,
        media: None,
        pins: Vec::new(),
        group: None,
    }
}

fn written_bytes() -> u64 {
    let io = std::fs::read_to_string("/proc/self/io").unwrap_or_default();
    io.lines()
        .find_map(|line| line.strip_prefix("write_bytes: "))
        .map_or(0, |n| n.trim().parse().unwrap_or(0))
}
