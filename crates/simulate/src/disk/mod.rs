//! A disk that does what disks may do.
//!
//! What was written is what is read, but what was not synced is at a power cut's mercy: of each file every
//! sector (or page) is, by chance and on its own, as it was after any of the writes since the last sync, which
//! is loss, tearing and reordering at once; so is the file's length, and so is every name that was made, moved
//! or removed since its folder was synced. A sync that fails drops what it was to write, and the next one
//! succeeds without it. Beside that: errors that pass and errors that last, no space, bits that rot.

mod fault;
mod folder;
mod node;
mod system;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use fault::{Class, DiskFault};
pub use node::Loss;

use crate::chance::Chance;
use crate::power::{Fate, Power, dead};
use folder::FolderNode;
use node::FileNode;

/// Called at writes and syncs of flat files: what else goes on while logs are folded in.
pub type Meanwhile = Box<dyn FnMut() + Send>;

/// A simulated disk; clones share it.
#[derive(Clone)]
pub struct SimDisk(Arc<Shared>);

struct Shared {
    power: Power,
    state: Mutex<State>,
    meanwhile: Mutex<Option<Meanwhile>>,
}

struct State {
    nodes: Vec<Option<Node>>,
    chance: Chance,
    faults: Vec<DiskFault>,
    full: bool,
}

enum Node {
    File(FileNode),
    Folder(FolderNode),
}

/// The root's place among the nodes.
const ROOT: usize = 0;

impl fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SimDisk")
    }
}

impl SimDisk {
    /// An empty disk.
    #[must_use]
    pub fn new(power: Power, seed: u64) -> Self {
        let state = State {
            nodes: vec![Some(Node::Folder(FolderNode::default()))],
            chance: Chance::new(seed),
            faults: Vec::new(),
            full: false,
        };
        Self(Arc::new(Shared { power, state: Mutex::new(state), meanwhile: Mutex::new(None) }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a power cut has left, as the next start finds it.
    pub fn settle(&self, loss: Loss) {
        let mut state = self.lock();
        let State { nodes, chance, .. } = &mut *state;
        for node in nodes.iter_mut().flatten() {
            match node {
                Node::File(file) => file.settle(loss, chance),
                Node::Folder(folder) => folder.settle(loss, chance),
            }
        }
        state.drop_unreachable();
    }

    /// Lets something go wrong from now on.
    pub fn inject(&self, fault: DiskFault) {
        self.lock().faults.push(fault);
    }

    /// Nothing goes wrong any more, and there is space.
    pub fn heal(&self) {
        let mut state = self.lock();
        state.faults.clear();
        state.full = false;
    }

    /// Whether there is no more space.
    pub fn set_full(&self, full: bool) {
        self.lock().full = full;
    }

    /// What happens while flat files are written.
    pub fn meanwhile(&self, hook: Option<Meanwhile>) {
        *self.0.meanwhile.lock().unwrap_or_else(PoisonError::into_inner) = hook;
    }

    /// Flips a bit of a file, in the cache and on the platter. False if there is no such byte.
    pub fn rot(&self, path: &Path, at: u64) -> bool {
        let mut state = self.lock();
        let found = state.find(path);
        match found.ok().and_then(|node| state.nodes[node].as_mut()) {
            Some(Node::File(file)) => file.rot(at),
            _ => false,
        }
    }

    /// The files below a folder, with their lengths.
    #[must_use]
    pub fn files_below(&self, folder: &Path) -> Vec<(PathBuf, u64)> {
        let state = self.lock();
        let mut found = Vec::new();
        if let Ok(node) = state.find(folder) {
            state.walk(node, folder, &mut found);
        }
        found
    }

    /// Runs what happens meanwhile, if that is wanted and not running already.
    fn run_meanwhile(&self, path: &Path) {
        let in_disks = path.parent().is_some_and(|folder| folder.ends_with("disks"));
        if !in_disks || self.0.power.is_observed() || self.0.power.is_down() {
            return;
        }
        let slot = || self.0.meanwhile.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(mut hook) = slot().take() else { return };
        hook();
        slot().get_or_insert(hook);
    }

    /// Takes a durable step, of a handle that was opened in life `boot`.
    fn step<T>(
        &self,
        boot: u64,
        class: Class,
        act: impl FnOnce(&mut State) -> io::Result<T>,
        failed: impl FnOnce(&mut State),
    ) -> io::Result<T> {
        let power = &self.0.power;
        if boot != power.boots() {
            return Err(dead());
        }
        let fate = power.step();
        if fate == Fate::DiesBefore {
            return Err(dead());
        }
        let outcome = {
            let mut state = self.lock();
            match state.trouble(class, power.is_observed()) {
                Some(error) => {
                    failed(&mut state);
                    Err(error)
                }
                None => act(&mut state),
            }
        };
        if fate == Fate::DiesAfter { Err(dead()) } else { outcome }
    }

    /// Looks at something; nothing changes.
    fn look<T>(&self, boot: u64, act: impl FnOnce(&State) -> io::Result<T>) -> io::Result<T> {
        let power = &self.0.power;
        if boot != power.boots() || power.is_down() {
            return Err(dead());
        }
        let mut state = self.lock();
        match state.trouble(Class::Read, power.is_observed()) {
            Some(error) => Err(error),
            None => act(&state),
        }
    }
}

impl State {
    fn trouble(&mut self, class: Class, observed: bool) -> Option<io::Error> {
        if observed {
            return None;
        }
        let struck = self.faults.iter_mut().any(|fault| fault.strikes(class));
        self.faults.retain(|fault| !fault.is_over());
        struck.then(|| io::Error::other("simulated I/O error"))
    }

    fn folder(&mut self, node: usize) -> io::Result<&mut FolderNode> {
        match self.nodes.get_mut(node) {
            Some(Some(Node::Folder(folder))) => Ok(folder),
            _ => Err(io::ErrorKind::NotADirectory.into()),
        }
    }

    fn file(&mut self, node: usize) -> io::Result<&mut FileNode> {
        match self.nodes.get_mut(node) {
            Some(Some(Node::File(file))) => Ok(file),
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn file_at(&self, node: usize) -> io::Result<&FileNode> {
        match self.nodes.get(node) {
            Some(Some(Node::File(file))) => Ok(file),
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// The node of a path.
    fn find(&self, path: &Path) -> io::Result<usize> {
        let mut at = ROOT;
        for name in names(path) {
            let Some(Some(Node::Folder(folder))) = self.nodes.get(at) else {
                return Err(io::ErrorKind::NotADirectory.into());
            };
            at = folder.get(name).ok_or(io::ErrorKind::NotFound)?;
        }
        Ok(at)
    }

    /// The folder that a path is in, and its name there.
    fn parent(&self, path: &Path) -> io::Result<(usize, std::ffi::OsString)> {
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
        Ok((self.find(path.parent().unwrap_or(Path::new("/")))?, name))
    }

    fn add(&mut self, node: Node) -> usize {
        self.nodes.push(Some(node));
        self.nodes.len() - 1
    }

    fn walk(&self, node: usize, path: &Path, found: &mut Vec<(PathBuf, u64)>) {
        match &self.nodes[node] {
            Some(Node::File(file)) => found.push((path.to_path_buf(), file.len())),
            Some(Node::Folder(folder)) => {
                folder.entries().for_each(|(name, node)| self.walk(node, &path.join(name), found));
            }
            None => {}
        }
    }

    /// After a crash nobody has a file open any more.
    fn drop_unreachable(&mut self) {
        let mut reached = vec![false; self.nodes.len()];
        let mut to_visit = vec![ROOT];
        while let Some(node) = to_visit.pop() {
            if std::mem::replace(&mut reached[node], true) {
                continue;
            }
            if let Some(Node::Folder(folder)) = &self.nodes[node] {
                to_visit.extend(folder.known());
            }
        }
        for (node, reached) in self.nodes.iter_mut().zip(reached) {
            if !reached {
                *node = None;
            }
        }
    }
}

/// The names of a path from the root on.
fn names(path: &Path) -> impl Iterator<Item = &std::ffi::OsStr> {
    path.components().filter_map(|part| match part {
        std::path::Component::Normal(name) => Some(name),
        _ => None,
    })
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
