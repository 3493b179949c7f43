//! The disks of a VM as one line of bytes, so that "how far a pass has come" is one number.

use std::ops::Range;

/// What one cycle looks at on one disk: first the part already covered (its changes), then the part
/// that a pass reads for the first time. In a cycle of changes the second is empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskPart {
    /// The disk, by its place.
    pub disk: usize,
    /// Where its changes are asked for.
    pub covered: Range<u64>,
    /// What has never been read in this pass.
    pub ahead: Range<u64>,
    /// Where the disk starts on the line.
    pub starts_at: u64,
}

/// Splits disks of these sizes at `covered_bytes` of the line.
pub fn parts(sizes: &[u64], covered_bytes: u64) -> Vec<DiskPart> {
    let mut starts_at = 0;
    let mut parts = Vec::with_capacity(sizes.len());
    for (disk, &size) in sizes.iter().enumerate() {
        let covered = covered_bytes.saturating_sub(starts_at).min(size);
        parts.push(DiskPart { disk, covered: 0..covered, ahead: covered..size, starts_at });
        starts_at += size;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_splits_exactly_one_disk() {
        let split = |covered| -> Vec<_> {
            parts(&[100, 50, 10], covered)
                .into_iter()
                .map(|part| (part.covered.end, part.ahead.end))
                .collect()
        };
        assert_eq!(split(0), [(0, 100), (0, 50), (0, 10)]);
        assert_eq!(split(120), [(100, 100), (20, 50), (0, 10)]);
        assert_eq!(split(160), [(100, 100), (50, 50), (10, 10)]);
        assert_eq!(split(1000), [(100, 100), (50, 50), (10, 10)]);
    }
}
