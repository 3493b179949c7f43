//! What a backup says of itself: manifest, list of files, lengths of chunks. A repository may lie with strangers.

/// The first two bytes say where the manifest ends, the next two where the list of files ends.
pub(crate) fn backup(data: &[u8]) {
    let Some((cuts, bytes)) = data.split_first_chunk::<4>() else { return };
    let cut = |at: usize| usize::from(u16::from_le_bytes([cuts[at], cuts[at + 1]]));
    let (manifest, rest) = bytes.split_at(cut(0).min(bytes.len()));
    let (tree, lengths) = rest.split_at(cut(2).min(rest.len()));
    if let Ok(disks) = repository::fuzzing::read_backup(manifest, tree, lengths) {
        for disk in disks {
            let sum: u64 = disk.chunk_bytes.iter().sum();
            assert_eq!(sum, disk.size_bytes, "the chunks are the disk");
        }
    }
}
