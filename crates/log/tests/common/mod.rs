//! What the tests of this crate share: headers, logs made of pieces, and what a log does to plain bytes.
#![allow(dead_code, reason = "each test uses a part of it")]

pub mod craft;

use std::io::Cursor;

use log::{Batcher, DiskInfo, Encoder, Footer, Header, RawRecord, RecordReader, Summary};
use model::{Consistency, LogClass, LogId, LogNumber, Progress, Purpose, Timestamp, VmId};

/// A piece of a disk as a primary hands it to a batcher.
#[derive(Debug, Clone)]
pub enum Piece {
    Data(u64, Vec<u8>),
    Zero(u64, u64),
}

pub fn header(disks: &[(&str, u64)]) -> Header {
    Header {
        vm: VmId::from_bytes([0x11; 16]),
        id: LogId::from_bytes([0x22; 16]),
        number: LogNumber(7),
        predecessor: LogId::from_bytes([0x33; 16]),
        moment: Timestamp(1_700_000_000_123_456),
        purpose: Purpose::Changes,
        disks: disks
            .iter()
            .map(|&(name, size_bytes)| DiskInfo { name: name.parse().unwrap(), size_bytes })
            .collect(),
    }
}

/// Bytes that do not compress.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
        .collect()
}

pub const POINT: Footer = Footer {
    class: LogClass::Point(Consistency::Crash),
    progress: Progress { covered_bytes: 0, total_bytes: 0 },
};

pub fn batch(disk: u16, pieces: &[Piece]) -> Vec<RawRecord> {
    let mut batcher = Batcher::new(disk);
    let mut records = Vec::new();
    for piece in pieces {
        records.extend(match piece {
            Piece::Data(offset, bytes) => batcher.data(*offset, bytes),
            Piece::Zero(offset, len) => batcher.zero(*offset, *len),
        });
    }
    records.extend(batcher.finish());
    records
}

/// A log of these pieces per disk; its bytes are taken out of the encoder as they come.
pub fn encode(header: &Header, disks: &[Vec<Piece>], level: i32, footer: Footer) -> (Vec<u8>, Summary) {
    let mut encoder = Encoder::new(Vec::new(), header).unwrap();
    let mut log = Vec::new();
    for (disk, pieces) in disks.iter().enumerate() {
        for record in batch(u16::try_from(disk).unwrap(), pieces) {
            encoder.record(record.encode(level)).unwrap();
            log.append(&mut std::mem::take(encoder.get_mut()));
        }
    }
    let (summary, mut rest) = encoder.finish(footer).unwrap();
    log.append(&mut rest);
    (log, summary)
}

/// Writes what a log holds over the disks' bytes.
pub fn apply(log: &[u8], disks: &mut [Vec<u8>]) {
    let mut reader = RecordReader::open(Cursor::new(log)).unwrap();
    let mut place = 0;
    while let Some(record) = reader.record(place).unwrap() {
        let disk = &mut disks[usize::from(record.entry.disk)];
        for (extent, data) in record.pieces() {
            let target = &mut disk[extent.offset as usize..extent.end() as usize];
            match data {
                Some(data) => target.copy_from_slice(data),
                None => target.fill(0),
            }
        }
        place += 1;
    }
}
