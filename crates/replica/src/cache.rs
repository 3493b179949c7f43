//! The records that were decoded last, within a bound of memory.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use model::LogNumber;

type Key = (LogNumber, u32);

/// A cache of decoded records. A reader that goes through a disk in order comes back to the same record
/// of each log again and again; more logs than fit make a plain least-recently-used order useless all at
/// once, so of two entries picked by chance the older one goes: then what fits is still found.
pub(crate) struct RecordCache {
    max_bytes: usize,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    places: HashMap<Key, usize>,
    entries: Vec<Entry>,
    bytes: usize,
    clock: u64,
    chance: u64,
}

struct Entry {
    key: Key,
    used: u64,
    record: Arc<Vec<u8>>,
}

impl RecordCache {
    pub fn new(max_bytes: usize) -> Self {
        Self { max_bytes, inner: Mutex::new(Inner::default()) }
    }

    pub fn get(&self, key: Key) -> Option<Arc<Vec<u8>>> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let place = *inner.places.get(&key)?;
        inner.clock += 1;
        let now = inner.clock;
        let entry = inner.entries.get_mut(place)?;
        entry.used = now;
        Some(entry.record.clone())
    }

    pub fn put(&self, key: Key, record: Arc<Vec<u8>>) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if record.len() > self.max_bytes || inner.places.contains_key(&key) {
            return;
        }
        while inner.bytes + record.len() > self.max_bytes && !inner.entries.is_empty() {
            inner.evict();
        }
        inner.clock += 1;
        inner.bytes += record.len();
        let (place, used) = (inner.entries.len(), inner.clock);
        inner.places.insert(key, place);
        inner.entries.push(Entry { key, used, record });
    }
}

impl Inner {
    fn evict(&mut self) {
        let (one, other) = (self.pick(), self.pick());
        let place = if self.entries[one].used <= self.entries[other].used { one } else { other };
        let gone = self.entries.swap_remove(place);
        self.bytes -= gone.record.len();
        self.places.remove(&gone.key);
        if let Some(moved) = self.entries.get(place) {
            self.places.insert(moved.key, place);
        }
    }

    /// A place among the entries, of which there is at least one (xorshift: no secret depends on it).
    fn pick(&mut self) -> usize {
        self.chance ^= 0x9e37_79b9_7f4a_7c15 ^ self.clock;
        self.chance ^= self.chance << 13;
        self.chance ^= self.chance >> 7;
        self.chance ^= self.chance << 17;
        usize::try_from(self.chance % self.entries.len() as u64).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_bounded_and_what_is_there_is_right() {
        let cache = RecordCache::new(1000);
        for number in 0..500_u32 {
            let key = (LogNumber(u64::from(number % 7)), number);
            cache.put(key, Arc::new(vec![u8::try_from(number % 251).unwrap(); 90]));
            let inner = cache.inner.lock().unwrap();
            assert!(inner.bytes <= 1000 && inner.entries.len() == inner.places.len());
            drop(inner);
            for older in 0..=number {
                if let Some(record) = cache.get((LogNumber(u64::from(older % 7)), older)) {
                    assert_eq!(record[0], u8::try_from(older % 251).unwrap());
                }
            }
        }
        cache.put((LogNumber(1), 9999), Arc::new(vec![0; 1001]));
        assert!(cache.get((LogNumber(1), 9999)).is_none());
    }
}
