//! For crate `fuzzing` and for measuring: a backup's parts as bytes, and an index, without the repository around
//! them.

use model::{Consistency, LogId, LogNumber, Timestamp, VmId};

use crate::id::Id;
use crate::list::{self, Chunk, encode_lengths};
use crate::list_of;
use crate::manifest::{BackupDisk, FORMAT, Manifest};
use crate::tree::{self, TreeFile};
use crate::zeros::zero_chunks;

/// A disk as it was read.
#[derive(Debug)]
pub struct ReadDisk {
    /// Its size.
    pub size_bytes: u64,
    /// The length of each of its chunks.
    pub chunk_bytes: Vec<u64>,
}

/// Reads the disks of a backup out of its manifest, its list of files and the lengths of its chunks (of the last
/// disk; the others must be empty). The digest is taken to be right: who writes a manifest can make it so.
pub fn read_backup(manifest: &[u8], tree: &[u8], lengths: &[u8]) -> Result<Vec<ReadDisk>, String> {
    let manifest: Manifest = serde_json::from_slice(manifest).map_err(|error| error.to_string())?;
    let files = tree::decode(tree)?;
    let _ = manifest.point_info();
    let mut disks = Vec::new();
    for (place, disk) in manifest.disks.iter().enumerate() {
        let name = disk.raw_file();
        let file = files.iter().find(|file| file.name == name).ok_or("no file")?;
        let lengths = if place + 1 == manifest.disks.len() { lengths } else { &[] };
        let chunks = list::decode(&file.content, lengths, disk.size_bytes)?;
        assert_eq!(encode_lengths(&chunks).len(), 2 * chunks.len());
        let told = BackupDisk { digest: list::digest(disk.size_bytes, &chunks), ..disk.clone() };
        let chunks = list_of(&told, &file.content, lengths)?;
        for stretch in list::data_stretches(&chunks, 1 << 20) {
            assert!(stretch.bytes.end <= disk.size_bytes && stretch.bytes.start < stretch.bytes.end);
        }
        let chunk_bytes = chunks.iter().map(Chunk::bytes).collect();
        disks.push(ReadDisk { size_bytes: disk.size_bytes, chunk_bytes });
    }
    Ok(disks)
}

/// An index of so many chunks: the memory that it counts itself, in bytes, and whether it has a chunk, by its number.
pub fn simulated_index(chunks: u64) -> (usize, impl Fn(u64) -> bool) {
    crate::index::simulated(chunks)
}

/// Some backups' parts: manifest, list of files, lengths.
///
/// # Panics
/// Never: what is written here can be written.
#[must_use]
pub fn samples() -> Vec<(&'static str, [Vec<u8>; 3])> {
    let chunks: Vec<Chunk> = [Chunk::data(Id::of(b"a"), 8192), Chunk::data(Id::of(b"b"), 4096)]
        .into_iter()
        .chain(zero_chunks(9 << 20))
        .chain([Chunk::data(Id::of(b"c"), 5000)])
        .collect();
    vec![("disk", sample(&chunks)), ("empty", sample(&[])), ("zeros", sample(&chunks[2..4]))]
}

fn sample(chunks: &[Chunk]) -> [Vec<u8>; 3] {
    let size_bytes = chunks.iter().map(Chunk::bytes).sum();
    let digest = list::digest(size_bytes, chunks);
    let name = "vda".parse().expect("a name");
    let manifest = Manifest {
        format: FORMAT,
        vm: VmId::from_bytes([1; 16]),
        vm_name: "web".parse().expect("a name"),
        point: LogId::from_bytes([2; 16]),
        number: LogNumber(7),
        taken_at: Timestamp(1_700_000_000_000_000),
        consistency: Consistency::Crash,
        made_at: Timestamp(1_700_000_001_000_000),
        disks: vec![BackupDisk { name, size_bytes, chunks: chunks.len() as u64, digest }],
    };
    let content = chunks.iter().map(|chunk| chunk.id).collect();
    let file = TreeFile { name: "vda.raw".into(), size_bytes, content };
    let mut json = Vec::new();
    tree::encode(&[&file], manifest.made_at, &mut json).expect("a vector takes all");
    let text = serde_json::to_vec(&manifest).expect("plain values can be written");
    [text, json, encode_lengths(chunks)]
}
