//! Whatever the bytes are: a typed error, never a panic, and never a log that is not the encoder's.

mod common;

use std::io::Cursor;

use common::craft::{Craft, CraftRecord, reseal};
use common::{POINT, Piece, encode, header, noise};
use log::{Encoding, ErrorKind, RecordReader, Verifier, decode_record, limits, read_index, verify};
use proptest::prelude::*;

/// Every door of the crate, with these bytes.
fn try_everything(bytes: &[u8], chunk: usize) -> Option<log::Verified> {
    let mut verifier = Verifier::new();
    let fed = bytes.chunks(chunk).try_for_each(|chunk| verifier.feed(chunk)).and_then(|()| verifier.finish());
    let verified = verify(&mut &bytes[..]);
    if let Ok(verified) = &verified {
        assert_eq!(fed.as_ref().unwrap(), verified);
    }
    let read = read_index(&mut Cursor::new(bytes));
    if let Ok(fed) = &fed {
        let read = read.as_ref().unwrap();
        assert_eq!((&read.header, &read.index, &read.summary), (&fed.header, &fed.index, &fed.summary));
    }
    for error in [fed.err(), read.err()].into_iter().flatten() {
        assert!(!error.to_string().is_empty() && !error.is_io(), "{error}");
        assert!(error.position <= bytes.len() as u64, "{error}");
    }
    if let Ok(mut reader) = RecordReader::open(Cursor::new(bytes)) {
        for place in 0..reader.meta().index.records.len() {
            if let Ok(record) = reader.record(place) {
                assert!(record.unwrap().pieces().count() > 0);
            }
        }
    }
    verified.ok()
}

/// A small log with all encodings.
fn small_log() -> Vec<u8> {
    let pieces = vec![
        Piece::Data(0, vec![7; 9000]),
        Piece::Zero(12_000, 5000),
        Piece::Data(20_480, noise(700, 1)),
        Piece::Data(30_000, vec![9; 2000]),
    ];
    let stored = vec![Piece::Data(100, noise(300, 2))];
    encode(&header(&[("vda", 40_000), ("vdb", 400)]), &[pieces, stored], 1, POINT).0
}

#[test]
fn every_single_flipped_bit_is_found() {
    let log = small_log();
    assert!(try_everything(&log, 100).is_some());
    let mut flipped = log.clone();
    for place in 0..log.len() {
        for bit in 0..8 {
            flipped[place] ^= 1 << bit;
            assert!(verify(&mut &flipped[..]).is_err(), "bit {bit} of byte {place}");
            flipped[place] ^= 1 << bit;
        }
    }
}

#[test]
fn every_truncation_says_so_and_nothing_may_follow() {
    let log = small_log();
    for len in 0..log.len() {
        let error = verify(&mut &log[..len]).unwrap_err();
        assert!(error.is_truncated(), "{len}: {error}");
        let error = read_index(&mut Cursor::new(&log[..len])).unwrap_err();
        assert!(error.is_truncated(), "{len}: {error}");
    }
    let error = verify(&mut &[&log[..], b"x"].concat()[..]).unwrap_err();
    assert_eq!((error.kind, error.position), (ErrorKind::TrailingBytes, log.len() as u64));
}

#[test]
fn a_verifier_that_failed_stays_failed() {
    let mut verifier = Verifier::new();
    let first = verifier.feed(&[1; 200]).unwrap_err();
    assert_eq!(first.kind, ErrorKind::BadMagic);
    assert_eq!(verifier.feed(&small_log()).unwrap_err().kind, first.kind);
    assert_eq!(verifier.finish().unwrap_err().kind, first.kind);
}

#[test]
fn the_encoder_writes_what_the_page_says() {
    let disks = [("vda", 40_000), ("vdb", 400)];
    let bytes = noise(9000, 3);
    let pieces = [vec![Piece::Data(5, bytes.clone()), Piece::Zero(20_000, 7)], vec![Piece::Data(3, vec![8])]];
    let (log, _) = encode(&header(&disks), &pieces, 1, POINT);
    let mut craft = Craft::new(&disks);
    let data = |disk, offset, payload: Vec<u8>| {
        let len = payload.len();
        CraftRecord { disk, encoding: 1, extents: vec![(offset, len as u64)], raw_bytes: len as u32, payload }
    };
    let zero = CraftRecord { extents: vec![(20_000, 7)], ..CraftRecord::default() };
    craft.records = vec![data(0, 5, bytes), zero, data(1, 3, vec![8])];
    assert!(craft.build() == log);
}

/// A log of one record, whose checksums are right.
fn one(record: CraftRecord) -> Vec<u8> {
    let mut craft = Craft::new(&[("vda", 1 << 30)]);
    craft.records = vec![record];
    craft.build()
}

fn kind(log: &[u8]) -> ErrorKind {
    let kind = verify(&mut &log[..]).unwrap_err().kind;
    let read = read_index(&mut Cursor::new(log)).unwrap_err().kind;
    assert_eq!(read.code(), kind.code());
    kind
}

#[test]
fn limits_hold_even_if_all_checksums_are_right() {
    let stored = |len: usize| CraftRecord {
        encoding: 1,
        extents: vec![(0, len as u64)],
        raw_bytes: len as u32,
        payload: vec![1; len],
        ..CraftRecord::default()
    };
    let max = limits::RECORD_RAW_BYTES_MAX;
    assert!(verify(&mut &one(stored(max))[..]).is_ok());
    assert!(matches!(kind(&one(stored(max + 1))), ErrorKind::Limit { .. }));

    let zeros = |extents: usize| CraftRecord {
        extents: (0..extents as u64).map(|n| (n * 2, 1)).collect(),
        ..CraftRecord::default()
    };
    assert!(verify(&mut &one(zeros(limits::RECORD_EXTENTS_MAX))[..]).is_ok());
    assert!(matches!(kind(&one(zeros(limits::RECORD_EXTENTS_MAX + 1))), ErrorKind::Limit { .. }));

    let names: Vec<_> = (0..=limits::DISKS_MAX).map(|n| format!("disk{n}")).collect();
    let disks: Vec<_> = names.iter().map(|name| (name.as_str(), 1)).collect();
    assert!(verify(&mut &Craft::new(&disks[1..]).build()[..]).is_ok());
    assert!(matches!(kind(&Craft::new(&disks).build()), ErrorKind::Limit { .. }));
}

#[test]
fn contradictions_are_named_even_if_all_checksums_are_right() {
    let record = |encoding, extents: &[(u64, u64)], raw_bytes, stored: usize| CraftRecord {
        encoding,
        extents: extents.to_vec(),
        raw_bytes,
        payload: vec![1; stored],
        ..CraftRecord::default()
    };
    let size = 1_u64 << 30;
    let lengths = [
        record(0, &[(0, 5)], 5, 0),
        record(0, &[(0, 5)], 0, 5),
        record(0, &[], 0, 0),
        record(1, &[(0, 5)], 5, 4),
        record(1, &[(0, 5)], 4, 4),
        record(1, &[], 0, 0),
        record(2, &[(0, 5)], 5, 5),
        record(2, &[(0, 5)], 5, 0),
    ];
    for wrong in lengths {
        assert_eq!(kind(&one(wrong)), ErrorKind::RecordLengths);
    }
    assert_eq!(kind(&one(record(3, &[(0, 5)], 5, 5))), ErrorKind::Field("encoding"));
    for extents in [vec![(5, 0)], vec![(5, 5), (0, 5)], vec![(0, 5), (4, 5)], vec![(0, 5), (3, 1), (9, 4)]] {
        let error = kind(&one(record(1, &extents, 10, 10)));
        assert!(matches!(error, ErrorKind::ExtentOrder { .. }), "{error:?}");
    }
    for extent in [(size, 1), (size - 1, 2), (u64::MAX, 1), (u64::MAX, u64::MAX), (0, u64::MAX)] {
        assert_eq!(
            kind(&one(record(0, &[extent], 0, 0))),
            ErrorKind::BeyondDisk { disk: 0, offset: extent.0 }
        );
    }
    let no_disk = CraftRecord { disk: 1, ..record(1, &[(0, 5)], 5, 5) };
    assert_eq!(kind(&one(no_disk)), ErrorKind::NoSuchDisk(1));
}

#[test]
fn a_byte_in_two_records_is_refused() {
    let zero = |offset, len| CraftRecord { extents: vec![(offset, len)], ..CraftRecord::default() };
    let mut craft = Craft::new(&[("vda", 1000), ("vdb", 1000)]);
    craft.records = vec![zero(500, 10), zero(0, 500), CraftRecord { disk: 1, ..zero(505, 10) }];
    assert!(verify(&mut &craft.build()[..]).is_ok());
    craft.records.push(zero(509, 1));
    let error = verify(&mut &craft.build()[..]).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Overlap { disk: 0, offset: 509 });
}

#[test]
fn headers_and_footers_that_contradict_the_format() {
    let build = |change: &dyn Fn(&mut Craft)| {
        let mut craft = Craft::new(&[("vda", 1000), ("vdb", 1000)]);
        change(&mut craft);
        craft.build()
    };
    let with_header = |header: Vec<u8>| build(&|craft: &mut Craft| craft.header.clone_from(&header));
    let disks = [("vda", 1)];
    use common::craft::header;
    assert_eq!(kind(&with_header(header(2, 2, 7, &disks))), ErrorKind::Version(2));
    assert_eq!(kind(&with_header(header(0, 2, 7, &disks))), ErrorKind::Field("version"));
    assert_eq!(kind(&with_header(header(1, 4, 7, &disks))), ErrorKind::Field("purpose"));
    assert_eq!(kind(&with_header(header(1, 2, 0, &disks))), ErrorKind::Field("log's number"));
    assert_eq!(kind(&with_header(header(1, 2, 7, &[("../x", 1)]))), ErrorKind::Field("disk's name"));
    assert_eq!(kind(&with_header(header(1, 2, 7, &[("", 1)]))), ErrorKind::Field("disk's name"));
    let twice = header(1, 2, 7, &[("vda", 1), ("vda", 2)]);
    assert_eq!(kind(&with_header(twice)), ErrorKind::DuplicateDisk("vda".into()));
    let mut long_name = header(1, 2, 7, &disks);
    long_name[88] = 65;
    assert_eq!(kind(&with_header(long_name)), ErrorKind::Field("disk's name"));
    let mut reserved = header(1, 2, 7, &disks);
    reserved[13] = 1;
    assert_eq!(kind(&with_header(reserved)), ErrorKind::Field("reserved part"));

    assert_eq!(kind(&build(&|craft| craft.class = 3)), ErrorKind::Field("class"));
    assert_eq!(kind(&build(&|craft| craft.covered_bytes = 1)), ErrorKind::Field("progress"));
}

#[test]
fn an_index_that_lies_is_refused() {
    let zero = |offset| CraftRecord { extents: vec![(offset, 1)], ..CraftRecord::default() };
    let mut craft = Craft::new(&[("vda", 1000)]);
    craft.records = vec![zero(0), zero(10)];
    craft.listed = Some(vec![zero(0), zero(11)]);
    let log = craft.build();
    assert_eq!(verify(&mut &log[..]).unwrap_err().kind, ErrorKind::IndexMismatch);
    // Without the records this cannot be seen: that is what receiving is for.
    assert!(read_index(&mut Cursor::new(&log)).is_ok());
    craft.listed = Some(vec![zero(0)]);
    assert_eq!(kind(&craft.build()), ErrorKind::IndexMismatch);
}

#[test]
fn a_record_is_checked_against_its_entry() {
    let log = small_log();
    let meta = read_index(&mut Cursor::new(&log)).unwrap();
    let bytes = |entry: &log::RecordEntry| {
        let range = entry.file_range();
        &log[range.start as usize..range.end as usize]
    };
    let mut out = Vec::new();
    for entry in &meta.index.records {
        decode_record(entry, bytes(entry), &mut out).unwrap();
        assert_eq!(out.len(), entry.raw_bytes as usize);
        let whole = bytes(entry);
        let short = decode_record(entry, &whole[..whole.len() - 1], &mut out).unwrap_err();
        assert!(short.is_truncated() && out.is_empty());
    }
    let encodings: Vec<_> = meta.index.records.iter().map(|entry| entry.encoding).collect();
    assert_eq!(encodings, [Encoding::Zstd, Encoding::Zero, Encoding::Stored]);
    let [first, _, last] = &meta.index.records[..] else { unreachable!() };
    let same_place = log::RecordEntry { position: first.position, ..last.clone() };
    let wrong = decode_record(&same_place, bytes(last), &mut out).map(|()| out.len());
    assert_eq!(wrong.unwrap(), 300, "the position is the caller's affair");
    let other = log::RecordEntry { disk: 0, ..last.clone() };
    assert_eq!(decode_record(&other, bytes(last), &mut out).unwrap_err().kind, ErrorKind::WrongRecord);
    let mut damaged = bytes(last).to_vec();
    damaged[50] ^= 1;
    let error = decode_record(last, &damaged, &mut out).unwrap_err();
    assert_eq!((error.kind, error.position), (ErrorKind::RecordCrc, last.position));
}

/// Records with values that are often nearly right.
fn any_record() -> impl Strategy<Value = CraftRecord> {
    let offset = prop_oneof![0_u64..2000, any::<u64>()];
    let extents = proptest::collection::vec((offset, prop_oneof![0_u64..300, any::<u64>()]), 0..4);
    (0_u16..3, 0_u8..4, extents, any::<bool>(), 0_u32..400, 0_usize..400).prop_map(
        |(disk, encoding, extents, right, raw_bytes, stored)| {
            let sum = extents.iter().fold(0_u64, |sum, (_, len)| sum.saturating_add(*len)).min(1000) as u32;
            let raw_bytes = if right && encoding > 0 { sum } else { raw_bytes };
            let payload = match encoding {
                1 if right => vec![5; raw_bytes as usize],
                2 if right => zstd::bulk::compress(&vec![5; raw_bytes as usize], 1).unwrap(),
                _ if right => vec![],
                _ => vec![5; stored],
            };
            CraftRecord { disk, encoding, extents, raw_bytes, payload }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn arbitrary_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..2000), chunk in 1_usize..500) {
        prop_assert!(try_everything(&bytes, chunk).is_none());
        // And as what follows a good header.
        let mut log = common::craft::with_crc(common::craft::header(1, 2, 7, &[("vda", 1 << 20)]));
        log.extend(bytes);
        prop_assert!(try_everything(&log, chunk).is_none());
    }

    #[test]
    fn a_log_that_was_changed_anywhere(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in proptest::option::of(any::<prop::sample::Index>()),
        sealed_again: bool,
        chunk in 1_usize..3000,
    ) {
        let original = small_log();
        let mut log = original.clone();
        for (place, byte) in changes {
            log[place.index(original.len())] = byte;
        }
        if let Some(cut) = cut {
            log.truncate(cut.index(original.len()));
        }
        if sealed_again && log.len() > 100 {
            reseal(&mut log);
        }
        let accepted = try_everything(&log, chunk).is_some();
        prop_assert!(!accepted || log == original || sealed_again);
    }

    #[test]
    fn arbitrary_parts_with_right_checksums(
        records in proptest::collection::vec(any_record(), 0..4),
        class in 0_u8..4,
        covered_bytes in 0_u64..3,
        chunk in 1_usize..3000,
    ) {
        let mut craft = Craft::new(&[("vda", 2000), ("vdb", 1500)]);
        craft.records = records;
        craft.class = class;
        craft.covered_bytes = covered_bytes;
        craft.total_bytes = 1;
        let Some(verified) = try_everything(&craft.build(), chunk) else { return Ok(()) };
        // What is accepted keeps every promise that the index makes.
        let mut disks = [vec![false; 2000], vec![false; 1500]];
        for record in &verified.index.records {
            let extents = verified.index.extents_of(record);
            for extent in extents {
                for byte in &mut disks[usize::from(record.disk)][extent.offset as usize..extent.end() as usize] {
                    prop_assert!(!*byte);
                    *byte = true;
                }
            }
            let sum: u64 = extents.iter().map(|extent| extent.len).sum();
            prop_assert!(record.encoding == Encoding::Zero || sum == u64::from(record.raw_bytes));
        }
    }
}
