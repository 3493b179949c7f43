//! One request's reply while it comes in, pure: what may come, and what has.
//!
//! A structured reply is a number of chunks in any order. What makes it whole: the chunks of a read cover
//! every byte exactly once; a block status has one chunk per metadata context.

use std::sync::Arc;

use crate::codec::{DecodeError, ErrorChunk, HoleChunk, StatusChunk, StatusExtent};

/// The most pieces that a read may lie in while chunks are missing between them: more than any server that
/// means well sends out of order.
const PIECES_MAX: usize = 1024;

#[derive(Debug)]
pub(crate) struct Assembly {
    offset: u64,
    expect: Expect,
    failed: Option<ErrorChunk>,
}

#[derive(Debug)]
enum Expect {
    Done,
    Data { buffer: Vec<u8>, pieces: Pieces },
    Status { len: u64, contexts: Arc<[u32]>, lists: Vec<Option<Vec<StatusExtent>>> },
}

/// A whole reply.
#[derive(Debug)]
pub(crate) enum Outcome {
    Done,
    Data(Vec<u8>),
    /// One list per context, in the order of the contexts; never longer than asked, perhaps shorter.
    Status(Vec<Vec<StatusExtent>>),
    Failed(ErrorChunk),
}

impl Assembly {
    /// For a request that is answered by success or failure.
    pub(crate) const fn done() -> Self {
        Self { offset: 0, expect: Expect::Done, failed: None }
    }

    /// For a read. Chunks of zeros need no work: the buffer starts as zeros.
    pub(crate) fn read(offset: u64, len: u32) -> Self {
        let expect = Expect::Data { buffer: vec![0; len as usize], pieces: Pieces::default() };
        Self { offset, expect, failed: None }
    }

    /// For a block status.
    pub(crate) fn status(offset: u64, len: u32, contexts: Arc<[u32]>) -> Self {
        let lists = vec![None; contexts.len()];
        Self { offset, expect: Expect::Status { len: len.into(), contexts, lists }, failed: None }
    }

    /// Where all of a read's data go, if it is a read (a simple reply's data have no offset).
    pub(crate) fn whole_read(&mut self) -> Option<&mut [u8]> {
        match &mut self.expect {
            Expect::Data { buffer, pieces } => {
                pieces.all(buffer.len());
                Some(buffer)
            }
            _ => None,
        }
    }

    /// Where the data of a chunk go.
    pub(crate) fn data(&mut self, offset: u64, len: usize) -> Result<&mut [u8], DecodeError> {
        let start = self.claim(offset, len)?;
        match &mut self.expect {
            Expect::Data { buffer, .. } => Ok(&mut buffer[start..start + len]),
            _ => unreachable!("claim succeeds for reads alone"),
        }
    }

    pub(crate) fn hole(&mut self, hole: HoleChunk) -> Result<(), DecodeError> {
        self.claim(hole.offset, hole.len as usize).map(drop)
    }

    /// Marks bytes as having come; gives their place in the buffer.
    fn claim(&mut self, offset: u64, len: usize) -> Result<usize, DecodeError> {
        let Expect::Data { buffer, pieces } = &mut self.expect else {
            return Err(DecodeError::Invalid("data came for a request that is no read"));
        };
        let start = offset.checked_sub(self.offset).and_then(|start| usize::try_from(start).ok());
        match start {
            Some(start) if len > 0 && start.checked_add(len).is_some_and(|end| end <= buffer.len()) => {
                pieces.add(start, len)?;
                Ok(start)
            }
            _ => Err(DecodeError::Invalid("a chunk of a read lies outside of what was asked for")),
        }
    }

    pub(crate) fn extents(&mut self, chunk: StatusChunk) -> Result<(), DecodeError> {
        let Expect::Status { len, contexts, lists } = &mut self.expect else {
            return Err(DecodeError::Invalid("extents came for a request that is no block status"));
        };
        let Some(place) = contexts.iter().position(|id| *id == chunk.context) else {
            return Err(DecodeError::Invalid("extents came for a metadata context that was not chosen"));
        };
        match &mut lists[place] {
            Some(_) => Err(DecodeError::Invalid("extents of a metadata context came twice")),
            none => {
                let mut extents = chunk.extents;
                clip(&mut extents, *len);
                *none = Some(extents);
                Ok(())
            }
        }
    }

    /// Notes a failure; the first one counts. Chunks may go on coming.
    pub(crate) fn fail(&mut self, error: ErrorChunk) {
        self.failed.get_or_insert(error);
    }

    /// The server says that this was all.
    pub(crate) fn finish(self) -> Result<Outcome, DecodeError> {
        if let Some(error) = self.failed {
            return Ok(Outcome::Failed(error));
        }
        match self.expect {
            Expect::Done => Ok(Outcome::Done),
            Expect::Data { buffer, pieces } if pieces.is_all(buffer.len()) => Ok(Outcome::Data(buffer)),
            Expect::Data { .. } => Err(DecodeError::Invalid("a read was answered in part")),
            Expect::Status { lists, .. } => {
                lists.into_iter().collect::<Option<_>>().map(Outcome::Status).ok_or(DecodeError::Invalid(
                    "a block status was answered without one of its metadata contexts",
                ))
            }
        }
    }
}

/// Cuts extents off at `len` bytes: the last one may reach past what was asked.
pub(super) fn clip(extents: &mut Vec<StatusExtent>, len: u64) {
    let mut left = len;
    let mut kept = 0;
    for extent in extents.iter_mut() {
        if left == 0 {
            break;
        }
        extent.len = extent.len.min(left);
        left -= extent.len;
        kept += 1;
    }
    extents.truncate(kept);
}

/// Which bytes of a buffer have come: sorted, disjoint, neighbours joined.
#[derive(Debug, Default)]
struct Pieces(Vec<(usize, usize)>);

impl Pieces {
    fn all(&mut self, len: usize) {
        self.0 = vec![(0, len)];
    }

    fn is_all(&self, len: usize) -> bool {
        len == 0 || self.0 == [(0, len)]
    }

    fn add(&mut self, start: usize, len: usize) -> Result<(), DecodeError> {
        let end = start + len;
        let next = self.0.partition_point(|piece| piece.0 < start);
        let overlaps =
            next > 0 && self.0[next - 1].1 > start || self.0.get(next).is_some_and(|piece| piece.0 < end);
        if overlaps {
            return Err(DecodeError::Invalid("two chunks of a read overlap"));
        }
        let joins_last = next > 0 && self.0[next - 1].1 == start;
        let joins_next = self.0.get(next).is_some_and(|piece| piece.0 == end);
        match (joins_last, joins_next) {
            (true, true) => self.0[next - 1].1 = self.0.remove(next).1,
            (true, false) => self.0[next - 1].1 = end,
            (false, true) => self.0[next].0 = start,
            (false, false) if self.0.len() == PIECES_MAX => {
                return Err(DecodeError::Invalid("a read comes in too many pieces"));
            }
            (false, false) => self.0.insert(next, (start, end)),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OFFSET: u64 = 1000;

    #[test]
    fn chunks_out_of_order_make_a_whole_read() {
        let mut read = Assembly::read(OFFSET, 30);
        read.data(1020, 10).unwrap().fill(3);
        read.data(1000, 10).unwrap().fill(1);
        read.hole(HoleChunk { offset: 1010, len: 10 }).unwrap();
        let Ok(Outcome::Data(bytes)) = read.finish() else { panic!("a whole read") };
        assert_eq!(bytes, [[1; 10], [0; 10], [3; 10]].concat());
    }

    #[test]
    fn a_read_answered_in_part_is_refused() {
        let mut read = Assembly::read(OFFSET, 30);
        read.data(1000, 29).unwrap();
        assert!(read.finish().is_err());
    }

    #[test]
    fn an_error_counts_even_when_data_came() {
        let mut read = Assembly::read(OFFSET, 30);
        read.data(1000, 30).unwrap();
        read.fail(ErrorChunk { errno: crate::codec::Errno::EIO, message: String::new(), offset: None });
        assert!(matches!(read.finish(), Ok(Outcome::Failed(_))));
    }

    #[test]
    fn extents_are_cut_at_what_was_asked() {
        let mut status = Assembly::status(OFFSET, 30, [7, 8].into());
        let extents =
            |lens: &[u64]| lens.iter().map(|&len| StatusExtent { len, flags: 0 }).collect::<Vec<_>>();
        status.extents(StatusChunk { context: 8, extents: extents(&[20, 500, 1]) }).unwrap();
        assert!(status.extents(StatusChunk { context: 8, extents: extents(&[1]) }).is_err());
        assert!(status.extents(StatusChunk { context: 9, extents: extents(&[1]) }).is_err());
        status.extents(StatusChunk { context: 7, extents: extents(&[5]) }).unwrap();
        let Ok(Outcome::Status(lists)) = status.finish() else { panic!("both contexts came") };
        assert_eq!(lists, [extents(&[5]), extents(&[20, 10])]);
    }

    #[test]
    fn data_for_what_is_no_read_is_refused() {
        assert!(Assembly::done().data(0, 1).is_err());
        assert!(Assembly::status(0, 1, [1].into()).hole(HoleChunk { offset: 0, len: 1 }).is_err());
        assert!(Assembly::read(0, 1).extents(StatusChunk { context: 1, extents: vec![] }).is_err());
    }

    proptest! {
        /// Whatever chunks come, the pieces agree with a naive list of bytes.
        #[test]
        fn pieces_agree_with_a_list_of_bytes(chunks in prop::collection::vec((0u64..80, 0u32..40), 0..40)) {
            let mut read = Assembly::read(10, 50);
            let mut come = [false; 50];
            for (offset, len) in chunks {
                let range = offset.wrapping_sub(10) as usize..(offset + u64::from(len)).wrapping_sub(10) as usize;
                let fits = len > 0 && offset >= 10 && range.end <= 50 && !come[range.clone()].contains(&true);
                prop_assert_eq!(read.hole(HoleChunk { offset, len }).is_ok(), fits);
                if fits {
                    come[range].fill(true);
                }
            }
            prop_assert_eq!(read.finish().is_ok(), !come.contains(&false));
        }
    }
}
