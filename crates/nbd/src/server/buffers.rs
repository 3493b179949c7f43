//! Buffers for payloads that are used again: to get fresh ones from the system, page by page, costs as much
//! as to fill them.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

/// Every buffer's room. Smaller payloads have memory of their own, and so have larger ones.
const BUFFER_BYTES: usize = super::PIECE_BYTES as usize;
const SMALL_BYTES: usize = 32 << 10;
/// Buffers kept while nobody needs them (8 MiB).
const KEPT_MAX: usize = 32;

/// Buffers that nobody needs just now.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    kept: Mutex<Vec<Box<[u8]>>>,
}

impl Buffers {
    /// A buffer to be *filled*: it may hold what was read from another disk before.
    pub fn get(self: &Arc<Self>, len: usize) -> Buffer {
        if !(SMALL_BYTES..=BUFFER_BYTES).contains(&len) {
            return Buffer { memory: vec![0; len].into(), len, home: None };
        }
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let memory = kept.unwrap_or_else(|| vec![0; BUFFER_BYTES].into());
        Buffer { memory, len, home: Some(self.clone()) }
    }
}

/// One in use; it goes home when it is dropped.
#[derive(Debug)]
pub(super) struct Buffer {
    memory: Box<[u8]>,
    len: usize,
    home: Option<Arc<Buffers>>,
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[..self.len]
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(home) = &self.home {
            let mut kept = home.kept.lock().unwrap_or_else(PoisonError::into_inner);
            if kept.len() < KEPT_MAX {
                kept.push(std::mem::take(&mut self.memory));
            }
        }
    }
}
