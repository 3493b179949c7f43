//! qcow2 images, written in one pass.
//!
//! The backup's list says where there is data, so where everything goes is known before the first byte is
//! written: header, level-1 table, reference counts, level-2 tables, and then the clusters with data one after
//! the other. They can then be written by several threads, as into a raw image.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::list::{Stretch, index_of};

const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// Entries of a level-2 table, which is one cluster of 8-byte entries.
const L2_ENTRIES: u64 = CLUSTER / 8;
/// Clusters whose 16-bit counts are in one block.
const REFCOUNTS: u64 = CLUSTER / 2;
/// The cluster has no second user, so it may be written in place.
const COPIED: u64 = 1 << 63;
const HEADER_BYTES: u32 = 104;

/// Where everything is in the file.
pub(crate) struct Layout {
    size_bytes: u64,
    /// The runs of clusters with data, in order.
    runs: Vec<Run>,
    l1_entries: u64,
    /// The level-1 entries that have a level-2 table, in order.
    l2_tables: Vec<u64>,
    refcount_table: u64,
    refcount_table_clusters: u64,
    refcount_blocks: u64,
    first_l2: u64,
    first_data: u64,
    clusters: u64,
}

/// Neighbouring clusters of the disk that are neighbours in the file too.
struct Run {
    clusters: Range<u64>,
    /// How many clusters with data are before it.
    rank: u64,
}

impl Layout {
    /// The layout for a disk of which these stretches have data.
    pub(crate) fn new(size_bytes: u64, stretches: &[Stretch]) -> Self {
        // qcow2 counts in sectors; the last one is filled up with zeros.
        let size_bytes = size_bytes.next_multiple_of(512);
        let l1_entries = size_bytes.div_ceil(CLUSTER * L2_ENTRIES);
        let runs = runs_of(stretches);
        let data_clusters = runs.last().map_or(0, |last| last.rank + last.clusters.end - last.clusters.start);
        let mut l2_tables: Vec<u64> = runs
            .iter()
            .flat_map(|run| run.clusters.start / L2_ENTRIES..=(run.clusters.end - 1) / L2_ENTRIES)
            .collect();
        l2_tables.dedup();
        let l1_clusters = (l1_entries * 8).div_ceil(CLUSTER);
        let l2_clusters = l2_tables.len() as u64;
        let fixed = 1 + l1_clusters + l2_clusters + data_clusters;
        let (refcount_table_clusters, refcount_blocks) = refcounts_for(fixed);
        let refcount_table = 1 + l1_clusters;
        let first_l2 = refcount_table + refcount_table_clusters + refcount_blocks;
        Self {
            size_bytes,
            runs,
            l1_entries,
            l2_tables,
            refcount_table,
            refcount_table_clusters,
            refcount_blocks,
            first_l2,
            first_data: first_l2 + l2_clusters,
            clusters: fixed + refcount_table_clusters + refcount_blocks,
        }
    }

    /// Where a cluster with data is in the file, in clusters; none if it has none.
    fn cluster_of(&self, cluster: u64) -> Option<u64> {
        let run = self.runs.partition_point(|run| run.clusters.end <= cluster);
        let run = self.runs.get(run).filter(|run| run.clusters.contains(&cluster))?;
        Some(self.first_data + run.rank + cluster - run.clusters.start)
    }

    /// Where bytes of a stretch with data go: the whole stretch, one after the other.
    pub(crate) fn place_of(&self, offset: u64) -> u64 {
        let cluster = self.cluster_of(offset / CLUSTER).expect("every stretch has its clusters");
        cluster * CLUSTER + offset % CLUSTER
    }

    /// Writes everything but the data, and gives the file its length.
    pub(crate) fn write_metadata(&self, file: &File) -> io::Result<()> {
        file.set_len(self.clusters * CLUSTER)?;
        file.write_all_at(&self.header(), 0)?;
        let mut l1 = vec![0; usize::try_from(self.l1_entries).map_err(io::Error::other)?];
        for (entry, place) in self.l2_tables.iter().zip(self.first_l2..) {
            l1[index_of(*entry)] = (place * CLUSTER) | COPIED;
            file.write_all_at(&self.l2_table(*entry), place * CLUSTER)?;
        }
        file.write_all_at(&big_endian(l1.into_iter()), CLUSTER)?;
        self.write_refcounts(file)
    }

    fn header(&self) -> Vec<u8> {
        let mut header = Vec::with_capacity(112);
        let mut word = |word: u32| header.extend_from_slice(&word.to_be_bytes());
        let long = |word: &mut dyn FnMut(u32), long: u64| {
            #[expect(clippy::cast_possible_truncation, reason = "the two halves")]
            [(long >> 32) as u32, long as u32].into_iter().for_each(word);
        };
        word(0x5146_49fb);
        word(3);
        long(&mut word, 0); // no backing file
        word(0);
        word(CLUSTER_BITS);
        long(&mut word, self.size_bytes);
        word(0); // not encrypted
        word(u32::try_from(self.l1_entries).unwrap_or(u32::MAX));
        long(&mut word, CLUSTER);
        long(&mut word, self.refcount_table * CLUSTER);
        word(u32::try_from(self.refcount_table_clusters).unwrap_or(u32::MAX));
        word(0); // no internal snapshots
        long(&mut word, 0);
        long(&mut word, 0); // no features
        long(&mut word, 0);
        long(&mut word, 0);
        word(4); // reference counts of 2^4 bits
        word(HEADER_BYTES);
        long(&mut word, 0); // no extensions
        header
    }

    fn write_refcounts(&self, file: &File) -> io::Result<()> {
        let first_block = self.refcount_table + self.refcount_table_clusters;
        let blocks = (0..self.refcount_blocks).map(|block| (first_block + block) * CLUSTER);
        file.write_all_at(&big_endian(blocks.clone()), self.refcount_table * CLUSTER)?;
        for (number, place) in (0..).zip(blocks) {
            let used = (self.clusters - number * REFCOUNTS).min(REFCOUNTS);
            let counts: Vec<u8> = (0..used).flat_map(|_| 1_u16.to_be_bytes()).collect();
            file.write_all_at(&counts, place)?;
        }
        Ok(())
    }

    fn l2_table(&self, l1: u64) -> Vec<u8> {
        let clusters = l1 * L2_ENTRIES..(l1 + 1) * L2_ENTRIES;
        big_endian(
            clusters.map(|cluster| self.cluster_of(cluster).map_or(0, |place| (place * CLUSTER) | COPIED)),
        )
    }
}

/// The clusters that stretches touch.
fn runs_of(stretches: &[Stretch]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for stretch in stretches {
        let clusters = stretch.bytes.start / CLUSTER..stretch.bytes.end.div_ceil(CLUSTER);
        match runs.last_mut() {
            Some(last) if clusters.start <= last.clusters.end => last.clusters.end = clusters.end,
            last => {
                let rank = last.map_or(0, |last| last.rank + last.clusters.end - last.clusters.start);
                runs.push(Run { clusters, rank });
            }
        }
    }
    runs
}

fn big_endian(entries: impl Iterator<Item = u64>) -> Vec<u8> {
    entries.flat_map(u64::to_be_bytes).collect()
}

/// Clusters of the reference-count table and of its blocks, which count themselves too.
fn refcounts_for(fixed_clusters: u64) -> (u64, u64) {
    let (mut table, mut blocks) = (1, 1);
    loop {
        let needed_blocks = (fixed_clusters + table + blocks).div_ceil(REFCOUNTS);
        let needed_table = (needed_blocks * 8).div_ceil(CLUSTER).max(1);
        if needed_blocks <= blocks && needed_table <= table {
            return (table, blocks);
        }
        (table, blocks) = (needed_table.max(table), needed_blocks.max(blocks));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reference_counts_count_themselves() {
        assert_eq!(refcounts_for(1), (1, 1));
        for fixed in [1, REFCOUNTS - 2, REFCOUNTS - 1, REFCOUNTS, 9 * REFCOUNTS, 8192 * REFCOUNTS] {
            let (table, blocks) = refcounts_for(fixed);
            assert!(blocks * REFCOUNTS >= fixed + table + blocks, "{fixed}");
            assert!(table * CLUSTER >= blocks * 8, "{fixed}");
        }
    }
}
