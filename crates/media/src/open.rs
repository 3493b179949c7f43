//! Opens a sealed file while it is read.

use aws_lc_rs::aead::{Aad, LessSafeKey};

use crate::error::{Error, Result};
use crate::header::{HEADER_BYTES, Header};
use crate::key::{MediaKey, nonce};
use crate::{CHUNK_BYTES, TAG_BYTES};

const SEALED_CHUNK: usize = CHUNK_BYTES + TAG_BYTES;

/// Takes the bytes of a file after its header and gives what was sealed, as far as it is what was sealed.
pub struct Opener {
    key: LessSafeKey,
    header: [u8; HEADER_BYTES],
    chunk: Vec<u8>,
    place: u64,
}

impl Opener {
    /// For the file that begins with this header.
    #[must_use]
    pub fn new(key: &MediaKey, header: &Header) -> Self {
        let chunk = Vec::with_capacity(SEALED_CHUNK);
        Self { key: key.of_file(header), header: header.encode(), chunk, place: 0 }
    }

    /// Takes the next bytes; what they open is put behind `out`. After an error it is of no more use.
    pub fn push(&mut self, mut bytes: &[u8], out: &mut Vec<u8>) -> Result<()> {
        while !bytes.is_empty() {
            if self.chunk.len() == SEALED_CHUNK {
                self.open(false, out)?;
            }
            let (taken, rest) = bytes.split_at(bytes.len().min(SEALED_CHUNK - self.chunk.len()));
            self.chunk.extend_from_slice(taken);
            bytes = rest;
        }
        Ok(())
    }

    /// At the end of the file: gives the rest, if the file has its last chunk.
    pub fn finish(mut self, out: &mut Vec<u8>) -> Result<()> {
        if self.chunk.len() < TAG_BYTES {
            return Err(Error::Truncated);
        }
        let whole = self.chunk.clone();
        let opened = self.open(true, out);
        if opened.is_err() && whole.len() == SEALED_CHUNK {
            // One that was sealed as not the last, and is the last that is here.
            self.chunk = whole;
            if self.open(false, &mut Vec::new()).is_ok() {
                return Err(Error::Truncated);
            }
        }
        opened
    }

    fn open(&mut self, is_last: bool, out: &mut Vec<u8>) -> Result<()> {
        let nonce = nonce(self.place, is_last);
        let opened = self.key.open_in_place(nonce, Aad::from(&self.header), &mut self.chunk);
        let plain = opened.map_err(|_| Error::Seal(self.place))?;
        out.extend_from_slice(plain);
        self.chunk.clear();
        self.place += 1;
        Ok(())
    }
}
