//! What lies on media: the card in plain, and what is sealed. Whoever finds them can do to them what he likes.

use media::{Card, End, HEADER_BYTES, Header, Kind, MediaKey, Opener, Sealer};
use model::{Head, LogId, LogNumber, MediaId, VmId};

use super::piece_of;

const KEY: MediaKey = MediaKey::from_bytes([5; 32]);
/// The key of a set of which only the seeds' writer has the key above.
const OTHER_KEY: MediaKey = MediaKey::from_bytes([7; 32]);
const SET: MediaId = MediaId::from_bytes([6; 16]);
const VM: VmId = VmId::from_bytes([1; 16]);
const NUMBER: LogNumber = LogNumber(3);
const ID: LogId = LogId::from_bytes([2; 16]);

/// The first byte chooses what the rest is: a card; a file as it is found; what was sealed, then changed at a place; or
/// the plain text of an end, sealed as its own.
pub(crate) fn media(data: &[u8]) {
    let [mode, rest @ ..] = data else { return };
    match mode >> 2 & 3 {
        0 => card(rest),
        1 => found(rest, *mode),
        2 => changed(rest, *mode),
        _ => end(rest),
    }
}

fn card(bytes: &[u8]) {
    if let Ok(card) = Card::decode(bytes) {
        assert_eq!(Card::decode(&card.encode()).expect("what was read is read again"), card);
    }
}

/// Nothing comes out of a file that was never sealed.
fn found(bytes: &[u8], mode: u8) {
    let Ok(header) = Header::decode(bytes) else { return };
    assert_eq!(header.encode(), bytes[..HEADER_BYTES], "a header is what it says");
    let _ = header.check(Kind::Log, SET, VM, NUMBER);
    assert!(open(&OTHER_KEY, &header, bytes, mode).is_none(), "something came out that nobody sealed");
    assert!(End::decode(bytes, &OTHER_KEY, SET, VM).is_err(), "an end that nobody sealed");
}

/// The first three bytes say where, and what is put over it there; where that changes something, nothing is opened.
fn changed(bytes: &[u8], mode: u8) {
    let [low, high, over, plain @ ..] = bytes else { return };
    let header = Header { kind: Kind::Log, set: SET, vm: VM, number: NUMBER, id: ID };
    let mut file = seal(&header, plain);
    assert_eq!(open(&KEY, &header, &file, mode).as_deref(), Some(plain), "what was sealed is opened");
    let at = usize::from(u16::from_le_bytes([*low, *high])) % file.len();
    if *over == 0 {
        file.truncate(at);
    } else {
        file[at] ^= over;
    }
    let opened = Header::decode(&file).ok().and_then(|header| open(&KEY, &header, &file, mode));
    assert!(opened.is_none(), "changed at {at}, and nobody noticed");
}

/// The number of logs is what the first two bytes say.
fn end(bytes: &[u8]) {
    let [low, high, plain @ ..] = bytes else { return };
    let number = LogNumber(u16::from_le_bytes([*low, *high]).into());
    let header = Header { kind: Kind::End, set: SET, vm: VM, number, id: ID };
    let Ok(end) = End::decode(&seal(&header, plain), &KEY, SET, VM) else { return };
    assert_eq!(end.files.len() as u64, number.0);
    let Head { number: newest, id } = end.head;
    assert_eq!((newest, id.as_bytes() as &[u8]), (number, &plain[..16]));
    let again = end.encode(&KEY, SET, VM, ID).expect("what was read can be written");
    assert_eq!(End::decode(&again, &KEY, SET, VM).expect("and read again"), end);
}

fn seal(header: &Header, plain: &[u8]) -> Vec<u8> {
    let (mut sealer, mut file) = (Sealer::new(&KEY, header), Vec::new());
    sealer.push(plain, &mut file).expect("a small text is sealed");
    sealer.finish(&mut file).expect("to its end");
    file
}

/// What the file opens to, with a header that was read before.
fn open(key: &MediaKey, header: &Header, file: &[u8], mode: u8) -> Option<Vec<u8>> {
    let (mut opener, mut plain) = (Opener::new(key, header), Vec::new());
    for piece in file.get(HEADER_BYTES..)?.chunks(piece_of(mode)) {
        opener.push(piece, &mut plain).ok()?;
    }
    opener.finish(&mut plain).ok()?;
    Some(plain)
}
