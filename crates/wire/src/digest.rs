//! Digests of blocks, by which two sides are compared without sending the blocks.

/// The digest of one block: the first 16 bytes of its BLAKE3.
#[must_use]
pub fn block_digest(block: &[u8]) -> [u8; 16] {
    truncate(blake3::hash(block))
}

/// The digest of a block of `len` zeros. Compares ask for the same length over and over: the last one is
/// remembered.
#[must_use]
pub fn zero_digest(len: u64) -> [u8; 16] {
    thread_local! {
        static LAST: std::cell::Cell<(u64, [u8; 16])> = const { std::cell::Cell::new((u64::MAX, [0; 16])) };
    }
    let (known, digest) = LAST.get();
    if known == len {
        return digest;
    }
    let digest = hash_zeros(len);
    LAST.set((len, digest));
    digest
}

fn hash_zeros(len: u64) -> [u8; 16] {
    const ZEROS: [u8; 4096] = [0; 4096];
    let mut hasher = blake3::Hasher::new();
    let mut left = len;
    while left > 0 {
        let piece = usize::try_from(left).unwrap_or(usize::MAX).min(ZEROS.len());
        hasher.update(&ZEROS[..piece]);
        left -= piece as u64;
    }
    truncate(hasher.finalize())
}

fn truncate(hash: blake3::Hash) -> [u8; 16] {
    let mut digest = [0; 16];
    digest.copy_from_slice(&hash.as_bytes()[..16]);
    digest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_have_the_digest_of_zeros() {
        for len in [0, 1, 4095, 4096, 65_536, 65_536, 100_001] {
            assert_eq!(zero_digest(len), block_digest(&vec![0; usize::try_from(len).unwrap()]), "{len}");
        }
        assert_ne!(zero_digest(4096), zero_digest(8192));
    }
}
