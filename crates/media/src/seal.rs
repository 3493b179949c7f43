//! Seals a file while it is written.

use aws_lc_rs::aead::{Aad, LessSafeKey};

use crate::error::{Error, Result};
use crate::header::{HEADER_BYTES, Header};
use crate::key::{MediaKey, nonce};
use crate::{CHUNK_BYTES, TAG_BYTES};

/// How large the file of so many bytes is.
#[must_use]
pub const fn sealed_bytes(plain_bytes: u64) -> u64 {
    let chunks = if plain_bytes == 0 { 1 } else { plain_bytes.div_ceil(CHUNK_BYTES as u64) };
    HEADER_BYTES as u64 + plain_bytes + chunks * TAG_BYTES as u64
}

/// Takes the bytes of a file and gives those of its sealed form, front to back.
pub struct Sealer {
    key: LessSafeKey,
    header: [u8; HEADER_BYTES],
    begun: bool,
    chunk: Vec<u8>,
    place: u64,
}

impl Sealer {
    /// Begins a file. The header's id must be one that was never used with this key.
    #[must_use]
    pub fn new(key: &MediaKey, header: &Header) -> Self {
        let chunk = Vec::with_capacity(CHUNK_BYTES + TAG_BYTES);
        Self { key: key.of_file(header), header: header.encode(), begun: false, chunk, place: 0 }
    }

    /// Takes the next bytes; what can be written by now is put behind `out`.
    pub fn push(&mut self, mut bytes: &[u8], out: &mut Vec<u8>) -> Result<()> {
        while !bytes.is_empty() {
            // A full chunk waits for the next byte: it may be the last one.
            if self.chunk.len() == CHUNK_BYTES {
                self.seal(false, out)?;
            }
            let (taken, rest) = bytes.split_at(bytes.len().min(CHUNK_BYTES - self.chunk.len()));
            self.chunk.extend_from_slice(taken);
            bytes = rest;
        }
        Ok(())
    }

    /// Ends the file.
    pub fn finish(mut self, out: &mut Vec<u8>) -> Result<()> {
        self.seal(true, out)
    }

    fn seal(&mut self, is_last: bool, out: &mut Vec<u8>) -> Result<()> {
        if !std::mem::replace(&mut self.begun, true) {
            out.extend_from_slice(&self.header);
        }
        self.key
            .seal_in_place_append_tag(nonce(self.place, is_last), Aad::from(&self.header), &mut self.chunk)
            .map_err(|_| Error::TooLarge)?;
        out.append(&mut self.chunk);
        self.place += 1;
        Ok(())
    }
}
