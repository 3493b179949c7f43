//! Every step at which a crash must be survived, by name.
//!
//! The product calls [`durable_step`] before and after whatever it makes durable: a sync, a rename, a change of
//! the catalog, a transaction in QEMU. With `AFTERIMAGE_FAIL_AT=name` in the environment (or `name:n` for the
//! n-th time) the process kills itself there, as a power cut would as far as a process can tell; without it a
//! call is one load and one comparison. [`ALL`] lists the names.
//!
//! Tests hold the list against the sources, and the sources against themselves (`tests/sources.rs`): a step that
//! is not listed, or something made durable without a step on either side, fails. The crash matrix of the
//! end-to-end tests is made from the list, so that no step can be forgotten there.
//!
//! What it does not do: lose what was not synced; that takes a file system (`afterimage-lossy`).

mod all;

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

pub use all::ALL;

/// The environment variable that names the step to die at.
pub const FAIL_AT: &str = "AFTERIMAGE_FAIL_AT";

struct FailAt {
    name: String,
    /// How many more times to pass it.
    left: AtomicU64,
}

/// Marks a durable step. Ends the process at the one that the environment names.
pub fn durable_step(name: &'static str) {
    static FAIL: OnceLock<Option<FailAt>> = OnceLock::new();
    let fail = FAIL.get_or_init(|| std::env::var(FAIL_AT).ok().map(|text| parse(&text)));
    if let Some(fail) = fail
        && fail.name == name
        && fail.left.fetch_sub(1, Ordering::SeqCst) == 1
    {
        // SIGKILL: no destructor, no flush, no exit handler runs.
        let _ = nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::Signal::SIGKILL);
        std::process::abort();
    }
}

/// `name` or `name:n`; the names themselves have double colons.
fn parse(text: &str) -> FailAt {
    let (name, nth) = match text.rsplit_once(':') {
        Some((name, nth)) if !name.ends_with(':') => (name, nth.parse().unwrap_or(1)),
        _ => (text, 1),
    };
    FailAt { name: name.to_owned(), left: AtomicU64::new(nth) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_say_which_time() {
        let parsed = |text| {
            let fail = parse(text);
            (fail.name, fail.left.into_inner())
        };
        assert_eq!(parsed("replica::apply::begin"), ("replica::apply::begin".into(), 1));
        assert_eq!(parsed("replica::apply::begin:3"), ("replica::apply::begin".into(), 3));
    }

    #[test]
    fn the_list_is_sorted_and_has_nothing_twice() {
        assert!(ALL.is_sorted_by(|a, b| a < b));
    }
}
