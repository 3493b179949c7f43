//! The replica moves to another peer: steered from here, because only here it is known that nothing is being sent.
//!
//! ```text
//! "moves to S" ─▶ before each cycle: is all there? ─▶ the old site takes no more logs ─▶ S is taken over ─▶ the peer is S ─▶ the old
//!                     └── no: a cycle as ever          (sealed)                                             site is told, and removes it
//! ```
//!
//! Nothing of the VM crosses this site's line: the old site passes its replica on to the new one. Cut off anywhere, the next cycle
//! begins with the same question, and each answer is the same. The bitmaps go on, and so does the chain: what the new site has is what the
//! old one had at the hand-over.

use std::time::Duration;

use model::{Phase, ResyncReason, Shipped};
use steps::durable_step;
use wire::{InStep, KeyId, Relocate, RelocateStep, Relocation};

use crate::error::{Error, Failure, FailureCode};
use crate::ports::{Ports, Remote};
use crate::relationship::Relationship;
use crate::rows::Relocating;
use crate::{Primary, VmName, VmStatus};

/// While no more than this is missing there, in bytes of logs, nothing is sent for a moment, so that it catches up.
const CLOSE_BYTES: u64 = 64 << 20;
/// How often it is asked meanwhile, and how many times.
const LOOK: Duration = Duration::from_millis(200);
const LOOKS: u32 = 50;

impl<P: Ports> Primary<P> {
    /// Has the replica of a VM moved to another peer, whose key this is. Answers once the move has begun.
    pub async fn relocate(&self, name: &VmName, peer: String, key: KeyId) -> Result<VmStatus, Error> {
        if let Some(group) = self.group_of(name) {
            return Err(Error::Setting(format!(
                "{name} is in group {group}, whose replicas are at one site: 'afterimage group remove {group}', move each, and create it anew"
            )));
        }
        self.order_relocated(name, Some((peer, key))).await
    }

    /// Ends that: the replica stays where it is.
    pub async fn cancel_relocation(&self, name: &VmName) -> Result<VmStatus, Error> {
        self.order_relocated(name, None).await
    }
}

impl<P: Ports> Relationship<P> {
    /// Begins to move the replica to a peer, or, with none, ends that.
    pub async fn relocate(&mut self, to: Option<(String, KeyId)>) -> Result<(), Failure> {
        self.check_is_ours()?;
        let Some((peer, key)) = to else { return self.cancel_relocation().await };
        self.check_can_move(&peer)?;
        // First here: a move that the other site alone knew of would never end.
        self.set_relocating(Some(Relocating::To { peer, key })).await?;
        match self.ask_to_relocate(key, RelocateStep::Begin).await {
            Ok(relocation) => self.relocation = relocation,
            Err(failure) => {
                self.set_relocating(None).await?;
                return Err(failure);
            }
        }
        self.book_now();
        Ok(())
    }

    fn check_can_move(&self, peer: &str) -> Result<(), Failure> {
        let (name, at) = (&self.row.name, &self.row.settings.peer);
        let unfit = |message: String| Err(Failure::lasting(FailureCode::Unfit, message));
        self.check_no_media("there is no replica to be moved")?;
        match &self.row.settings.relocating {
            Some(Relocating::To { peer: other, .. }) if other != peer => {
                return unfit(format!(
                    "the replica of {name} moves to {other} already; 'afterimage migrate {name} --cancel' ends that"
                ));
            }
            Some(Relocating::From { peer: before, .. }) => {
                return unfit(format!(
                    "the replica of {name} has just moved to {at}, and {before} has not heard of it yet; wait until it can be reached"
                ));
            }
            _ => {}
        }
        if peer == at {
            return unfit(format!("the replica of {name} is at {peer} already"));
        }
        if self.row.phase != Phase::Replicating {
            let message = format!(
                "{name} is in phase {}; its replica can be moved when it is replicating",
                self.row.phase.name()
            );
            return Err(Failure::transient(FailureCode::Unfit, message));
        }
        Ok(())
    }

    async fn cancel_relocation(&mut self) -> Result<(), Failure> {
        let Some(Relocating::To { peer, key }) = self.row.settings.relocating.clone() else {
            let message = format!("the replica of {} does not move", self.row.name);
            return Err(Failure::lasting(FailureCode::Unfit, message));
        };
        self.ask_to_relocate(key, RelocateStep::Cancel).await?;
        // It may have been taken over, and the answer lost: then nobody sends there any more.
        if let Some(remote) = self.shared.ports.remote(&peer) {
            let _ = remote.withdraw(self.row.vm).await;
        }
        self.set_relocating(None).await
    }

    /// The protection ends: the old site need not move anything any more.
    pub(crate) async fn give_up_relocation(&self) {
        if let Some(Relocating::To { key, .. }) = self.row.settings.relocating {
            let _ = self.ask_to_relocate(key, RelocateStep::Cancel).await;
        }
    }

    /// Refuses what a replica on its way is not fit for.
    pub(crate) fn check_not_moving(&self) -> Result<(), Failure> {
        let Some(Relocating::To { peer, .. }) = &self.row.settings.relocating else { return Ok(()) };
        let name = &self.row.name;
        let message = format!(
            "the replica of {name} is on its way to {peer}; wait until it is there, or end that with 'afterimage migrate {name} --cancel'"
        );
        Err(Failure::transient(FailureCode::Unfit, message))
    }

    /// Between cycles: asks how far the move is, and has the next cycle come at once where the new site has nearly everything.
    pub(crate) async fn look_at_move(&mut self) {
        let outcome = match self.row.settings.relocating.clone() {
            Some(Relocating::To { key, .. }) if !self.row.paused => {
                self.ask_to_relocate(key, RelocateStep::Begin).await.map(|asked| {
                    if asked.in_step.is_some() || is_close(&asked) {
                        self.book_now();
                    }
                    // Why it was not gone over last stays to be seen.
                    let error = asked.error.clone().or_else(|| self.relocation.error.take());
                    self.relocation = Relocation { error, ..asked };
                })
            }
            Some(Relocating::From { peer, key }) => self.leave(&peer, key).await,
            _ => Ok(()),
        };
        if let Err(failure) = outcome {
            self.relocation.error = Some(failure.message);
        }
    }

    /// Does what there is to do for a move, before a cycle. What fails is tried again before the next one.
    pub(crate) async fn move_on(&mut self) {
        let outcome = match self.row.settings.relocating.clone() {
            None => return,
            Some(Relocating::To { peer, key }) => self.go_over(&peer, key).await,
            Some(Relocating::From { peer, key }) => self.leave(&peer, key).await,
        };
        if let Err(failure) = outcome {
            tracing::warn!(vm = %self.row.name, %failure, "the move of a replica does not go on just now");
            self.relocation.error = Some(failure.message);
        }
    }

    /// Goes over to the new site if that has everything.
    async fn go_over(&mut self, to: &str, key: KeyId) -> Result<(), Failure> {
        let mut asked = self.ask_to_relocate(key, RelocateStep::Begin).await?;
        for _ in 0..LOOKS {
            self.relocation = asked.clone();
            self.publish();
            if asked.in_step.is_some() || !is_close(&asked) || self.stop.is_cancelled() {
                break;
            }
            tokio::time::sleep(LOOK).await;
            asked = self.ask_to_relocate(key, RelocateStep::Begin).await?;
        }
        if asked.in_step.is_none() || self.row.phase != Phase::Replicating {
            return Ok(()); // a cycle sends more
        }
        // A log whose fate is not known has arrived, and then the old site's newest is another one, or it never will.
        let acked = self.row.shipped.acked;
        let seal = RelocateStep::Seal { number: acked.number, id: acked.id };
        let sealed = self.ask_to_relocate(key, seal).await?;
        let (true, Some(there)) = (sealed.sealed, sealed.in_step) else { return Ok(()) };
        self.squared = false; // whatever becomes of it, the next cycle asks first
        match self.take_over_at(to, InStep { there, here: acked.number }).await {
            Ok(()) => {}
            Err(failure) if failure.transient => return Err(failure),
            Err(failure) => {
                // What the new site refuses is a person's to mend; until then the old one takes logs.
                self.ask_to_relocate(key, RelocateStep::Unseal).await?;
                return Err(failure);
            }
        }
        let before = std::mem::replace(&mut self.row.settings.peer, to.to_owned());
        tracing::info!(vm = %self.row.name, from = before, to, "the replica has moved");
        self.relocation = Relocation::default();
        self.squared = false;
        self.set_relocating(Some(Relocating::From { peer: before.clone(), key })).await?;
        self.leave(&before, key).await
    }

    /// Becomes the primary of the replica at the new site; what is remembered of the chain is of that one's from now on.
    async fn take_over_at(&mut self, to: &str, in_step: InStep) -> Result<(), Failure> {
        let remote = self.shared.ports.remote(to).ok_or_else(|| unknown(to))?;
        let taken = remote.take_over(&self.row.name, in_step).await?;
        let (true, Some(head)) = (taken.vm == self.row.vm, taken.head) else {
            let message = format!("what {to} has under the name {} is not this VM's replica", self.row.name);
            return Err(Failure::lasting(FailureCode::ReplicaRefused, message));
        };
        if head.number < in_step.there.max(in_step.here) {
            let what =
                format!("{to} has log {} as its newest, and should have {}", head.number, in_step.there);
            return Err(self.require_resync(ResyncReason::ChainBroken(what)).await?);
        }
        self.row.generation = taken.generation;
        self.row.shipped = Shipped { acked: head, attempt: None, ..self.row.shipped };
        Ok(())
    }

    /// Tells the site that had the replica that it has it no more.
    async fn leave(&mut self, before: &str, key: KeyId) -> Result<(), Failure> {
        let Some(remote) = self.shared.ports.remote(before) else { return self.set_relocating(None).await };
        match remote.relocate(self.row.vm, &Relocate { to: key, step: RelocateStep::Done }).await {
            Err(failure) if failure.transient => return Err(failure),
            Err(failure) => {
                tracing::warn!(vm = %self.row.name, site = before, %failure, "what is left of the replica there stays");
            }
            Ok(_) => {}
        }
        self.set_relocating(None).await
    }

    async fn ask_to_relocate(&self, to: KeyId, step: RelocateStep) -> Result<Relocation, Failure> {
        self.remote()?.relocate(self.row.vm, &Relocate { to, step }).await
    }

    async fn set_relocating(&mut self, relocating: Option<Relocating>) -> Result<(), Failure> {
        self.row.settings.relocating = relocating;
        if self.row.settings.relocating.is_none() {
            self.relocation = Relocation::default();
        }
        durable_step("primary::relocate::saving");
        self.row.save(&self.shared.catalog).await?;
        durable_step("primary::relocate::saved");
        Ok(())
    }
}

/// Whether the new site lacks so little that it is worth waiting for.
fn is_close(relocation: &Relocation) -> bool {
    relocation.error.is_none()
        && relocation.progress.is_none()
        && relocation.pending_bytes.is_some_and(|bytes| bytes <= CLOSE_BYTES)
}

fn unknown(peer: &str) -> Failure {
    let message =
        format!("no peer is named {peer} (any more), or it was revoked; 'afterimage peer list' shows them");
    Failure::lasting(FailureCode::UnknownPeer, message)
}
