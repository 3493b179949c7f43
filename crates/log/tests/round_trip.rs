//! What goes in comes out, whatever the pieces and however the bytes arrive.

mod common;

use std::io::Cursor;

use common::{POINT, Piece, apply, encode, header, noise};
use log::{Verified, Verifier, read_index, verify};
use proptest::prelude::*;

fn feed_in_chunks(log: &[u8], chunks: &[usize]) -> Verified {
    let mut verifier = Verifier::new();
    let mut rest = log;
    let mut sizes = chunks.iter().cycle();
    while !rest.is_empty() {
        let (now, later) = rest.split_at(rest.len().min(*sizes.next().unwrap()));
        verifier.feed(now).unwrap();
        rest = later;
    }
    assert_eq!(verifier.bytes(), log.len() as u64);
    verifier.finish().unwrap()
}

/// Makes a log and checks it in all ways there are.
fn check(sizes: &[u64], disks: &[Vec<Piece>], level: i32, chunks: &[usize]) {
    let names = ["vda", "vdb", "vdc"];
    let header = header(&names.into_iter().zip(sizes.iter().copied()).collect::<Vec<_>>());
    let (log, summary) = encode(&header, disks, level, POINT);
    assert_eq!(summary.total_bytes, log.len() as u64);

    let verified = feed_in_chunks(&log, chunks);
    assert_eq!(verified.header, header);
    assert_eq!(verified.footer, POINT);
    assert_eq!(verified.summary, summary);
    assert_eq!(verify(&mut &log[..]).unwrap(), verified);
    let meta = read_index(&mut Cursor::new(&log)).unwrap();
    assert_eq!((meta.header, meta.footer, meta.summary), (header, POINT, summary));
    assert_eq!(meta.index, verified.index);

    // Applied over bytes that none of the pieces has.
    let mut got: Vec<_> = sizes.iter().map(|&size| vec![0xee; size as usize]).collect();
    let mut expected = got.clone();
    apply(&log, &mut got);
    for (disk, pieces) in expected.iter_mut().zip(disks) {
        for piece in pieces {
            match piece {
                Piece::Data(offset, bytes) => {
                    disk[*offset as usize..*offset as usize + bytes.len()].copy_from_slice(bytes);
                }
                Piece::Zero(offset, len) => disk[*offset as usize..(offset + len) as usize].fill(0),
            }
        }
    }
    assert!(got == expected);
}

#[test]
fn a_log_of_every_encoding_over_several_disks() {
    let mut mixed = vec![7; 300_000];
    mixed[8192..40_960].fill(0);
    let disks = [
        vec![Piece::Data(4096, mixed), Piece::Zero(400_000, 100_000)],
        vec![],
        vec![Piece::Data(0, noise(700_001, 5))],
    ];
    for chunk in [1, 7, 4096, 1 << 20] {
        check(&[500_000, 0, 700_001], &disks, 1, &[chunk]);
    }
}

#[test]
fn an_empty_log() {
    check(&[], &[], 1, &[3]);
    check(&[4096], &[vec![]], 1, &[1000]);
}

/// Pieces in ascending order: gaps and lengths, some of them adjacent, of data of several kinds or zeros.
fn pieces() -> impl Strategy<Value = (u64, Vec<Piece>)> {
    let gap = prop_oneof![Just(0_u64), 1_u64..200, (1_u64..5).prop_map(|n| n * 4096)];
    let len = prop_oneof![1_u64..600, (1_u64..80).prop_map(|n| n * 4096)];
    let piece = (gap, len, 0_u8..4, any::<u64>());
    proptest::collection::vec(piece, 0..30).prop_map(|pieces| {
        let mut at = 0;
        let mut out = Vec::new();
        for (gap, len, kind, seed) in pieces {
            at += gap;
            out.push(match kind {
                0 => Piece::Zero(at, len),
                1 => Piece::Data(at, vec![(seed % 3) as u8; len as usize]),
                2 => Piece::Data(at, noise(len as usize, seed)),
                _ => {
                    let mut bytes = noise(len as usize, seed);
                    bytes.chunks_mut(4096).skip(seed as usize % 2).step_by(2).for_each(|block| block.fill(0));
                    Piece::Data(at, bytes)
                }
            });
            at += len;
        }
        (at + 10, out)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_pieces_in_any_chunks(
        disks in proptest::collection::vec(pieces(), 0..3),
        level in -3..6,
        chunks in proptest::collection::vec(1_usize..100_000, 1..6),
    ) {
        let (sizes, disks): (Vec<_>, Vec<_>) = disks.into_iter().unzip();
        check(&sizes, &disks, level, &chunks);
    }
}
