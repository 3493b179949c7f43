//! What a replica passes on to a third site: which point next, and which logs stay for it.
//!
//! A *mark* is a point whose state the third site has, or is about to have. What changed since it can always be told:
//! from the logs after it while they are there, from the change map once they are folded into the base. The logs
//! tell it to the byte, the map in chunks of [`crate::CHANGE_CHUNK_BYTES`]. So logs are kept for the marks, but not at
//! any price: a third site that is away for a week costs it some bytes more, and this one a bounded room.

use model::{Consistency, LogNumber, PointInfo};

/// So many bytes of logs are kept for a third site, whatever the size of the VM.
pub const FORWARD_KEEP_BYTES_MIN: u64 = 64 << 20;
/// Of a large VM, this part of its disks.
const FORWARD_KEEP_PART: u64 = 8;

/// The point to pass on after `sent`: the oldest application-consistent one that has not been, else the newest of all;
/// none if there is nothing newer. Those in between go with it: each cycle sends the last after-image of each block.
#[must_use]
pub fn next_to_forward(points: &[PointInfo], sent: Option<LogNumber>) -> Option<PointInfo> {
    let newer = || points.iter().filter(|point| sent.is_none_or(|sent| point.number > sent));
    // Of the first pass only the end is a point: an older one is no use.
    let applications =
        newer().filter(|point| sent.is_some() && point.consistency == Consistency::Application);
    applications
        .min_by_key(|point| point.number)
        .or_else(|| newer().max_by_key(|point| point.number))
        .copied()
}

/// The point to pass on after `sent` where the replica moves to the other site: the oldest that is newer, for all of them to be
/// there in the end; none if there is nothing newer. Before anything was sent it is the oldest of all.
#[must_use]
pub fn next_to_move(points: &[PointInfo], sent: Option<LogNumber>) -> Option<PointInfo> {
    let newer = points.iter().filter(|point| sent.is_none_or(|sent| point.number > sent));
    newer.min_by_key(|point| point.number).copied()
}

/// The marks that logs are kept for, of those given: where the logs after one come to more than an eighth of the VM's
/// disks (and to [`FORWARD_KEEP_BYTES_MIN`]), it is let go. `logs` are the ones not folded in, with their bytes.
#[must_use]
pub fn marks_kept(marks: &[LogNumber], logs: &[(LogNumber, u64)], disk_bytes: u64) -> Vec<LogNumber> {
    let room = (disk_bytes / FORWARD_KEEP_PART).max(FORWARD_KEEP_BYTES_MIN);
    let after = |mark: LogNumber| -> u64 {
        logs.iter().filter(|(number, _)| *number > mark).map(|(_, bytes)| bytes).sum()
    };
    marks.iter().copied().filter(|mark| after(*mark) <= room).collect()
}

#[cfg(test)]
mod tests {
    use model::{LogId, Timestamp};

    use super::*;

    fn points(consistencies: &[Consistency]) -> Vec<PointInfo> {
        let numbered = (1..).zip(consistencies);
        let point = |(number, consistency): (u64, &Consistency)| PointInfo {
            id: LogId::from_bytes([1; 16]),
            number: LogNumber(number),
            taken_at: Timestamp(0),
            consistency: *consistency,
        };
        numbered.map(point).collect()
    }

    #[test]
    fn application_consistent_points_travel_one_by_one_and_the_newest_always() {
        use Consistency::{Application as App, Crash};
        let shown = points(&[Crash, App, Crash, App, Crash]);
        let next =
            |sent: Option<u64>| next_to_forward(&shown, sent.map(LogNumber)).map(|point| point.number.0);
        let way: Vec<_> = std::iter::successors(next(Some(1)), |sent| next(Some(*sent))).collect();
        assert_eq!(way, [2, 4, 5]);
        assert_eq!(next(None), Some(5), "the first pass shows no point before its end");
        assert_eq!(next_to_forward(&[], None), None);
    }

    #[test]
    fn of_a_replica_that_moves_every_point_travels_in_its_order() {
        use Consistency::{Application as App, Crash};
        let shown = points(&[Crash, App, Crash, Crash]);
        let next = |sent: Option<u64>| next_to_move(&shown, sent.map(LogNumber)).map(|point| point.number.0);
        let way: Vec<_> = std::iter::successors(next(None), |sent| next(Some(*sent))).collect();
        assert_eq!(way, [1, 2, 3, 4]);
        assert_eq!(next_to_move(&[], None), None);
    }

    #[test]
    fn a_mark_is_let_go_when_the_logs_after_it_take_too_much_room() {
        let mib = |n: u64| n << 20;
        let logs: Vec<_> = (1..=10).map(|number| (LogNumber(number), mib(20))).collect();
        let marks = [2, 6, 7, 9].map(LogNumber);
        let kept =
            |disk_bytes| marks_kept(&marks, &logs, disk_bytes).iter().map(|mark| mark.0).collect::<Vec<_>>();
        assert_eq!(kept(0), [7, 9], "60 MiB after mark 7, 80 MiB after mark 6");
        assert_eq!(kept(mib(8 * 80)), [6, 7, 9]);
        assert_eq!(kept(mib(8 * 160)), [2, 6, 7, 9]);
    }
}
