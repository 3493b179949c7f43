//! A replica moves to another site, as far as the store that it leaves is concerned.
//!
//! ```text
//! "moves to S" ─▶ passed on to S, oldest point first (`forward`) ─▶ S has all of it ─▶ sealed: no more logs are taken
//!      │                                                                  ▲   │             └─▶ S is the replica's now: removed, fence raised
//!      └──────────────────────── given up: nothing has changed ◀──────────┴───┘
//! ```
//!
//! The primary says when: it alone knows that it is sending nothing. Until it has gone over, everything is here; from then on a
//! primary of before (one that was put back from an older copy) is turned away by the fence.

use std::sync::PoisonError;

use model::{Head, LogNumber, Phase, Timestamp, TravellingPin, VmId};
use steps::durable_step;

use crate::error::{Error, Refused, Result};
use crate::rows::{Fence, Relocating, VmRow};
use crate::store::Store;
use crate::vm::State;

/// Where a replica that moves is going.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelocationStatus {
    /// The site, as a peer of this one.
    pub to: String,
    /// No more logs are taken.
    pub sealed: bool,
    /// The log of the other site's chain that has all that is here, given the newest one that is durable there.
    pub in_step: Option<LogNumber>,
}

impl Store {
    /// Notes that a replica moves to another site. From now on every point is kept until it is there. With `extended` it was
    /// passed on to that site before. Asked again, for the same site, nothing changes.
    pub fn begin_relocation(&self, vm: VmId, to: &str, extended: bool) -> Result<()> {
        self.change_relocation(vm, |state, now| {
            let doc = &state.row.doc;
            if let Some(relocating) = &doc.relocating {
                if relocating.to == to {
                    return Ok(doc.relocating.clone());
                }
                let why = format!("it moves to {} already; give that up first", relocating.to);
                return Err(Error::busy(vm, why));
            }
            if state.in_failover() || doc.migrating.is_some() {
                return Err(Error::busy(
                    vm,
                    "it is failed over, or its storage is being moved; end that first",
                ));
            }
            Ok(Some(Relocating { to: to.to_owned(), since: now, sealed: false, extended }))
        })
    }

    /// Takes no more logs, if the newest one here is the one that the primary knows of and log `there` of the other site's chain
    /// has it. False if there is more to be passed on first.
    pub fn seal_relocation(&self, vm: VmId, newest: Head, there: LogNumber) -> Result<bool> {
        let found = self.vm(vm)?;
        // Whatever is arriving would be half a log.
        let mut receiving = found.receiving.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sealed = false;
        self.change_relocation(vm, |state, _| {
            let Some(relocating) = state.row.doc.relocating.clone() else {
                return Err(
                    Refused::lasting("not-moving", format!("VM {} does not move", state.row.name)).into()
                );
            };
            if state.in_failover() {
                return Err(Error::busy(vm, "it is failed over; cancel or complete the failover first"));
            }
            sealed = state.row.doc.head == newest && in_step(state, there) == Some(there);
            Ok(Some(Relocating { sealed: relocating.sealed || sealed, ..relocating }))
        })?;
        if sealed {
            *receiving = None;
        }
        Ok(sealed)
    }

    /// Takes logs again; it goes on moving.
    pub fn unseal_relocation(&self, vm: VmId) -> Result<()> {
        self.change_relocation(vm, |state, _| {
            Ok(state.row.doc.relocating.clone().map(|relocating| Relocating { sealed: false, ..relocating }))
        })
    }

    /// It does not move any more. Whether it is passed on for the move alone.
    pub fn give_up_relocation(&self, vm: VmId) -> Result<bool> {
        let mut for_the_move = false;
        self.change_relocation(vm, |state, _| {
            for_the_move = state.row.doc.relocating.as_ref().is_some_and(|moving| !moving.extended);
            Ok(None)
        })?;
        Ok(for_the_move)
    }

    fn change_relocation(
        &self,
        vm: VmId,
        change: impl FnOnce(&State, Timestamp) -> Result<Option<Relocating>>,
    ) -> Result<()> {
        let found = self.vm(vm)?;
        let mut state = found.live()?;
        let mut row = state.row.clone();
        row.doc.relocating = change(&state, self.now())?;
        if row == state.row {
            return Ok(());
        }
        durable_step("replica::relocate::writing");
        self.commit_row(&mut state, row)?;
        durable_step("replica::relocate::written");
        drop(state);
        self.wake(vm);
        Ok(())
    }

    /// How far it is, given the newest log that the other site is known to have; none if it does not move.
    pub fn relocation(&self, vm: VmId, there: LogNumber) -> Result<Option<RelocationStatus>> {
        let vm = self.vm(vm)?;
        let state = vm.live()?;
        Ok(state.row.doc.relocating.as_ref().map(|relocating| RelocationStatus {
            to: relocating.to.clone(),
            sealed: relocating.sealed,
            in_step: in_step(&state, there),
        }))
    }

    /// What the other site is to pin, where a replica moves.
    pub fn travelling_pins(&self, vm: VmId) -> Result<Vec<TravellingPin>> {
        let vm = self.vm(vm)?;
        let state = vm.live()?;
        if state.row.doc.relocating.is_none() {
            return Ok(Vec::new());
        }
        let pins = state.row.doc.pinned.iter().filter_map(|pin| {
            let taken_at = state.points.get(&pin.number)?.taken_at;
            Some(TravellingPin { taken_at, name: pin.name.clone(), pinned_at: pin.pinned_at })
        });
        Ok(pins.collect())
    }

    /// The other site is the replica's: it is removed here, and a fence stands in its place. Asked again, once it is gone, nothing
    /// happens.
    pub fn relocated(&self, vm: VmId) -> Result<()> {
        match self.vm(vm) {
            Ok(found) if found.live()?.row.doc.relocating.as_ref().is_some_and(|moving| moving.sealed) => {
                self.remove(vm)
            }
            Ok(found) => {
                let message = format!("VM {} was not handed over to another site", found.live()?.row.name);
                Err(Refused::lasting("not-moving", message).into())
            }
            Err(Error::NoSuchVm(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// The fence that takes the place of a replica that is removed because it was moved; none for others.
pub(crate) fn fence_of(row: &VmRow, at: Timestamp) -> Option<Fence> {
    let relocating = row.doc.relocating.as_ref().filter(|relocating| relocating.sealed)?;
    Some(Fence {
        vm: row.vm,
        name: row.name.clone(),
        generation: row.doc.generation + 1,
        at,
        replicated: (row.peer.clone(), row.doc.interval_s, row.doc.points),
        folder: None,
        moved_to: Some(relocating.to.clone()),
    })
}

/// `there`, if that log of the other site's chain has the newest state here, and it is a point.
fn in_step(state: &State, there: LogNumber) -> Option<LogNumber> {
    let doc = &state.row.doc;
    let newest = doc.head.number;
    let is_point = doc.phase == Phase::Replicating && state.points.contains_key(&newest);
    let has_it = doc.forwarded.iter().any(|mark| mark.k == there && mark.at == newest);
    (is_point && has_it).then_some(there)
}
