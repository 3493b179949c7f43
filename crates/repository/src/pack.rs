//! Packs: the files that hold chunks and trees, in restic's format.
//!
//! A pack is its blobs, each sealed, then a sealed header that names them, then the header's length.
//! Its name is the SHA-256 of all that.

use crate::crypto::{Cipher, NONCE_BYTES, SEAL_BYTES, sealed};
use crate::direct::Aligned;
use crate::id::Id;

/// A pack is closed once it has this many bytes: restic's own target size.
pub(crate) const PACK_BYTES: usize = 16 * 1024 * 1024;

/// What a blob is. A pack holds blobs of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BlobKind {
    /// A chunk of a disk, or a small file.
    Data,
    /// A folder's list of files.
    Tree,
}

/// One blob in a pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PackedBlob {
    pub(crate) id: Id,
    pub(crate) offset: u32,
    /// As stored, sealed.
    pub(crate) len: u32,
    /// Before compression; zero if it is stored as it is.
    pub(crate) raw_len: u32,
}

/// A blob ready to be packed: compressed (or not) and sealed.
pub(crate) struct SealedBlob<'a> {
    pub(crate) id: Id,
    pub(crate) bytes: &'a [u8],
    /// Before compression; zero if it was not compressed.
    pub(crate) raw_len: u32,
}

/// A pack that is being filled.
pub(crate) struct PackBuilder {
    kind: BlobKind,
    bytes: Aligned,
    blobs: Vec<PackedBlob>,
}

/// A finished pack.
pub(crate) struct Pack {
    pub(crate) id: Id,
    pub(crate) kind: BlobKind,
    pub(crate) bytes: Aligned,
    pub(crate) blobs: Vec<PackedBlob>,
}

impl PackBuilder {
    /// An empty pack, in a buffer that may have been another's.
    pub(crate) fn new(kind: BlobKind, mut buffer: Aligned) -> Self {
        buffer.clear();
        Self { kind, bytes: buffer, blobs: Vec::new() }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.blobs.is_empty()
    }

    /// Adds a blob; true once the pack is full. A blob is far smaller than 4 GiB, and a pack is closed long
    /// before that, so the format's 32 bits are enough.
    pub(crate) fn add(&mut self, blob: &SealedBlob<'_>) -> bool {
        self.blobs.push(PackedBlob {
            id: blob.id,
            offset: u32_of(self.bytes.len()),
            len: u32_of(blob.bytes.len()),
            raw_len: blob.raw_len,
        });
        self.append(blob.bytes);
        self.bytes.len() >= PACK_BYTES
    }

    fn append(&mut self, bytes: &[u8]) {
        // Once the first blob shows that it will not be a small pack, it gets room for a full one and its
        // last blob.
        let full = PACK_BYTES + PACK_BYTES / 8;
        let grown = 2 * self.bytes.len();
        self.bytes.append(bytes, if grown > (1 << 20) { full } else { grown });
    }

    /// Closes the pack: header, length, name. Hashing it is the larger part, so call it off the hot path.
    pub(crate) fn finish(mut self, cipher: &Cipher) -> Pack {
        let mut header = Vec::with_capacity(self.blobs.len() * 41);
        for blob in &self.blobs {
            let compressed = blob.raw_len != 0;
            header.push(match (self.kind, compressed) {
                (BlobKind::Data, false) => 0,
                (BlobKind::Tree, false) => 1,
                (BlobKind::Data, true) => 2,
                (BlobKind::Tree, true) => 3,
            });
            header.extend_from_slice(&blob.len.to_le_bytes());
            if compressed {
                header.extend_from_slice(&blob.raw_len.to_le_bytes());
            }
            header.extend_from_slice(&blob.id.0);
        }
        let header = sealed(cipher, &header);
        self.append(&header);
        self.append(&u32_of(header.len()).to_le_bytes());
        Pack { id: Id::of(&self.bytes), kind: self.kind, bytes: self.bytes, blobs: self.blobs }
    }
}

fn u32_of(len: usize) -> u32 {
    u32::try_from(len).expect("a pack is far smaller than 4 GiB")
}

/// zstd's level. Measured on an 8 GiB disk filled from /usr: level 2 is 2.3 % larger and 17 % faster; level 5 is
/// 1.9 % smaller and takes twice as long; larger tables and shorter matches at this level are 0.5 % smaller for
/// 18 % more time.
const LEVEL: i32 = 3;

/// Compresses and seals blobs, one at a time, in one buffer. Each thread has its own.
pub(crate) struct Sealer {
    cipher: Cipher,
    compressor: zstd::bulk::Compressor<'static>,
    buffer: Vec<u8>,
}

impl Sealer {
    pub(crate) fn new(cipher: Cipher) -> std::io::Result<Self> {
        Ok(Self { cipher, compressor: zstd::bulk::Compressor::new(LEVEL)?, buffer: Vec::new() })
    }

    /// Compresses, if that makes it smaller, and seals.
    pub(crate) fn seal(&mut self, id: Id, raw: &[u8]) -> std::io::Result<SealedBlob<'_>> {
        let room = zstd::zstd_safe::compress_bound(raw.len()) + SEAL_BYTES;
        if self.buffer.len() < room {
            self.buffer.resize(room, 0);
        }
        let packed = self.compressor.compress_to_buffer(raw, &mut self.buffer[NONCE_BYTES..])?;
        let (plain_bytes, raw_len) = if packed < raw.len() {
            (packed, u32_of(raw.len()))
        } else {
            self.buffer[NONCE_BYTES..NONCE_BYTES + raw.len()].copy_from_slice(raw);
            (raw.len(), 0)
        };
        let whole = &mut self.buffer[..plain_bytes + SEAL_BYTES];
        self.cipher.seal(whole);
        Ok(SealedBlob { id, bytes: whole, raw_len })
    }
}

/// Opens stored blobs. Each thread has its own.
pub(crate) struct Opener {
    cipher: Cipher,
    decompressor: zstd::bulk::Decompressor<'static>,
}

impl Opener {
    pub(crate) fn new(cipher: Cipher) -> std::io::Result<Self> {
        Ok(Self { cipher, decompressor: zstd::bulk::Decompressor::new()? })
    }

    /// What a stored blob holds, checked against its id, into `raw`, which it fills; else what is wrong.
    pub(crate) fn open(
        &mut self,
        id: &Id,
        raw_len: u32,
        stored: &mut [u8],
        raw: &mut [u8],
    ) -> Result<(), &'static str> {
        const OTHER_LENGTH: &str = "it has another length than its place";
        let plain = self.cipher.open(stored).map_err(|_| "its bytes have changed (the MAC does not fit)")?;
        if raw_len == 0 {
            if plain.len() != raw.len() {
                return Err(OTHER_LENGTH);
            }
            raw.copy_from_slice(plain);
        } else {
            if raw_len as usize != raw.len() {
                return Err(OTHER_LENGTH);
            }
            let len = self.decompressor.decompress_to_buffer(plain, raw);
            if len.map_err(|_| "it cannot be decompressed")? != raw.len() {
                return Err(OTHER_LENGTH);
            }
        }
        if Id::of(raw) == *id { Ok(()) } else { Err("its bytes have another hash than its name") }
    }
}
