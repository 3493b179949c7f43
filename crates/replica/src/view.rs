//! A view: the disks as they were at one recovery point, read through the chain.

use std::ops::Range;
use std::sync::Arc;

use model::gate::{Access, Admission};
use model::{DiskName, LogId, LogNumber, PointInfo, VmId};
use steps::durable_step;

use crate::error::Result;
use crate::gate::{Admitted, Pin};
use crate::reader::{ChainReader, OpenFiles};
use crate::rows::{self, DiskSize};
use crate::store::Store;
use crate::vm::Vm;

/// The disks as they were at one recovery point. Only the gate's admission makes one.
///
/// Its point is pinned and its files are open as long as it lives; what arrives, is applied or merged meanwhile
/// changes no byte of it. It can be read from several threads at once.
pub struct ConsistentView {
    admission: Admission,
    pin: Pin,
    reader: Arc<ChainReader>,
    store: Store,
    /// The hold that the view was made of: the view is worth nothing once that has run out.
    hold: Option<String>,
}

impl Store {
    /// Opens the view that was admitted. From now on its point can be the parent of an incremental backup.
    pub fn open_view(&self, admitted: Admitted) -> Result<ConsistentView> {
        self.view(admitted.admission, admitted.pin, None)
    }

    pub(crate) fn view(
        &self,
        admission: Admission,
        pin: Pin,
        hold: Option<String>,
    ) -> Result<ConsistentView> {
        let (vm, PointInfo { id, number, .. }) = (pin.vm.id, pin.point);
        let files = {
            let state = pin.vm.live()?;
            pin.check_in(&state)?;
            OpenFiles::open(&state, number)?
        };
        let reader = files.into_reader(self.inner.config.view_cache_bytes)?;
        durable_step("replica::parent::noting");
        self.catalog().write(move |tx| rows::add_parent(tx, vm, id, number))?;
        durable_step("replica::parent::noted");
        Ok(ConsistentView { admission, pin, reader: Arc::new(reader), store: self.clone(), hold })
    }
}

impl ConsistentView {
    /// What the gate gave: whoever backs the view up has to show it.
    #[must_use]
    pub const fn admission(&self) -> &Admission {
        &self.admission
    }

    /// The VM.
    #[must_use]
    pub fn vm(&self) -> VmId {
        self.pin.vm.id
    }

    /// The recovery point.
    #[must_use]
    pub fn point(&self) -> PointInfo {
        self.pin.point
    }

    /// How it may be read: as a hold only through [`crate::Hold::view`].
    #[must_use]
    pub fn access(&self) -> Access {
        if self.hold.is_some() { Access::Hold } else { Access::Pinned }
    }

    /// The VM's disks at that point.
    #[must_use]
    pub fn disks(&self) -> Vec<DiskSize> {
        let disks = self.reader.disks().iter();
        disks.map(|disk| DiskSize { name: disk.name.clone(), size_bytes: disk.size_bytes }).collect()
    }

    /// The VM's definition.
    pub fn definition(&self) -> Result<serde_json::Value> {
        self.store.definition(self.vm())
    }

    /// Fills `buf` with a disk's bytes from `offset`; beyond its end they are zeros.
    pub fn read_at(&self, disk: &DiskName, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.reader.read_at(disk, offset, buf)?;
        // After the read: what was read before the view ended is right.
        self.pin.check()
    }

    /// What of a range of a disk is not certainly zeros, in order and joined.
    pub fn data_extents(&self, disk: &DiskName, range: Range<u64>) -> Result<Vec<Range<u64>>> {
        let found = self.reader.data_extents(disk, range)?;
        self.pin.check()?;
        Ok(found)
    }

    /// Where a disk may differ from what it was at the point `parent`; none if that cannot be told: it is
    /// newer than this one, was never read through a view of this chain, or was lost. Then all of the disk
    /// is to be read.
    ///
    /// By id, not by number: after a loss or a removal another chain can have the same numbers.
    pub fn changed_since(&self, disk: &DiskName, parent: LogId) -> Result<Option<Vec<Range<u64>>>> {
        match self.parent(parent)? {
            Some(number) => self.reader.changed_since(disk, number).map(Some),
            None => Ok(None),
        }
    }

    /// Whether [`Self::changed_since`] that point can be told.
    pub fn knows_changes_since(&self, parent: LogId) -> Result<bool> {
        Ok(self.parent(parent)?.is_some())
    }

    fn parent(&self, parent: LogId) -> Result<Option<LogNumber>> {
        let number = rows::parent(self.store.catalog(), self.vm(), parent)?;
        Ok(number.filter(|number| *number <= self.pin.point.number))
    }

    /// Whether everything that was read of it is the point's. To be asked after the last read and before a
    /// backup is listed.
    pub fn still_valid(&self) -> Result<()> {
        self.pin.check()?;
        match &self.hold {
            Some(hold) => self.store.check_hold(self.vm(), hold),
            None => Ok(()),
        }
    }
}

/// The newest durable state, all logs with it: what a resynchronization compares with. No view, because
/// it may be no point; it never leaves the store but as digests.
pub(crate) struct Newest {
    pub reader: Arc<ChainReader>,
    store: Store,
    vm: Arc<Vm>,
    head: LogNumber,
    epoch: u64,
}

impl Store {
    /// Opens the newest state, or takes the one of the last call if nothing has arrived since. While it
    /// lives no log newer than it is folded into the base.
    pub(crate) fn newest(&self, vm: &Arc<Vm>) -> Result<Newest> {
        let mut state = vm.live()?;
        let head = state.row.doc.head.number;
        let cached = state.newest.clone().filter(|(number, _)| *number == head);
        let files = match &cached {
            Some(_) => None,
            None => Some(OpenFiles::open(&state, head)?),
        };
        *state.pins.entry(head).or_insert(0) += 1;
        let epoch = state.epoch;
        drop(state);
        let unpin = |reader| Newest { reader, store: self.clone(), vm: vm.clone(), head, epoch };
        let reader = match (cached, files) {
            (Some((_, reader)), _) => return Ok(unpin(reader)),
            (None, Some(files)) => {
                files.into_reader(self.inner.config.view_cache_bytes).and_then(ChainReader::with_all_disks)
            }
            (None, None) => unreachable!("what is not there was opened"),
        };
        match reader {
            Ok(reader) => {
                let newest = unpin(Arc::new(reader));
                let mut state = vm.lock();
                if state.epoch == epoch && state.row.doc.head.number == head {
                    state.newest = Some((head, newest.reader.clone()));
                }
                drop(state);
                Ok(newest)
            }
            Err(error) => {
                vm.lock().unpin(epoch, head);
                Err(error)
            }
        }
    }
}

impl Drop for Newest {
    fn drop(&mut self) {
        self.vm.lock().unpin(self.epoch, self.head);
        self.store.wake(self.vm.id);
    }
}
