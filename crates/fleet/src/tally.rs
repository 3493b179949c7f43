//! What came out: counts and distributions that add up over sites in any order.

use model::GiveUp;
use model::gate::Condition;

use crate::clock::{Micros, SECOND};
use crate::histogram::Histogram;
use crate::jobs::End;

/// Classes of VMs by their rate of change: each is twice the one before, the first ends at 1 KiB/s.
pub const RATE_CLASSES: usize = 20;

/// What one or more sites came to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tally {
    /// Backups that were tried at least once.
    pub tried: u64,
    /// Backups that are in the repository.
    pub done: u64,
    /// Of these, inside the window.
    pub in_window: u64,
    /// Given up because all attempts were used.
    pub out_of_attempts: u64,
    /// Given up because the window ended.
    pub out_of_time: u64,
    /// Given up, and the last refusal was a collision with an apply: starved.
    pub starved: u64,
    /// Attempts refused because the apply that the barrier waited for did not end in time.
    pub barrier_in_vain: u64,
    /// Holds that were left behind by a site that died.
    pub orphaned_holds: u64,
    /// Jobs that had come to no end when the simulation stopped.
    pub unfinished: u64,
    /// VMs that were still paused then.
    pub still_paused: u64,
    /// First attempts that met a running apply.
    pub first_collided: u64,
    /// Refusals, in the order of [`Condition::ALL`].
    pub refusals: [u64; 8],
    /// Attempts with the barrier.
    pub barriers: u64,
    /// Attempts per backup, the one that succeeded among them.
    pub attempts: Histogram,
    /// From due to admitted, in milliseconds.
    pub wait_ms: Histogram,
    /// From due to done, in milliseconds.
    pub done_ms: Histogram,
    /// How old the point is that the backup holds, when it is opened, in milliseconds.
    pub point_age_ms: Histogram,
    /// The greatest age of the newest recovery point from a backup's first attempt to its end, in milliseconds.
    pub exposed_ms: Histogram,
    /// How far the flat files are behind when a backup has been read, in milliseconds.
    pub behind_ms: Histogram,
    /// First attempts by class of VM, and those of them that collided.
    pub by_rate: [(u64, u64); RATE_CLASSES],
    /// Cycles that shipped a log.
    pub cycles: u64,
    /// Applies that began.
    pub applies: u64,
    /// Microseconds in which a VM's apply ran, over all VMs, and microseconds in which they were looked at.
    pub busy_us: u128,
    /// See `busy_us`.
    pub observed_us: u128,
}

impl Tally {
    /// Adds what other sites came to.
    pub fn merge(&mut self, other: &Self) {
        let counts = [
            (&mut self.tried, other.tried),
            (&mut self.done, other.done),
            (&mut self.in_window, other.in_window),
            (&mut self.out_of_attempts, other.out_of_attempts),
            (&mut self.out_of_time, other.out_of_time),
            (&mut self.starved, other.starved),
            (&mut self.barrier_in_vain, other.barrier_in_vain),
            (&mut self.orphaned_holds, other.orphaned_holds),
            (&mut self.unfinished, other.unfinished),
            (&mut self.still_paused, other.still_paused),
            (&mut self.first_collided, other.first_collided),
            (&mut self.barriers, other.barriers),
            (&mut self.cycles, other.cycles),
            (&mut self.applies, other.applies),
        ];
        counts.into_iter().for_each(|(mine, theirs)| *mine += theirs);
        self.refusals.iter_mut().zip(other.refusals).for_each(|(mine, theirs)| *mine += theirs);
        for (mine, theirs) in self.by_rate.iter_mut().zip(other.by_rate) {
            *mine = (mine.0 + theirs.0, mine.1 + theirs.1);
        }
        self.attempts.merge(&other.attempts);
        self.wait_ms.merge(&other.wait_ms);
        self.done_ms.merge(&other.done_ms);
        self.point_age_ms.merge(&other.point_age_ms);
        self.exposed_ms.merge(&other.exposed_ms);
        self.behind_ms.merge(&other.behind_ms);
        self.busy_us += other.busy_us;
        self.observed_us += other.observed_us;
    }

    /// The share of first attempts that met a running apply.
    #[must_use]
    pub fn collision_share(&self) -> f64 {
        share(self.first_collided, self.tried)
    }

    /// The share of backups that were made.
    #[must_use]
    pub fn done_share(&self) -> f64 {
        share(self.done, self.tried)
    }

    /// The share of backups that were made in the window.
    #[must_use]
    pub fn window_share(&self) -> f64 {
        share(self.in_window, self.tried)
    }

    /// The share of its time that an average VM's apply runs.
    #[must_use]
    pub fn busy_share(&self) -> f64 {
        self.busy_us as f64 / (self.observed_us as f64).max(1.0)
    }

    pub(crate) fn first_attempt(&mut self, bytes_per_s: f64) {
        self.tried += 1;
        self.by_rate[rate_class(bytes_per_s)].0 += 1;
    }

    /// A refusal; of a first attempt with the VM's rate.
    pub(crate) fn refused(&mut self, condition: Condition, first_of: Option<f64>) {
        if let Some(place) = Condition::ALL.iter().position(|known| *known == condition) {
            self.refusals[place] += 1;
        }
        if let (Some(rate), Condition::ApplyInProgress) = (first_of, condition) {
            self.first_collided += 1;
            self.by_rate[rate_class(rate)].1 += 1;
        }
    }

    pub(crate) fn admitted(&mut self, after: Micros, point_age: Micros) {
        self.wait_ms.add(millis(after));
        self.point_age_ms.add(millis(point_age));
    }

    pub(crate) fn behind(&mut self, behind: Micros) {
        self.behind_ms.add(millis(behind));
    }

    pub(crate) fn ended(
        &mut self,
        end: End,
        attempts: u64,
        after: Micros,
        in_window: bool,
        collided: bool,
        exposed: Micros,
    ) {
        self.attempts.add(attempts);
        self.exposed_ms.add(millis(exposed));
        match end {
            End::Done => {
                self.done += 1;
                self.in_window += u64::from(in_window);
                self.done_ms.add(millis(after));
            }
            End::GaveUp(GiveUp::Attempts) => self.out_of_attempts += 1,
            End::GaveUp(GiveUp::Deadline) => self.out_of_time += 1,
        }
        self.starved += u64::from(end != End::Done && collided);
    }
}

/// The class of a VM that changes this much.
fn rate_class(bytes_per_s: f64) -> usize {
    let doublings = (bytes_per_s / 1024.0).log2().ceil().max(0.0);
    (doublings as usize).min(RATE_CLASSES - 1)
}

fn share(part: u64, whole: u64) -> f64 {
    part as f64 / whole.max(1) as f64
}

fn millis(time: Micros) -> u64 {
    (time.max(0) / (SECOND / 1000)) as u64
}
