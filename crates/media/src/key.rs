//! The key of a set, and what is made of it.

use std::fmt;

use aws_lc_rs::aead::{AES_256_GCM, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use serde::{Deserialize, Serialize};

use crate::header::Header;

/// What the key of a file is made for, and of.
const CONTEXT: &str = "afterimage 2026 media file key v1";

/// 32 random bytes that open a set. They travel over the line between the two sites, and never lie on the media.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MediaKey([u8; 32]);

impl MediaKey {
    /// The key of these bytes, which must be random.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The key of one attempt at one file: it has the id of the attempt in it, so that no two attempts, of which a disk
    /// may show both to whoever looks closely, are encrypted with the same.
    pub(crate) fn of_file(&self, header: &Header) -> LessSafeKey {
        let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
        hasher.update(&self.0).update(&header.encode());
        let key = UnboundKey::new(&AES_256_GCM, hasher.finalize().as_bytes()).expect("a key of 32 bytes");
        LessSafeKey::new(key)
    }
}

/// What chunk `place` is sealed under: its place, and whether it is the last.
pub(crate) fn nonce(place: u64, is_last: bool) -> Nonce {
    let mut bytes = [0; NONCE_LEN];
    bytes[..8].copy_from_slice(&place.to_le_bytes());
    bytes[8] = u8::from(is_last);
    Nonce::assume_unique_for_key(bytes)
}

impl fmt::Debug for MediaKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MediaKey(..)")
    }
}

impl TryFrom<String> for MediaKey {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let bytes = hex::decode(text).map_err(|_| "a key is written in hexadecimal digits")?;
        bytes.try_into().map(Self).map_err(|_| "a key has 32 bytes")
    }
}

impl From<MediaKey> for String {
    fn from(key: MediaKey) -> Self {
        hex::encode(key.0)
    }
}
