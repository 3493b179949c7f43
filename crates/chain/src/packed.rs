//! One overlaid piece in 24 bytes, and the merge of two runs of them.
//!
//! A run is sorted by offset and disjoint. A chain at its busiest has a million pieces, so their size
//! decides what a view costs in memory, and the merge what it costs in time.

use model::LogNumber;

/// What a surviving piece holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Zeros; nothing is stored.
    Zero,
    /// Bytes of a record's raw payload.
    Record {
        /// The record, by its place in the log's index.
        record: u32,
        /// Where in the raw payload the piece starts, in bytes.
        skip: u32,
    },
}

/// In place of a record's number: the piece is zeros.
const ZEROS: u32 = u32::MAX;

/// A piece of a disk and where its bytes are. Logs go by their slot in the overlay's table.
///
/// Zeros need no skip but can be longer than 4 GiB, records the other way round; so they share a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Packed {
    pub(crate) offset: u64,
    len_low: u32,
    pub(crate) slot: u32,
    record: u32,
    skip_or_len_high: u32,
}

impl Packed {
    /// Bytes of a record. `record` is less than `u32::MAX`: the index check sees to it.
    pub(crate) const fn record(offset: u64, len: u32, slot: u32, record: u32, skip: u32) -> Self {
        Self { offset, len_low: len, slot, record, skip_or_len_high: skip }
    }

    #[expect(clippy::cast_possible_truncation, reason = "the two halves of the length")]
    pub(crate) const fn zeros(offset: u64, len: u64, slot: u32) -> Self {
        Self { offset, len_low: len as u32, slot, record: ZEROS, skip_or_len_high: (len >> 32) as u32 }
    }

    pub(crate) const fn len(&self) -> u64 {
        match self.record {
            ZEROS => (self.skip_or_len_high as u64) << 32 | self.len_low as u64,
            _ => self.len_low as u64,
        }
    }

    pub(crate) const fn end(&self) -> u64 {
        self.offset + self.len()
    }

    pub(crate) const fn content(&self) -> Content {
        match self.record {
            ZEROS => Content::Zero,
            record => Content::Record { record, skip: self.skip_or_len_high },
        }
    }

    /// The part in `start..end`, which is not empty and lies within the piece.
    #[expect(clippy::cast_possible_truncation, reason = "a part of a record is no longer than the record")]
    pub(crate) const fn part(&self, start: u64, end: u64) -> Self {
        match self.content() {
            Content::Zero => Self::zeros(start, end - start, self.slot),
            Content::Record { record, skip } => {
                let skip = skip + (start - self.offset) as u32;
                Self::record(start, (end - start) as u32, self.slot, record, skip)
            }
        }
    }

    /// Whether `next` goes on where this piece ends, on the disk and in its source.
    fn is_continued_by(&self, next: &Self) -> bool {
        let same_source = self.slot == next.slot && self.record == next.record;
        same_source
            && self.end() == next.offset
            && (self.record == ZEROS
                || u64::from(self.skip_or_len_high) + self.len() == u64::from(next.skip_or_len_high))
    }
}

/// Adds `piece` at the end of a run, joined to the last one where the two are really one.
pub(crate) fn push_joined(run: &mut Vec<Packed>, piece: Packed) {
    match run.last_mut() {
        Some(last) if last.is_continued_by(&piece) => *last = grown(last, piece.end()),
        _ => run.push(piece),
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "a record's pieces together are no longer than the record"
)]
fn grown(piece: &Packed, end: u64) -> Packed {
    match piece.content() {
        Content::Zero => Packed::zeros(piece.offset, end - piece.offset, piece.slot),
        Content::Record { .. } => Packed { len_low: (end - piece.offset) as u32, ..*piece },
    }
}

/// Two runs as one. Where both have a byte the newer log's stays, and of the same log `right`'s.
pub(crate) fn merge(left: &[Packed], right: &[Packed], numbers: &[LogNumber]) -> Vec<Packed> {
    let mut merged = Vec::with_capacity(left.len() + right.len());
    let (mut left, mut right) = (Cursor::new(left), Cursor::new(right));
    while let (Some(l), Some(r)) = (left.head, right.head) {
        if l.end() <= r.offset {
            push_joined(&mut merged, l);
            left.advance();
        } else if r.end() <= l.offset {
            push_joined(&mut merged, r);
            right.advance();
        } else if numbers[l.slot as usize] > numbers[r.slot as usize] {
            right.give_way(&l, &mut merged);
        } else {
            left.give_way(&r, &mut merged);
        }
    }
    left.drain_into(&mut merged);
    right.drain_into(&mut merged);
    merged
}

/// A run while it is merged: what is left of its first piece, and the rest.
struct Cursor<'a> {
    head: Option<Packed>,
    rest: std::slice::Iter<'a, Packed>,
}

impl<'a> Cursor<'a> {
    fn new(run: &'a [Packed]) -> Self {
        let mut rest = run.iter();
        Self { head: rest.next().copied(), rest }
    }

    fn advance(&mut self) {
        self.head = self.rest.next().copied();
    }

    /// The head overlaps a piece that outranks it: what lies before that piece stays, what lies under it
    /// is gone, what lies after it is looked at next. The pieces that follow may outrank it in turn.
    fn give_way(&mut self, to: &Packed, merged: &mut Vec<Packed>) {
        let Some(head) = self.head else { return };
        if head.offset < to.offset {
            push_joined(merged, head.part(head.offset, to.offset));
        }
        if head.end() > to.end() {
            self.head = Some(head.part(to.end(), head.end()));
        } else {
            self.advance();
        }
    }

    fn drain_into(mut self, merged: &mut Vec<Packed>) {
        if let Some(head) = self.head.take() {
            push_joined(merged, head);
        }
        for piece in self.rest {
            push_joined(merged, *piece);
        }
    }
}

/// Cuts a run off at `size_bytes`.
pub(crate) fn clip(run: &mut Vec<Packed>, size_bytes: u64) {
    run.truncate(run.partition_point(|piece| piece.offset < size_bytes));
    if let Some(last) = run.last_mut()
        && last.end() > size_bytes
    {
        *last = last.part(last.offset, size_bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NUMBERS: [LogNumber; 2] = [LogNumber(1), LogNumber(2)];

    #[test]
    fn a_piece_takes_24_bytes_and_zeros_can_be_longer_than_4_gib() {
        assert_eq!(size_of::<Packed>(), 24);
        let tail = Packed::zeros(5, 1 << 40, 0);
        assert_eq!(tail.end(), 5 + (1 << 40));
        assert_eq!(tail.part(10, 1 << 39).end(), 1 << 39);
    }

    #[test]
    fn a_newer_piece_splits_an_older_one_whichever_side_it_is_on() {
        let old = [Packed::record(0, 100, 0, 7, 1000)];
        let new = [Packed::zeros(40, 20, 1)];
        let expected = [Packed::record(0, 40, 0, 7, 1000), new[0], Packed::record(60, 40, 0, 7, 1060)];
        assert_eq!(merge(&old, &new, &NUMBERS), expected);
        assert_eq!(merge(&new, &old, &NUMBERS), expected);
    }

    #[test]
    fn neighbours_of_one_source_become_one_piece() {
        let left =
            [Packed::record(0, 10, 0, 3, 0), Packed::record(20, 10, 0, 3, 20), Packed::zeros(50, 5, 0)];
        let right =
            [Packed::record(10, 10, 0, 3, 10), Packed::record(30, 10, 0, 3, 90), Packed::zeros(55, 5, 0)];
        let merged = merge(&left, &right, &NUMBERS);
        let expected =
            [Packed::record(0, 30, 0, 3, 0), Packed::record(30, 10, 0, 3, 90), Packed::zeros(50, 10, 0)];
        assert_eq!(merged, expected);
    }
}
