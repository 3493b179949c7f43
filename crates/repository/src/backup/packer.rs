//! Where sealed chunks become durable packs, and packs become known.

use std::collections::HashSet;
use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};

use sha2::{Digest, Sha256};
use steps::durable_step;

use crate::crypto::{Cipher, NONCE_BYTES, SEAL_BYTES};
use crate::direct::Aligned;
use crate::error::Error;
use crate::id::{ById, Id};
use crate::index::{Index, IndexedPack, write_index_file};
use crate::pack::{BlobKind, Pack, PackBuilder, SealedBlob};
use crate::storage::FileKind;
use crate::store::Store;

/// An index file is written once it would name this many blobs: so a long run that is killed has not worked
/// for nothing, and memory stays bounded.
const INDEX_BLOBS: usize = 8192;

/// One run's way into the repository.
pub(crate) struct Packer<'a> {
    store: &'a Store,
    index: &'a RwLock<Index>,
    open: Mutex<PackBuilder>,
    /// Buffers of packs that are written, to be filled again.
    spare: Mutex<Vec<Aligned>>,
    /// What this run has claimed to store.
    fresh: Mutex<HashSet<Id, ById>>,
    /// Durable packs that no index file names yet.
    written: Mutex<Vec<IndexedPack>>,
    bytes_added: AtomicU64,
    raw_bytes_added: AtomicU64,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'a> Packer<'a> {
    pub(crate) fn new(store: &'a Store, index: &'a RwLock<Index>) -> Self {
        Self {
            store,
            index,
            open: Mutex::new(PackBuilder::new(BlobKind::Data, Aligned::default())),
            spare: Mutex::default(),
            fresh: Mutex::default(),
            written: Mutex::default(),
            bytes_added: AtomicU64::new(0),
            raw_bytes_added: AtomicU64::new(0),
        }
    }

    pub(crate) fn cipher(&self) -> &Cipher {
        self.store.cipher()
    }

    /// How many packs are written at the same time: while some wait for the storage, another is hashed.
    pub(crate) fn writers(&self) -> usize {
        self.store.writers()
    }

    /// Whether the repository has this chunk not, nor anybody of this run.
    pub(crate) fn lacks(&self, id: &Id) -> bool {
        let known = self.index.read().unwrap_or_else(PoisonError::into_inner).has_data(id);
        !known && !locked(&self.fresh).contains(id)
    }

    /// Whether the caller must store this chunk: the repository has it not, and nobody else of this run is
    /// at it. Another run may be; then it is stored twice, which harms nothing.
    pub(crate) fn claim(&self, id: &Id) -> bool {
        let known = self.index.read().unwrap_or_else(PoisonError::into_inner).has_data(id);
        !known && locked(&self.fresh).insert(*id)
    }

    /// Adds a chunk; gives the pack to write if it is full now.
    pub(crate) fn add(&self, blob: &SealedBlob<'_>, raw_bytes: usize) -> Option<PackBuilder> {
        self.raw_bytes_added.fetch_add(raw_bytes as u64, Ordering::Relaxed);
        let mut open = locked(&self.open);
        open.add(blob).then(|| std::mem::replace(&mut *open, self.empty_pack()))
    }

    fn empty_pack(&self) -> PackBuilder {
        PackBuilder::new(BlobKind::Data, locked(&self.spare).pop().unwrap_or_default())
    }

    /// The pack being filled, if anything is in it.
    pub(crate) fn take_rest(&self) -> Option<PackBuilder> {
        let rest = std::mem::replace(&mut *locked(&self.open), self.empty_pack());
        (!rest.is_empty()).then_some(rest)
    }

    /// Closes a pack and makes it durable; now and then an index file too.
    pub(crate) fn write(&self, pack: PackBuilder) -> Result<(), Error> {
        let Pack { id, kind, bytes, blobs } = pack.finish(self.cipher());
        durable_step("repository::pack::writing");
        self.store.write(FileKind::Pack, &id, &bytes)?;
        durable_step("repository::pack::written");
        self.bytes_added.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        locked(&self.spare).push(bytes);
        let due = {
            let mut written = locked(&self.written);
            written.push(IndexedPack { id, kind, blobs });
            let blobs: usize = written.iter().map(|pack| pack.blobs.len()).sum();
            (blobs >= INDEX_BLOBS).then(|| std::mem::take(&mut *written))
        };
        due.map_or(Ok(()), |packs| self.write_index_of(&packs))
    }

    /// Names all durable packs in an index file.
    pub(crate) fn write_index(&self) -> Result<(), Error> {
        let packs = std::mem::take(&mut *locked(&self.written));
        if packs.is_empty() { Ok(()) } else { self.write_index_of(&packs) }
    }

    fn write_index_of(&self, packs: &[IndexedPack]) -> Result<(), Error> {
        durable_step("repository::index::writing");
        let file = write_index_file(self.store, packs)?;
        durable_step("repository::index::written");
        self.index.write().unwrap_or_else(PoisonError::into_inner).add_written(file, packs);
        Ok(())
    }

    /// Bytes of packs so far.
    pub(crate) fn bytes_added(&self) -> u64 {
        self.bytes_added.load(Ordering::Relaxed)
    }
    /// Bytes of chunks before compression.
    pub(crate) fn raw_bytes_added(&self) -> u64 {
        self.raw_bytes_added.load(Ordering::Relaxed)
    }
}

/// A tree being written: hashed and compressed as it comes, because its JSON is 67 bytes for each chunk.
pub(crate) struct TreeBlob {
    cipher: Cipher,
    hasher: Sha256,
    raw_bytes: u64,
    encoder: zstd::stream::Encoder<'static, Vec<u8>>,
    pending: Vec<u8>,
}

/// A tree ready to be packed.
pub(crate) struct SealedTree {
    pub(crate) id: Id,
    bytes: Vec<u8>,
    raw_len: u32,
}

impl SealedTree {
    pub(crate) fn sealed(&self) -> SealedBlob<'_> {
        SealedBlob { id: self.id, bytes: &self.bytes, raw_len: self.raw_len }
    }
}

const PENDING_BYTES: usize = 128 * 1024;

impl TreeBlob {
    pub(crate) fn new(cipher: Cipher) -> io::Result<Self> {
        Ok(Self {
            cipher,
            hasher: Sha256::new(),
            raw_bytes: 0,
            encoder: zstd::stream::Encoder::new(vec![0; NONCE_BYTES], 1)?,
            pending: Vec::with_capacity(PENDING_BYTES),
        })
    }

    pub(crate) fn finish(mut self) -> io::Result<SealedTree> {
        self.flush()?;
        let mut bytes = self.encoder.finish()?;
        bytes.resize(bytes.len() + SEAL_BYTES - NONCE_BYTES, 0);
        self.cipher.seal(&mut bytes);
        let too_long = |_| io::Error::other("the lists of chunks of this VM's disks are longer than 4 GiB");
        Ok(SealedTree {
            id: Id(self.hasher.finalize().into()),
            bytes,
            raw_len: u32::try_from(self.raw_bytes).map_err(too_long)?,
        })
    }
}

impl Write for TreeBlob {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.pending.len() + bytes.len() > PENDING_BYTES {
            self.flush()?;
        }
        self.pending.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.hasher.update(&self.pending);
        self.raw_bytes += self.pending.len() as u64;
        self.encoder.write_all(&self.pending)?;
        self.pending.clear();
        Ok(())
    }
}
