//! What a cycle looks at on each disk. In a pass the disks of a VM are one line of bytes, so that "how far it has come"
//! is one number.

use std::ops::Range;

use model::{Phase, Progress};

use crate::rows::KnownDisk;

/// What one cycle looks at on one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskPart {
    /// The disk, by its place.
    pub disk: usize,
    /// Where its changes are asked for.
    pub covered: Range<u64>,
    /// What it has grown by since the last cycle: no bitmap speaks for that, so all of it is read.
    pub grown: Range<u64>,
    /// What has never been read, in a pass or of a disk that joins: as much as the cycle's limits allow.
    pub ahead: Range<u64>,
    /// Where the disk starts on the line.
    pub starts_at: u64,
    /// It joins: what is read of it goes into logs before the one that makes a point.
    pub joins: bool,
}

impl DiskPart {
    /// Whether nothing is looked at but changes.
    pub fn is_only_changes(&self) -> bool {
        !self.joins && self.grown.is_empty() && self.ahead.is_empty()
    }
}

/// The parts of a cycle of a pass that has come to `covered_bytes` on the line of disks of these sizes.
pub fn parts_of_pass(sizes: &[u64], covered_bytes: u64) -> Vec<DiskPart> {
    let mut starts_at = 0;
    let mut parts = Vec::with_capacity(sizes.len());
    for (disk, (&size, covered)) in sizes.iter().zip(covered_by_line(sizes, covered_bytes)).enumerate() {
        let (covered, ahead) = (0..covered, covered..size);
        parts.push(DiskPart { disk, covered, grown: size..size, ahead, starts_at, joins: false });
        starts_at += size;
    }
    parts
}

/// The parts of a cycle of changes, of disks that have these sizes now.
pub fn parts_of_changes(agreed: &[KnownDisk], sizes: &[u64]) -> Vec<DiskPart> {
    let part = |(disk, (known, &size)): (usize, (&KnownDisk, &u64))| {
        let covered = known.joining.unwrap_or(known.size_bytes).min(size);
        let joins = known.joining.is_some();
        let (grown, ahead) = if joins { (size..size, covered..size) } else { (covered..size, size..size) };
        DiskPart { disk, covered: 0..covered, grown, ahead, starts_at: 0, joins }
    };
    agreed.iter().zip(sizes).enumerate().map(part).collect()
}

/// How much of each disk the bitmap of the last cycle speaks for.
pub fn covered(phase: &Phase, disks: &[KnownDisk]) -> Vec<u64> {
    let sizes: Vec<u64> = disks.iter().map(|disk| disk.size_bytes).collect();
    match phase {
        Phase::InitialReplication { progress } | Phase::Resynchronizing { progress } => {
            covered_by_line(&sizes, progress.covered_bytes)
        }
        Phase::ResyncRequired { .. } => vec![0; disks.len()],
        Phase::Replicating | Phase::Failover { .. } | Phase::FailedOver => {
            disks.iter().map(|disk| disk.joining.unwrap_or(disk.size_bytes)).collect()
        }
    }
}

/// How far a pass has come once a disk has left it.
pub fn progress_without(disks: &[KnownDisk], progress: Progress, leaving: usize) -> Progress {
    let sizes: Vec<u64> = disks.iter().map(|disk| disk.size_bytes).collect();
    let gone = covered_by_line(&sizes, progress.covered_bytes).get(leaving).copied().unwrap_or(0);
    let size = sizes.get(leaving).copied().unwrap_or(0);
    Progress {
        covered_bytes: progress.covered_bytes - gone,
        total_bytes: progress.total_bytes.saturating_sub(size),
    }
}

fn covered_by_line(sizes: &[u64], covered_bytes: u64) -> Vec<u64> {
    let mut left = covered_bytes;
    let take = |&size: &u64| {
        let covered = left.min(size);
        left -= covered;
        covered
    };
    sizes.iter().map(take).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(size_bytes: u64, joining: Option<u64>) -> KnownDisk {
        KnownDisk { node: "node".into(), name: "vda".parse().unwrap(), size_bytes, image: None, joining }
    }

    #[test]
    fn a_position_splits_exactly_one_disk() {
        let split = |covered| -> Vec<_> {
            parts_of_pass(&[100, 50, 10], covered)
                .into_iter()
                .map(|part| (part.covered.end, part.ahead.end, part.starts_at))
                .collect()
        };
        assert_eq!(split(0), [(0, 100, 0), (0, 50, 100), (0, 10, 150)]);
        assert_eq!(split(120), [(100, 100, 0), (20, 50, 100), (0, 10, 150)]);
        assert_eq!(split(160), [(100, 100, 0), (50, 50, 100), (10, 10, 150)]);
        assert_eq!(split(1000), [(100, 100, 0), (50, 50, 100), (10, 10, 150)]);
    }

    #[test]
    fn what_has_grown_is_read_whole_and_what_joins_in_stretches() {
        let disks = [known(100, None), known(100, None), known(100, Some(40))];
        let parts = parts_of_changes(&disks, &[100, 130, 100]);
        let shown: Vec<_> =
            parts.into_iter().map(|part| (part.covered, part.grown, part.ahead, part.joins)).collect();
        assert_eq!(shown[0], (0..100, 100..100, 100..100, false));
        assert_eq!(shown[1], (0..100, 100..130, 130..130, false));
        assert_eq!(shown[2], (0..40, 100..100, 40..100, true));
        assert_eq!(covered(&Phase::Replicating, &disks), [100, 100, 40]);
    }

    #[test]
    fn a_disk_that_leaves_takes_its_part_of_the_line_with_it() {
        let disks = [known(100, None), known(50, None), known(10, None)];
        let left = |covered_bytes, leaving| {
            let progress = Progress { covered_bytes, total_bytes: 160 };
            let progress = progress_without(&disks, progress, leaving);
            (progress.covered_bytes, progress.total_bytes)
        };
        assert_eq!((left(120, 0), left(120, 1), left(120, 2)), ((20, 60), (100, 110), (120, 150)));
        assert_eq!((left(160, 1), left(0, 0)), ((110, 110), (0, 60)));
    }
}
