//! Which states of several disks there were at one time.

use super::prefixes::changes_of;
use super::{Act, Entry, Kind, Prefixes, Step};

/// The order of all changes over all disks.
#[derive(Debug)]
pub struct CommonOrder {
    /// For each moment: how many changes each disk had seen.
    moments: Vec<Vec<usize>>,
    dropped: usize,
}

impl CommonOrder {
    /// The order in which a guest made its steps one at a time; an error if a disk's log does not hold just
    /// these, in this order. Discards alone may be missing: QEMU drops them, as it may, while a moment of the
    /// disk is being read (its filter `copy-before-write` does not hand them on).
    pub fn of(steps: &[Step], disks: &[Prefixes]) -> Result<Self, String> {
        let mut logs: Vec<_> = disks.iter().map(|disk| changes_of(disk.log()).peekable()).collect();
        let mut moments = vec![vec![0; disks.len()]];
        let mut dropped = 0;
        for (number, step) in (1..).zip(steps) {
            let kind = if step.act == Act::Discard { Kind::Discard } else { Kind::Write };
            let is_step =
                |entry: &&Entry| (entry.kind, entry.offset, entry.len) == (kind, step.offset, step.len);
            let mut moment = moments[number - 1].clone();
            if logs[step.disk].next_if(is_step).is_some() {
                moment[step.disk] += 1;
            } else if step.act == Act::Discard {
                dropped += 1;
            } else {
                return Err(format!(
                    "step {number} was {step:?}, but QEMU logged {:?}",
                    logs[step.disk].peek()
                ));
            }
            moments.push(moment);
        }
        match logs.iter_mut().position(|log| log.next().is_some()) {
            Some(disk) => Err(format!("QEMU logged more on disk {disk} than the guest did")),
            None => Ok(Self { moments, dropped }),
        }
    }

    /// The last moment: after all steps.
    #[must_use]
    pub fn last(&self) -> usize {
        self.moments.len() - 1
    }

    /// How many discards QEMU dropped.
    #[must_use]
    pub fn dropped(&self) -> usize {
        self.dropped
    }

    /// The first moment from `least` on at which the disks were in one of these states each.
    #[must_use]
    pub fn moment(&self, states: &[&[usize]], least: usize) -> Option<usize> {
        let fits = |moment: &Vec<usize>| states.iter().zip(moment).all(|(states, at)| states.contains(at));
        (least..self.moments.len()).find(|&number| fits(&self.moments[number]))
    }
}

#[cfg(test)]
mod tests {
    use super::super::WriteLog;
    use super::super::write_log::tests::log_of;
    use super::*;

    #[test]
    fn states_of_different_moments_do_not_go_together() {
        let dir = tempfile::tempdir().unwrap();
        let disk = |name: &str, entries: &[(u64, u64, u64, u8)]| {
            log_of(&dir.path().join(name), entries);
            Prefixes::replay(WriteLog::open(&dir.path().join(name), 4096).unwrap()).unwrap()
        };
        let disks = [
            disk("a", &[(0, 1, 0, 1), (1, 1, 0, 2)]),
            disk("b", &[(0, 1, 0, 3), (0, 0, 1, 0), (0, 1, 4, 0)]),
        ];
        let step = |disk, act, sector: u64| Step { disk, act, offset: sector * 512, len: 512 };
        let steps = [
            step(0, Act::Write, 0),
            step(1, Act::Write, 0),
            step(1, Act::Discard, 0),
            step(0, Act::Write, 1),
        ];
        let order = CommonOrder::of(&steps, &disks).unwrap();
        assert_eq!(order.last(), 4);
        assert_eq!(order.moment(&[&[0], &[0, 2]], 0), Some(0));
        assert_eq!(order.moment(&[&[1], &[0, 2]], 0), Some(1));
        assert_eq!(order.moment(&[&[1], &[0, 2]], 2), Some(3));
        assert_eq!(order.moment(&[&[1], &[0, 2]], 4), None, "that was earlier");
        assert_eq!(order.moment(&[&[2], &[1]], 0), None, "the second disk is behind");
        assert_eq!(order.moment(&[&[0], &[1]], 0), None, "the first disk is behind");

        assert_eq!(order.dropped(), 0);
        let dropped =
            CommonOrder::of(&[&steps[..3], &[step(1, Act::Discard, 5)], &steps[3..]].concat(), &disks);
        let dropped = dropped.unwrap();
        assert_eq!((dropped.last(), dropped.dropped()), (5, 1));
        assert_eq!(dropped.moment(&[&[1], &[2]], 4), Some(4), "nothing changed");
        assert!(CommonOrder::of(&steps[..3], &disks).is_err(), "more was logged");
        assert!(
            CommonOrder::of(&[&steps[..], &steps[..1]].concat(), &disks).is_err(),
            "a write passed the log by"
        );
        assert!(CommonOrder::of(&[steps[1], steps[0], steps[3], steps[2]], &disks).is_ok());
        assert!(CommonOrder::of(&[steps[3], steps[1], steps[2], steps[0]], &disks).is_err(), "another order");
    }
}
