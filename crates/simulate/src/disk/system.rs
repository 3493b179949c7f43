//! The disk as the store sees it.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use files::{Entry, File, FileSystem, Metadata, Open};

use super::folder::FolderNode;
use super::node::FileNode;
use super::{Class, Node, SimDisk, State};

/// What is free while the disk is not full.
const FREE_BYTES: u64 = 1 << 40;

/// An open file; it goes on being one after it was removed, and stops being one when the site dies.
#[derive(Debug)]
struct SimFile {
    disk: SimDisk,
    node: usize,
    boot: u64,
    path: PathBuf,
}

impl SimDisk {
    fn boot(&self) -> u64 {
        self.0.power.boots()
    }

    fn change<T>(&self, class: Class, act: impl FnOnce(&mut State) -> io::Result<T>) -> io::Result<T> {
        self.step(self.boot(), class, act, |_| ())
    }

    fn opened(&self, node: usize, path: &Path) -> Arc<dyn File> {
        Arc::new(SimFile { disk: self.clone(), node, boot: self.boot(), path: path.to_path_buf() })
    }
}

impl State {
    fn room(&self, observed: bool) -> io::Result<()> {
        if self.full && !observed { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    fn is_folder(&self, node: usize) -> bool {
        matches!(self.nodes[node], Some(Node::Folder(_)))
    }
}

impl FileSystem for SimDisk {
    fn open(&self, path: &Path, how: Open) -> io::Result<Arc<dyn File>> {
        let found = self.look(self.boot(), |state| match state.find(path) {
            Ok(node) if state.is_folder(node) => Err(io::ErrorKind::IsADirectory.into()),
            Ok(node) => Ok(Some(node)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        })?;
        match (found, how) {
            (Some(_), Open::CreateNew) => Err(io::ErrorKind::AlreadyExists.into()),
            (Some(node), _) => Ok(self.opened(node, path)),
            (None, Open::Read | Open::ReadWrite) => Err(io::ErrorKind::NotFound.into()),
            (None, Open::Create | Open::CreateNew) => {
                let observed = self.0.power.is_observed();
                let node = self.change(Class::Write, |state| {
                    state.room(observed)?;
                    let (folder, name) = state.parent(path)?;
                    let node = state.add(Node::File(FileNode::default()));
                    state.folder(folder)?.put(name, node);
                    Ok(node)
                })?;
                Ok(self.opened(node, path))
            }
        }
    }

    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        let (mut made, observed) = (PathBuf::from("/"), self.0.power.is_observed());
        for name in super::names(path) {
            made.push(name);
            match self.look(self.boot(), |state| state.find(&made).map(|node| state.is_folder(node))) {
                Ok(true) => continue,
                Ok(false) => return Err(io::ErrorKind::AlreadyExists.into()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
            self.change(Class::Write, |state| {
                state.room(observed)?;
                let (folder, name) = state.parent(&made)?;
                let node = state.add(Node::Folder(FolderNode::default()));
                state.folder(folder)?.put(name, node);
                Ok(())
            })?;
        }
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.change(Class::Write, |state| {
            let node = state.find(from)?;
            let ((old, old_name), (new, new_name)) = (state.parent(from)?, state.parent(to)?);
            if old == new {
                state.folder(old)?.rename(&old_name, new_name, node);
            } else {
                state.folder(new)?.put(new_name, node);
                state.folder(old)?.remove(&old_name);
            }
            Ok(())
        })
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.change(Class::Write, |state| {
            if state.is_folder(state.find(path)?) {
                return Err(io::ErrorKind::IsADirectory.into());
            }
            let (folder, name) = state.parent(path)?;
            state.folder(folder)?.remove(&name);
            Ok(())
        })
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        // From the leaves up: each removal is a change of its own, and a crash may come between any two.
        for entry in self.read_dir(path)? {
            let below = path.join(&entry.name);
            if entry.is_dir { self.remove_dir_all(&below)? } else { self.remove_file(&below)? }
        }
        self.change(Class::Write, |state| {
            let (folder, name) = state.parent(path)?;
            state.folder(folder)?.remove(&name);
            Ok(())
        })
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.change(Class::Sync, |state| {
            let node = state.find(path)?;
            state.folder(node)?.sync();
            Ok(())
        })
    }

    fn read_dir(&self, path: &Path) -> io::Result<Vec<Entry>> {
        self.look(self.boot(), |state| {
            let node = state.find(path)?;
            let Some(Node::Folder(folder)) = &state.nodes[node] else {
                return Err(io::ErrorKind::NotADirectory.into());
            };
            let entry = |(name, node): (&std::ffi::OsString, usize)| Entry {
                name: name.clone(),
                is_dir: state.is_folder(node),
            };
            Ok(folder.entries().map(entry).collect())
        })
    }

    fn metadata(&self, path: &Path) -> io::Result<Metadata> {
        self.look(self.boot(), |state| {
            let node = state.find(path)?;
            Ok(match &state.nodes[node] {
                Some(Node::File(file)) => {
                    Metadata { len: file.len(), allocated_bytes: file.allocated_bytes(), is_file: true }
                }
                _ => Metadata { len: 0, allocated_bytes: 0, is_file: false },
            })
        })
    }

    fn free_bytes(&self, _path: &Path) -> io::Result<u64> {
        self.look(self.boot(), |state| Ok(if state.full { 0 } else { FREE_BYTES }))
    }
}

impl SimFile {
    fn change<T>(&self, act: impl FnOnce(&mut FileNode, bool) -> io::Result<T>) -> io::Result<T> {
        self.disk.run_meanwhile(&self.path);
        let observed = self.disk.0.power.is_observed();
        let act = |state: &mut State| {
            let full = state.full && !observed;
            act(state.file(self.node)?, full)
        };
        self.disk.step(self.boot, Class::Write, act, |_| ())
    }

    fn look<T>(&self, act: impl FnOnce(&FileNode) -> T) -> io::Result<T> {
        self.disk.look(self.boot, |state| state.file_at(self.node).map(act))
    }
}

impl File for SimFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.look(|file| file.read(buf, offset))
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        self.change(|file, full| {
            if full && file.grows_by(buf, offset) {
                return Err(io::ErrorKind::StorageFull.into());
            }
            file.write(buf, offset)?;
            Ok(buf.len())
        })
    }

    fn len(&self) -> io::Result<u64> {
        self.look(FileNode::len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(|file, _| file.set_len(len))
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        self.change(|file, _| {
            file.zero(offset..offset.saturating_add(len));
            Ok(())
        })
    }

    fn data_ranges(&self, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        self.look(|file| file.data_ranges(range))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.disk.run_meanwhile(&self.path);
        let node = self.node;
        self.disk.step(
            self.boot,
            Class::Sync,
            |state| state.file(node).map(FileNode::sync),
            |state| {
                let State { nodes, chance, .. } = state;
                if let Some(Some(Node::File(file))) = nodes.get_mut(node) {
                    file.fail_sync(chance);
                }
            },
        )
    }

    fn sync_all(&self) -> io::Result<()> {
        self.sync_data()
    }
}
