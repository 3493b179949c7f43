//! Every step after which a crash must be survived, by name.
//!
//! `AFTERIMAGE_FAIL_AT=name` (or `name:n` for its n-th time) makes the process kill itself there, as a
//! power cut would as far as a process can tell. [`STEPS`] lists all names, so that a test can try each.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// The environment variable that names the step to die at.
pub const FAIL_AT: &str = "AFTERIMAGE_FAIL_AT";

/// All names; a test holds them against the sources.
pub const STEPS: &[&str] = &[
    "replica::apply::begin",
    "replica::apply::marked",
    "replica::apply::noted",
    "replica::apply::mapped",
    "replica::apply::sized",
    "replica::apply::writing",
    "replica::apply::written",
    "replica::apply::synced",
    "replica::apply::described",
    "replica::apply::committed",
    "replica::apply::unlinked",
    "replica::compact::begin",
    "replica::compact::synced",
    "replica::compact::renamed",
    "replica::compact::committed",
    "replica::compact::unlinked",
    "replica::failover::marked",
    "replica::failover::folded",
    "replica::failover::overlaid",
    "replica::failover::ready",
    "replica::failover::cancelled",
    "replica::hold::committed",
    "replica::migrate::marked",
    "replica::migrate::copied",
    "replica::migrate::synced",
    "replica::migrate::switched",
    "replica::migrate::removed",
    "replica::offer::made",
    "replica::offer::committed",
    "replica::receive::begun",
    "replica::receive::verified",
    "replica::receive::synced",
    "replica::receive::renamed",
    "replica::receive::folders",
    "replica::receive::committed",
    "replica::retention::committed",
];

struct FailAt {
    name: String,
    /// How many more times to pass it.
    left: AtomicU64,
}

/// Marks a durable step. Ends the process at the one that the environment names.
pub(crate) fn durable_step(name: &'static str) {
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
    use std::collections::BTreeSet;

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
    fn the_list_has_every_step_of_the_sources_and_no_other() {
        let mut found = BTreeSet::new();
        for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/src")).unwrap() {
            let path = entry.unwrap().path();
            if path.ends_with("step.rs") {
                continue;
            }
            let source = std::fs::read_to_string(path).unwrap();
            for after in source.split("durable_step(\"").skip(1) {
                found.insert(after.split('"').next().unwrap().to_owned());
            }
        }
        let listed: BTreeSet<_> = STEPS.iter().map(ToString::to_string).collect();
        assert_eq!(found, listed);
        assert_eq!(listed.len(), STEPS.len());
    }
}
