//! Logs: from a peer over the wire, or from a replica's disk that has rotted.

use std::io::Cursor;

use log::{Encoding, Index, Verified, Verifier, decode_record, read_index, verify};

use super::piece_of;
use crate::seal;

/// The first byte says how: pieces, and whether checksums (and the tail) are made right first.
pub(crate) fn log(data: &[u8]) {
    let Some((&mode, bytes)) = data.split_first() else { return };
    let log = sealed(mode, bytes);
    let fed = feed(&log, piece_of(mode));
    assert_eq!(fed, feed(&log, usize::MAX), "the pieces that a log comes in matter");
    let whole = verify(&mut &log[..]);
    let meta = read_index(&mut Cursor::new(&log));
    if let Ok(verified) = &whole {
        assert_eq!(fed.as_ref(), Ok(verified), "what reads as a whole reads as it comes in");
        let meta = meta.as_ref().expect("a log that verifies has an index");
        assert_eq!((&meta.index, &meta.header), (&verified.index, &verified.header));
    }
    if let Ok(meta) = &meta {
        decode_all(&log, &meta.index, whole.is_ok());
    }
}

/// A log as an input says: as it is, with right checksums, or with a right tail too.
pub(crate) fn sealed(mode: u8, bytes: &[u8]) -> Vec<u8> {
    let mut log = bytes.to_vec();
    match mode >> 2 & 3 {
        1 => seal::mend(&mut log),
        2 | 3 => seal::finish(&mut log),
        _ => {}
    }
    log
}

fn feed(log: &[u8], piece: usize) -> Result<Verified, String> {
    let mut verifier = Verifier::new();
    for piece in log.chunks(piece.min(log.len().max(1))) {
        verifier.feed(piece).map_err(|error| error.to_string())?;
    }
    assert_eq!(verifier.bytes(), log.len() as u64);
    verifier.finish().map_err(|error| error.to_string())
}

fn decode_all(log: &[u8], index: &Index, must_decode: bool) {
    let mut out = Vec::new();
    for entry in &index.records {
        let range = entry.file_range();
        let place = |at: u64| usize::try_from(at).map_or(log.len(), |at| at.min(log.len()));
        let decoded = decode_record(entry, &log[place(range.start)..place(range.end)], &mut out);
        assert!(decoded.is_ok() || !must_decode, "{decoded:?}");
        if decoded.is_ok() && entry.encoding != Encoding::Zero {
            let extents: u64 = index.extents_of(entry).iter().map(|extent| extent.len).sum();
            assert_eq!(out.len() as u64, extents, "a record has the bytes of its extents");
        }
    }
}
