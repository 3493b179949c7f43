//! The kernel's requests, answered.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, FileTimes, Metadata, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty,
    ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};
use nix::unistd::{Whence, lseek};

use crate::names::NodeId;
use crate::shared::Shared;
use crate::tree::Tree;

/// Only this file system changes what is below it, so the kernel may keep names and attributes.
const TTL: Duration = Duration::from_secs(60);

fn kind(of: fs::FileType) -> FileType {
    match of {
        _ if of.is_dir() => FileType::Directory,
        _ if of.is_socket() => FileType::Socket,
        _ if of.is_fifo() => FileType::NamedPipe,
        _ if of.is_symlink() => FileType::Symlink,
        _ => FileType::RegularFile,
    }
}

fn attributes(node: NodeId, metadata: &Metadata) -> FileAttr {
    let at = |seconds: i64| SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
    let with_nanos =
        |seconds, nanos: i64| at(seconds) + Duration::from_nanos(u64::try_from(nanos).unwrap_or(0));
    FileAttr {
        ino: INodeNo(node),
        size: metadata.len(),
        blocks: metadata.blocks(),
        atime: with_nanos(metadata.atime(), metadata.atime_nsec()),
        mtime: with_nanos(metadata.mtime(), metadata.mtime_nsec()),
        ctime: with_nanos(metadata.ctime(), metadata.ctime_nsec()),
        crtime: SystemTime::UNIX_EPOCH,
        kind: kind(metadata.file_type()),
        perm: u16::try_from(metadata.mode() & 0o7777).unwrap_or(0),
        nlink: u32::try_from(metadata.nlink()).unwrap_or(1),
        uid: metadata.uid(),
        gid: metadata.gid(),
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

fn look(shared: &Shared, node: NodeId) -> io::Result<FileAttr> {
    shared.metadata(node).map(|metadata| attributes(node, &metadata))
}

/// The file system as FUSE sees it.
pub(crate) struct Lossy(Arc<Mutex<Shared>>);

impl Lossy {
    pub fn new(shared: Arc<Mutex<Shared>>) -> Self {
        Self(shared)
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something, unless the power is gone.
    fn with<T>(&self, call: impl FnOnce(&mut Shared) -> io::Result<T>) -> Result<T, Errno> {
        self.lock().with(call).map_err(Errno::from)
    }

    /// Makes something and gives its attributes.
    fn make(&self, call: impl FnOnce(&mut Tree) -> io::Result<NodeId>, reply: ReplyEntry) {
        let made = self.with(|shared| {
            shared.faults.make()?;
            let node = call(&mut shared.tree)?;
            look(shared, node)
        });
        answer_entry(made, reply);
    }
}

fn answer_entry(outcome: Result<FileAttr, Errno>, reply: ReplyEntry) {
    match outcome {
        Ok(attributes) => reply.entry(&TTL, &attributes, Generation(0)),
        Err(error) => reply.error(error),
    }
}

fn answer(outcome: Result<(), Errno>, reply: ReplyEmpty) {
    match outcome {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(error),
    }
}

fn moment(time: TimeOrNow) -> SystemTime {
    match time {
        TimeOrNow::SpecificTime(time) => time,
        TimeOrNow::Now => SystemTime::now(),
    }
}

impl Filesystem for Lossy {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = self.with(|shared| {
            let node = shared.tree.lookup(parent.0, name)?;
            look(shared, node)
        });
        answer_entry(found, reply);
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.with(|shared| look(shared, ino.0)) {
            Ok(attributes) => reply.attr(&TTL, &attributes),
            Err(error) => reply.error(error),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let changed = self.with(|shared| {
            if let Some(len) = size {
                shared.resize(ino.0, handle.map(u64::from), len)?;
            }
            let path = shared.tree.path(ino.0)?;
            if let Some(mode) = mode {
                fs::set_permissions(&path, Permissions::from_mode(mode & 0o7777))?;
            }
            if uid.is_some() || gid.is_some() {
                chown(&path, uid, gid)?;
            }
            let metadata = fs::symlink_metadata(&path)?;
            if (atime.is_some() || mtime.is_some()) && (metadata.is_file() || metadata.is_dir()) {
                let mut times = FileTimes::new();
                times = atime.map_or(times, |time| times.set_accessed(moment(time)));
                times = mtime.map_or(times, |time| times.set_modified(moment(time)));
                File::open(&path)?.set_times(times)?;
            }
            look(shared, ino.0)
        });
        match changed {
            Ok(attributes) => reply.attr(&TTL, &attributes),
            Err(error) => reply.error(error),
        }
    }

    fn mknod(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        self.make(|tree| tree.make_special(parent.0, name, mode & !umask), reply);
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, name: &OsStr, mode: u32, umask: u32, reply: ReplyEntry) {
        self.make(|tree| tree.make_folder(parent.0, name, mode & !umask), reply);
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer(self.with(|shared| shared.tree.remove(parent.0, name, false)), reply);
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer(self.with(|shared| shared.tree.remove(parent.0, name, true)), reply);
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let renamed = self.with(|shared| {
            if flags.intersects(RenameFlags::RENAME_EXCHANGE | RenameFlags::RENAME_WHITEOUT) {
                return Err(nix::errno::Errno::EINVAL.into());
            }
            let replace = !flags.contains(RenameFlags::RENAME_NOREPLACE);
            shared.tree.rename((parent.0, name), (newparent.0, newname), replace)
        });
        answer(renamed, reply);
    }

    fn create(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        let made = self.with(|shared| {
            let (node, handle) = shared.make_file(parent.0, name, mode & !umask)?;
            Ok((look(shared, node)?, FileHandle(handle)))
        });
        match made {
            Ok((attributes, handle)) => {
                reply.created(&TTL, &attributes, Generation(0), handle, FopenFlags::empty())
            }
            Err(error) => reply.error(error),
        }
    }

    fn open(&self, _: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.with(|shared| shared.open_file(ino.0)) {
            Ok(handle) => reply.opened(FileHandle(handle), FopenFlags::empty()),
            Err(error) => reply.error(error),
        }
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let read = self.with(|shared| {
            let file = shared.file(ino.0, Some(handle.0))?;
            let mut buffer = vec![0; size as usize];
            let mut filled = 0;
            while filled < buffer.len() {
                match file.read_at(&mut buffer[filled..], offset + filled as u64)? {
                    0 => break,
                    count => filled += count,
                }
            }
            buffer.truncate(filled);
            Ok(buffer)
        });
        match read {
            Ok(bytes) => reply.data(&bytes),
            Err(error) => reply.error(error),
        }
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.with(|shared| shared.write(ino.0, handle.0, offset, data)) {
            Ok(()) => reply.written(u32::try_from(data.len()).unwrap_or(0)),
            Err(error) => reply.error(error),
        }
    }

    fn release(
        &self,
        _: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.lock().close(handle.0);
        reply.ok();
    }

    fn fsync(&self, _: &Request, ino: INodeNo, _handle: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        answer(self.with(|shared| shared.sync(ino.0)), reply);
    }

    fn opendir(&self, _: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.with(|shared| shared.open_folder(ino.0)) {
            Ok(handle) => reply.opened(FileHandle(handle), FopenFlags::empty()),
            Err(error) => reply.error(error),
        }
    }

    fn readdir(&self, _: &Request, ino: INodeNo, handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let shared = self.lock();
        let Some(entries) = shared.entries(handle.0) else { return reply.error(Errno::EBADF) };
        let dots = [".", ".."].map(|name| (ino.0, FileType::Directory, OsString::from(name)));
        let all = entries.iter().map(|(node, of, name)| (*node, kind(*of), name.clone()));
        let rest = dots.into_iter().chain(all).zip(1..).skip(usize::try_from(offset).unwrap_or(usize::MAX));
        for ((node, kind, name), next) in rest {
            if reply.add(INodeNo(node), next, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(&self, _: &Request, _: INodeNo, handle: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        self.lock().close(handle.0);
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, ino: INodeNo, _: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        let synced = self.with(|shared| {
            shared.faults.sync()?;
            shared.tree.sync_folder(ino.0)
        });
        answer(synced, reply);
    }

    fn statfs(&self, _: &Request, ino: INodeNo, reply: ReplyStatfs) {
        let found = self.with(|shared| {
            let free = u64::from(!shared.faults.no_space);
            Ok((nix::sys::statvfs::statvfs(&shared.tree.path(ino.0)?)?, free))
        });
        match found {
            Ok((stat, free)) => reply.statfs(
                stat.blocks(),
                stat.blocks_free() * free,
                stat.blocks_available() * free,
                stat.files(),
                stat.files_free(),
                u32::try_from(stat.block_size()).unwrap_or(4096),
                255,
                u32::try_from(stat.fragment_size()).unwrap_or(4096),
            ),
            Err(error) => reply.error(error),
        }
    }

    fn fallocate(
        &self,
        _: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        answer(self.with(|shared| shared.allocate(ino.0, handle.0, offset, length, mode)), reply);
    }

    fn lseek(
        &self,
        _: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let found = self.with(|shared| {
            let whence = match whence {
                nix::libc::SEEK_DATA => Whence::SeekData,
                nix::libc::SEEK_HOLE => Whence::SeekHole,
                _ => return Err(nix::errno::Errno::EINVAL.into()),
            };
            Ok(lseek(&*shared.file(ino.0, Some(handle.0))?, offset, whence)?)
        });
        match found {
            Ok(offset) => reply.offset(offset),
            Err(error) => reply.error(error),
        }
    }
}
