//! A set that was written once and must be read for ever.
//!
//! `AFTERIMAGE_BLESS=1 cargo test -p afterimage-media --test golden` writes files that are missing. A file that is there
//! is never written again: the format of version 1 does not change.

use std::path::PathBuf;

use media::{CARD_FILE, Card, END_FILE, End, HEADER_BYTES, Header, Kind, MediaKey, Opener, Sealer, log_file};
use model::{Head, LogId, LogNumber, MediaId, VmId};

const SET: MediaId = MediaId::from_bytes(*b"set of the media");
const VM: VmId = VmId::from_bytes(*b"the VM of it all");
const LOG: LogId = LogId::from_bytes(*b"the first log it");

fn key() -> MediaKey {
    MediaKey::from_bytes(*b"32 bytes that nobody else knows.")
}

fn golden(name: &str, made: &[u8]) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if !path.exists() && std::env::var_os("AFTERIMAGE_BLESS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, made).unwrap();
    }
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn a_set_of_version_1_is_read_and_written_as_ever() {
    let card = Card { set: SET, vm: VM };
    let file = golden(CARD_FILE, &card.encode());
    assert_eq!((Card::decode(&file), card.encode()), (Ok(card), file));

    let header = Header { kind: Kind::Log, set: SET, vm: VM, number: LogNumber(1), id: LOG };
    let plain = b"the after-images of all disks between two moments";
    let mut made = Vec::new();
    let mut sealer = Sealer::new(&key(), &header);
    sealer.push(plain, &mut made).unwrap();
    sealer.finish(&mut made).unwrap();
    let file = golden(&log_file(LogNumber(1)), &made);
    assert!(file == made, "the file of a log is written otherwise than it was");
    assert_eq!(Header::decode(&file), Ok(header));
    let (mut opener, mut opened) = (Opener::new(&key(), &header), Vec::new());
    opener.push(&file[HEADER_BYTES..], &mut opened).unwrap();
    opener.finish(&mut opened).unwrap();
    assert_eq!(opened, plain);

    let end = End { head: Head { number: LogNumber(1), id: LOG }, files: vec![file.len() as u64] };
    let made = end.encode(&key(), SET, VM, LogId::from_bytes(*b"an attempt at it")).unwrap();
    let file = golden(END_FILE, &made);
    assert!(file == made, "the end is written otherwise than it was");
    assert_eq!(End::decode(&file, &key(), SET, VM), Ok(end));
}
