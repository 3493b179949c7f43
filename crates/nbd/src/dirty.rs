//! What a cycle has to read: dirty extents of an export, and which of them are zeros.

use std::ops::Range;

use crate::client::Client;
use crate::codec::StatusExtent;
use crate::error::Result;

/// The metadata context that tells data from zeros.
pub const BASE_ALLOCATION: &str = "base:allocation";

/// A run of bytes that changed (or, without a bitmap, that holds data).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirtyExtent {
    /// Where it starts on the disk, in bytes.
    pub offset: u64,
    /// Its length in bytes; never 0.
    pub len: u64,
    /// Whether it reads as zeros, so that nothing need be read.
    pub zero: bool,
}

impl DirtyExtent {
    /// The first byte after it.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.offset + self.len
    }
}

/// The dirty extents of a range, sorted, neighbours joined; see [`DirtyScan`]. The answer is held in memory
/// (at 4 KiB granularity at most 3 MB per GiB of disk): ask for a bounded range.
pub async fn dirty_extents(
    source: &impl AsRef<Client>,
    bitmap_context: Option<&str>,
    range: Range<u64>,
) -> Result<Vec<DirtyExtent>> {
    let mut scan = DirtyScan::new(source.as_ref().clone(), bitmap_context, range)?;
    let mut extents = Vec::new();
    while let Some(batch) = scan.next().await? {
        extents.extend(batch);
    }
    Ok(extents)
}

/// Goes over a range of an export in batches of bounded size, one block status request each.
///
/// With a bitmap (`qemu:dirty-bitmap:NAME`) it gives what is dirty in it; `base:allocation` tells which of
/// that reads as zeros. Without a bitmap (an initial replication) it gives what holds data and passes over
/// what reads as zeros. A hole that is not promised to read as zeros counts as data: it has to be read.
#[derive(Debug)]
pub struct DirtyScan {
    client: Client,
    bitmap: Option<usize>,
    allocation: Option<usize>,
    at: u64,
    end: u64,
    /// The last extent so far: the next batch may continue it.
    open: Option<DirtyExtent>,
}

impl DirtyScan {
    /// A scan of `range`, which is cut at the end of the export. Without `base:allocation` on the server,
    /// everything counts as data.
    pub fn new(client: Client, bitmap_context: Option<&str>, range: Range<u64>) -> Result<Self> {
        let bitmap = bitmap_context.map(|name| client.context(name)).transpose()?;
        let allocation = client.context(BASE_ALLOCATION).ok();
        let end = range.end.min(client.size_bytes());
        Ok(Self { client, bitmap, allocation, at: range.start, end, open: None })
    }

    /// The next batch (it may be empty), or `None` at the end.
    pub async fn next(&mut self) -> Result<Option<Vec<DirtyExtent>>> {
        if self.at >= self.end {
            return Ok(self.open.take().map(|last| vec![last]));
        }
        let mut batch: Vec<DirtyExtent> = self.open.take().into_iter().collect();
        if self.bitmap.is_none() && self.allocation.is_none() {
            push_joined(&mut batch, DirtyExtent { offset: self.at, len: self.end - self.at, zero: false });
            self.at = self.end;
        } else {
            let (covered, lists) = self.client.block_status_some(self.at, self.end - self.at).await?;
            let list = |place: Option<usize>| place.map(|place| lists[place].as_slice());
            for extent in overlay(self.at, covered, list(self.bitmap), list(self.allocation)) {
                push_joined(&mut batch, extent);
            }
            self.at += covered;
        }
        self.open = batch.pop();
        Ok(Some(batch))
    }
}

/// Lays the two contexts' extents, both of `len` bytes from `offset`, over each other.
fn overlay<'a>(
    offset: u64,
    len: u64,
    bitmap: Option<&'a [StatusExtent]>,
    allocation: Option<&'a [StatusExtent]>,
) -> impl Iterator<Item = DirtyExtent> + 'a {
    let mut bitmap_runs = Runs::new(bitmap, len);
    let mut allocation_runs = Runs::new(allocation, len);
    let mut at = offset;
    std::iter::from_fn(move || {
        loop {
            let (dirty, allocated) = (bitmap_runs.head()?, allocation_runs.head()?);
            let run = dirty.len.min(allocated.len);
            bitmap_runs.advance(run);
            allocation_runs.advance(run);
            let zero = allocated.has(StatusExtent::ZERO);
            let wanted = if bitmap.is_some() { dirty.has(StatusExtent::DIRTY) } else { !zero };
            let extent = DirtyExtent { offset: at, len: run, zero };
            at += run;
            if wanted {
                return Some(extent);
            }
        }
    })
}

/// Extents being used up from the front.
struct Runs<'a> {
    head: Option<StatusExtent>,
    rest: std::slice::Iter<'a, StatusExtent>,
}

impl<'a> Runs<'a> {
    /// A context that is not there says nothing (0) of the whole length.
    fn new(extents: Option<&'a [StatusExtent]>, len: u64) -> Self {
        let mut rest = extents.unwrap_or_default().iter();
        let head = match extents {
            Some(_) => rest.next().copied(),
            None => Some(StatusExtent { len, flags: 0 }).filter(|_| len > 0),
        };
        Self { head, rest }
    }

    const fn head(&self) -> Option<StatusExtent> {
        self.head
    }

    fn advance(&mut self, len: u64) {
        if let Some(head) = &mut self.head {
            head.len -= len;
            if head.len == 0 {
                self.head = self.rest.next().copied();
            }
        }
    }
}

fn push_joined(extents: &mut Vec<DirtyExtent>, extent: DirtyExtent) {
    match extents.last_mut() {
        Some(last) if last.end() == extent.offset && last.zero == extent.zero => last.len += extent.len,
        _ => extents.push(extent),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Extents of random lengths and flags, `total` bytes together.
    fn extents(total: u64) -> impl Strategy<Value = Vec<StatusExtent>> {
        prop::collection::vec((1..20u64, 0..4u32), 1..30).prop_map(move |runs| {
            let mut left = total;
            let mut list = Vec::new();
            for (len, flags) in runs.into_iter().cycle() {
                if left == 0 {
                    break;
                }
                list.push(StatusExtent { len: len.min(left), flags });
                left -= len.min(left);
            }
            list
        })
    }

    fn bytes(list: &[StatusExtent]) -> Vec<u32> {
        list.iter().flat_map(|extent| vec![extent.flags; extent.len as usize]).collect()
    }

    proptest! {
        #[test]
        fn the_overlay_agrees_with_bytes(bitmap in prop::option::of(extents(200)), allocation in prop::option::of(extents(200))) {
            let mut found = vec![None; 200];
            for extent in overlay(1000, 200, bitmap.as_deref(), allocation.as_deref()) {
                for at in extent.offset..extent.end() {
                    prop_assert!(found[at as usize - 1000].replace(extent.zero).is_none());
                }
            }
            let allocation = allocation.map_or(vec![0; 200], |list| bytes(&list));
            let dirty = bitmap.map(|list| bytes(&list));
            for (at, found) in found.into_iter().enumerate() {
                let zero = allocation[at] & StatusExtent::ZERO != 0;
                let wanted = dirty.as_ref().map_or(!zero, |dirty| dirty[at] & StatusExtent::DIRTY != 0);
                prop_assert_eq!(found, wanted.then_some(zero));
            }
        }
    }
}
