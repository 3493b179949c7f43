//! Names that were made, removed or changed since their folders were synced.
//!
//! A change *rests on* an earlier one that has to do with the same name, and a change within a folder on the
//! making of that folder. When power is lost, a change stays only if all that it rests on stay, so that what
//! is taken back can be taken back newest first.

use std::ffi::OsString;

use crate::chance::Chance;

/// A file or folder, whatever it is called.
pub(crate) type NodeId = u64;

/// A name in a folder.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Name {
    pub folder: NodeId,
    pub name: OsString,
}

/// One change; it is on the disk as a whole or not at all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    Made { at: Name, node: NodeId },
    Removed { at: Name, node: NodeId },
    Renamed { from: Name, to: Name, node: NodeId, replaced: Option<NodeId> },
}

impl Change {
    fn names(&self) -> impl Iterator<Item = &Name> {
        let (one, other) = match self {
            Self::Made { at, .. } | Self::Removed { at, .. } => (at, None),
            Self::Renamed { from, to, .. } => (from, Some(to)),
        };
        std::iter::once(one).chain(other)
    }

    fn is_in(&self, folder: NodeId) -> bool {
        self.names().any(|name| name.folder == folder)
    }

    /// What is gone from the tree by it.
    pub fn gone(&self) -> Option<NodeId> {
        match self {
            Self::Made { .. } => None,
            Self::Removed { node, .. } => Some(*node),
            Self::Renamed { replaced, .. } => *replaced,
        }
    }

    fn shares_a_name_with(&self, earlier: &Self) -> bool {
        self.names().any(|name| earlier.names().any(|other| other == name))
    }

    /// A folder can be removed only after what was in it.
    fn empties(&self, earlier: &Self) -> bool {
        self.gone().is_some_and(|folder| earlier.is_in(folder))
    }

    fn is_in_the_folder_made_by(&self, earlier: &Self) -> bool {
        matches!(earlier, Self::Made { node, .. } if self.is_in(*node))
    }

    fn rests_on(&self, earlier: &Self) -> bool {
        self.shares_a_name_with(earlier) || self.empties(earlier) || self.is_in_the_folder_made_by(earlier)
    }
}

#[derive(Debug)]
struct Pending {
    change: Change,
    synced: bool,
}

/// The changes that are not settled, oldest first.
#[derive(Debug, Default)]
pub(crate) struct Journal(Vec<Pending>);

impl Journal {
    pub fn push(&mut self, change: Change) {
        self.0.push(Pending { change, synced: false });
    }

    /// A folder was synced. Gives the changes that nothing can take back any more.
    pub fn sync(&mut self, folder: NodeId) -> Vec<Change> {
        for place in (0..self.0.len()).rev() {
            let (earlier, rest) = self.0.split_at_mut(place);
            let Some(this) = rest.first_mut() else { continue };
            this.synced |= this.change.is_in(folder);
            if !this.synced {
                continue;
            }
            // The same name's past goes with it. That the folder itself has a durable name is not implied.
            for before in earlier {
                before.synced |=
                    this.change.shares_a_name_with(&before.change) || this.change.empties(&before.change);
            }
        }
        self.settle()
    }

    fn settle(&mut self) -> Vec<Change> {
        let mut settled = Vec::new();
        let mut left: Vec<Pending> = Vec::new();
        for pending in std::mem::take(&mut self.0) {
            let rests = left.iter().any(|earlier| pending.change.rests_on(&earlier.change));
            match pending.synced && !rests {
                true => settled.push(pending.change),
                false => left.push(pending),
            }
        }
        self.0 = left;
        settled
    }

    /// The power is gone: the changes to take back, newest first, and how many stay.
    pub fn lose(self, chance: &mut Chance) -> (Vec<Change>, usize) {
        // None, all, those before a moment (as a journal does it), or each by itself.
        let mood = chance.below(4);
        let before = chance.below(self.0.len() as u64 + 1);
        let mut taken_back: Vec<Change> = Vec::new();
        let mut kept = 0;
        for (place, Pending { change, synced }) in self.0.into_iter().enumerate() {
            let lucky = match mood {
                0 => false,
                1 => true,
                2 => (place as u64) < before,
                _ => chance.percent(50),
            };
            let rests_on_lost = taken_back.iter().any(|earlier| change.rests_on(earlier));
            if (synced || lucky) && !rests_on_lost {
                kept += 1;
            } else {
                taken_back.push(change);
            }
        }
        taken_back.reverse();
        (taken_back, kept)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(folder: NodeId, name: &str) -> Name {
        Name { folder, name: name.into() }
    }

    fn made(folder: NodeId, at: &str, node: NodeId) -> Change {
        Change::Made { at: name(folder, at), node }
    }

    fn renamed(from: (NodeId, &str), to: (NodeId, &str), node: NodeId) -> Change {
        Change::Renamed { from: name(from.0, from.1), to: name(to.0, to.1), node, replaced: None }
    }

    fn journal(changes: &[Change]) -> Journal {
        let mut journal = Journal::default();
        changes.iter().cloned().for_each(|change| journal.push(change));
        journal
    }

    /// What may be taken back, over many seeds.
    fn outcomes(changes: &[Change], synced: &[NodeId]) -> Vec<Vec<Change>> {
        let mut found: Vec<Vec<Change>> = Vec::new();
        for seed in 0..500 {
            let mut journal = journal(changes);
            for folder in synced {
                journal.sync(*folder);
            }
            let (taken_back, _) = journal.lose(&mut Chance::new(seed));
            if !found.contains(&taken_back) {
                found.push(taken_back);
            }
        }
        found
    }

    #[test]
    fn what_is_not_synced_may_stay_or_go() {
        let (a, b) = (made(1, "a", 2), made(1, "b", 3));
        assert_eq!(outcomes(&[a.clone(), b.clone()], &[]).len(), 4);
        assert_eq!(outcomes(&[a, b], &[1]), [Vec::new()]);
    }

    #[test]
    fn a_rename_never_outlives_the_making_of_its_file() {
        let changes = [made(1, "new", 3), renamed((1, "new"), (2, "log"), 3)];
        for taken_back in outcomes(&changes, &[]) {
            assert!(taken_back != [changes[0].clone()], "the file is there and was never made");
        }
        // Synced where it went to, it is there, made and all.
        assert_eq!(outcomes(&changes, &[2]), [Vec::new()]);
    }

    #[test]
    fn a_folder_that_was_synced_and_whose_own_name_was_not_can_be_lost_with_all_in_it() {
        let changes = [made(1, "folder", 5), made(5, "file", 6)];
        let found = outcomes(&changes, &[5]);
        let all_gone = vec![changes[1].clone(), changes[0].clone()];
        assert!(found.contains(&all_gone) && found.contains(&Vec::new()) && found.len() == 2, "{found:?}");
        assert_eq!(outcomes(&changes, &[1, 5]), [Vec::new()]);
        assert_eq!(outcomes(&changes, &[5, 1]), [Vec::new()]);
    }

    #[test]
    fn settled_changes_are_told_so_that_what_they_removed_can_go() {
        let removed = Change::Removed { at: name(1, "a"), node: 2 };
        let mut journal = journal(&[made(1, "a", 2), removed.clone(), made(9, "other", 8)]);
        assert_eq!(journal.sync(1), [made(1, "a", 2), removed]);
        assert_eq!(journal.0.len(), 1);
    }
}
