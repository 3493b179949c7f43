//! Turns: where a cycle that runs beside everything else lets the others go on.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

use crate::chance::Chance;

/// Gives turns away by chance; clones share it.
#[derive(Debug, Clone)]
pub struct Turns(Arc<Mutex<Chance>>);

impl Turns {
    /// Turns by this seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(Arc::new(Mutex::new(Chance::new(seed))))
    }

    /// Lets the others go on for up to a few turns.
    pub async fn pass(&self) {
        let turns = self.0.lock().unwrap_or_else(PoisonError::into_inner).below(3);
        self.wait(turns).await;
    }

    /// Lets the others go on for this many turns.
    pub async fn wait(&self, turns: u64) {
        Wait(turns).await;
    }
}

struct Wait(u64);

impl Future for Wait {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.0 == 0 {
            return Poll::Ready(());
        }
        self.0 -= 1;
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

/// Gives a future one turn.
pub fn turn<F: Future + ?Sized>(future: Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}
