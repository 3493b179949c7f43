//! Files and folders by number, and what happens to them, in the backing folder and in the books.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::stat::{Mode, SFlag, mknod};

use crate::chance::Chance;
use crate::mount::Lost;
use crate::names::{Change, Journal, Name, NodeId};
use crate::unsynced::Unsynced;

/// The number of the folder that is mounted.
pub(crate) const ROOT: NodeId = 1;
/// In the backing folder: what was removed and may come back.
const REMOVED: &str = ".lossy-removed";

/// An entry of a folder.
pub(crate) type Entry = (NodeId, fs::FileType, OsString);

#[derive(Debug)]
struct Node {
    /// Where it is, if it has a name.
    at: Option<Name>,
    unsynced: Unsynced,
}

/// Everything below the backing folder.
#[derive(Debug)]
pub(crate) struct Tree {
    backing: PathBuf,
    nodes: HashMap<NodeId, Node>,
    by_name: HashMap<Name, NodeId>,
    next: NodeId,
    journal: Journal,
}

impl Tree {
    pub fn open(backing: &Path) -> io::Result<Self> {
        let removed = backing.join(REMOVED);
        // Of a run before this one: with nobody to remember it, it is gone.
        if removed.exists() {
            fs::remove_dir_all(&removed)?;
        }
        fs::create_dir(&removed)?;
        let nodes = HashMap::from([(ROOT, Node { at: None, unsynced: Unsynced::default() })]);
        let backing = backing.to_owned();
        Ok(Self { backing, nodes, by_name: HashMap::new(), next: ROOT + 1, journal: Journal::default() })
    }

    /// Where a node is in the backing folder.
    pub fn path(&self, node: NodeId) -> io::Result<PathBuf> {
        if node == ROOT {
            return Ok(self.backing.clone());
        }
        match &self.nodes.get(&node).ok_or(Errno::ENOENT)?.at {
            Some(at) => Ok(self.path(at.folder)?.join(&at.name)),
            None => Ok(self.removed(node)),
        }
    }

    pub fn metadata(&self, node: NodeId) -> io::Result<Metadata> {
        fs::symlink_metadata(self.path(node)?)
    }

    /// The node of a name that is there.
    pub fn lookup(&mut self, folder: NodeId, name: &OsStr) -> io::Result<NodeId> {
        let at = self.name(folder, name)?;
        fs::symlink_metadata(self.path(folder)?.join(name))?;
        if let Some(node) = self.by_name.get(&at) {
            return Ok(*node);
        }
        Ok(self.add(at))
    }

    /// The names in a folder.
    pub fn list(&mut self, folder: NodeId) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(self.path(folder)?)? {
            let entry = entry?;
            if folder != ROOT || entry.file_name() != REMOVED {
                entries.push((
                    self.lookup(folder, &entry.file_name())?,
                    entry.file_type()?,
                    entry.file_name(),
                ));
            }
        }
        Ok(entries)
    }

    /// Makes a file and opens it.
    pub fn make_file(&mut self, folder: NodeId, name: &OsStr, mode: u32) -> io::Result<(NodeId, File)> {
        let path = self.path(folder)?.join(name);
        let file =
            OpenOptions::new().read(true).write(true).create_new(true).mode(mode & 0o7777).open(path)?;
        Ok((self.made(folder, name)?, file))
    }

    pub fn make_folder(&mut self, folder: NodeId, name: &OsStr, mode: u32) -> io::Result<NodeId> {
        DirBuilder::new().mode(mode & 0o7777).create(self.path(folder)?.join(name))?;
        self.made(folder, name)
    }

    /// Makes a socket or a pipe, or a file in the old way.
    pub fn make_special(&mut self, folder: NodeId, name: &OsStr, mode: u32) -> io::Result<NodeId> {
        let kind = SFlag::from_bits_truncate(mode & SFlag::S_IFMT.bits());
        mknod(&self.path(folder)?.join(name), kind, Mode::from_bits_truncate(mode & 0o7777), 0)?;
        self.made(folder, name)
    }

    fn made(&mut self, folder: NodeId, name: &OsStr) -> io::Result<NodeId> {
        let at = self.name(folder, name)?;
        let node = self.add(at.clone());
        self.journal.push(Change::Made { at, node });
        Ok(node)
    }

    /// Removes a file, or a folder that is empty.
    pub fn remove(&mut self, folder: NodeId, name: &OsStr, is_folder: bool) -> io::Result<()> {
        let node = self.lookup(folder, name)?;
        let path = self.path(node)?;
        if is_folder && fs::read_dir(&path)?.next().is_some() {
            return Err(Errno::ENOTEMPTY.into());
        }
        let at = self.name(folder, name)?;
        self.take_away(node)?;
        self.journal.push(Change::Removed { at, node });
        Ok(())
    }

    pub fn rename(&mut self, from: (NodeId, &OsStr), to: (NodeId, &OsStr), replace: bool) -> io::Result<()> {
        let node = self.lookup(from.0, from.1)?;
        let (from, to) = (self.name(from.0, from.1)?, self.name(to.0, to.1)?);
        let replaced = match self.lookup(to.folder, &to.name) {
            Ok(there) if there == node => return Ok(()),
            Ok(_) if !replace => return Err(Errno::EEXIST.into()),
            Ok(there) => {
                self.check_replaceable(node, there)?;
                self.take_away(there)?;
                Some(there)
            }
            Err(_) => None,
        };
        self.move_to(node, to.clone())?;
        self.journal.push(Change::Renamed { from, to, node, replaced });
        Ok(())
    }

    fn check_replaceable(&self, node: NodeId, there: NodeId) -> io::Result<()> {
        match (self.metadata(node)?.is_dir(), self.metadata(there)?.is_dir()) {
            (true, false) => Err(Errno::ENOTDIR.into()),
            (false, true) => Err(Errno::EISDIR.into()),
            (true, true) if fs::read_dir(self.path(there)?)?.next().is_some() => Err(Errno::ENOTEMPTY.into()),
            _ => Ok(()),
        }
    }

    /// The books of a file's bytes; none if it can never come back by any name.
    pub fn unsynced(&mut self, node: NodeId) -> Option<&mut Unsynced> {
        self.nodes.get_mut(&node).map(|node| &mut node.unsynced)
    }

    /// Makes what happened in a folder durable.
    pub fn sync_folder(&mut self, folder: NodeId) -> io::Result<()> {
        for change in self.journal.sync(folder) {
            if let Some(node) = change.gone() {
                self.forget(node)?;
            }
        }
        Ok(())
    }

    /// The power is gone. The backing folder becomes what the disk has.
    pub fn lose(&mut self, chance: &mut Chance) -> io::Result<Lost> {
        let mut lost = Lost::default();
        let mut dirty: Vec<NodeId> =
            self.nodes.iter().filter(|(_, node)| !node.unsynced.is_clean()).map(|(id, _)| *id).collect();
        dirty.sort_unstable(); // a map's order must not decide what is lost
        for id in dirty {
            let file = OpenOptions::new().read(true).write(true).open(self.path(id)?)?;
            let unsynced = self.unsynced(id).map(std::mem::take).unwrap_or_default();
            unsynced.lose(&file, chance, &mut lost)?;
        }
        let (taken_back, kept) = std::mem::take(&mut self.journal).lose(chance);
        lost.names_kept = kept;
        for change in taken_back {
            self.take_back(change)?;
            lost.names += 1;
        }
        fs::remove_dir_all(self.backing.join(REMOVED))?;
        Ok(lost)
    }

    fn take_back(&mut self, change: Change) -> io::Result<()> {
        match change {
            Change::Made { node, .. } => self.take_away(node),
            Change::Removed { at, node } => self.move_to(node, at),
            Change::Renamed { from, to, node, replaced } => {
                self.move_to(node, from)?;
                replaced.map_or(Ok(()), |there| self.move_to(there, to))
            }
        }
    }

    fn name(&self, folder: NodeId, name: &OsStr) -> io::Result<Name> {
        if folder == ROOT && name == REMOVED {
            return Err(Errno::ENOENT.into());
        }
        Ok(Name { folder, name: name.to_owned() })
    }

    fn add(&mut self, at: Name) -> NodeId {
        let node = self.next;
        self.next += 1;
        self.by_name.insert(at.clone(), node);
        self.nodes.insert(node, Node { at: Some(at), unsynced: Unsynced::default() });
        node
    }

    fn removed(&self, node: NodeId) -> PathBuf {
        self.backing.join(REMOVED).join(node.to_string())
    }

    /// Takes a node out of the tree; it stays aside.
    fn take_away(&mut self, node: NodeId) -> io::Result<()> {
        fs::rename(self.path(node)?, self.removed(node))?;
        if let Some(at) = self.nodes.get_mut(&node).and_then(|node| node.at.take()) {
            self.by_name.remove(&at);
        }
        Ok(())
    }

    fn move_to(&mut self, node: NodeId, to: Name) -> io::Result<()> {
        fs::rename(self.path(node)?, self.path(to.folder)?.join(&to.name))?;
        let known = self.nodes.get_mut(&node).ok_or(Errno::ENOENT)?;
        if let Some(at) = known.at.replace(to.clone()) {
            self.by_name.remove(&at);
        }
        self.by_name.insert(to, node);
        Ok(())
    }

    /// Nothing brings it back any more. Who has it open goes on with it.
    fn forget(&mut self, node: NodeId) -> io::Result<()> {
        let path = self.removed(node);
        if self.nodes.get(&node).is_some_and(|node| node.at.is_some()) {
            return Ok(());
        }
        match fs::symlink_metadata(&path)?.is_dir() {
            true => fs::remove_dir(&path)?,
            false => fs::remove_file(&path)?,
        }
        self.nodes.remove(&node);
        Ok(())
    }
}
