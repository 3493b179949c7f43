//! The repository's encryption: AES-256-CTR with Poly1305-AES, as restic's format has it.
//!
//! Sealed bytes are a nonce of 16 bytes, the ciphertext, and a MAC of 16 bytes.

use aes256ctr_poly1305aes::aead::AeadInPlace;
use aes256ctr_poly1305aes::aead::generic_array::GenericArray;
use aes256ctr_poly1305aes::{Aes256CtrPoly1305Aes, Key};

/// Bytes of nonce before the ciphertext.
pub(crate) const NONCE_BYTES: usize = 16;
const MAC_BYTES: usize = 16;
/// Bytes that sealing adds in all.
pub(crate) const SEAL_BYTES: usize = NONCE_BYTES + MAC_BYTES;

/// The MAC does not fit: the bytes are not what was written, or another key wrote them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Forged;

/// The master key of a repository, ready for use.
#[derive(Clone)]
pub(crate) struct Cipher(Aes256CtrPoly1305Aes);

impl Cipher {
    /// The cipher of this encryption key and the two halves of the MAC key; none if a length is wrong.
    pub(crate) fn new(encrypt: &[u8], mac_k: &[u8], mac_r: &[u8]) -> Option<Self> {
        if encrypt.len() != 32 || mac_k.len() != 16 || mac_r.len() != 16 {
            return None;
        }
        let key: Key = GenericArray::from_exact_iter(encrypt.iter().chain(mac_k).chain(mac_r).copied())?;
        Some(Self(Aes256CtrPoly1305Aes::new(&key)))
    }

    /// Seals in place: `whole` has room for the nonce before the plaintext and for the MAC after it.
    pub(crate) fn seal(&self, whole: &mut [u8]) {
        let mut nonce = [0; NONCE_BYTES];
        // Without randomness nothing can be encrypted, and nothing better can be done than to stop.
        getrandom::fill(&mut nonce).expect("the operating system has no random bytes");
        // restic counts blocks in all 128 bits, this cipher in the low 64: without a carry they agree.
        nonce[8] &= 0x7f;
        let (front, rest) = whole.split_at_mut(NONCE_BYTES);
        let (plain, mac) = rest.split_at_mut(rest.len() - MAC_BYTES);
        front.copy_from_slice(&nonce);
        let tag = self
            .0
            .encrypt_in_place_detached(&GenericArray::from(nonce), &[], plain)
            .expect("one seal is far below the cipher's limit of length");
        mac.copy_from_slice(&tag);
    }

    /// Opens in place and gives the plaintext within `sealed`.
    pub(crate) fn open<'a>(&self, sealed: &'a mut [u8]) -> Result<&'a [u8], Forged> {
        let plain_bytes = sealed.len().checked_sub(SEAL_BYTES).ok_or(Forged)?;
        let (nonce, rest) = sealed.split_at_mut(NONCE_BYTES);
        let (cipher, tag) = rest.split_at_mut(plain_bytes);
        self.0
            .decrypt_in_place_detached(
                GenericArray::from_slice(nonce),
                &[],
                cipher,
                GenericArray::from_slice(tag),
            )
            .map_err(|_| Forged)?;
        Ok(cipher)
    }
}

/// These bytes, sealed.
pub(crate) fn sealed(cipher: &Cipher, plain: &[u8]) -> Vec<u8> {
    let mut whole = vec![0; plain.len() + SEAL_BYTES];
    whole[NONCE_BYTES..NONCE_BYTES + plain.len()].copy_from_slice(plain);
    cipher.seal(&mut whole);
    whole
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_flipped_bit_is_noticed() {
        let cipher = Cipher::new(&[1; 32], &[2; 16], &[3; 16]).unwrap();
        let sealed = sealed(&cipher, b"bytes");
        assert_eq!(cipher.open(&mut sealed.clone()).unwrap(), b"bytes");
        for byte in 0..sealed.len() {
            let mut bad = sealed.clone();
            bad[byte] ^= 0x10;
            assert_eq!(cipher.open(&mut bad), Err(Forged), "byte {byte}");
        }
        for len in 0..sealed.len() {
            assert_eq!(cipher.open(&mut sealed[..len].to_vec()), Err(Forged));
        }
    }
}
