//! The guest: disks in memory, dirty bitmaps as sets of blocks, moments as copies.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use model::{DiskName, LogNumber, ResyncReason, Timestamp, Tracking};
use nbd::DirtyExtent;
use primary::ports::{self, AgentAddress, CaptureRequest, DiskReader, Door, GroupMoment, Ports, Which};
use primary::{Failure, FailureCode, KnownDisk};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::World;

pub const BLOCK: usize = model::BLOCK_BYTES as usize;

/// The VM as it runs.
pub struct Vm {
    pub disks: Vec<SimDisk>,
    /// Counts its starts: whoever is connected to an earlier one is connected to nothing.
    pub boot: u32,
    /// Moments that are fixed now.
    pub captures: usize,
    /// What the disks held at each moment.
    pub moments: BTreeMap<Timestamp, Vec<Vec<u8>>>,
    /// Why the guest cannot be brought to rest, if it cannot.
    pub restless: Option<String>,
    /// Its processors stand still.
    pub quiet: bool,
    /// It shuts down when it is asked to.
    pub obeys: bool,
}

pub struct SimDisk {
    pub known: KnownDisk,
    pub data: Vec<u8>,
    pub bitmaps: BTreeMap<LogNumber, Bitmap>,
    /// What has changed since reading ahead began, while it is noted.
    pub again: Option<Bitmap>,
}

#[derive(Default, Clone)]
pub struct Bitmap {
    blocks: BTreeSet<u64>,
    recording: bool,
}

impl Vm {
    pub fn new(sizes: &[usize]) -> Self {
        Self {
            disks: sizes.iter().enumerate().map(|(i, &size)| SimDisk::new(i, size)).collect(),
            boot: 0,
            captures: 0,
            moments: BTreeMap::new(),
            restless: None,
            quiet: false,
            obeys: true,
        }
    }

    /// Ends QEMU and starts it again: the disks stay, and nothing else.
    pub fn restart(&mut self) {
        self.boot += 1;
        self.captures = 0;
        self.disks.iter_mut().for_each(|disk| {
            disk.bitmaps.clear();
            disk.again = None;
        });
    }

    /// The disk of a node.
    pub fn disk(&mut self, node: &str) -> &mut SimDisk {
        self.disks.iter_mut().find(|disk| disk.known.node == node).expect("the VM has such a disk")
    }

    pub fn data(&self) -> Vec<Vec<u8>> {
        self.disks.iter().map(|disk| disk.data.clone()).collect()
    }

    pub fn bitmaps(&self) -> BTreeSet<LogNumber> {
        self.disks.iter().flat_map(|disk| disk.bitmaps.keys().copied()).collect()
    }
}

impl SimDisk {
    /// An empty one.
    pub fn new(i: usize, size: usize) -> Self {
        Self {
            known: KnownDisk {
                node: format!("node{i}"),
                name: format!("vd{i}").parse().unwrap(),
                size_bytes: size as u64,
                image: None,
                joining: None,
            },
            data: vec![0; size],
            bitmaps: BTreeMap::new(),
            again: None,
        }
    }

    /// Grows it. Of what comes new no bitmap tells that it does.
    pub fn grow(&mut self, size: usize) {
        self.data.resize(size, 0);
        self.known.size_bytes = size as u64;
    }

    pub fn write(&mut self, at: u64, blocks: u64, byte: u8) {
        let range = at as usize * BLOCK..(at + blocks) as usize * BLOCK;
        self.data[range].fill(byte);
        for bitmap in self.bitmaps.values_mut().chain(&mut self.again).filter(|bitmap| bitmap.recording) {
            bitmap.blocks.extend(at..at + blocks);
        }
    }

    /// Makes bitmap `wanted` the only one, if it can be had.
    fn repair(&mut self, wanted: LogNumber) {
        self.again = None;
        let mut found = std::mem::take(&mut self.bitmaps);
        let only_older = found.len() == 1 && found.iter().all(|(k, b)| *k < wanted && b.recording);
        if only_older {
            self.bitmaps.extend(found.into_values().map(|bitmap| (wanted, bitmap)));
        } else if let Some(mut bitmap) = found.remove(&wanted) {
            for newer in found.split_off(&wanted).into_values() {
                bitmap.recording |= newer.recording;
                bitmap.blocks.extend(newer.blocks);
            }
            self.bitmaps.insert(wanted, bitmap);
        }
    }
}

/// A connection to the VM.
pub struct Guest {
    pub world: World,
    pub boot: u32,
}

impl Guest {
    fn alive(&self) -> Result<(), Failure> {
        if ports::Guest::is_alive(self) {
            Ok(())
        } else {
            Err(Failure::transient(FailureCode::QemuGone, "QEMU is gone"))
        }
    }

    fn fix(&self, request: &CaptureRequest<'_, KnownDisk>) -> Result<Capture, Failure> {
        self.alive()?;
        let moment = self.world.now();
        let mut state = self.world.lock();
        let mut readers = Vec::new();
        for (place, wanted) in request.disks.iter().enumerate() {
            let disk = state.vm.disk(&wanted.node);
            let mut changed = None;
            if request.fresh.contains(&place) {
                disk.bitmaps.clear();
            } else if let Some(base) = request.base {
                let bitmap = disk.bitmaps.get_mut(&base).expect("a bitmap that was inspected");
                bitmap.recording = false;
                changed = Some(bitmap.blocks.clone());
            }
            disk.bitmaps.insert(request.next, Bitmap { recording: true, ..Bitmap::default() });
            let mut again = None;
            if request.again {
                let bitmap = disk.again.as_mut().expect("what changes was noted");
                bitmap.recording = false;
                again = Some(bitmap.blocks.clone());
            }
            let image = Image { name: disk.known.name.clone(), data: disk.data.clone(), changed, again };
            readers.push(Reader { world: self.world.clone(), image: Arc::new(image) });
        }
        let data = state.vm.data();
        state.vm.moments.insert(moment, data);
        state.vm.captures += 1;
        drop(state);
        Ok(Capture { world: self.world.clone(), boot: self.boot, moment, shared: None, readers })
    }
}

impl Guest {
    /// Waits for the others of its group first, if it is in one.
    async fn fix_together(&self, request: &CaptureRequest<'_, KnownDisk>) -> Result<Capture, Failure> {
        let Some(seat) = request.seat.clone() else { return self.fix(request) };
        seat.pass(Door::Prepare).await;
        seat.pass(Door::Freeze).await;
        let start = Instant::now();
        let mut capture = self.fix(request)?;
        capture.shared = seat.fixed(start, Instant::now()).await;
        Ok(capture)
    }
}

impl ports::Guest for Guest {
    type Disk = KnownDisk;
    type Capture = Capture;
    type Ahead = Ahead;

    fn is_alive(&self) -> bool {
        self.world.lock().vm.boot == self.boot
    }

    async fn disks(&self) -> Result<Vec<KnownDisk>, Failure> {
        self.alive()?;
        Ok(self.world.lock().vm.disks.iter().map(|disk| disk.known.clone()).collect())
    }

    async fn resolve(&self, nodes: &[String]) -> Result<Vec<KnownDisk>, Failure> {
        self.alive()?;
        let vm = &mut self.world.lock().vm;
        Ok(nodes.iter().map(|node| vm.disk(node).known.clone()).collect())
    }

    async fn is_quiet(&self) -> Result<bool, Failure> {
        self.alive()?;
        Ok(self.world.lock().vm.quiet)
    }

    async fn power_down(&self) -> Result<(), Failure> {
        self.alive()?;
        let vm = &mut self.world.lock().vm;
        vm.quiet = vm.obeys;
        Ok(())
    }

    async fn quit(&self) -> Result<(), Failure> {
        self.world.lock().vm.restart();
        Ok(())
    }

    async fn definition(&self) -> Result<Value, Failure> {
        Ok(json!({"source": "simulation"}))
    }

    async fn inspect(&self, disks: &[KnownDisk], since: LogNumber) -> Result<Tracking, Failure> {
        self.alive()?;
        let state = self.world.lock();
        let records = |bitmaps: &BTreeMap<_, Bitmap>| bitmaps.get(&since).is_some_and(|b| b.recording);
        let asked = |disk: &&SimDisk| disks.iter().any(|asked| asked.node == disk.known.node);
        let lost = state.vm.disks.iter().filter(asked).find(|disk| !records(&disk.bitmaps));
        Ok(lost.map_or(Tracking::Intact, |disk| {
            Tracking::Broken(ResyncReason::BitmapLost(disk.known.name.to_string()))
        }))
    }

    async fn pending_bytes(&self, _disks: &[KnownDisk], since: LogNumber) -> Result<u64, Failure> {
        self.alive()?;
        let state = self.world.lock();
        let ours = state.vm.disks.iter().flat_map(|disk| disk.bitmaps.range(since..));
        Ok(ours.map(|(_, bitmap)| (bitmap.blocks.len() * BLOCK) as u64).sum())
    }

    async fn begin_ahead(&self, disks: &[KnownDisk], base: LogNumber) -> Result<Ahead, Failure> {
        self.alive()?;
        let mut state = self.world.lock();
        let mut readers = Vec::new();
        for asked in disks {
            let is_asked = |disk: &SimDisk| disk.known.node == asked.node;
            let place = state.vm.disks.iter().position(is_asked).expect("the VM has such a disk");
            let disk = &mut state.vm.disks[place];
            disk.again = Some(Bitmap { recording: true, ..Bitmap::default() });
            let seen = disk.bitmaps.get(&base).expect("a bitmap that was inspected").blocks.clone();
            readers.push(LiveReader {
                world: self.world.clone(),
                place,
                known: disk.known.clone(),
                seen: Arc::new(seen),
            });
        }
        Ok(Ahead(readers))
    }

    async fn end_ahead(&self, ahead: Ahead) -> Result<(), Failure> {
        drop(ahead);
        self.alive()
    }

    async fn begin_capture(&self, request: CaptureRequest<'_, KnownDisk>) -> Result<Capture, Failure> {
        self.fix_together(&request).await
    }

    async fn begin_capture_frozen(
        &self,
        request: CaptureRequest<'_, KnownDisk>,
        _agent: &AgentAddress,
    ) -> Result<(Capture, Result<(), String>), Failure> {
        let capture = self.fix_together(&request).await?;
        Ok((capture, self.world.lock().vm.restless.clone().map_or(Ok(()), Err)))
    }

    async fn end_reading(&self, capture: Capture) -> Result<(), Failure> {
        drop(capture);
        self.alive()
    }

    async fn commit(
        &self,
        _disks: &[KnownDisk],
        base: Option<LogNumber>,
        next: LogNumber,
    ) -> Result<(), Failure> {
        self.alive()?;
        for disk in &mut self.world.lock().vm.disks {
            disk.bitmaps.retain(|k, _| Some(*k) != base || *k == next);
            disk.again = None;
        }
        Ok(())
    }

    async fn give_back(&self, _disks: &[KnownDisk], base: Option<LogNumber>) -> Result<(), Failure> {
        self.alive()?;
        for disk in &mut self.world.lock().vm.disks {
            let base = base.filter(|base| disk.bitmaps.contains_key(base));
            base.into_iter().for_each(|base| disk.repair(base));
        }
        Ok(())
    }

    async fn cleanup(&self, _disks: &[KnownDisk], since: Option<LogNumber>) -> Result<(), Failure> {
        self.alive()?;
        let mut state = self.world.lock();
        state.vm.captures = 0;
        if let Some(since) = since {
            state.vm.disks.iter_mut().for_each(|disk| disk.repair(since));
        }
        Ok(())
    }

    async fn stop_tracking(&self, disks: &[KnownDisk]) -> Result<(), Failure> {
        self.alive()?;
        let vm = &mut self.world.lock().vm;
        disks.iter().for_each(|disk| vm.disk(&disk.node).bitmaps.clear());
        Ok(())
    }
}

/// A fixed moment.
pub struct Capture {
    world: World,
    boot: u32,
    moment: Timestamp,
    shared: Option<GroupMoment>,
    readers: Vec<Reader>,
}

impl Drop for Capture {
    fn drop(&mut self) {
        let mut state = self.world.lock();
        if state.vm.boot == self.boot {
            state.vm.captures = state.vm.captures.saturating_sub(1);
        }
    }
}

impl ports::Capture for Capture {
    type Reader = Reader;

    fn moment(&self) -> Timestamp {
        self.moment
    }

    fn shared(&self) -> Option<GroupMoment> {
        self.shared.clone()
    }

    async fn readers(&self) -> Result<Vec<Reader>, Failure> {
        Ok(self.readers.clone())
    }

    async fn watch(&self) -> Failure {
        std::future::pending().await
    }
}

struct Image {
    name: DiskName,
    data: Vec<u8>,
    changed: Option<BTreeSet<u64>>,
    again: Option<BTreeSet<u64>>,
}

/// A disk as it was at the moment.
#[derive(Clone)]
pub struct Reader {
    world: World,
    image: Arc<Image>,
}

impl DiskReader for Reader {
    fn name(&self) -> &DiskName {
        &self.image.name
    }

    fn size_bytes(&self) -> u64 {
        self.image.data.len() as u64
    }

    async fn extents(&self, range: Range<u64>, which: Which) -> Result<Vec<DirtyExtent>, Failure> {
        let blocks = match which {
            Which::Changed => Some(self.image.changed.as_ref().expect("there is a base")),
            Which::Again => Some(self.image.again.as_ref().expect("it was read ahead")),
            Which::Data => None,
        };
        Ok(extents_of(&self.image.data, range, blocks))
    }

    /// Takes a while, in which the guest goes on writing: what is read must be what was.
    async fn read(&self, offset: u64, len: u64) -> Result<Bytes, Failure> {
        let takes = {
            let mut state = self.world.lock();
            state.guest_writes();
            Duration::from_micros(50 + state.below(200))
        };
        tokio::time::sleep(takes).await;
        Ok(Bytes::copy_from_slice(&self.image.data[offset as usize..][..len as usize]))
    }
}

/// The extents of some blocks, or of those that are not zeros.
fn extents_of(data: &[u8], range: Range<u64>, blocks: Option<&BTreeSet<u64>>) -> Vec<DirtyExtent> {
    let mut extents: Vec<DirtyExtent> = Vec::new();
    for offset in range.step_by(BLOCK) {
        let zero = data[offset as usize..][..BLOCK].iter().all(|&byte| byte == 0);
        let wanted = blocks.map_or(!zero, |blocks| blocks.contains(&(offset / BLOCK as u64)));
        match extents.last_mut() {
            Some(last) if wanted && last.end() == offset && last.zero == zero => last.len += BLOCK as u64,
            _ if wanted => extents.push(DirtyExtent { offset, len: BLOCK as u64, zero }),
            _ => {}
        }
    }
    extents
}

/// Disks that go on changing while they are read.
pub struct Ahead(Vec<LiveReader>);

impl ports::Ahead for Ahead {
    type Reader = LiveReader;

    async fn readers(&self) -> Result<Vec<LiveReader>, Failure> {
        Ok(self.0.clone())
    }
}

#[derive(Clone)]
pub struct LiveReader {
    world: World,
    place: usize,
    known: KnownDisk,
    seen: Arc<BTreeSet<u64>>,
}

impl DiskReader for LiveReader {
    fn name(&self) -> &DiskName {
        &self.known.name
    }

    fn size_bytes(&self) -> u64 {
        self.known.size_bytes
    }

    async fn extents(&self, range: Range<u64>, which: Which) -> Result<Vec<DirtyExtent>, Failure> {
        assert_eq!(which, Which::Changed, "nothing else is asked of it");
        Ok(extents_of(&self.world.lock().vm.disks[self.place].data, range, Some(&self.seen)))
    }

    /// Takes a while, and gives what there is at its end.
    async fn read(&self, offset: u64, len: u64) -> Result<Bytes, Failure> {
        let takes = {
            let mut state = self.world.lock();
            state.guest_writes();
            Duration::from_micros(50 + state.below(200))
        };
        tokio::time::sleep(takes).await;
        Ok(Bytes::copy_from_slice(
            &self.world.lock().vm.disks[self.place].data[offset as usize..][..len as usize],
        ))
    }
}
