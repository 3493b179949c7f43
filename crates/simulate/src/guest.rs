//! A VM as QEMU runs it: disks, dirty bitmaps, moments fixed over all disks, and a process that can die.
//!
//! What the bitmaps are for, and what is done to them when, is the product's (`model::bitmaps`); that they do
//! what QEMU's do is ours: they record while they are enabled, a transaction changes all disks or none, they are
//! in memory alone and gone with the process, and a scratch that is full ends the fixed moment, not the guest.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use model::bitmaps::{self, Ours, Step};
use model::{BLOCK_BYTES, DiskName, LogNumber, Timestamp, VmId};

use crate::history::{History, Moment, SECTOR_BYTES, State};
use crate::truth::Truth;

/// Sectors of a block that a bitmap has one bit for.
const BLOCK_SECTORS: usize = BLOCK_BYTES as usize / SECTOR_BYTES;

#[derive(Debug, Default, Clone)]
struct Bitmap {
    recording: bool,
    blocks: BTreeSet<usize>,
}

#[derive(Debug)]
struct Disk {
    name: DiskName,
    bitmaps: BTreeMap<LogNumber, Bitmap>,
    /// What has changed since reading ahead began, while it is noted.
    again: Option<Bitmap>,
    /// The sizes that it had before, in blocks.
    had: BTreeSet<usize>,
    /// It has shrunk since it was last read from its start.
    shrunk: bool,
}

/// A moment that is fixed.
#[derive(Debug)]
struct Fixed {
    id: u64,
    state: Arc<State>,
    base: Option<LogNumber>,
    /// Blocks whose bytes at the moment the scratch keeps.
    kept: BTreeSet<(usize, usize)>,
    broken: bool,
}

/// A VM and the process that runs it; clones share it.
#[derive(Debug, Clone)]
pub struct SimVm(Arc<Mutex<Machine>>);

/// The VM.
#[derive(Debug)]
pub struct Machine {
    /// Its id; made by the primary, known once it is protected.
    pub id: Option<VmId>,
    /// What it has written.
    pub history: History,
    /// Which process runs it.
    pub process: u64,
    /// How many blocks the scratch may keep.
    pub scratch_blocks: usize,
    /// So many of the next commands fail.
    pub failing: u32,
    /// Whether its agent can bring the file systems to rest.
    pub freezes: bool,
    disks: Vec<Disk>,
    fixed: Option<Fixed>,
    moments: u64,
}

impl SimVm {
    /// A VM with disks of so many blocks.
    #[must_use]
    pub fn new(blocks: &[usize]) -> Self {
        let sectors: Vec<usize> = blocks.iter().map(|blocks| blocks * BLOCK_SECTORS).collect();
        let disk = |place: usize| Disk {
            name: format!("vd{}", char::from(b'a' + place as u8)).parse().expect("a plain name"),
            bitmaps: BTreeMap::new(),
            again: None,
            had: BTreeSet::new(),
            shrunk: false,
        };
        Self(Arc::new(Mutex::new(Machine {
            id: None,
            history: History::new(&sectors),
            process: 0,
            scratch_blocks: usize::MAX,
            failing: 0,
            freezes: true,
            disks: (0..blocks.len()).map(disk).collect(),
            fixed: None,
            moments: 0,
        })))
    }

    /// Looks at it, or changes it.
    pub fn lock(&self) -> MutexGuard<'_, Machine> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Machine {
    /// How many disks it has.
    #[must_use]
    pub fn disk_count(&self) -> usize {
        self.disks.len()
    }

    /// The name of a disk: of its node too.
    #[must_use]
    pub fn name(&self, disk: usize) -> &DiskName {
        &self.disks[disk].name
    }

    /// The place of the disk of this name.
    #[must_use]
    pub fn place(&self, name: &str) -> Option<usize> {
        self.disks.iter().position(|disk| disk.name.as_str() == name)
    }

    /// Its size in bytes.
    #[must_use]
    pub fn bytes(&self, disk: usize) -> u64 {
        self.history.now().bytes(disk)
    }

    /// The guest writes some sectors.
    pub fn write(&mut self, disk: usize, sector: usize, count: usize, zeros: bool) {
        let end = self.history.now().disks[disk].len();
        let sectors = sector.min(end)..(sector + count).min(end);
        if sectors.is_empty() {
            return;
        }
        let blocks = sectors.start / BLOCK_SECTORS..sectors.end.div_ceil(BLOCK_SECTORS);
        let Disk { bitmaps, again, .. } = &mut self.disks[disk];
        for bitmap in bitmaps.values_mut().chain(again).filter(|bitmap| bitmap.recording) {
            bitmap.blocks.extend(blocks.clone());
        }
        if let Some(fixed) = &mut self.fixed {
            fixed.kept.extend(blocks.map(|block| (disk, block)));
            fixed.broken |= fixed.kept.len() > self.scratch_blocks;
        }
        self.history.write(disk, sectors, zeros);
    }

    /// Gives a disk so many blocks. QEMU refuses that while a moment is fixed. No disk comes back to a size that it
    /// had, and none that has shrunk grows before it was read anew: of one that does so between two cycles QEMU's
    /// bitmaps do not tell.
    pub fn resize(&mut self, disk: usize, blocks: usize) -> bool {
        let now = self.history.now().disks[disk].len() / BLOCK_SECTORS;
        let Disk { bitmaps, had, again, shrunk, .. } = &mut self.disks[disk];
        if self.fixed.is_some() || blocks == now || had.contains(&blocks) || (*shrunk && blocks > now) {
            return false;
        }
        had.insert(now);
        *shrunk |= blocks < now;
        bitmaps.values_mut().chain(again).for_each(|bitmap| bitmap.blocks.retain(|block| *block < blocks));
        self.history.resize(disk, blocks * BLOCK_SECTORS);
        true
    }

    /// The process dies and the VM is started again: the disks are there, everything in memory is gone.
    pub fn restart(&mut self) {
        self.process += 1;
        self.fixed = None;
        self.disks.iter_mut().for_each(|disk| {
            disk.bitmaps.clear();
            disk.again = None;
        });
    }

    /// Begins to note what changes from now on, and gives what has changed before, of each disk. None where there is no
    /// such bitmap.
    pub fn look_ahead(&mut self, base: LogNumber) -> Option<Vec<Vec<usize>>> {
        let seen = |disk: &Disk| Some(disk.bitmaps.get(&base)?.blocks.iter().copied().collect());
        let seen = self.disks.iter().map(seen).collect::<Option<_>>()?;
        self.forget_ahead();
        self.disks
            .iter_mut()
            .for_each(|disk| disk.again = Some(Bitmap { recording: true, ..Bitmap::default() }));
        Some(seen)
    }

    /// Ends what reading ahead has left.
    pub fn forget_ahead(&mut self) {
        self.disks.iter_mut().for_each(|disk| disk.again = None);
    }

    /// What has changed since reading ahead began stays as it is now. False where nothing was noted.
    pub fn end_again(&mut self) -> bool {
        self.disks.iter_mut().all(|disk| disk.again.as_mut().map(|again| again.recording = false).is_some())
    }

    /// The blocks that have changed since reading ahead began.
    #[must_use]
    pub fn again(&self, disk: usize) -> Option<Vec<usize>> {
        Some(self.disks[disk].again.as_ref()?.blocks.iter().copied().collect())
    }

    /// Our bitmaps on a disk.
    #[must_use]
    pub fn ours(&self, disk: usize) -> Vec<Ours> {
        let ours = |(k, bitmap): (&LogNumber, &Bitmap)| Ours {
            k: *k,
            recording: bitmap.recording,
            inconsistent: false,
            count_bytes: bitmap.blocks.len() as u64 * BLOCK_BYTES,
        };
        self.disks[disk].bitmaps.iter().map(ours).collect()
    }

    /// Changes the bitmaps of all disks in one transaction; false, and nothing is changed, if QEMU refuses any
    /// of it.
    pub fn transaction(&mut self, steps: impl Fn(usize, &[Ours]) -> Vec<Step>) -> bool {
        let exported = self.fixed.as_ref().and_then(|fixed| fixed.base);
        let mut changed: Vec<BTreeMap<LogNumber, Bitmap>> = Vec::new();
        for place in 0..self.disks.len() {
            let mut bitmaps = self.disks[place].bitmaps.clone();
            for step in steps(place, &self.ours(place)) {
                // A bitmap that is being read is busy.
                if exported.is_some_and(|exported| touches(step, exported)) || !take(&mut bitmaps, step) {
                    return false;
                }
            }
            changed.push(bitmaps);
        }
        for (disk, bitmaps) in self.disks.iter_mut().zip(changed) {
            disk.bitmaps = bitmaps;
        }
        true
    }

    /// Fixes a moment over all disks, those at the places `fresh` without `base`. None, and nothing is changed, where
    /// QEMU refuses.
    pub fn fix(
        &mut self,
        fresh: &[usize],
        base: Option<LogNumber>,
        next: LogNumber,
        at: Timestamp,
        frozen: bool,
        truth: &Truth,
    ) -> Option<u64> {
        if !self.transaction(|disk, _| bitmaps::at_moment(base.filter(|_| !fresh.contains(&disk)), next)) {
            return None;
        }
        if base.is_none() {
            self.disks.iter_mut().for_each(|disk| disk.shrunk = false);
        }
        self.moments += 1;
        let state = Arc::new(self.history.now().clone());
        self.fixed = Some(Fixed {
            id: self.moments,
            state: state.clone(),
            base,
            kept: BTreeSet::new(),
            broken: false,
        });
        if let Some(vm) = self.id {
            truth.fixed(vm, Moment { state, at, frozen });
        }
        Some(self.moments)
    }

    /// Ends a fixed moment, whichever there is or this one; the bitmaps stay.
    pub fn let_go(&mut self, id: Option<u64>) {
        if id.is_none_or(|id| self.fixed.as_ref().is_some_and(|fixed| fixed.id == id)) {
            self.fixed = None;
        }
    }

    /// The disks as they were at a moment that still is fixed; else whether its scratch is full.
    pub fn fixed(&self, id: u64) -> Result<Arc<State>, bool> {
        match &self.fixed {
            Some(fixed) if fixed.id == id && !fixed.broken => Ok(fixed.state.clone()),
            Some(fixed) if fixed.id == id => Err(true),
            _ => Err(false),
        }
    }

    /// The blocks that the bitmap of a fixed moment names, of one disk.
    #[must_use]
    pub fn dirty(&self, id: u64, disk: usize) -> Option<Vec<usize>> {
        let fixed = self.fixed.as_ref().filter(|fixed| fixed.id == id)?;
        let bitmap = self.disks[disk].bitmaps.get(&fixed.base?)?;
        Some(bitmap.blocks.iter().copied().collect())
    }
}

fn touches(step: Step, k: LogNumber) -> bool {
    match step {
        Step::Add(other) | Step::Enable(other) | Step::Disable(other) | Step::Remove(other) => other == k,
        Step::Merge { from, into } => from == k || into == k,
    }
}

/// One step on one disk, as QEMU takes it.
fn take(bitmaps: &mut BTreeMap<LogNumber, Bitmap>, step: Step) -> bool {
    let recording = |bitmaps: &mut BTreeMap<LogNumber, Bitmap>, k, recording| {
        bitmaps.get_mut(&k).map(|bitmap: &mut Bitmap| bitmap.recording = recording).is_some()
    };
    match step {
        Step::Add(k) if bitmaps.contains_key(&k) => false,
        Step::Add(k) => bitmaps.insert(k, Bitmap { recording: true, ..Bitmap::default() }).is_none(),
        Step::Merge { from, into } => {
            let Some(from) = bitmaps.get(&from).map(|bitmap| bitmap.blocks.clone()) else { return false };
            bitmaps.get_mut(&into).map(|bitmap| bitmap.blocks.extend(from)).is_some()
        }
        Step::Enable(k) => recording(bitmaps, k, true),
        Step::Disable(k) => recording(bitmaps, k, false),
        Step::Remove(k) => bitmaps.remove(&k).is_some(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bitmaps_record_what_is_written_from_their_moment_on() {
        let (vm, truth) = (SimVm::new(&[8, 8]), Truth::default());
        let mut vm = vm.lock();
        vm.write(0, 0, 8, false);
        let first = vm.fix(&[], None, LogNumber(1), Timestamp(1), false, &truth).unwrap();
        vm.write(1, 9, 1, false);
        assert_eq!(vm.fixed(first).unwrap().disks[1][9], 0);
        assert_eq!(vm.dirty(first, 0), None);
        vm.let_go(Some(first));
        let second = vm.fix(&[], Some(LogNumber(1)), LogNumber(2), Timestamp(2), false, &truth).unwrap();
        assert!(!vm.transaction(|_, _| vec![Step::Remove(LogNumber(1))]), "it is being read");
        assert_eq!((vm.dirty(second, 0), vm.dirty(second, 1)), (Some(vec![]), Some(vec![1])));
        vm.write(0, 63, 5, false);
        assert_eq!(vm.dirty(second, 0), Some(vec![]));
        assert!(vm.fix(&[], Some(LogNumber(7)), LogNumber(3), Timestamp(3), false, &truth).is_none());
        assert_eq!(vm.ours(0).len(), 2);
        vm.restart();
        assert!(vm.ours(0).is_empty() && vm.fixed(second) == Err(false));
    }

    #[test]
    fn a_scratch_that_is_full_ends_the_moment() {
        let (vm, truth) = (SimVm::new(&[8]), Truth::default());
        let mut vm = vm.lock();
        vm.scratch_blocks = 2;
        let moment = vm.fix(&[], None, LogNumber(1), Timestamp(1), false, &truth).unwrap();
        vm.write(0, 0, 16, false);
        vm.write(0, 3, 5, false);
        assert!(vm.fixed(moment).is_ok() && !vm.resize(0, 9));
        vm.write(0, 16, 1, false);
        assert_eq!(vm.fixed(moment), Err(true));
        vm.let_go(None);
        assert!(vm.resize(0, 9) && !vm.resize(0, 8) && vm.resize(0, 3) && !vm.resize(0, 9));
    }
}
