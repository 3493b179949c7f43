//! The log format: encode, decode, verify. `docs/format/log-v1.md` describes it byte by byte.
//!
//! A log holds the after-images of all of a VM's disks between two moments: a header, records (runs of
//! data or zeros of one disk), an index of the records for random reads, a footer and a seal. Data goes
//! in through a [`Batcher`], which makes [`RawRecord`]s; [`RawRecord::encode`] compresses one (on any
//! thread), an [`Encoder`] writes them. A [`Verifier`] is fed a log as it arrives; [`read_index`] finds out
//! what a log holds without reading its records, and [`decode_record`] decodes one of them.
//!
//! Invariants:
//! * what the encoder accepts, the verifier accepts, and the other way round: both use the same checks;
//! * any byte that is changed, missing or added is an [`Error`] of the verifier: each record has a CRC32C,
//!   so have header, index and seal, and a BLAKE3 covers the whole;
//! * memory is bounded by the constants of [`limits`], whatever the bytes say; nothing is allocated for bytes
//!   that a length promises but that have not arrived, and nothing is decompressed past the length that the
//!   index gives;
//! * arbitrary bytes give a typed error, never a panic.
//!
//! What it does not do: open a file, choose a number, id or moment, decide whether a log continues its chain
//! (`chain` does), or keep out a peer that lies: checksums prove that the bytes are the encoder's, not that
//! the encoder is honest.

mod batch;
mod building;
mod encode;
mod error;
mod layout;
pub mod limits;
mod read;
mod record;
mod types;
mod units;
mod verify;

pub use batch::{Batcher, RawRecord};
pub use encode::{Encoder, Summary};
pub use error::{Error, ErrorKind, Result};
pub use limits::RECORD_RAW_BYTES_MAX;
pub use read::{LogMeta, Record, RecordReader, read_index};
pub use record::{EncodedRecord, decode_record, lift_record};
pub use types::{DiskInfo, Encoding, Extent, Footer, Header, Index, RecordEntry};
pub use verify::{Verified, Verifier, verify};
