//! How pieces become records, and what an encoder refuses.

mod common;

use std::io;

use common::{POINT, Piece, batch, header, noise};
use log::{
    Batcher, EncodedRecord, Encoder, Encoding, ErrorKind, Extent, RECORD_RAW_BYTES_MAX, RawRecord, Verifier,
    limits,
};

fn extent(offset: u64, len: u64) -> Extent {
    Extent { offset, len }
}

fn shape(records: &[RawRecord]) -> Vec<(bool, Vec<(u64, u64)>)> {
    let extents =
        |record: &RawRecord| record.extents().iter().map(|extent| (extent.offset, extent.len)).collect();
    records.iter().map(|record| (record.bytes().is_some(), extents(record))).collect()
}

#[test]
fn zero_blocks_leave_the_data() {
    let mut bytes = vec![1; 5 * 4096];
    bytes[4096..2 * 4096].fill(0);
    bytes[3 * 4096..4 * 4096].fill(0);
    // Zeros of less than a block stay: splitting there would cost more than it saves.
    bytes[4 * 4096 + 10..].fill(0);
    let records = batch(3, &[Piece::Data(1 << 40, bytes.clone()), Piece::Zero((1 << 40) + 20_480, 1 << 42)]);
    let at = |block: u64| (1_u64 << 40) + block * 4096;
    assert_eq!(
        shape(&records),
        [
            (true, vec![(at(0), 4096), (at(2), 4096), (at(4), 4096)]),
            (false, vec![(at(1), 4096), (at(3), 4096), (at(5), 1 << 42)]),
        ]
    );
    assert!(records.iter().all(|record| record.disk() == 3));
    assert_eq!(
        records[0].bytes().unwrap(),
        [&bytes[..4096], &bytes[8192..12_288], &bytes[16_384..]].concat()
    );
}

#[test]
fn blocks_are_those_of_the_disk_not_of_the_piece() {
    let mut bytes = vec![0; 3 * 4096];
    assert_eq!(
        shape(&batch(0, &[Piece::Data(1000, bytes.clone())])),
        [(true, vec![(1000, 3096)]), (false, vec![(4096, 2 * 4096 + 1000)])]
    );
    // The end of a disk need not be a block's end.
    bytes.truncate(4096 + 512);
    assert_eq!(shape(&batch(0, &[Piece::Data(8192, bytes)])), [(false, vec![(8192, 4608)])]);
}

#[test]
fn neighbours_are_joined_and_records_are_cut_at_their_limit() {
    let mut batcher = Batcher::new(0);
    assert!(batcher.data(4096, &noise(100_000, 1)).is_empty());
    assert!(batcher.zero(0, 0).is_empty() && batcher.data(0, &[]).is_empty());
    let full = batcher.data(104_096, &noise(2 * RECORD_RAW_BYTES_MAX, 2));
    let max = RECORD_RAW_BYTES_MAX as u64;
    assert_eq!(shape(&full), [(true, vec![(4096, max)]), (true, vec![(4096 + max, max)])]);
    assert_eq!(shape(&batcher.finish()), [(true, vec![(4096 + 2 * max, 100_000)])]);
}

#[test]
fn records_are_cut_at_their_limit_of_extents() {
    let max = limits::RECORD_EXTENTS_MAX;
    for zero in [false, true] {
        let mut batcher = Batcher::new(0);
        let mut records = Vec::new();
        for n in 0..=max as u64 {
            records.extend(if zero { batcher.zero(n * 2, 1) } else { batcher.data(n * 2, &[1]) });
        }
        // The last one still grows.
        let end = max as u64 * 2 + 1;
        records.extend(if zero { batcher.zero(end, 1) } else { batcher.data(end, &[1]) });
        records.extend(batcher.finish());
        assert_eq!(records.iter().map(|record| record.extents().len()).collect::<Vec<_>>(), [max, 1]);
        assert_eq!(records[1].extents(), [extent(max as u64 * 2, 2)]);
    }
}

#[test]
fn what_does_not_get_smaller_is_stored() {
    let encoding = |bytes: Vec<u8>, level| {
        let [record] = &batch(0, &[Piece::Data(0, bytes)])[..] else { panic!("one record") };
        record.clone().encode(level).encoding()
    };
    for level in [1, 19, -5, 0, 1, i32::MAX, 3] {
        assert_eq!(encoding(vec![1; 10_000], level), Encoding::Zstd, "{level}");
        assert_eq!(encoding(noise(10_000, 1), level), Encoding::Stored, "{level}");
        assert_eq!(encoding(vec![1], level), Encoding::Stored, "{level}");
    }
}

#[test]
fn what_is_given_twice_or_does_not_fit_is_refused() {
    let header = header(&[("vda", 10_000)]);
    let write = |disk, pieces: &[Piece]| {
        let mut encoder = Encoder::new(Vec::new(), &header)?;
        for record in batch(disk, pieces) {
            encoder.record(record.encode(1))?;
        }
        encoder.finish(POINT).map(|_| ())
    };
    let kind = |disk, pieces: &[Piece]| write(disk, pieces).unwrap_err().kind;

    write(0, &[Piece::Data(500, vec![1; 10]), Piece::Data(0, vec![2; 500])]).unwrap();
    let twice = [Piece::Data(500, vec![1; 10]), Piece::Data(0, vec![2; 501])];
    assert_eq!(kind(0, &twice), ErrorKind::Overlap { disk: 0, offset: 500 });
    let twice = [Piece::Data(500, vec![1; 10]), Piece::Zero(509, 10)];
    assert_eq!(kind(0, &twice), ErrorKind::Overlap { disk: 0, offset: 509 });
    assert_eq!(kind(0, &[Piece::Zero(9999, 2)]), ErrorKind::BeyondDisk { disk: 0, offset: 9999 });
    let far = u64::MAX - 1;
    assert_eq!(kind(0, &[Piece::Data(far, vec![1; 9000])]), ErrorKind::BeyondDisk { disk: 0, offset: far });
    assert_eq!(kind(1, &[Piece::Zero(0, 1)]), ErrorKind::NoSuchDisk(1));
}

#[test]
fn a_writer_that_fails_is_an_io_error_with_its_place() {
    struct Full(usize);
    impl io::Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 = self.0.checked_sub(bytes.len()).ok_or(io::ErrorKind::StorageFull)?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let header = header(&[("vda", 10_000)]);
    let mut encoder = Encoder::new(Full(400), &header).unwrap();
    let record = batch(0, &[Piece::Data(0, noise(1000, 1))]).remove(0).encode(1);
    let error = encoder.record(record).unwrap_err();
    assert!(error.is_io() && error.position > 0, "{error}");
    let source = std::error::Error::source(&error).unwrap().downcast_ref::<io::Error>().unwrap();
    assert_eq!(source.kind(), io::ErrorKind::StorageFull);
}

#[test]
fn the_figures_that_a_primary_cuts_its_logs_by() {
    let mut encoder = Encoder::new(Vec::new(), &header(&[("vda", 1 << 40)])).unwrap();
    for record in
        batch(0, &[Piece::Data(0, vec![1; 5000]), Piece::Zero(8192, 1 << 39), Piece::Data(6000, vec![2])])
    {
        let expected = record.extents().len() + encoder.extents();
        encoder.record(record.encode(1)).unwrap();
        assert_eq!(encoder.extents(), expected);
    }
    assert_eq!((encoder.raw_bytes(), encoder.extents()), (5001, 3));
    let (summary, _) = encoder.finish(POINT).unwrap();
    assert_eq!((summary.data_bytes, summary.zero_bytes, summary.extents), (5001, 1 << 39, 3));
}

#[test]
fn everything_may_go_to_another_thread() {
    fn send<T: Send + 'static>() {}
    send::<Batcher>();
    send::<RawRecord>();
    send::<EncodedRecord>();
    send::<Encoder<Vec<u8>>>();
    send::<Verifier>();
    send::<log::Error>();
}
