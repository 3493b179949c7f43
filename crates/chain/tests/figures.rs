//! What an overlay of a million random 4 KiB extents costs. Run by hand, as a release build:
//! `cargo test -p afterimage-chain --release --test figures -- --ignored --nocapture`

use std::time::Instant;

use chain::{ApplyPlan, Layer, LayerDisk, Overlay};
use log::{Encoding, Extent, Index, RecordEntry};
use model::LogNumber;

const BLOCK_BYTES: u64 = 4096;
const EXTENTS_PER_RECORD: usize = 64;
const DISK_BYTES: u64 = 1 << 40;

/// A small generator of our own (an LCG with a mixing step): the figures are to repeat.
struct Chance(u64);

impl Chance {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let mixed = (self.0 ^ (self.0 >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        (mixed ^ (mixed >> 33)) % bound
    }
}

fn index(chance: &mut Chance, extents: usize, blocks: u64, sorted: bool) -> Index {
    let mut offsets: Vec<u64> = (0..extents).map(|_| chance.below(blocks) * BLOCK_BYTES).collect();
    offsets.sort_unstable();
    offsets.dedup();
    let mut records: Vec<Vec<u64>> = offsets.chunks(EXTENTS_PER_RECORD).map(<[u64]>::to_vec).collect();
    if !sorted {
        for place in (1..records.len()).rev() {
            let other = usize::try_from(chance.below(place as u64 + 1)).unwrap();
            records.swap(place, other);
        }
    }
    let mut index = Index::default();
    for record in records {
        let first = u32::try_from(index.extents.len()).unwrap();
        let len = BLOCK_BYTES;
        index.extents.extend(record.into_iter().map(|offset| Extent { offset, len }));
        let end = u32::try_from(index.extents.len()).unwrap();
        let raw_bytes = (end - first) * u32::try_from(BLOCK_BYTES).unwrap();
        let (disk, encoding, position, stored_bytes) = (0, Encoding::Zstd, 0, raw_bytes);
        index.records.push(RecordEntry {
            disk,
            encoding,
            position,
            stored_bytes,
            raw_bytes,
            extents: first..end,
        });
    }
    index
}

#[test]
#[ignore = "a measurement, for release builds"]
fn a_million_extents() {
    println!("| logs | disk | records | build | plan | pieces | bytes per piece | 1M lookups |");
    println!("|---|---|---|---|---|---|---|---|");
    for (logs, gib, sorted) in
        [(1, 1024, true), (1, 1024, false), (250, 1024, true), (250, 16, true), (2500, 16, false)]
    {
        measure(logs, gib << 30, sorted);
    }
}

fn measure(log_count: usize, disk_bytes: u64, sorted: bool) {
    let mut chance = Chance(42);
    let blocks = disk_bytes / BLOCK_BYTES;
    let indexes: Vec<_> =
        (0..log_count).map(|_| index(&mut chance, 1_000_000 / log_count, blocks, sorted)).collect();
    let disks = [LayerDisk { disk: Some(0), size_bytes: disk_bytes.min(DISK_BYTES) }];
    let layers = || {
        (1..).zip(&indexes).map(|(number, index)| Layer { number: LogNumber(number), index, disks: &disks })
    };

    let started = Instant::now();
    let overlay = Overlay::build(1, layers()).unwrap();
    let build = started.elapsed();
    let started = Instant::now();
    let pieces: usize = (0..1_000_000)
        .map(|_| {
            let start = chance.below(disk_bytes - 65_536);
            overlay.resolve(0, start..start + 65_536).count()
        })
        .sum();
    let lookups = started.elapsed();
    assert!(pieces >= 1_000_000);
    let surviving = overlay.surviving(0).pieces;
    let memory = overlay.memory_bytes();
    let started = Instant::now();
    let plan = ApplyPlan::from_overlay(overlay);
    let planned = started.elapsed();
    assert!(plan.write_bytes() >= surviving as u64 * BLOCK_BYTES);
    println!(
        "| {log_count} | {} GiB | {} | {build:.0?} | {planned:.0?} | {surviving} | {:.1} | {lookups:.0?} |",
        disk_bytes >> 30,
        if sorted { "sorted" } else { "shuffled" },
        memory as f64 / surviving as f64,
    );
}
