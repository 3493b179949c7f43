//! Which reads to make for a list of dirty extents, pure.

use crate::dirty::DirtyExtent;

/// One read, and which of its bytes are wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadRequest {
    /// Where on the disk, in bytes.
    pub offset: u64,
    /// How many bytes.
    pub len: u64,
    /// The bytes wanted, as (bytes to skip from the start of the read, length): sorted, disjoint, the
    /// first at the start and the last at the end of the read.
    pub wanted: Vec<(u64, u64)>,
}

/// The reads for the data among `extents` (sorted and disjoint; those that are zeros need no read).
/// Extents with at most `merge_gap_bytes` between them are read in one request, gap and all, because a
/// request costs as much as some bytes more; no request is longer than `request_bytes_max`.
///
/// # Panics
/// If `request_bytes_max` is 0.
#[must_use]
pub fn read_plan(extents: &[DirtyExtent], merge_gap_bytes: u64, request_bytes_max: u64) -> Vec<ReadRequest> {
    assert!(request_bytes_max > 0, "a request of no bytes reads nothing");
    let mut plan: Vec<ReadRequest> = Vec::new();
    for extent in extents.iter().filter(|extent| !extent.zero) {
        let mut at = extent.offset;
        while at < extent.end() {
            let request = match plan.last_mut() {
                // A gap is only worth reading if something after it still fits.
                Some(last)
                    if at - (last.offset + last.len) <= merge_gap_bytes
                        && at - last.offset < request_bytes_max =>
                {
                    last
                }
                _ => plan.push_mut(ReadRequest { offset: at, len: 0, wanted: Vec::new() }),
            };
            let skip = at - request.offset;
            let len = (extent.end() - at).min(request_bytes_max - skip);
            request.len = skip + len;
            match request.wanted.last_mut() {
                Some(last) if last.0 + last.1 == skip => last.1 += len,
                _ => request.wanted.push((skip, len)),
            }
            at += len;
        }
    }
    plan
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn data(offset: u64, len: u64) -> DirtyExtent {
        DirtyExtent { offset, len, zero: false }
    }

    #[test]
    fn near_extents_share_a_read_and_far_ones_do_not() {
        let plan = read_plan(&[data(0, 4), data(8, 4), data(100, 4)], 4, 64);
        assert_eq!(
            plan,
            [
                ReadRequest { offset: 0, len: 12, wanted: vec![(0, 4), (8, 4)] },
                ReadRequest { offset: 100, len: 4, wanted: vec![(0, 4)] },
            ]
        );
    }

    #[test]
    fn a_long_extent_is_cut() {
        let plan = read_plan(&[data(10, 20)], 4, 8);
        assert_eq!(
            plan.iter().map(|read| (read.offset, read.len)).collect::<Vec<_>>(),
            [(10, 8), (18, 8), (26, 4)]
        );
    }

    proptest! {
        #[test]
        fn every_byte_wanted_is_read_once_and_zeros_never(
            runs in prop::collection::vec((0..40u64, 1..50u64, any::<bool>()), 0..40),
            gap in 0..30u64,
            max in 1..64u64,
        ) {
            let mut extents = Vec::new();
            let mut at = 0;
            for (skip, len, zero) in runs {
                extents.push(DirtyExtent { offset: at + skip, len, zero });
                at += skip + len;
            }
            let mut times = vec![0; at as usize];
            let mut end = 0;
            for request in read_plan(&extents, gap, max) {
                prop_assert!(request.len <= max && request.offset >= end);
                end = request.offset + request.len;
                prop_assert_eq!(request.wanted[0].0, 0);
                let last = request.wanted.last().unwrap();
                prop_assert_eq!(last.0 + last.1, request.len);
                for pair in request.wanted.windows(2) {
                    let between = pair[1].0.checked_sub(pair[0].0 + pair[0].1).unwrap();
                    prop_assert!(between > 0 && between <= gap);
                }
                for (skip, len) in request.wanted {
                    (request.offset + skip..request.offset + skip + len).for_each(|at| times[at as usize] += 1);
                }
            }
            for extent in extents {
                prop_assert!(times[extent.offset as usize..extent.end() as usize].iter().all(|&n| n == i32::from(!extent.zero)));
            }
            prop_assert!(times.iter().all(|&n| n <= 1));
        }
    }
}
