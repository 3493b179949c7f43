//! qcow2 images, written in one pass.
//!
//! The backup's list says which chunks have data, so where everything goes is known before the first byte
//! is written: header, level-1 table, reference counts, level-2 tables, and then the chunks one after the
//! other. Chunks can then be written by several threads, as into a raw image.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::id::Id;
use crate::shape::Shape;

const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// Entries of a level-2 table, which is one cluster of 8-byte entries.
const L2_ENTRIES: u64 = CLUSTER / 8;
/// Clusters whose 16-bit counts are in one block.
const REFCOUNTS: u64 = CLUSTER / 2;
/// The cluster has no second user, so it may be written in place.
const COPIED: u64 = 1 << 63;
const HEADER_BYTES: u32 = 104;
const NO_DATA: u64 = u64::MAX;

/// Where everything is in the file.
pub(crate) struct Layout {
    size_bytes: u64,
    chunk_clusters: u64,
    /// For each chunk, how many chunks with data are before it; `NO_DATA` if it has none.
    rank: Vec<u64>,
    l1_entries: u64,
    /// For each level-1 entry, the place of its level-2 table among those; `NO_DATA` if it has none.
    l2_rank: Vec<u64>,
    refcount_table: u64,
    refcount_table_clusters: u64,
    refcount_blocks: u64,
    first_l2: u64,
    first_data: u64,
    clusters: u64,
}

impl Layout {
    /// The layout for a disk. A chunk is a multiple of a cluster.
    pub(crate) fn new(shape: &Shape, ids: &[Id]) -> Self {
        let chunk_clusters = u64::from(shape.chunk_bytes).div_ceil(CLUSTER);
        let chunks_per_l2 = L2_ENTRIES / chunk_clusters;
        // qcow2 counts in sectors; the last one is filled up with zeros.
        let size_bytes = shape.size_bytes.div_ceil(512) * 512;
        let l1_entries = size_bytes.div_ceil(CLUSTER * L2_ENTRIES);
        let mut data_chunks = 0;
        let mut next = |has_data: bool| {
            let rank = if has_data { data_chunks } else { NO_DATA };
            data_chunks += u64::from(has_data);
            rank
        };
        let rank: Vec<u64> = (0..).zip(ids).map(|(chunk, id)| next(*id != shape.zero_id(chunk))).collect();
        let mut l2_tables = 0;
        let l2_rank = (0..l1_entries)
            .map(|l1| {
                let chunks = (l1 * chunks_per_l2)..((l1 + 1) * chunks_per_l2).min(rank.len() as u64);
                let used = chunks.into_iter().any(|chunk| rank_of(&rank, chunk) != NO_DATA);
                l2_tables += u64::from(used);
                if used { l2_tables - 1 } else { NO_DATA }
            })
            .collect();
        // The last chunk of a disk may be short; it is the last in the file too.
        let last_has_data = rank.last().is_some_and(|rank| *rank != NO_DATA);
        let unused = match size_bytes.div_ceil(CLUSTER) % chunk_clusters {
            short if short > 0 && last_has_data => chunk_clusters - short,
            _ => 0,
        };
        let l1_clusters = (l1_entries * 8).div_ceil(CLUSTER);
        let fixed = 1 + l1_clusters + l2_tables + data_chunks * chunk_clusters - unused;
        let (refcount_table_clusters, refcount_blocks) = refcounts_for(fixed);
        let refcount_table = 1 + l1_clusters;
        let first_l2 = refcount_table + refcount_table_clusters + refcount_blocks;
        Self {
            size_bytes,
            chunk_clusters,
            rank,
            l1_entries,
            l2_rank,
            refcount_table,
            refcount_table_clusters,
            refcount_blocks,
            first_l2,
            first_data: first_l2 + l2_tables,
            clusters: fixed + refcount_table_clusters + refcount_blocks,
        }
    }

    /// Where a chunk with data goes.
    pub(crate) fn offset_of(&self, chunk: u64) -> u64 {
        (self.first_data + rank_of(&self.rank, chunk) * self.chunk_clusters) * CLUSTER
    }

    /// Writes everything but the chunks, and gives the file its length.
    pub(crate) fn write_metadata(&self, file: &File) -> io::Result<()> {
        file.set_len(self.clusters * CLUSTER)?;
        file.write_all_at(&self.header(), 0)?;
        let l1 = self.l2_rank.iter().map(|rank| match *rank {
            NO_DATA => 0,
            rank => ((self.first_l2 + rank) * CLUSTER) | COPIED,
        });
        file.write_all_at(&big_endian(l1), CLUSTER)?;
        self.write_refcounts(file)?;
        for (l1, rank) in (0..).zip(&self.l2_rank) {
            if *rank != NO_DATA {
                file.write_all_at(&self.l2_table(l1), (self.first_l2 + rank) * CLUSTER)?;
            }
        }
        Ok(())
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
        big_endian((l1 * L2_ENTRIES..(l1 + 1) * L2_ENTRIES).map(|cluster| {
            match rank_of(&self.rank, cluster / self.chunk_clusters) {
                NO_DATA => 0,
                _ if cluster * CLUSTER >= self.size_bytes => 0,
                _ => {
                    let chunk = cluster / self.chunk_clusters;
                    (self.offset_of(chunk) + cluster % self.chunk_clusters * CLUSTER) | COPIED
                }
            }
        }))
    }
}

fn rank_of(rank: &[u64], chunk: u64) -> u64 {
    usize::try_from(chunk).ok().and_then(|chunk| rank.get(chunk)).copied().unwrap_or(NO_DATA)
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
