//! A folder: names that are durable, names that are seen, and what was done in between.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};

use super::node::Loss;
use crate::chance::Chance;

#[derive(Debug, Clone)]
enum Change {
    Put {
        name: OsString,
        node: usize,
    },
    Remove {
        name: OsString,
    },
    /// Within one folder a rename is one change.
    Move {
        from: OsString,
        to: OsString,
        node: usize,
    },
}

#[derive(Debug, Default)]
pub(super) struct FolderNode {
    now: BTreeMap<OsString, usize>,
    durable: BTreeMap<OsString, usize>,
    pending: Vec<Change>,
}

impl FolderNode {
    pub fn get(&self, name: &OsStr) -> Option<usize> {
        self.now.get(name).copied()
    }

    pub fn entries(&self) -> impl Iterator<Item = (&OsString, usize)> {
        self.now.iter().map(|(name, node)| (name, *node))
    }

    /// Every node that has a name here, or may have one again after a power cut.
    pub fn known(&self) -> impl Iterator<Item = usize> {
        let pending = self.pending.iter().filter_map(|change| match change {
            Change::Put { node, .. } | Change::Move { node, .. } => Some(*node),
            Change::Remove { .. } => None,
        });
        self.now.values().chain(self.durable.values()).copied().chain(pending)
    }

    pub fn put(&mut self, name: OsString, node: usize) {
        self.change(Change::Put { name, node });
    }

    pub fn remove(&mut self, name: &OsStr) {
        self.change(Change::Remove { name: name.to_owned() });
    }

    pub fn rename(&mut self, from: &OsStr, to: OsString, node: usize) {
        self.change(Change::Move { from: from.to_owned(), to, node });
    }

    fn change(&mut self, change: Change) {
        apply(&change, &mut self.now);
        self.pending.push(change);
    }

    pub fn sync(&mut self) {
        self.durable.clone_from(&self.now);
        self.pending.clear();
    }

    /// What a power cut leaves.
    pub fn settle(&mut self, loss: Loss, chance: &mut Chance) {
        let kept: Vec<Change> = match loss {
            Loss::Nothing => return,
            Loss::Everything => Vec::new(),
            Loss::Suffix => {
                let kept = chance.place(self.pending.len() + 1);
                self.pending.drain(..).take(kept).collect()
            }
            Loss::Pages | Loss::Sectors => self.pending.drain(..).filter(|_| chance.one_in(2)).collect(),
        };
        kept.iter().for_each(|change| apply(change, &mut self.durable));
        self.now.clone_from(&self.durable);
        self.pending.clear();
    }
}

fn apply(change: &Change, names: &mut BTreeMap<OsString, usize>) {
    match change {
        Change::Put { name, node } => drop(names.insert(name.clone(), *node)),
        Change::Remove { name } => drop(names.remove(name)),
        Change::Move { from, to, node } => {
            // A name that another survivor has put elsewhere is not this change's to take away.
            if names.get(from) == Some(node) {
                names.remove(from);
            }
            names.insert(to.clone(), *node);
        }
    }
}
