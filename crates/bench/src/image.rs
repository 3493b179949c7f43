//! Disk images like real ones: ext4 filled from /usr, bytes that no one can compress, and sparse disks.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};

/// The size of a piece, in which images are made and looked at.
pub const MIB: usize = 1 << 20;
/// Bytes of each piece of a sparse disk that do not compress; the rest is text.
const NOISE_BYTES: usize = 400 << 10;

/// Makes an ext4 image of `gib` GiB: files from /usr (at most half of it, none twice), and beside them a
/// sixteenth of the image that is incompressible.
pub fn realistic(path: &Path, gib: u64) -> anyhow::Result<()> {
    let tree = path.with_extension("tree");
    let _ = fs::remove_dir_all(&tree);
    fs::create_dir_all(&tree)?;
    let mut room = (gib << 30) / 2;
    copy_tree(Path::new("/usr"), &tree.join("usr"), &mut room)?;
    noise(&tree.join("noise"), (gib << 30) / 16)?;
    let partial = path.with_extension("partial");
    File::create(&partial)?.set_len(gib << 30)?;
    rig::tool(Command::new(mkfs()).args(["-q", "-F", "-d"]).arg(&tree).arg(&partial))?;
    fs::remove_dir_all(&tree)?;
    fs::rename(&partial, path)?;
    Ok(())
}

/// Where mkfs is: a user's PATH may not lead there.
fn mkfs() -> PathBuf {
    let usual = Path::new("/usr/sbin/mkfs.ext4");
    if usual.exists() { usual.to_owned() } else { "mkfs.ext4".into() }
}

/// Copies files, folders and links, in the order of their names, until there is no more room.
fn copy_tree(from: &Path, to: &Path, room: &mut u64) -> io::Result<()> {
    fs::create_dir_all(to)?;
    let mut entries = fs::read_dir(from)?.collect::<io::Result<Vec<_>>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let (source, target, kind) = (entry.path(), to.join(entry.file_name()), entry.file_type()?);
        if kind.is_dir() {
            copy_tree(&source, &target, room)?;
        } else if kind.is_symlink() {
            symlink(fs::read_link(&source)?, &target)?;
        } else if kind.is_file() {
            let len = entry.metadata()?.len().next_multiple_of(4096);
            if len <= *room {
                // A file that may not be read is none that the image needs.
                match fs::copy(&source, &target) {
                    Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
                    copied => *room -= copied.map(|_| len)?,
                }
            }
        }
    }
    Ok(())
}

/// A file of bytes that do not compress.
pub fn noise(path: &Path, bytes: u64) -> anyhow::Result<()> {
    let mut file = File::create(path).with_context(|| path.display().to_string())?;
    io::copy(&mut File::open("/dev/urandom")?.take(bytes), &mut file)?;
    file.sync_all()?;
    Ok(())
}

/// A file of `pieces` MiB from all over an image, of places that hold data. A small image is gone through
/// again.
pub fn excerpt(image: &Path, path: &Path, pieces: usize) -> anyhow::Result<()> {
    let source = File::open(image).with_context(|| image.display().to_string())?;
    let file = File::create(path).with_context(|| path.display().to_string())?;
    let mut piece = vec![0; MIB];
    let mut full = Vec::new();
    for n in 0..source.metadata()?.len() / MIB as u64 {
        source.read_exact_at(&mut piece, n * MIB as u64)?;
        if is_full(&piece) {
            full.push(n);
        }
    }
    ensure!(!full.is_empty(), "{} holds no data", image.display());
    for n in 0..pieces {
        let chosen = if full.len() >= pieces { full[n * full.len() / pieces] } else { full[n % full.len()] };
        source.read_exact_at(&mut piece, chosen * MIB as u64)?;
        file.write_all_at(&piece, (n * MIB) as u64)?;
    }
    file.sync_all()?;
    Ok(())
}

/// Whether hardly a block of a piece is zero.
fn is_full(piece: &[u8]) -> bool {
    let blocks = piece.len() / 4096;
    let zero = piece.chunks(4096).filter(|block| block.iter().all(|&byte| byte == 0)).count();
    zero * 20 <= blocks
}

/// Two sparse images with the same pieces of data, spread over each: `(path, GiB)`, and the pieces in MiB.
pub fn sparse(images: &[(&Path, u64)], pieces: u64) -> anyhow::Result<()> {
    let mut files = Vec::new();
    for (path, gib) in images {
        let file = File::create(path).with_context(|| path.display().to_string())?;
        file.set_len(gib << 30)?;
        files.push((file, *gib));
    }
    let mut random = File::open("/dev/urandom")?;
    let mut block = b"afterimage keeps a replica\n".iter().copied().cycle().take(MIB).collect::<Vec<_>>();
    for n in 0..pieces {
        random.read_exact(&mut block[..NOISE_BYTES])?;
        for (file, gib) in &files {
            file.write_all_at(&block, piece_offset(*gib, pieces, n))?;
        }
    }
    files.iter().try_for_each(|(file, _)| file.sync_all())?;
    Ok(())
}

/// A change of `bytes` within the pieces of a sparse image, in extents of 64 to 512 KiB: the same pieces and the same
/// places in them for the same seed, whatever the image's size.
pub fn within_pieces(seed: u64, gib: u64, pieces: u64, bytes: u64) -> Vec<(u64, u64)> {
    let (mut random, mut left, mut extents) = (Random::new(seed), bytes, Vec::new());
    while left > 0 {
        let len = ((1 + random.next() % 8) * 65536).min(left.next_multiple_of(4096));
        let within = random.next() % ((MIB as u64 - len) / 4096) * 4096;
        extents.push((piece_offset(gib, pieces, random.next() % pieces) + within, len));
        left = left.saturating_sub(len);
    }
    extents
}

/// Where piece `n` of a sparse image begins.
fn piece_offset(gib: u64, pieces: u64, n: u64) -> u64 {
    n * ((gib << 30) / pieces) / 4096 * 4096
}

/// The places of a change of `bytes` in extents of 64 to 512 KiB, spread over `within` bytes.
pub fn scattered(seed: u64, within: u64, bytes: u64) -> Vec<(u64, u64)> {
    let mut random = Random::new(seed);
    let (mut left, mut extents) = (bytes, Vec::new());
    while left > 0 {
        let len = ((1 + random.next() % 8) * 64 * 1024).min(left.next_multiple_of(4096));
        extents.push((random.next() % ((within - len) / 4096) * 4096, len));
        left = left.saturating_sub(len);
    }
    extents
}

/// Bytes that do not compress, the same for the same seed.
pub struct Random(u64);

impl Random {
    /// The bytes of a seed.
    pub fn new(seed: u64) -> Self {
        // Neighbouring seeds must not give neighbouring bytes.
        Self(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next eight of them.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Fills a buffer with them.
    pub fn fill(&mut self, buffer: &mut [u8]) {
        for word in buffer.chunks_mut(8) {
            let bytes = self.next().to_le_bytes();
            word.copy_from_slice(&bytes[..word.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_within_the_pieces() {
        let (gib, pieces) = (10, 4096);
        let begins: Vec<u64> = (0..pieces).map(|n| piece_offset(gib, pieces, n)).collect();
        let extents = within_pieces(3, gib, pieces, 100_000_000);
        assert_eq!(extents.iter().map(|(_, len)| len).sum::<u64>(), 100_000_000_u64.next_multiple_of(4096));
        for (offset, len) in extents {
            let piece = begins[begins.partition_point(|begin| *begin <= offset) - 1];
            assert!(offset + len <= piece + MIB as u64);
        }
    }

    #[test]
    fn a_change_has_its_size_and_stays_within() {
        let extents = scattered(7, 64 << 20, 1_000_000);
        assert_eq!(extents.iter().map(|(_, len)| len).sum::<u64>(), 1_000_000u64.next_multiple_of(4096));
        assert!(extents.iter().all(|(offset, len)| offset % 4096 == 0 && offset + len <= 64 << 20));
        assert_eq!(extents, scattered(7, 64 << 20, 1_000_000));
        assert_ne!(extents, scattered(8, 64 << 20, 1_000_000));
    }

    #[test]
    fn sparse_disks_of_two_sizes_hold_the_same_data() {
        let dir = tempfile::tempdir().unwrap();
        let paths = ["large", "small"].map(|name| dir.path().join(name));
        sparse(&[(&paths[0], 2), (&paths[1], 1)], 3).unwrap();
        let files = paths.each_ref().map(|path| File::open(path).unwrap());
        for n in 0..3 {
            let [large, small] = [(&files[0], 2), (&files[1], 1)].map(|(file, gib)| {
                let mut piece = vec![0; MIB];
                file.read_exact_at(&mut piece, piece_offset(gib, 3, n)).unwrap();
                piece
            });
            assert!(large == small && is_full(&large));
        }
        assert!(crate::measure::disk_usage(&paths[0]).unwrap() < 4.0 * MIB as f64);
    }

    #[test]
    fn an_excerpt_is_of_places_with_data() {
        let dir = tempfile::tempdir().unwrap();
        let (image, path) = (dir.path().join("image"), dir.path().join("excerpt"));
        sparse(&[(&image, 1)], 4).unwrap();
        excerpt(&image, &path, 6).unwrap();
        let bytes = fs::read(&path).unwrap();
        assert_eq!(bytes.len(), 6 * MIB);
        assert!(bytes.chunks(MIB).all(is_full));
    }

    #[test]
    fn a_tree_is_copied_until_there_is_no_room() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::create_dir_all(from.join("a")).unwrap();
        fs::write(from.join("a/one"), [1; 5000]).unwrap();
        fs::write(from.join("two"), [2; 5000]).unwrap();
        symlink("two", from.join("link")).unwrap();
        let mut room = 12_000;
        copy_tree(&from, &to, &mut room).unwrap();
        assert!(to.join("a/one").exists() && !to.join("two").exists() && to.join("link").is_symlink());
        assert_eq!(room, 12_000 - 8192);
    }
}
