//! The format of media: what an initial replication is carried by where the line is too thin. `docs/format/media-v1.md`
//! says the same in words.
//!
//! A *set* is a folder of files: a [`Card`] that says whose it is, a file for each log of the pass, and the [`End`],
//! without which it is not whole. All but the card are sealed, in chunks of a MiB, with a [`MediaKey`] that never is on
//! the media. What holds:
//!
//! * without the key nothing can be read of a set but how large it is and which VM's id it has;
//! * nothing of a file comes out of an [`Opener`] that was not put into a [`Sealer`] with the same key for the same place
//!   of the same set: a chunk that was changed, moved, left out or taken from another file is refused, and so is a file
//!   without its last chunk;
//! * no key encrypts two different things under one number: each attempt at a file has a key of its own.
//!
//! This crate reads no file: bytes go in and come out. That the logs in the files continue one another and are whole in
//! themselves is what `log` and the replica check, as of logs from the wire.

mod card;
mod end;
mod error;
mod header;
mod key;
mod open;
mod seal;

pub use card::{CARD_BYTES_MAX, CARD_FILE, Card};
pub use end::{END_FILE, End};
pub use error::Error;
pub use header::{HEADER_BYTES, Header, Kind};
pub use key::MediaKey;
pub use open::Opener;
pub use seal::{Sealer, sealed_bytes};

use model::LogNumber;

/// A file is sealed in chunks of this many bytes; the last one is shorter, or as long.
pub const CHUNK_BYTES: usize = 1 << 20;
/// What sealing adds to each chunk.
pub const TAG_BYTES: usize = 16;

/// The name of the file of a log.
#[must_use]
pub fn log_file(number: LogNumber) -> String {
    format!("log-{:08}.sealed", number.0)
}
