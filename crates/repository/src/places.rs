//! Where blobs are, by their hashes, in little memory: nearly all in one sorted list, 48 bytes each and no room
//! between them, the newest in a map beside it. A hash map alone would take up to twice as much, and as much again
//! while it grows.

use std::collections::HashMap;

use crate::id::{ById, Id};

/// The newest are sorted in once there are more than this, and than an eighth of the others.
const YOUNG: usize = 1 << 16;

/// Where a blob is in the packs of an index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The pack's place in the index's list.
    pub(crate) pack: u32,
    pub(crate) offset: u32,
    pub(crate) len: u32,
    pub(crate) raw_len: u32,
}

/// The places of blobs.
#[derive(Default)]
pub(crate) struct Places {
    sorted: Vec<(Id, Entry)>,
    young: HashMap<Id, Entry, ById>,
}

impl Places {
    /// Where a blob is.
    pub(crate) fn get(&self, id: &Id) -> Option<Entry> {
        self.young.get(id).copied().or_else(|| self.find(id).map(|place| self.sorted[place].1))
    }

    /// Adds a blob; of two places the one in a pack that is `present` is kept, and else the first.
    pub(crate) fn add(&mut self, id: Id, entry: Entry, present: impl Fn(&Entry) -> bool) {
        if self.get(&id).is_none_or(|known| !present(&known)) {
            self.young.insert(id, entry);
        }
    }

    /// Whether there are so many new ones that they should be sorted in.
    pub(crate) fn is_unsettled(&self) -> bool {
        self.young.len() > YOUNG.max(self.sorted.len() / 8)
    }

    /// Sorts the new ones in.
    pub(crate) fn settle(&mut self, present: impl Fn(&Entry) -> bool) {
        if self.young.is_empty() {
            return;
        }
        let young = std::mem::take(&mut self.young);
        self.sorted.reserve_exact(young.len());
        self.sorted.extend(young);
        self.sorted.sort_unstable_by(|(a, at), (b, bt)| (a, !present(at)).cmp(&(b, !present(bt))));
        self.sorted.dedup_by_key(|(id, _)| *id);
    }

    /// About how much memory it takes up, in bytes.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.sorted.capacity() * size_of::<(Id, Entry)>()
            + of_map(self.young.capacity(), size_of::<(Id, Entry)>())
    }

    /// The place in the sorted list. Hashes are spread evenly: a look at about the right place is nearly enough.
    fn find(&self, id: &Id) -> Option<usize> {
        let len = self.sorted.len();
        let begins = u64::from_be_bytes(*id.0.first_chunk::<8>()?);
        let guess = usize::try_from((u128::from(begins) * len as u128) >> 64).ok()?;
        let near = 4 * len.isqrt() + 8;
        let (mut from, mut to) = (guess.saturating_sub(near), (guess + near).min(len));
        if from > 0 && self.sorted[from].0 > *id {
            from = 0;
        }
        if to < len && self.sorted[to].0 < *id {
            to = len;
        }
        // The one that it ended before may be it.
        let to = (to + 1).min(len);
        self.sorted[from..to].binary_search_by(|(known, _)| known.cmp(id)).ok().map(|place| from + place)
    }
}

/// A hash map's memory: a byte of its own for each place, and an eighth of them free.
pub(crate) fn of_map(capacity: usize, entry: usize) -> usize {
    capacity * 8 / 7 * (entry + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(pack: u32) -> Entry {
        Entry { pack, offset: 1, len: 2, raw_len: 3 }
    }

    #[test]
    fn what_was_added_is_found_and_nothing_else() {
        let id = |number: u32| Id::of(&number.to_le_bytes());
        let mut places = Places::default();
        for count in [0, 1, 2, 3, 100, 5000] {
            for number in 0..count {
                places.add(id(number), entry(number), |_| true);
                assert_eq!(places.get(&id(number)), Some(entry(number)));
            }
            places.settle(|_| true);
            assert_eq!(places.sorted.len() as u32, count);
            for number in 0..2 * count + 2 {
                assert_eq!(places.get(&id(number)), (number < count).then(|| entry(number)), "{number}");
            }
        }
    }

    #[test]
    fn hashes_that_are_not_spread_evenly_are_found_too() {
        let mut places = Places::default();
        let id = |number: u16| {
            let mut id = [0xff; 32];
            id[30..].copy_from_slice(&number.to_be_bytes());
            Id(id)
        };
        for number in (0..2000).step_by(2) {
            places.add(id(number), entry(number.into()), |_| true);
        }
        places.add(Id([0; 32]), entry(7), |_| true);
        places.settle(|_| true);
        assert_eq!(places.get(&Id([0; 32])), Some(entry(7)));
        for number in 0..2001 {
            let expected = (number % 2 == 0 && number < 2000).then(|| entry(number.into()));
            assert_eq!(places.get(&id(number)), expected);
        }
    }

    #[test]
    fn a_place_that_is_there_outranks_one_that_is_lost() {
        let (id, is_there) = (Id::of(b"x"), |entry: &Entry| entry.pack == 2);
        for order in [[1, 2, 3], [2, 1, 3], [3, 1, 2]] {
            for settled in [false, true] {
                let mut places = Places::default();
                for pack in order {
                    places.add(id, entry(pack), is_there);
                    if settled {
                        places.settle(is_there);
                    }
                }
                places.settle(is_there);
                assert_eq!((places.get(&id), places.sorted.len()), (Some(entry(2)), 1));
            }
        }
    }
}
