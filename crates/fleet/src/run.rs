//! A fleet: its sites, one after the other on each thread.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::churn::LogSizes;
use crate::scenario::Scenario;
use crate::site::Site;
use crate::tally::Tally;

/// Simulates a fleet's night on this many threads. The outcome does not depend on their number.
#[must_use]
pub fn run(scenario: &Scenario, threads: usize) -> Tally {
    let sizes = LogSizes::new(&scenario.churn, scenario.interval);
    let (next, sum) = (AtomicU32::new(0), Mutex::new(Tally::default()));
    let work = || {
        let mut mine = Tally::default();
        loop {
            let site = next.fetch_add(1, Ordering::Relaxed);
            if site >= scenario.sites {
                break;
            }
            mine.merge(&Site::new(scenario, &sizes, site).run());
        }
        sum.lock().unwrap_or_else(std::sync::PoisonError::into_inner).merge(&mine);
    };
    std::thread::scope(|scope| (0..threads.max(1)).for_each(|_| drop(scope.spawn(work))));
    sum.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)
}
