//! Counts memory, so that "bounded" is something that a test can fail on.
//!
//! A program that makes [`Counting`] its allocator has [`within`] check the most that was in use while something
//! ran, over all threads. In a program that does not, nothing is counted and nothing can fail.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

static USED: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, with a count.
#[derive(Debug)]
pub struct Counting;

fn took(bytes: usize) {
    let used = USED.fetch_add(bytes, Ordering::Relaxed) + bytes;
    PEAK.fetch_max(used, Ordering::Relaxed);
}

fn gave_back(bytes: usize) {
    USED.fetch_sub(bytes, Ordering::Relaxed);
}

// SAFETY: every call is passed on to the system's allocator as it is; the counters touch no memory of it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        took(layout.size());
        // SAFETY: the caller keeps the contract of `alloc`, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        gave_back(layout.size());
        // SAFETY: `at` came from `System` with this layout, as everything that we give out.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        took(layout.size());
        // SAFETY: the caller keeps the contract of `alloc_zeroed`, which is the same.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        took(bytes);
        gave_back(layout.size());
        // SAFETY: `at` came from `System` with this layout, as everything that we give out.
        unsafe { System.realloc(at, layout, bytes) }
    }
}

/// Runs something that may take at most `limit` bytes.
///
/// # Panics
/// If it took more.
pub fn within<T>(limit: usize, run: impl FnOnce() -> T) -> T {
    // One at a time: the count is the whole program's.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let before = USED.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let value = run();
    let took = PEAK.load(Ordering::Relaxed).saturating_sub(before);
    assert!(took <= limit, "one input took {took} bytes of memory; {limit} are allowed");
    value
}
