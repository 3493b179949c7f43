//! The VM as the primary sees it.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use model::bitmaps;
use model::{BLOCK_BYTES, DiskName, LogNumber, Timestamp, Tracking};
use nbd::DirtyExtent;
use primary::ports::{AgentAddress, Ahead, Capture, CaptureRequest, DiskReader, Guest, Which};
use primary::{Failure, FailureCode, KnownDisk};

use super::{SimPorts, failure};
use crate::guest::{Machine, SimVm};
use crate::history::State;

/// A connection to a VM's process.
pub struct SimGuest {
    pub(super) vm: SimVm,
    pub(super) process: u64,
    pub(super) ports: SimPorts,
}

impl SimGuest {
    /// Runs a command: the others may go on before it and after it, and QEMU may be gone either time.
    async fn run<T>(&self, command: impl FnOnce(&mut Machine) -> Result<T, Failure>) -> Result<T, Failure> {
        self.ports.turns.pass().await;
        let outcome = {
            let mut machine = self.vm.lock();
            if machine.process != self.process {
                return Err(failure(FailureCode::QemuGone, "the connection to QEMU is gone"));
            }
            if machine.failing > 0 {
                machine.failing -= 1;
                return Err(failure(FailureCode::Qemu, "QEMU has not answered"));
            }
            command(&mut machine)
        };
        self.ports.turns.pass().await;
        outcome
    }

    async fn fix(
        &self,
        request: CaptureRequest<'_, KnownDisk>,
        freeze: bool,
    ) -> Result<(SimCapture, bool), Failure> {
        let (base, next, again) = (request.base, request.next, request.again);
        let places: Vec<Option<usize>> = {
            let machine = self.vm.lock();
            request.disks.iter().map(|disk| machine.place(&disk.node)).collect()
        };
        let fresh: Vec<usize> = request.fresh.iter().filter_map(|&place| places[place]).collect();
        let now = self.ports.clock.clone();
        let truth = self.ports.truth.clone();
        let fixed = self.run(move |machine| {
            if !again {
                machine.forget_ahead();
            }
            prepare(machine, &fresh, base)?;
            let frozen = freeze && machine.freezes;
            let refused = || failure(FailureCode::Qemu, "QEMU refused the transaction");
            let at = now.now();
            if again && !machine.end_again() {
                return Err(refused());
            }
            let id = machine.fix(&fresh, base, next, at, frozen, &truth).ok_or_else(refused)?;
            Ok((id, at, frozen))
        });
        let (id, moment, frozen) = fixed.await?;
        let places = places.into_iter().flatten().collect();
        let life = self.ports.power.boots();
        let ports = self.ports.clone();
        Ok((SimCapture { vm: self.vm.clone(), id, moment, places, life, ports }, frozen))
    }
}

/// Makes sure of the bitmaps, as the product's own preparation does: a run before this one may have been killed.
fn prepare(machine: &mut Machine, fresh: &[usize], base: Option<LogNumber>) -> Result<(), Failure> {
    machine.let_go(None);
    if let Some(base) = base {
        for disk in (0..machine.disk_count()).filter(|disk| !fresh.contains(disk)) {
            bitmaps::judge_repairable(machine.name(disk), &machine.ours(disk), base)
                .map_err(|why| failure(FailureCode::Qemu, why.to_string()))?;
        }
    }
    change(machine, |disk, found| bitmaps::repair(found, base.filter(|_| !fresh.contains(&disk))))
}

fn change(
    machine: &mut Machine,
    steps: impl Fn(usize, &[bitmaps::Ours]) -> Vec<bitmaps::Step>,
) -> Result<(), Failure> {
    if machine.transaction(steps) {
        return Ok(());
    }
    Err(failure(FailureCode::Qemu, "QEMU refused the transaction"))
}

fn known(machine: &Machine, disk: usize) -> KnownDisk {
    let name = machine.name(disk).clone();
    KnownDisk { node: name.to_string(), name, size_bytes: machine.bytes(disk), image: None, joining: None }
}

impl Guest for SimGuest {
    type Disk = KnownDisk;
    type Capture = SimCapture;
    type Ahead = SimAhead;

    fn is_alive(&self) -> bool {
        self.vm.lock().process == self.process
    }

    async fn disks(&self) -> Result<Vec<KnownDisk>, Failure> {
        self.run(|machine| Ok((0..machine.disk_count()).map(|disk| known(machine, disk)).collect())).await
    }

    async fn resolve(&self, nodes: &[String]) -> Result<Vec<KnownDisk>, Failure> {
        self.run(|machine| {
            let missing = || failure(FailureCode::Qemu, "QEMU has no such disk");
            let find =
                |node: &String| machine.place(node).map(|disk| known(machine, disk)).ok_or_else(missing);
            nodes.iter().map(find).collect()
        })
        .await
    }

    async fn is_quiet(&self) -> Result<bool, Failure> {
        Ok(false) // its guest never rests
    }

    async fn power_down(&self) -> Result<(), Failure> {
        Ok(())
    }

    async fn quit(&self) -> Result<(), Failure> {
        Ok(())
    }

    async fn definition(&self) -> Result<serde_json::Value, Failure> {
        self.run(|machine| Ok(serde_json::json!({ "disks": machine.disk_count() }))).await
    }

    async fn inspect(&self, disks: &[KnownDisk], since: LogNumber) -> Result<Tracking, Failure> {
        self.run(|machine| {
            let judge = |disk| bitmaps::judge(machine.name(disk), &machine.ours(disk), since);
            Ok(disks
                .iter()
                .filter_map(|disk| machine.place(&disk.node))
                .try_for_each(judge)
                .map_or_else(Tracking::Broken, |()| Tracking::Intact))
        })
        .await
    }

    async fn pending_bytes(&self, _disks: &[KnownDisk], since: LogNumber) -> Result<u64, Failure> {
        self.run(|machine| {
            let ours = (0..machine.disk_count()).flat_map(|disk| machine.ours(disk));
            Ok(ours.filter(|bitmap| bitmap.k >= since).map(|bitmap| bitmap.count_bytes).sum())
        })
        .await
    }

    async fn begin_ahead(&self, disks: &[KnownDisk], base: LogNumber) -> Result<SimAhead, Failure> {
        let shown = self.run(|machine| {
            let refused = || failure(FailureCode::Qemu, "QEMU refused the transaction");
            let mut seen = machine.look_ahead(base).ok_or_else(refused)?;
            let live = |disk: &KnownDisk| {
                let place = machine.place(&disk.node)?;
                Some((
                    place,
                    machine.name(place).clone(),
                    machine.bytes(place),
                    std::mem::take(&mut seen[place]),
                ))
            };
            disks.iter().map(live).collect::<Option<Vec<_>>>().ok_or_else(refused)
        });
        let reader = |(place, name, size_bytes, seen): (usize, DiskName, u64, Vec<usize>)| LiveReader {
            vm: self.vm.clone(),
            process: self.process,
            place,
            name,
            size_bytes,
            seen: Arc::new(seen),
            ports: self.ports.clone(),
        };
        Ok(SimAhead(shown.await?.into_iter().map(reader).collect()))
    }

    async fn end_ahead(&self, ahead: SimAhead) -> Result<(), Failure> {
        drop(ahead);
        self.run(|_| Ok(())).await
    }

    async fn begin_capture(&self, request: CaptureRequest<'_, KnownDisk>) -> Result<SimCapture, Failure> {
        self.fix(request, false).await.map(|(capture, _)| capture)
    }

    async fn begin_capture_frozen(
        &self,
        request: CaptureRequest<'_, KnownDisk>,
        _agent: &AgentAddress,
    ) -> Result<(SimCapture, Result<(), String>), Failure> {
        let (capture, frozen) = self.fix(request, true).await?;
        Ok((capture, if frozen { Ok(()) } else { Err("the agent does not answer".into()) }))
    }

    async fn end_reading(&self, capture: SimCapture) -> Result<(), Failure> {
        drop(capture);
        self.ports.turns.pass().await;
        Ok(())
    }

    async fn commit(
        &self,
        _disks: &[KnownDisk],
        base: Option<LogNumber>,
        next: LogNumber,
    ) -> Result<(), Failure> {
        self.run(|machine| {
            machine.forget_ahead();
            change(machine, |_, found| bitmaps::after_durable(found, base, next))
        })
        .await
    }

    async fn give_back(&self, _disks: &[KnownDisk], base: Option<LogNumber>) -> Result<(), Failure> {
        self.run(|machine| {
            machine.forget_ahead();
            change(machine, |_, found| bitmaps::after_failure(found, base))
        })
        .await
    }

    async fn cleanup(&self, _disks: &[KnownDisk], since: Option<LogNumber>) -> Result<(), Failure> {
        self.run(|machine| {
            machine.let_go(None);
            machine.forget_ahead();
            match since {
                Some(_) => change(machine, |_, found| bitmaps::repair(found, since)),
                None => Ok(()),
            }
        })
        .await
    }

    async fn stop_tracking(&self, _disks: &[KnownDisk]) -> Result<(), Failure> {
        self.run(|machine| change(machine, |_, found| bitmaps::repair(found, None))).await
    }
}

/// A moment that is fixed.
pub struct SimCapture {
    vm: SimVm,
    id: u64,
    moment: Timestamp,
    places: Vec<usize>,
    life: u64,
    ports: SimPorts,
}

impl SimCapture {
    /// The disks as they were, or why they can no longer be read.
    fn state(&self) -> Result<Arc<State>, Failure> {
        state(&self.vm, self.id)
    }
}

fn state(vm: &SimVm, id: u64) -> Result<Arc<State>, Failure> {
    vm.lock().fixed(id).map_err(|full| match full {
        true => failure(FailureCode::ScratchFull, "the scratch is full"),
        false => failure(FailureCode::Qemu, "the fixed moment is no longer kept"),
    })
}

impl Drop for SimCapture {
    /// A primary that lives takes it out of QEMU. One that was killed leaves it to its next life.
    fn drop(&mut self) {
        if !self.ports.power.is_down() && self.ports.power.boots() == self.life {
            self.vm.lock().let_go(Some(self.id));
        }
    }
}

impl Capture for SimCapture {
    type Reader = SimReader;

    fn moment(&self) -> Timestamp {
        self.moment
    }

    async fn readers(&self) -> Result<Vec<SimReader>, Failure> {
        self.ports.turns.pass().await;
        self.state()?;
        let reader = |place: &usize| {
            let (name, size_bytes) = {
                let machine = self.vm.lock();
                (machine.name(*place).clone(), machine.bytes(*place))
            };
            SimReader {
                vm: self.vm.clone(),
                capture: self.id,
                place: *place,
                name,
                size_bytes,
                ports: self.ports.clone(),
            }
        };
        Ok(self.places.iter().map(reader).collect())
    }

    async fn watch(&self) -> Failure {
        loop {
            if let Err(over) = self.state() {
                return over;
            }
            self.ports.turns.wait(1).await;
        }
    }
}

/// A disk as it was.
#[derive(Clone)]
pub struct SimReader {
    vm: SimVm,
    capture: u64,
    place: usize,
    name: DiskName,
    size_bytes: u64,
    ports: SimPorts,
}

impl DiskReader for SimReader {
    fn name(&self) -> &DiskName {
        &self.name
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    async fn extents(&self, range: Range<u64>, which: Which) -> Result<Vec<DirtyExtent>, Failure> {
        self.ports.turns.pass().await;
        let state = state(&self.vm, self.capture)?;
        let gone = || failure(FailureCode::Qemu, "the bitmap that is read is gone");
        let blocks = match which {
            Which::Again => self.vm.lock().again(self.place).ok_or_else(gone)?,
            Which::Data => (0..usize::try_from(self.size_bytes.div_ceil(BLOCK_BYTES)).unwrap_or(0)).collect(),
            Which::Changed => {
                let dirty = self.vm.lock().dirty(self.capture, self.place);
                dirty.ok_or_else(gone)?
            }
        };
        Ok(extents_of(&state, self.place, self.size_bytes, range, &blocks, which))
    }

    async fn read(&self, offset: u64, len: u64) -> Result<Bytes, Failure> {
        self.ports.turns.pass().await;
        let state = state(&self.vm, self.capture)?;
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        state.read(self.place, offset, &mut bytes);
        Ok(bytes.into())
    }
}

/// The extents of some blocks of a disk.
fn extents_of(
    state: &State,
    place: usize,
    size_bytes: u64,
    range: Range<u64>,
    blocks: &[usize],
    which: Which,
) -> Vec<DirtyExtent> {
    let mut found: Vec<DirtyExtent> = Vec::new();
    for &block in blocks {
        let start = (block as u64 * BLOCK_BYTES).max(range.start);
        let end = ((block as u64 + 1) * BLOCK_BYTES).min(range.end).min(size_bytes);
        if start >= end {
            continue;
        }
        let zero = state.is_zero(place, start..end);
        match found.last_mut() {
            _ if zero && which == Which::Data => {}
            Some(last) if last.offset + last.len == start && last.zero == zero => last.len += end - start,
            _ => found.push(DirtyExtent { offset: start, len: end - start, zero }),
        }
    }
    found
}

/// Disks that go on changing while they are read.
pub struct SimAhead(Vec<LiveReader>);

impl Ahead for SimAhead {
    type Reader = LiveReader;

    async fn readers(&self) -> Result<Vec<LiveReader>, Failure> {
        Ok(self.0.clone())
    }
}

/// A disk as it is.
#[derive(Clone)]
pub struct LiveReader {
    vm: SimVm,
    process: u64,
    place: usize,
    name: DiskName,
    size_bytes: u64,
    seen: Arc<Vec<usize>>,
    ports: SimPorts,
}

impl LiveReader {
    async fn now<T>(&self, look: impl FnOnce(&State) -> T) -> Result<T, Failure> {
        self.ports.turns.pass().await;
        let machine = self.vm.lock();
        if machine.process != self.process {
            return Err(failure(FailureCode::QemuGone, "the connection to QEMU is gone"));
        }
        Ok(look(machine.history.now()))
    }
}

impl DiskReader for LiveReader {
    fn name(&self) -> &DiskName {
        &self.name
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    async fn extents(&self, range: Range<u64>, which: Which) -> Result<Vec<DirtyExtent>, Failure> {
        self.now(|state| extents_of(state, self.place, self.size_bytes, range, &self.seen, which)).await
    }

    async fn read(&self, offset: u64, len: u64) -> Result<Bytes, Failure> {
        self.now(|state| {
            let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
            state.read(self.place, offset, &mut bytes);
            bytes.into()
        })
        .await
    }
}
