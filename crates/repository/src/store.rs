//! An open repository's files, sealed and opened: what all its parts read and write through.

use std::sync::Arc;

use steps::durable_step;

use crate::crypto::{Cipher, sealed};
use crate::error::{Error, Unread};
use crate::id::{BackupId, Id};
use crate::rustic::Opened;
use crate::storage::{FileKind, FileName, Storage, Trouble, TroubleKind};

/// An open repository: its files, and the key to them.
pub(crate) struct Store {
    storage: Arc<dyn Storage>,
    cipher: Cipher,
    pub(crate) opened: Opened,
}

impl Store {
    pub(crate) fn new(storage: Arc<dyn Storage>, cipher: Cipher, opened: Opened) -> Self {
        Self { storage, cipher, opened }
    }

    /// Where it is, for messages.
    pub(crate) fn at(&self) -> &str {
        self.storage.location()
    }

    /// The master key.
    pub(crate) fn cipher(&self) -> &Cipher {
        &self.cipher
    }

    /// How many packs are written at the same time.
    pub(crate) fn writers(&self) -> usize {
        self.storage.writers()
    }

    /// The files of one kind. What has no proper name (a file half written) is not listed.
    pub(crate) fn list(&self, kind: FileKind) -> Result<Vec<Id>, Error> {
        Ok(self.list_with_size(kind)?.into_iter().map(|(id, _)| id).collect())
    }

    /// The files of one kind and their sizes in bytes.
    pub(crate) fn list_with_size(&self, kind: FileKind) -> Result<Vec<(Id, u64)>, Error> {
        self.storage.list(kind).map_err(|trouble| {
            Error::of_storage("cannot list", format!("{}/{}", self.at(), kind.folder()), trouble)
        })
    }

    /// Makes the names of the files of one kind durable. Whoever wrote them may have died, or failed, before.
    pub(crate) fn settle(&self, kind: FileKind) -> Result<(), Error> {
        self.storage.settle(kind).map_err(|trouble| {
            Error::of_storage("cannot sync", format!("{}/{}", self.at(), kind.folder()), trouble)
        })
    }

    /// A part of a pack, as it is stored, into `stored`.
    pub(crate) fn read_pack(
        &self,
        pack: &Id,
        offset: u32,
        len: u32,
        stored: &mut Vec<u8>,
    ) -> Result<(), Unread> {
        stored.resize(len as usize, 0);
        let file = FileName::new(FileKind::Pack, *pack);
        self.storage.read_at(&file, offset.into(), stored).map_err(|trouble| {
            let short = BackupId(*pack).short();
            match trouble.kind {
                TroubleKind::Missing => format!("pack {short} is missing").into(),
                TroubleKind::Short => format!("pack {short} is too short").into(),
                TroubleKind::Unavailable | TroubleKind::Denied => {
                    self.failed("cannot read", &file, trouble).into()
                }
                _ => format!("pack {short} cannot be read: {trouble}").into(),
            }
        })
    }

    /// Writes a file under its hash; it is durable when this returns.
    pub(crate) fn write(&self, kind: FileKind, id: &Id, bytes: &[u8]) -> Result<(), Error> {
        let file = FileName::new(kind, *id);
        self.storage.write(&file, bytes).map_err(|trouble| self.failed("cannot write", &file, trouble))
    }

    /// Removes a file; one that is not there is no error.
    pub(crate) fn remove(&self, kind: FileKind, id: &Id) -> Result<(), Error> {
        let file = FileName::new(kind, *id);
        self.storage.remove(&file).map_err(|trouble| self.failed("cannot remove", &file, trouble))
    }

    /// Whether a file is there.
    pub(crate) fn has(&self, kind: FileKind, id: &Id) -> Result<bool, Error> {
        let file = FileName::new(kind, *id);
        let size =
            self.storage.size(&file).map_err(|trouble| self.failed("cannot look for", &file, trouble))?;
        Ok(size.is_some())
    }

    /// Whether a dead process of this machine has left a lock half written.
    pub(crate) fn has_half_written(&self) -> bool {
        self.storage.has_half_written()
    }

    /// Removes what dead processes of this machine had half written.
    pub(crate) fn sweep(&self) {
        self.storage.sweep();
    }

    /// An index or snapshot file: sealed JSON, usually compressed.
    pub(crate) fn read_json_file(&self, kind: FileKind, id: &Id) -> Result<Vec<u8>, Unread> {
        let file = FileName::new(kind, *id);
        let stored = self.storage.read(&file).map_err(|trouble| match trouble.kind {
            TroubleKind::Unavailable | TroubleKind::Denied => {
                self.failed("cannot read", &file, trouble).into()
            }
            _ => Unread::Damaged(trouble.why),
        })?;
        if Id::of(&stored) != *id {
            return Err("its bytes have another hash than its name".into());
        }
        Ok(self.unsealed_json(stored)?)
    }

    /// Writes an index or snapshot file; it is durable when this returns.
    pub(crate) fn write_json_file(&self, kind: FileKind, json: &[u8]) -> Result<Id, Error> {
        let mut plain = vec![2];
        zstd::stream::copy_encode(json, &mut plain, 3)
            .map_err(|error| self.failed_here("cannot compress for", error))?;
        let stored = sealed(&self.cipher, &plain);
        let id = Id::of(&stored);
        self.write(kind, &id, &stored)?;
        Ok(id)
    }

    /// A key file.
    pub(crate) fn read_key(&self, id: &Id) -> Result<Vec<u8>, Error> {
        let file = FileName::new(FileKind::Key, *id);
        self.storage.read(&file).map_err(|trouble| self.failed("cannot read", &file, trouble))
    }

    /// Writes a lock file; `before` is told its name before anybody can see it.
    pub(crate) fn write_lock(&self, json: &[u8], before: impl FnOnce(Id)) -> Result<Id, Error> {
        let stored = sealed(&self.cipher, json);
        let id = Id::of(&stored);
        before(id);
        durable_step("repository::lock::writing");
        self.write(FileKind::Lock, &id, &stored)?;
        durable_step("repository::lock::written");
        Ok(id)
    }

    /// What a lock file says; none if it is gone or none of this repository.
    pub(crate) fn read_lock(&self, id: &Id) -> Result<Option<Vec<u8>>, Error> {
        let file = FileName::new(FileKind::Lock, *id);
        match self.storage.read(&file) {
            Ok(stored) => Ok(self.unsealed_json(stored).ok()),
            Err(trouble) if trouble.is_transient() => {
                Err(self.failed("cannot read the lock", &file, trouble))
            }
            Err(_) => Ok(None),
        }
    }

    fn unsealed_json(&self, mut stored: Vec<u8>) -> Result<Vec<u8>, String> {
        let plain = self.cipher.open(&mut stored).map_err(|_| "the MAC does not fit")?;
        match plain.split_first() {
            Some((2, packed)) => zstd::decode_all(packed).map_err(|error| error.to_string()),
            _ => Ok(plain.to_vec()),
        }
    }

    fn failed(&self, what: &'static str, file: &FileName, trouble: Trouble) -> Error {
        Error::of_storage(what, format!("{}/{}", self.at().trim_end_matches('/'), file.path()), trouble)
    }

    /// An error that has to do with no file, on this side.
    pub(crate) fn failed_here(
        &self,
        what: &'static str,
        error: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Error {
        Error::io(what, std::path::Path::new(self.at()), std::io::Error::other(error))
    }
}
