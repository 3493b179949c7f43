//! Logs that were written once and must be read for ever, and damaged ones with the error that each gives.
//!
//! `AFTERIMAGE_BLESS=1 cargo test -p afterimage-log --test golden` writes files that are missing. A file that is
//! there is never written again: the format of version 1 does not change.

mod common;

use std::fs;
use std::io::{Cursor, Write};
use std::path::PathBuf;

use common::craft::{Craft, CraftRecord, header as craft_header, reseal, with_crc};
use common::{POINT, Piece, apply, encode, header, noise};
use log::{Footer, RecordReader, Verifier, read_index, verify};
use model::{Consistency, LogClass, Progress};

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// The file's bytes; made by `make` if it is missing and may be made.
fn golden(name: &str, make: impl FnOnce() -> Vec<u8>) -> Vec<u8> {
    let path = path(name);
    if !path.exists() && std::env::var_os("AFTERIMAGE_BLESS").is_some() {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, make()).unwrap();
    }
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

const DISKS: [(&str, u64); 2] = [("system", 64 * 1024), ("data-1", 10_000)];
const APPLICATION: Footer = Footer {
    class: LogClass::Point(Consistency::Application),
    progress: Progress { covered_bytes: 75_536, total_bytes: 75_536 },
};
const PARTIAL: Footer =
    Footer { class: LogClass::Partial, progress: Progress { covered_bytes: 20_480, total_bytes: 75_536 } };

/// Data that does not compress, zeros, two disks.
fn plain() -> [Vec<Piece>; 2] {
    [
        vec![
            Piece::Data(4096, noise(3000, 1)),
            Piece::Zero(8192, 40_960),
            Piece::Data(60_000, noise(512, 2)),
        ],
        vec![Piece::Data(0, noise(100, 3)), Piece::Zero(9000, 1000)],
    ]
}

/// Data that compresses, too.
fn compressed() -> [Vec<Piece>; 2] {
    let text = b"the after-images of all disks between two moments; ".repeat(300);
    [
        vec![Piece::Data(0, text), Piece::Data(20_480, noise(600, 4))],
        vec![Piece::Data(4096, vec![0xa5; 5000])],
    ]
}

fn expected(pieces: &[Vec<Piece>; 2]) -> [Vec<u8>; 2] {
    let mut disks = DISKS.map(|(_, size)| vec![0xee; size as usize]);
    for (disk, pieces) in disks.iter_mut().zip(pieces) {
        for piece in pieces {
            match piece {
                Piece::Data(offset, bytes) => disk[*offset as usize..][..bytes.len()].copy_from_slice(bytes),
                Piece::Zero(offset, len) => disk[*offset as usize..][..*len as usize].fill(0),
            }
        }
    }
    disks
}

fn check_valid(name: &str, pieces: &[Vec<Piece>; 2], footer: Footer) -> Vec<u8> {
    let log = golden(name, || encode(&header(&DISKS), pieces, 1, footer).0);
    let verified = verify(&mut &log[..]).unwrap_or_else(|error| panic!("{name}: {error}"));
    assert_eq!((&verified.header, verified.footer), (&header(&DISKS), footer), "{name}");
    assert_eq!(read_index(&mut Cursor::new(&log)).unwrap().index, verified.index, "{name}");
    let mut disks = DISKS.map(|(_, size)| vec![0xee; size as usize]);
    apply(&log, &mut disks);
    assert!(disks == expected(pieces), "{name}");
    log
}

#[test]
fn logs_of_version_1_are_read_and_written_as_ever() {
    let point = check_valid("point.log", &plain(), APPLICATION);
    assert!(encode(&header(&DISKS), &plain(), 1, APPLICATION).0 == point);
    let partial = check_valid("partial.log", &plain(), PARTIAL);
    assert!(encode(&header(&DISKS), &plain(), 1, PARTIAL).0 == partial);
    let empty = check_valid("empty.log", &[vec![], vec![]], POINT);
    assert!(encode(&header(&DISKS), &[vec![], vec![]], 1, POINT).0 == empty);
    // How zstd compresses may change from version to version: this one is only read.
    check_valid("zstd.log", &compressed(), POINT);
}

/// `point.log`, changed.
fn damaged(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut log = encode(&header(&DISKS), &plain(), 1, APPLICATION).0;
    change(&mut log);
    log
}

/// Where `point.log` has its index, by its footer.
fn index_position(log: &[u8]) -> usize {
    let at = log.len() - 96 + 24;
    u64::from_le_bytes(log[at..at + 8].try_into().unwrap()) as usize
}

fn crafted(records: Vec<CraftRecord>) -> Vec<u8> {
    Craft { records, ..Craft::new(&DISKS) }.build()
}

fn zeros(disk: u16, offset: u64, len: u64) -> CraftRecord {
    CraftRecord { disk, extents: vec![(offset, len)], ..CraftRecord::default() }
}

/// A record of 4 KiB whose payload is a frame of `len` zeros.
fn zstd_of(len: usize) -> Vec<u8> {
    let mut encoder = zstd::stream::Encoder::new(Vec::new(), 1).unwrap();
    encoder.write_all(&vec![0; len]).unwrap();
    let payload = encoder.finish().unwrap();
    crafted(vec![CraftRecord { disk: 0, encoding: 2, extents: vec![(0, 4096)], raw_bytes: 4096, payload }])
}

#[test]
fn damaged_logs_give_the_error_that_says_what_is_wrong() {
    let header_bytes = 80 + 2 * 80 + 4;
    check_damaged("truncated.log", "log-truncated", || damaged(|log| log.truncate(1000)));
    check_damaged("truncated-in-seal.log", "log-truncated", || damaged(|log| log.truncate(log.len() - 1)));
    check_damaged("bad-magic.log", "log-bad-magic", || damaged(|log| log[1] = b'X'));
    check_damaged("future-version.log", "log-version", || {
        Craft { header: craft_header(2, 2, 7, &DISKS), ..Craft::new(&DISKS) }.build()
    });
    check_damaged("header-crc.log", "log-header-crc", || damaged(|log| log[70] ^= 1));
    check_damaged("record-crc.log", "log-record-crc", || damaged(|log| log[header_bytes + 100] ^= 1));
    check_damaged("index-crc.log", "log-index-crc", || {
        damaged(|log| {
            let extent = index_position(log) + 32;
            log[extent] ^= 1;
        })
    });
    check_damaged("index-mismatch.log", "log-index-mismatch", || {
        let (records, listed) = (vec![zeros(0, 0, 4096)], Some(vec![zeros(0, 4096, 4096)]));
        Craft { records, listed, ..Craft::new(&DISKS) }.build()
    });
    check_damaged("footer-crc.log", "log-footer-crc", || {
        damaged(|log| {
            let class = log.len() - 96 + 4;
            log[class] = 1;
        })
    });
    check_damaged("hash-mismatch.log", "log-hash-mismatch", || {
        // Another moment in the header, under a CRC that is right, in an otherwise whole log.
        damaged(|log| {
            log[72] ^= 1;
            let whole = with_crc(log[..header_bytes - 4].to_vec());
            log[..header_bytes].copy_from_slice(&whole);
        })
    });
    check_damaged("trailing-bytes.log", "log-trailing-bytes", || damaged(|log| log.push(0)));
    check_damaged("zip-bomb.log", "log-decompress", || zstd_of(16 << 20));
    check_damaged("zstd-too-short.log", "log-decompress", || zstd_of(4095));
    check_damaged("beyond-disk.log", "log-beyond-disk", || crafted(vec![zeros(1, 9000, 1001)]));
    check_damaged("overlap.log", "log-overlap", || crafted(vec![zeros(0, 0, 4096), zeros(0, 4095, 1)]));
    check_damaged("no-such-disk.log", "log-no-such-disk", || crafted(vec![zeros(2, 0, 1)]));
    check_damaged("no-index.log", "log-bad-tag", || {
        damaged(|log| {
            let index = index_position(log);
            log[index] = b'X';
            reseal(log);
        })
    });
}

fn check_damaged(name: &str, code: &str, make: impl FnOnce() -> Vec<u8>) {
    let log = golden(name, make);
    let error = verify(&mut &log[..]).unwrap_err();
    assert_eq!(error.code(), code, "{name}: {error}");

    let mut verifier = Verifier::new();
    let fed = log.chunks(100).try_for_each(|chunk| verifier.feed(chunk)).and_then(|()| verifier.finish());
    if code == "log-decompress" {
        // The checksums are right. Whoever decodes the record finds out, and nothing grows past its length.
        fed.unwrap();
        let mut reader = RecordReader::open(Cursor::new(&log)).unwrap();
        assert_eq!(reader.record(0).unwrap_err().code(), code, "{name}");
    } else {
        assert_eq!(fed.unwrap_err().code(), code, "{name}");
    }
}
