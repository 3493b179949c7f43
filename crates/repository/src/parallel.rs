//! Work on many pieces, on all cores.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::error::Error;

/// Does `work` for each piece, taking them in order, with one of `tools` per thread; the first error ends it.
/// `tick` is called on this thread now and then, and once at the end.
pub(crate) fn for_each<T: Sync, S: Send>(
    pieces: &[T],
    tools: Vec<S>,
    work: &(dyn Fn(&mut S, &T) -> Result<(), Error> + Sync),
    tick: &dyn Fn(),
    cancel: &AtomicBool,
) -> Result<(), Error> {
    let (next, stop, failure) = (AtomicUsize::new(0), AtomicBool::new(false), Mutex::new(None));
    let fail = |error| {
        failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        stop.store(true, Ordering::Relaxed);
    };
    thread::scope(|scope| {
        let (alive, all_done) = channel::<()>();
        for mut tool in tools {
            let (alive, next, stop, fail) = (alive.clone(), &next, &stop, &fail);
            scope.spawn(move || {
                while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    if let Err(error) = work(&mut tool, piece) {
                        fail(error);
                    }
                }
                drop(alive);
            });
        }
        drop(alive);
        while all_done.recv_timeout(Duration::from_millis(100)) == Err(RecvTimeoutError::Timeout) {
            if cancel.load(Ordering::Relaxed) {
                fail(Error::Cancelled);
            }
            tick();
        }
        tick();
    });
    failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// How many threads to use.
pub(crate) fn threads() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}
