//! A mounted file system's state, and what its files are asked to do.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use crate::Faults;
use crate::chance::Chance;
use crate::mount::Lost;
use crate::names::NodeId;
use crate::tree::{Entry, Tree};

/// What the requests and the owner of the mount share.
pub(crate) struct Shared {
    pub tree: Tree,
    pub faults: Faults,
    power_is_gone: bool,
    open: HashMap<u64, Open>,
    next_handle: u64,
}

/// What a program has open.
enum Open {
    File(NodeId, Arc<File>),
    Folder(Vec<Entry>),
}

impl Shared {
    pub fn open(backing: &Path) -> io::Result<Self> {
        let tree = Tree::open(backing)?;
        Ok(Self {
            tree,
            faults: Faults::default(),
            power_is_gone: false,
            open: HashMap::new(),
            next_handle: 1,
        })
    }

    pub fn lose_power(&mut self, chance: &mut Chance) -> io::Result<Lost> {
        if std::mem::replace(&mut self.power_is_gone, true) {
            return Err(io::Error::other("the power is gone already"));
        }
        self.tree.lose(chance)
    }

    /// Does something, unless the power is gone.
    pub fn with<T>(&mut self, call: impl FnOnce(&mut Self) -> io::Result<T>) -> io::Result<T> {
        if self.power_is_gone { Err(Errno::EIO.into()) } else { call(self) }
    }

    pub fn open_file(&mut self, node: NodeId) -> io::Result<u64> {
        let file = open_file(&self.tree.path(node)?)?;
        Ok(self.keep(Open::File(node, Arc::new(file))))
    }

    pub fn make_file(&mut self, folder: NodeId, name: &OsStr, mode: u32) -> io::Result<(NodeId, u64)> {
        self.faults.make()?;
        let (node, file) = self.tree.make_file(folder, name, mode)?;
        Ok((node, self.keep(Open::File(node, Arc::new(file)))))
    }

    pub fn open_folder(&mut self, node: NodeId) -> io::Result<u64> {
        let entries = self.tree.list(node)?;
        Ok(self.keep(Open::Folder(entries)))
    }

    /// What was in an open folder when it was opened.
    pub fn entries(&self, handle: u64) -> Option<&[Entry]> {
        match self.open.get(&handle) {
            Some(Open::Folder(entries)) => Some(entries),
            _ => None,
        }
    }

    pub fn close(&mut self, handle: u64) {
        self.open.remove(&handle);
    }

    fn keep(&mut self, open: Open) -> u64 {
        let handle = self.next_handle;
        self.next_handle += 1;
        self.open.insert(handle, open);
        handle
    }

    /// An open file. What the kernel writes back from memory comes with any handle of it or with none, and a file
    /// without a name is found only by who has it open.
    pub fn file(&self, node: NodeId, handle: Option<u64>) -> io::Result<Arc<File>> {
        if let Some(Open::File(_, file)) = handle.and_then(|handle| self.open.get(&handle)) {
            return Ok(file.clone());
        }
        let of_node = |open: &Open| match open {
            Open::File(of, file) if *of == node => Some(file.clone()),
            _ => None,
        };
        match self.open.values().find_map(of_node) {
            Some(file) => Ok(file),
            None => open_file(&self.tree.path(node)?).map(Arc::new),
        }
    }

    pub fn metadata(&self, node: NodeId) -> io::Result<Metadata> {
        self.tree.metadata(node).or_else(|_| self.file(node, None)?.metadata())
    }

    pub fn write(&mut self, node: NodeId, handle: u64, offset: u64, data: &[u8]) -> io::Result<()> {
        let file = self.file(node, Some(handle))?;
        let end = offset + data.len() as u64;
        self.faults.write(end > file.metadata()?.len())?;
        if let Some(unsynced) = self.tree.unsynced(node) {
            unsynced.before_write(&file, offset..end)?;
        }
        file.write_all_at(data, offset)
    }

    pub fn resize(&mut self, node: NodeId, handle: Option<u64>, len: u64) -> io::Result<()> {
        let file = self.file(node, handle)?;
        if let Some(unsynced) = self.tree.unsynced(node) {
            unsynced.before_resize(&file, len)?;
        }
        file.set_len(len)
    }

    pub fn sync(&mut self, node: NodeId) -> io::Result<()> {
        let outcome = self.faults.sync();
        if let Some(unsynced) = self.tree.unsynced(node) {
            match outcome {
                Ok(()) => unsynced.synced(),
                Err(_) => unsynced.sync_failed(),
            }
        }
        outcome
    }

    pub fn allocate(
        &mut self,
        node: NodeId,
        handle: u64,
        offset: u64,
        len: u64,
        mode: i32,
    ) -> io::Result<()> {
        let flags = FallocateFlags::from_bits(mode).ok_or(Errno::EOPNOTSUPP)?;
        let known = FallocateFlags::FALLOC_FL_KEEP_SIZE
            | FallocateFlags::FALLOC_FL_PUNCH_HOLE
            | FallocateFlags::FALLOC_FL_ZERO_RANGE;
        if !known.contains(flags) {
            return Err(Errno::EOPNOTSUPP.into());
        }
        let file = self.file(node, Some(handle))?;
        let (now, end) = (file.metadata()?.len(), offset + len);
        let keeps_size = flags.contains(FallocateFlags::FALLOC_FL_KEEP_SIZE);
        self.faults.write(!flags.contains(FallocateFlags::FALLOC_FL_PUNCH_HOLE))?;
        if let Some(unsynced) = self.tree.unsynced(node) {
            unsynced.before_write(&file, offset.min(now)..end.min(now))?;
            if !keeps_size && end > now {
                unsynced.before_resize(&file, end)?;
            }
        }
        Ok(fallocate(&*file, flags, signed(offset)?, signed(len)?)?)
    }
}

fn signed(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| Errno::EINVAL.into())
}

/// For reading too, because what is overwritten must be known.
fn open_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}
