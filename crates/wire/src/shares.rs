//! Something of which there is a bounded amount, shared so that one peer cannot take it all.
//!
//! A peer gets another piece as long as it holds fewer than are free: alone it gets half, the next one half of the
//! rest. So however many the first ones hold, there is one left for somebody who holds none.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::identity::Fingerprint;

#[derive(Debug)]
pub(crate) struct Shares {
    state: Mutex<State>,
    given_back: Notify,
}

#[derive(Debug)]
struct State {
    free: usize,
    held: HashMap<Fingerprint, usize>,
}

/// One piece; given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Share<'a> {
    of: &'a Shares,
    peer: Fingerprint,
}

impl Shares {
    pub fn new(pieces: usize) -> Self {
        Self {
            state: Mutex::new(State { free: pieces.max(1), held: HashMap::new() }),
            given_back: Notify::new(),
        }
    }

    /// Waits for a piece. Safe to cancel.
    pub async fn take(&self, peer: Fingerprint) -> Share<'_> {
        loop {
            let mut given_back = pin!(self.given_back.notified());
            // Before looking: what is given back between the two is not missed.
            given_back.as_mut().enable();
            if let Some(share) = self.try_take(peer) {
                return share;
            }
            given_back.await;
        }
    }

    fn try_take(&self, peer: Fingerprint) -> Option<Share<'_>> {
        let mut state = self.lock();
        let held = state.held.get(&peer).copied().unwrap_or(0);
        if held >= state.free {
            return None;
        }
        state.free -= 1;
        state.held.insert(peer, held + 1);
        Some(Share { of: self, peer })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Share<'_> {
    fn drop(&mut self) {
        let mut state = self.of.lock();
        state.free += 1;
        if let Some(held) = state.held.get_mut(&self.peer) {
            *held -= 1;
            if *held == 0 {
                state.held.remove(&self.peer);
            }
        }
        drop(state);
        self.of.given_back.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn however_much_some_hold_there_is_something_for_the_next() {
        let shares = Shares::new(16);
        let mut held = Vec::new();
        for (peer, gets) in [(1, 8), (2, 4), (3, 2), (4, 1), (5, 1), (6, 0)] {
            let peer = Fingerprint::from_bytes([peer; 32]);
            let mut count = 0;
            while let Some(share) = shares.try_take(peer) {
                held.push(share);
                count += 1;
            }
            assert_eq!(count, gets, "{peer}");
        }
        held.clear();
        let state = shares.lock();
        assert_eq!((state.free, state.held.len()), (16, 0));
    }

    #[tokio::test]
    async fn who_waits_gets_what_is_given_back() {
        let shares = Shares::new(1);
        let (a, b) = (Fingerprint::from_bytes([1; 32]), Fingerprint::from_bytes([2; 32]));
        let first = shares.take(a).await;
        let (second, ()) = tokio::join!(shares.take(b), async { drop(first) });
        assert_eq!(second.peer, b);
    }
}
