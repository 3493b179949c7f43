//! What a primary says of its VM: offers, reports, withdrawals.

use std::path::Path;
use std::sync::PoisonError;
use std::time::Duration;

use model::group::Group;
use model::{
    DiskName, Head, LogId, LogNumber, Phase, PinnedPoint, PointInfo, Progress, Timestamp, TravellingPin,
    VmId, VmName, Window,
};
use steps::durable_step;

use crate::completion::fresh_home;
use crate::error::{Error, Refused, Result};
use crate::folder::Folder;
use crate::rows::{self, Awaited, Base, DiskSize, Reported, VmDoc, VmRow};
use crate::store::Store;
use crate::vm::{State, Vm};

/// A VM as its primary offers it.
#[derive(Debug, Clone, PartialEq)]
pub struct Offer {
    /// The VM.
    pub vm: VmId,
    /// What people call it.
    pub name: VmName,
    /// Its disks.
    pub disks: Vec<DiskSize>,
    /// The interval between cycles.
    pub interval: Duration,
    /// How many hourly points to keep beside the latest one.
    pub points: u8,
    /// The primary's site.
    pub primary_name: String,
    /// The VM's definition, kept for backups.
    pub definition: serde_json::Value,
    /// Where the primary stands.
    pub phase: Phase,
    /// Replication is paused by a person.
    pub paused: bool,
    /// How often the VM has changed its site for good, and one more.
    pub generation: u64,
    /// The media that its initial replication comes on.
    pub media: Option<Awaited>,
    /// The group that it is in.
    pub group: Option<Group>,
    /// The points that are to be pinned once they are here.
    pub pins: Vec<TravellingPin>,
}

/// Where the chain here and the one that a primary comes from are one state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InStep {
    /// The newest log here.
    pub there: LogNumber,
    /// The newest log of the other chain.
    pub here: LogNumber,
}

impl InStep {
    /// The end of the chain from now on. The next log has a number beyond both chains': the primary's bitmaps are named
    /// after them. A gap in the numbers is nothing new, they have one after each loss.
    fn check(self, state: &State) -> Result<Head> {
        let head = state.row.doc.head;
        let is_point = state.points.contains_key(&head.number);
        if head.number != self.there || !is_point || self.here.0 > NUMBER_MAX {
            let message = format!(
                "the newest point of VM {} here is not number {}: the replica that is moved here is not complete",
                state.row.name, self.there
            );
            return Err(Refused::transient("wrong-number", message, Duration::from_secs(5)).into());
        }
        Ok(Head { number: head.number.max(self.here), id: head.id })
    }
}

/// Beyond that no chain comes by logs.
const NUMBER_MAX: u64 = 1 << 62;

/// Where a relationship stands here, for its primary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// The newest durable log.
    pub head: Head,
    /// The replica's phase.
    pub phase: Phase,
    /// Why logs are not taken, if they are not.
    pub refused: Option<Refused>,
}

impl Store {
    /// Takes a primary's offer: makes the replica if there is none, and says where it stands. Disks that
    /// have grown, come or gone are the next log's to say; here they are only shown.
    pub fn offer(&self, peer: &str, offer: Offer) -> Result<Standing> {
        let _registry = self.inner.registry.lock().unwrap_or_else(PoisonError::into_inner);
        self.check_name(offer.vm, &offer.name)?;
        self.check_fence(offer.vm, offer.generation)?;
        let id = offer.vm;
        match self.vm(id) {
            Ok(vm) => self.update(&vm, peer, offer)?,
            Err(_) => self.create(peer, offer)?,
        }
        let vm = self.vm(id)?;
        self.adopt_seed(&vm)?;
        Ok(standing(&*vm.live()?))
    }

    pub(crate) fn check_name(&self, vm: VmId, name: &VmName) -> Result<()> {
        let Some(taken) = self.find(name).filter(|found| *found != vm) else { return Ok(()) };
        let message = format!(
            "the name {name} is taken here by another VM ({taken}); protect this one under another name, or remove that replica"
        );
        Err(Refused::lasting("name-taken", message).into())
    }

    /// Turns away what was the VM before it was failed over to this site for good.
    pub fn check_fence(&self, vm: VmId, generation: u64) -> Result<()> {
        match rows::fence(self.catalog(), vm)? {
            Some(fence) if generation < fence.generation => Err(fenced(&fence, generation).into()),
            _ => Ok(()),
        }
    }

    fn create(&self, peer: &str, offer: Offer) -> Result<()> {
        let now = self.now();
        let home = self.home(peer, offer.vm)?;
        let storage = home.path.parent().map_or_else(|| home.path.clone(), Path::to_owned);
        self.check_space(&Folder { path: storage, ..home.clone() }, 0)?;
        let folder = fresh_home(&home)?;
        // What lies there is of a replica whose removal was cut off.
        folder.files.remove_folder(&folder.path)?;
        folder.create()?;
        durable_step("replica::offer::made");
        let row = first_row(peer, &offer, folder.path, first_doc(&offer, now));
        let mut state = State::new(row.clone(), folder.files, now);
        self.commit_row(&mut state, row)?;
        durable_step("replica::offer::describing");
        crate::rebuild::describe(&state)?;
        durable_step("replica::offer::committed");
        self.vms_mut().insert(offer.vm, Vm::new(state));
        Ok(())
    }

    fn update(&self, vm: &Vm, peer: &str, offer: Offer) -> Result<()> {
        let mut state = vm.live()?;
        check_peer(&state, peer)?;
        let mut row = state.row.clone();
        row.name = offer.name;
        row.definition = offer.definition.to_string();
        let doc = &mut row.doc;
        doc.primary_name = offer.primary_name;
        doc.interval_s = offer.interval.as_secs();
        doc.points = offer.points;
        doc.offered = offer.disks;
        doc.withdrawn = false;
        doc.generation = offer.generation;
        doc.media = offer.media;
        doc.group = offer.group;
        doc.awaited_pins = offer.pins;
        pin_awaited(doc, state.points.values());
        // Whoever offers is about to send: what failed before is no error that lasts.
        take_report(doc, offer.phase, None, offer.paused, self.now());
        let described = |VmRow { name, doc, .. }: &VmRow| {
            (
                name.clone(),
                doc.interval_s,
                doc.points,
                doc.offered.clone(),
                doc.group.clone(),
                doc.pinned.clone(),
            )
        };
        let changed = described(&row) != described(&state.row);
        if row != state.row {
            durable_step("replica::offer::updating");
            self.commit_row(&mut state, row)?;
            durable_step("replica::offer::updated");
        }
        if changed {
            crate::rebuild::describe(&state)?;
            durable_step("replica::offer::described");
        }
        Ok(())
    }

    /// Takes a primary's word of where it stands.
    pub fn report(
        &self,
        peer: &str,
        vm: VmId,
        phase: Phase,
        error: Option<String>,
        paused: bool,
    ) -> Result<()> {
        let vm = self.vm(vm)?;
        let mut state = vm.live()?;
        check_peer(&state, peer)?;
        let mut row = state.row.clone();
        take_report(&mut row.doc, phase, error, paused, self.now());
        durable_step("replica::report::writing");
        self.commit_row(&mut state, row)?;
        durable_step("replica::report::written");
        Ok(())
    }

    /// The primary no longer protects the VM. Everything stays until [`Store::remove`].
    pub fn withdraw(&self, peer: &str, vm: VmId) -> Result<()> {
        let vm = self.vm(vm)?;
        let mut state = vm.live()?;
        check_peer(&state, peer)?;
        let mut row = state.row.clone();
        row.doc.withdrawn = true;
        durable_step("replica::withdraw::writing");
        self.commit_row(&mut state, row)?;
        durable_step("replica::withdraw::written");
        Ok(())
    }

    /// Makes a VM another peer's: what its primary was until now may send nothing for it any more. Where the replica was
    /// moved here the two are `in_step`, and nothing is compared. Gives its generation from now on, and where its chain ends.
    pub fn take_over(&self, peer: &str, vm: VmId, in_step: Option<InStep>) -> Result<(u64, Head)> {
        let vm = self.vm(vm)?;
        let mut receiving = vm.receiving.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = vm.live()?;
        if state.row.peer == peer {
            return Ok((state.row.doc.generation, state.row.doc.head));
        }
        if state.in_failover() {
            return Err(Error::busy(vm.id, "it is failed over here; cancel or complete the failover first"));
        }
        let mut row = state.row.clone();
        if let Some(in_step) = in_step {
            row.doc.head = in_step.check(&state)?;
        }
        row.peer = peer.to_owned();
        row.doc.generation += 1;
        row.doc.withdrawn = false;
        let (generation, head) = (row.doc.generation, row.doc.head);
        durable_step("replica::takeover::writing");
        self.commit_row(&mut state, row)?;
        durable_step("replica::takeover::written");
        *receiving = None;
        crate::rebuild::describe(&state)?;
        durable_step("replica::takeover::described");
        Ok((generation, head))
    }

    /// Removes a replica with all its files. Views of it end; a hold must be released first.
    pub fn remove(&self, vm: VmId) -> Result<()> {
        let vm = self.vm(vm)?;
        // First this one: it may take as long as an apply, and other VMs' offers must not wait for that.
        let _work = vm.work();
        let _registry = self.inner.registry.lock().unwrap_or_else(PoisonError::into_inner);
        let mut receiving = vm.receiving.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = vm.live()?;
        if state.is_held(self.now()) {
            return Err(Error::busy(vm.id, "its flat files are held; release the hold first"));
        }
        if state.in_failover() {
            let why = "it is failed over, and may be running from these files; cancel or complete the failover first";
            return Err(Error::busy(vm.id, why));
        }
        let mut row = state.row.clone();
        row.doc.removing = true;
        durable_step("replica::remove::marking");
        self.commit_row(&mut state, row)?;
        durable_step("replica::remove::marked");
        state.removed = true;
        state.revoke_views("the replica was removed");
        *receiving = None;
        self.end_removal(&state.row)?;
        self.vms_mut().remove(&vm.id);
        Ok(())
    }

    /// Removes the files of a replica that is to go, and then all that says that they are there.
    pub(crate) fn end_removal(&self, row: &VmRow) -> Result<()> {
        self.files().remove_folder(&row.folder)?;
        let (id, fence) = (row.vm, crate::relocate::fence_of(row, self.now()));
        durable_step("replica::remove::writing");
        self.catalog().write(move |tx| {
            rows::remove_vm(tx, id)?;
            fence.iter().try_for_each(|fence| rows::raise_fence(tx, fence))
        })?;
        durable_step("replica::remove::written");
        Ok(())
    }
}

/// Whether a VM is this peer's.
pub(crate) fn check_peer(state: &State, peer: &str) -> Result<()> {
    if state.row.peer == peer {
        return Ok(());
    }
    let message = format!(
        "VM {} here belongs to another peer than {peer}; only the site that protects it may send for it",
        state.row.name
    );
    Err(Refused::lasting("forbidden", message).into())
}

/// Why logs are not taken now, whatever they are.
pub(crate) fn refuses_logs(state: &State) -> Option<Refused> {
    let name = &state.row.name;
    if let Phase::Failover { point } = state.row.doc.phase {
        let message = format!(
            "VM {name} is failed over to point {point} on this site; cancel or complete the failover there first"
        );
        return Some(Refused::transient("failover", message, Duration::from_secs(300)));
    }
    if state.row.doc.migrating.is_some() {
        let message = format!("the storage of VM {name} is being moved on the replica's site");
        return Some(Refused::transient("migration", message, Duration::from_secs(30)));
    }
    if let Some(relocating) = state.row.doc.relocating.as_ref().filter(|relocating| relocating.sealed) {
        let message = format!(
            "the replica of VM {name} is being handed over to {}; what changes meanwhile goes there",
            relocating.to
        );
        return Some(Refused::transient("migration", message, Duration::from_secs(5)));
    }
    None
}

/// Why the old primary of a VM that was failed over for good, or whose replica was moved away, is turned away.
pub(crate) fn fenced(fence: &rows::Fence, generation: u64) -> Refused {
    if let Some(to) = &fence.moved_to {
        let message = format!(
            "the replica of VM {} was moved from here to {to} (generation {}), and nothing of generation {generation} is taken any more; if your site was put back from an older copy, run 'afterimage unprotect {}' there and protect it anew, to {to}",
            fence.name, fence.generation, fence.name
        );
        return Refused::lasting("moved", message);
    }
    let message = format!(
        "VM {} was failed over to this site for good and has run here since (generation {}); what you have is the VM of before (generation {generation}), and nothing of it is taken. Keep it switched off; 'afterimage failover reverse {}' here makes your site its replica, or run 'afterimage unprotect {}' at yours",
        fence.name, fence.generation, fence.name, fence.name
    );
    Refused::lasting("fenced", message)
}

fn standing(state: &State) -> Standing {
    let doc = &state.row.doc;
    Standing { head: doc.head, phase: doc.phase.clone(), refused: refuses_logs(state) }
}

/// The row of a replica that begins.
pub(crate) fn first_row(peer: &str, offer: &Offer, folder: std::path::PathBuf, doc: VmDoc) -> VmRow {
    VmRow {
        vm: offer.vm,
        name: offer.name.clone(),
        peer: peer.to_owned(),
        folder,
        definition: offer.definition.to_string(),
        doc,
    }
}

pub(crate) fn first_doc(offer: &Offer, now: Timestamp) -> VmDoc {
    let total_bytes = offer.disks.iter().map(|disk| disk.size_bytes).fold(0, u64::saturating_add);
    let disks: Vec<DiskName> = offer.disks.iter().map(|disk| disk.name.clone()).collect();
    VmDoc {
        primary_name: offer.primary_name.clone(),
        generation: offer.generation,
        interval_s: offer.interval.as_secs(),
        points: offer.points,
        offered: offer.disks.clone(),
        disks,
        base: Base { applied: LogNumber::ZERO, id: LogId::NONE, disks: Vec::new() },
        head: Head::EMPTY,
        head_moment: None,
        phase: Phase::InitialReplication { progress: Progress { covered_bytes: 0, total_bytes } },
        phase_since: now,
        reported: Reported { phase: offer.phase.clone(), error: None, paused: offer.paused, at: now },
        made_at: now,
        last_log_at: None,
        applying: None,
        migrating: None,
        leftover: None,
        failover: None,
        withdrawn: false,
        removing: false,
        damage: None,
        unsure: false,
        pinned: Vec::new(),
        forwarded: Vec::new(),
        relocating: None,
        awaited_pins: offer.pins.clone(),
        media: offer.media.clone(),
        group: offer.group.clone(),
        measured: Window::beginning(now),
    }
}

/// A primary that must resynchronize makes its replica say so too: until the pass is complete, the newest
/// states are not ones that the VM was in. All other phases the replica learns from the logs.
fn take_report(doc: &mut VmDoc, phase: Phase, error: Option<String>, paused: bool, now: Timestamp) {
    if let Phase::ResyncRequired { .. } = &phase
        && doc.head != Head::EMPTY
    {
        match &mut doc.failover {
            // It counts from the moment when the failover is cancelled.
            Some(failover) => failover.before = phase.clone(),
            None => set_phase(doc, phase.clone(), now),
        }
    }
    doc.reported = Reported { phase, error, paused, at: now };
}

/// Pins those of the points that are to be pinned and are not yet. They are known by their moments: where they come from their
/// ids were others. Whether there were any.
pub(crate) fn pin_awaited<'a>(doc: &mut VmDoc, points: impl Iterator<Item = &'a PointInfo>) -> bool {
    let mut pinned = false;
    for point in points {
        let Some(place) = doc.awaited_pins.iter().position(|pin| pin.taken_at == point.taken_at) else {
            continue;
        };
        let TravellingPin { name, pinned_at, .. } = doc.awaited_pins.remove(place);
        let is_there = |pin: &PinnedPoint| pin.number == point.number || name.is_some() && pin.name == name;
        if !doc.pinned.iter().any(is_there) {
            doc.pinned.push(PinnedPoint { number: point.number, id: point.id, name, pinned_at });
            pinned = true;
        }
    }
    pinned
}

/// Changes the phase; its age counts from when its kind changed, not from each step of a pass.
pub(crate) fn set_phase(doc: &mut VmDoc, phase: Phase, now: Timestamp) {
    if doc.phase.name() != phase.name() {
        doc.phase_since = now;
    }
    doc.phase = phase;
}
