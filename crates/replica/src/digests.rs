//! Digests of the newest durable state, for a resynchronization.

use blake3::Hasher;
use model::{DiskName, VmId};

use crate::error::{Error, Result};
use crate::store::Store;

/// Of at most so many bytes at once; bounds memory, whatever a peer asks for.
const READ_BYTES: u64 = 1 << 20;
/// A block of a request; smaller and the digests are larger than what they save.
const BLOCK_BYTES: std::ops::RangeInclusive<u64> = 4096..=16 << 20;
/// A request for more is refused: 64 GiB of disk, 16 MiB of digests of 64 KiB blocks.
const LEN_MAX: u64 = 64 << 30;

impl Store {
    /// The first 16 bytes of the BLAKE3 of each block of a range of a disk, one after the other, as all
    /// logs that are durable leave it. Blocks beyond the disk's end, and a disk that has not arrived here
    /// yet, are zeros. Holes are not read.
    pub fn digests(
        &self,
        peer: &str,
        vm: VmId,
        disk: &DiskName,
        offset: u64,
        len: u64,
        block_bytes: u64,
    ) -> Result<Vec<[u8; 16]>> {
        let vm = self.vm(vm)?;
        crate::relationship::check_peer(&*vm.live()?, peer)?;
        if !BLOCK_BYTES.contains(&block_bytes) || len > LEN_MAX || offset.checked_add(len).is_none() {
            return Err(Error::busy(vm.id, "digests of such blocks or of so many bytes are not given"));
        }
        if vm.live()?.row.doc.unsure {
            self.wake(vm.id);
            return Err(Error::busy(
                vm.id,
                "its flat files are being written anew, since a sync of them has failed",
            ));
        }
        match self.digests_of(&vm, disk, offset, len, block_bytes) {
            // Else the compare that would make it good comes to the same log again and again.
            Err(Error::Damaged { path, source }) => {
                self.check_damage(&vm, &path)?;
                let why = format!(
                    "the log {} is damaged ({source}); the compare goes on without it",
                    path.display()
                );
                Err(Error::busy(vm.id, why))
            }
            outcome => outcome,
        }
    }

    fn digests_of(
        &self,
        vm: &std::sync::Arc<crate::vm::Vm>,
        disk: &DiskName,
        offset: u64,
        len: u64,
        block_bytes: u64,
    ) -> Result<Vec<[u8; 16]>> {
        let newest = self.newest(vm)?;
        let reader = &newest.reader;
        let known = reader.disks().iter().any(|known| known.name == *disk);
        let data = if known { reader.data_extents(disk, offset..offset + len)? } else { Vec::new() };
        let mut data = data.into_iter().peekable();
        let zero = block_digest_of_zeros(block_bytes);
        let mut digests = Vec::with_capacity(usize::try_from(len.div_ceil(block_bytes)).unwrap_or(0));
        let mut buf = vec![0; usize::try_from(block_bytes.min(READ_BYTES)).unwrap_or(0)];
        let mut at = offset;
        while at < offset + len {
            let end = (at + block_bytes).min(offset + len);
            while data.next_if(|extent| extent.end <= at).is_some() {}
            let all_zero = data.peek().is_none_or(|extent| extent.start >= end);
            digests.push(match end - at {
                whole if all_zero && whole == block_bytes => zero,
                part if all_zero => block_digest_of_zeros(part),
                _ => digest(at..end, &mut buf, |offset, buf| reader.read_at(disk, offset, buf))?,
            });
            at = end;
        }
        Ok(digests)
    }
}

fn digest(
    range: std::ops::Range<u64>,
    buf: &mut [u8],
    mut read: impl FnMut(u64, &mut [u8]) -> Result<()>,
) -> Result<[u8; 16]> {
    let mut hasher = Hasher::new();
    let mut at = range.start;
    while at < range.end {
        let len = usize::try_from(range.end - at).map_or(buf.len(), |left| left.min(buf.len()));
        read(at, &mut buf[..len])?;
        hasher.update(&buf[..len]);
        at += len as u64;
    }
    Ok(short(&hasher))
}

fn block_digest_of_zeros(len: u64) -> [u8; 16] {
    let mut buf = vec![0; usize::try_from(len.min(READ_BYTES)).unwrap_or(0)];
    digest(0..len, &mut buf, |_, _| Ok(())).expect("nothing is read")
}

fn short(hasher: &Hasher) -> [u8; 16] {
    let mut digest = [0; 16];
    digest.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    digest
}
