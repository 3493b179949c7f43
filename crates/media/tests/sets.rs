//! What comes out of a set is what went in, or nothing does.

use media::{
    CHUNK_BYTES, Card, End, Error, HEADER_BYTES, Header, Kind, MediaKey, Opener, Sealer, sealed_bytes,
};
use model::{Head, LogId, LogNumber, MediaId, VmId};
use proptest::prelude::*;

const SET: MediaId = MediaId::from_bytes([7; 16]);
const VM: VmId = VmId::from_bytes([9; 16]);

fn key(byte: u8) -> MediaKey {
    MediaKey::from_bytes([byte; 32])
}

fn header(number: u64) -> Header {
    Header {
        kind: Kind::Log,
        set: SET,
        vm: VM,
        number: LogNumber(number),
        id: LogId::from_bytes([number as u8; 16]),
    }
}

/// Bytes that do not repeat within a chunk.
fn noise(len: usize) -> Vec<u8> {
    (0..len as u64).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u8).collect()
}

fn seal(header: &Header, plain: &[u8], piece: usize) -> Vec<u8> {
    let mut sealer = Sealer::new(&key(1), header);
    let mut file = Vec::new();
    for part in plain.chunks(piece) {
        sealer.push(part, &mut file).unwrap();
    }
    sealer.finish(&mut file).unwrap();
    file
}

fn open(file: &[u8], key: &MediaKey, piece: usize) -> Result<Vec<u8>, Error> {
    let header = Header::decode(file)?;
    let mut opener = Opener::new(key, &header);
    let mut plain = Vec::new();
    for part in file[HEADER_BYTES..].chunks(piece) {
        opener.push(part, &mut plain)?;
    }
    opener.finish(&mut plain)?;
    Ok(plain)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn a_file_opens_to_what_was_sealed_whatever_pieces_it_came_in(
        len in prop_oneof![0..2000_usize, Just(CHUNK_BYTES), CHUNK_BYTES - 1..CHUNK_BYTES * 2 + 3],
        written in 1..CHUNK_BYTES * 2,
        read in 1000..CHUNK_BYTES * 2,
    ) {
        let plain = noise(len);
        let file = seal(&header(3), &plain, written);
        prop_assert_eq!(file.len() as u64, sealed_bytes(len as u64));
        prop_assert!(open(&file, &key(1), read).unwrap() == plain);
    }
}

#[test]
fn any_byte_that_was_changed_is_noticed() {
    let file = seal(&header(3), b"a few bytes of a disk", 100);
    for at in 0..file.len() {
        let mut changed = file.clone();
        changed[at] ^= 1;
        assert!(open(&changed, &key(1), 100).is_err(), "byte {at}");
    }
    assert_eq!(open(&file, &key(2), 100), Err(Error::Seal(0)), "another key");
}

#[test]
fn a_file_that_was_cut_off_says_so_or_that_its_last_chunk_is_damaged() {
    let file = seal(&header(3), &noise(CHUNK_BYTES * 2 + 5), CHUNK_BYTES);
    let chunk = CHUNK_BYTES + media::TAG_BYTES;
    for whole_chunks in 0..=2 {
        let cut = &file[..HEADER_BYTES + whole_chunks * chunk];
        assert_eq!(open(cut, &key(1), CHUNK_BYTES), Err(Error::Truncated), "after {whole_chunks} chunks");
    }
    assert_eq!(open(&file[..HEADER_BYTES + 9], &key(1), 100), Err(Error::Truncated));
    assert_eq!(open(&file[..file.len() - 1], &key(1), CHUNK_BYTES), Err(Error::Seal(2)));
    assert_eq!(Header::decode(&file[..40]), Err(Error::Truncated));
    let mut longer = file.clone();
    longer.push(0);
    assert_eq!(open(&longer, &key(1), CHUNK_BYTES), Err(Error::Seal(2)));
}

#[test]
fn chunks_that_were_moved_and_files_of_others_are_not_taken() {
    let plain = noise(CHUNK_BYTES * 3);
    let file = seal(&header(3), &plain, CHUNK_BYTES);
    let chunk = CHUNK_BYTES + media::TAG_BYTES;
    let mut swapped = file.clone();
    let (first, second) = swapped[HEADER_BYTES..].split_at_mut(chunk);
    first.swap_with_slice(&mut second[..chunk]);
    assert_eq!(open(&swapped, &key(1), CHUNK_BYTES), Err(Error::Seal(0)));

    let mut foreign = seal(&header(4), &plain, CHUNK_BYTES);
    foreign[..HEADER_BYTES].copy_from_slice(&file[..HEADER_BYTES]);
    assert_eq!(open(&foreign, &key(1), CHUNK_BYTES), Err(Error::Seal(0)), "under another's header");

    let check = |kind, set, vm, number| header(3).check(kind, set, vm, LogNumber(number));
    assert_eq!(check(Kind::Log, SET, VM, 3), Ok(()));
    assert_eq!(check(Kind::Log, MediaId::from_bytes([1; 16]), VM, 3), Err(Error::Foreign("set")));
    assert_eq!(check(Kind::Log, SET, VmId::from_bytes([1; 16]), 3), Err(Error::Foreign("VM")));
    assert_eq!(check(Kind::Log, SET, VM, 4), Err(Error::Foreign("place in the set")));
    assert_eq!(check(Kind::End, SET, VM, 3), Err(Error::Foreign("place in the set")));
}

/// The same plain bytes in two attempts have nothing in common.
#[test]
fn each_attempt_has_a_key_of_its_own() {
    let plain = vec![0; 4096];
    let files = [1, 2].map(|id| seal(&Header { id: LogId::from_bytes([id; 16]), ..header(3) }, &plain, 4096));
    let equal = files[0].iter().zip(&files[1]).skip(HEADER_BYTES).filter(|(a, b)| a == b).count();
    assert!(equal < 100, "{equal} of 4096 bytes are equal; by chance 16 are");
}

#[test]
fn an_end_says_what_the_set_consists_of_and_only_under_its_key() {
    let head = Head { number: LogNumber(3), id: LogId::from_bytes([3; 16]) };
    let end = End { head, files: vec![100, 2000, 30] };
    let file = end.encode(&key(1), SET, VM, LogId::from_bytes([8; 16])).unwrap();
    assert_eq!(End::decode(&file, &key(1), SET, VM), Ok(end.clone()));
    assert_eq!(end.bytes(), 2130);
    assert_eq!(End::decode(&file, &key(2), SET, VM), Err(Error::Seal(0)));
    assert_eq!(
        End::decode(&seal(&header(3), &[0; 40], 99), &key(1), SET, VM).unwrap_err().code(),
        "media-foreign"
    );
    let lies = End { files: vec![100], ..end };
    let lies = lies.encode(&key(1), SET, VM, LogId::from_bytes([8; 16])).unwrap();
    assert_eq!(End::decode(&lies, &key(1), SET, VM), Err(Error::Field("number of logs")));
}

#[test]
fn a_card_is_known_from_anything_else() {
    let card = Card { set: SET, vm: VM };
    assert_eq!(Card::decode(&card.encode()), Ok(card));
    for other in ["", "{}", "null", "{\"format\":\"tar\",\"version\":1}"] {
        assert_eq!(Card::decode(other.as_bytes()), Err(Error::NotMedia), "{other}");
    }
    let later = String::from_utf8(card.encode()).unwrap().replace("\"version\":1", "\"version\":2");
    assert_eq!(Card::decode(later.as_bytes()), Err(Error::Version(2)));
}

#[test]
fn a_key_shows_itself_to_nobody() {
    assert_eq!(format!("{:?}", key(0xab)), "MediaKey(..)");
    let text = serde_json::to_string(&key(0xab)).unwrap();
    assert!(serde_json::from_str::<MediaKey>(&text).unwrap() == key(0xab));
    assert!(serde_json::from_str::<MediaKey>("\"abcd\"").is_err());
}
