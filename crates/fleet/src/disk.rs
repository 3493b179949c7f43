//! The disk of a site: all that is written to it and read from it at one time shares it evenly.
//!
//! Work is measured in seconds of the whole disk. A clock that runs slower the more share the disk gives
//! each stream what is its due without touching every stream at every change.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::clock::{Micros, SECOND};

/// A disk, with the applies that run on it and the number of backups that read from it.
#[derive(Debug, Default)]
pub(crate) struct Disk {
    /// Seconds of the whole disk that each stream has had since the beginning.
    served: f64,
    at: Micros,
    /// When `served` reaches which value, whose apply ends. Bits of positive numbers sort as the numbers do.
    applies: BinaryHeap<Reverse<(u64, u32)>>,
    readers: u32,
}

impl Disk {
    fn streams(&self) -> f64 {
        self.applies.len() as f64 + f64::from(self.readers)
    }

    fn advance(&mut self, now: Micros) {
        let streams = self.streams();
        if streams > 0.0 {
            self.served += (now - self.at) as f64 / SECOND as f64 / streams;
        }
        self.at = now;
    }

    /// An apply of this much work begins.
    pub fn begin_apply(&mut self, now: Micros, vm: u32, work_seconds: f64) {
        self.advance(now);
        self.applies.push(Reverse(((self.served + work_seconds).to_bits(), vm)));
    }

    /// The apply that ends next, and when, if nothing changes before.
    pub fn next_end(&self) -> Option<(Micros, u32)> {
        let Reverse((end, vm)) = *self.applies.peek()?;
        let left = (f64::from_bits(end) - self.served).max(0.0) * self.streams();
        Some((self.at + (left * SECOND as f64).ceil() as Micros, vm))
    }

    /// Takes out the apply that [`Self::next_end`] named.
    pub fn end_apply(&mut self, now: Micros) -> Option<u32> {
        self.advance(now);
        self.applies.pop().map(|Reverse((_, vm))| vm)
    }

    /// A backup begins to read.
    pub fn begin_reading(&mut self, now: Micros) {
        self.advance(now);
        self.readers += 1;
    }

    /// A backup has read everything.
    pub fn end_reading(&mut self, now: Micros) {
        self.advance(now);
        self.readers -= 1;
    }

    /// The site dies: nothing goes on. Names the applies that were cut off, in a fixed order.
    pub fn cut_off(&mut self, now: Micros) -> Vec<u32> {
        self.advance(now);
        self.readers = 0;
        let mut vms: Vec<u32> = self.applies.drain().map(|Reverse((_, vm))| vm).collect();
        vms.sort_unstable();
        vms
    }

    /// The applies that run.
    pub fn running(&self) -> usize {
        self.applies.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_share_the_disk_evenly() {
        let mut disk = Disk::default();
        disk.begin_apply(0, 1, 2.0);
        assert_eq!(disk.next_end(), Some((2 * SECOND, 1)));
        // After a second a shorter one joins: each goes at half speed.
        disk.begin_apply(SECOND, 2, 0.5);
        assert_eq!(disk.next_end(), Some((2 * SECOND, 2)));
        assert_eq!(disk.end_apply(2 * SECOND), Some(2));
        // The first has half a second left, and a reader comes.
        disk.begin_reading(2 * SECOND);
        assert_eq!(disk.next_end(), Some((3 * SECOND, 1)));
        disk.end_reading(2 * SECOND + SECOND / 2);
        assert_eq!(disk.next_end(), Some((2 * SECOND + 3 * SECOND / 4, 1)));
    }
}
