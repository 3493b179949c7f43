//! A replica moves to another site: asked for where its VM runs, done by the site that has it.
//!
//! ```text
//!  primary's site ──"move it to S"──▶ this site ══ the extension: every point, the oldest first ══▶ S
//!        │ before each cycle: is all there?   │
//!        └──────── takes S over ──────────────┴──────────────▶ S takes logs from the primary; here it is removed
//! ```
//!
//! Where a VM's data goes is its owner's to say, so the order comes from the primary's site and no other. That this site may send to S,
//! and S take from it, the two have agreed on as peers; that the primary may have at S what came from here, S says with a
//! trust group (`docs/decisions/0027-moving-to-another-site.md`).

use std::sync::Arc;
use std::time::Duration;

use model::{Head, InitialStart, LogNumber, Phase, ResyncPolicy, VmId, VmName};
use primary::{Monitor, ProtectRequest, Settings, VmStatus};
use serde_json::Value;
use wire::{KeyId, Peer, Refused, RefusedClass, Relocate, RelocateStep, Relocation};

use crate::clock::now;
use crate::commands::Site;
use crate::endpoint::refused;
use crate::events::Event;
use crate::failure::{Code, Failure};
use crate::peers::no_such_peer;
use crate::status::progress;

/// A cycle that is due within this time need not be hurried.
const IDLE: Duration = Duration::from_secs(1);

impl Site {
    /// Has the replica of a VM moved to a peer; with none, ends that.
    pub(crate) async fn relocate(&self, vm: &VmName, to: Option<String>) -> Result<Value, Failure> {
        if let Some(id) = self.store.find(vm) {
            return match to {
                None => self.cancel_relocation_here(id, vm).await,
                Some(_) => Err(Failure::new(
                    Code::NoSuchVm,
                    format!(
                        "the replica of {vm} is here, and where the data of {vm} goes is decided where it runs; run this at {}",
                        self.store.status(id)?.primary_name
                    ),
                )),
            };
        }
        let Some(peer) = to else { return self.of_primary(self.primary.cancel_relocation(vm).await) };
        let row = self.peers.get(&peer).ok_or_else(|| no_such_peer(&peer))?;
        let key = row.key.ok_or_else(|| {
            let message = format!(
                "the key of {peer} was never seen; 'afterimage peer invite {peer} --replace' makes it known"
            );
            Failure::new(Code::Peer, message)
        })?;
        let status = self.primary.relocate(vm, peer.clone(), key).await;
        if status.is_ok() {
            let what = format!("its replica is on its way to {peer}");
            self.events.note(Event::new("moving", what).vm(vm)).await;
        }
        self.of_primary(status)
    }

    /// For a primary that is lost in the middle.
    async fn cancel_relocation_here(&self, id: VmId, vm: &VmName) -> Result<Value, Failure> {
        if self.store.relocation(id, LogNumber::ZERO)?.is_none() {
            return Err(Failure::new(Code::Unfit, format!("the replica of {vm} does not move")));
        }
        self.give_up_moving(id, vm).await?;
        self.of_replica(id)
    }

    async fn give_up_moving(&self, id: VmId, vm: &VmName) -> Result<(), Failure> {
        let for_the_move = self.store.run(move |store| store.give_up_relocation(id)).await?;
        if for_the_move && self.extensions.get(vm).is_some() {
            self.unextend(vm).await?;
        }
        Ok(())
    }

    /// A step that the primary of a replica here asks for.
    pub(crate) async fn relocate_replica(
        self: &Arc<Self>,
        peer: &Peer,
        vm: VmId,
        wanted: Relocate,
    ) -> Result<Relocation, Refused> {
        let Some(name) = self.store.name(vm) else {
            // Done, and the answer was lost.
            return match wanted.step {
                RelocateStep::Done | RelocateStep::Cancel => Ok(Relocation::default()),
                _ => Err(Refused::new(
                    RefusedClass::NotFound,
                    "no-such-vm",
                    format!("there is no replica of VM {vm} here"),
                )),
            };
        };
        match wanted.step {
            RelocateStep::Begin => self.begin_moving(vm, &name, wanted.to).await?,
            RelocateStep::Seal { number, id } => self.seal(vm, &name, Head { number, id }).await?,
            RelocateStep::Unseal => self.of_store(move |store| store.unseal_relocation(vm)).await?,
            RelocateStep::Cancel => {
                self.give_up_moving(vm, &name).await.map_err(as_refused)?;
                return Ok(Relocation::default());
            }
            RelocateStep::Done => {
                self.end_moving(peer, vm, &name).await?;
                return Ok(Relocation::default());
            }
        }
        self.how_far(vm, &name)
    }

    async fn begin_moving(&self, vm: VmId, name: &VmName, key: KeyId) -> Result<(), Refused> {
        let Some(to) = self.peers.named_by_key(key) else {
            let message = format!(
                "site {} does not know the site that VM {name} is to be moved to; 'afterimage peer invite {}' there and 'afterimage peer accept' here make them peers",
                self.config.name, self.config.name
            );
            return Err(Refused::conflict("unknown-site", message));
        };
        let there = self.of_store(move |store| store.forwardable(vm)).await?;
        if there.newest.is_none() || there.failed_over {
            let message =
                format!("VM {name} has no recovery point at site {} that could be moved", self.config.name);
            return Err(Refused::new(RefusedClass::Busy, "no-point", message).retry_after(30));
        }
        let extension = self.extensions.get(name);
        if let Some(other) = extension.as_ref().filter(|found| found.settings.peer != to) {
            let message = format!(
                "VM {name} is passed on from site {} to {}; 'afterimage unextend {name}' there first",
                self.config.name, other.settings.peer
            );
            return Err(Refused::conflict("extended", message));
        }
        let (mark, extended) = (to.clone(), extension.is_some());
        self.of_store(move |store| store.begin_relocation(vm, &mark, extended)).await?;
        match extension {
            None => self.pass_on_to(vm, name, to, &there).await,
            // What its site has refused may have been mended; and what has arrived goes on at once, whatever the interval.
            Some(found) if !found.paused && (is_stopped(&found) || self.waits_idly(vm, &found)) => {
                self.extensions.resume(name).await.map(drop).map_err(as_refused)
            }
            Some(_) => Ok(()),
        }
    }

    /// There is more to pass on, and the next cycle comes only when its interval is over.
    fn waits_idly(&self, vm: VmId, extension: &VmStatus) -> bool {
        is_through(extension)
            && extension.next_at > now().plus(IDLE)
            && self.store.has_backlog(vm, extension.acked)
    }

    async fn pass_on_to(
        &self,
        vm: VmId,
        name: &VmName,
        to: String,
        there: &replica::Forwardable,
    ) -> Result<(), Refused> {
        let settings = Settings {
            monitor: Monitor::Replica,
            nbd: None,
            nodes: Vec::new(),
            peer: to.clone(),
            interval: Duration::from_secs(there.interval_s),
            points: there.points,
            app_every: None,
            guest_agent: None,
            bandwidth_bytes_per_s: None,
            sign_of_life: None,
            excluded: Vec::new(),
            relocating: None,
            resync: ResyncPolicy::Automatic,
        };
        let request = ProtectRequest { name: name.clone(), settings, initial: InitialStart::Now };
        match self.extensions.begin(request, vm, there.generation).await {
            // Asked twice at once.
            Ok(_) | Err(primary::Error::Exists(_)) => {}
            Err(error) => return Err(as_refused(error)),
        }
        self.events.note(Event::new("moving", format!("on its way to {to}")).vm(name)).await;
        Ok(())
    }

    async fn seal(&self, vm: VmId, name: &VmName, newest: Head) -> Result<(), Refused> {
        let Some(extension) = self.extensions.get(name).filter(is_through) else { return Ok(()) };
        self.of_store(move |store| store.seal_relocation(vm, newest, extension.acked)).await.map(drop)
    }

    /// The new site is the replica's.
    async fn end_moving(&self, peer: &Peer, vm: VmId, name: &VmName) -> Result<(), Refused> {
        let to = self.store.relocation(vm, LogNumber::ZERO).ok().flatten().filter(|moving| moving.sealed);
        let Some(to) = to.map(|moving| moving.to) else {
            let message = format!("VM {name} was not handed over from site {}", self.config.name);
            return Err(Refused::conflict("not-moving", message));
        };
        if self.extensions.get(name).is_some() {
            // Nothing is told to the new site: what it has is the primary's now.
            self.extensions.stand_down(name).await.map_err(as_refused)?;
            self.extensions.forget(name).await.map_err(as_refused)?;
        }
        self.of_store(move |store| store.relocated(vm)).await?;
        let what = format!("its replica was moved from here to {to}");
        self.events.note(Event::new("moved", what).vm(name).peer(&peer.name)).await;
        Ok(())
    }

    fn how_far(&self, vm: VmId, name: &VmName) -> Result<Relocation, Refused> {
        let extension = self.extensions.get(name);
        let through = extension.as_ref().filter(|found| is_through(found));
        let acked = through.map_or(LogNumber::ZERO, |found| found.acked);
        let moving = self.store.relocation(vm, acked).map_err(|error| refused(error.into_refused()))?;
        let Some(moving) = moving else { return Ok(Relocation::default()) };
        Ok(Relocation {
            in_step: moving.in_step.filter(|_| through.is_some()),
            sealed: moving.sealed,
            progress: extension.as_ref().and_then(|found| progress(&found.phase)),
            pending_bytes: through.and_then(|found| self.store.bytes_after_mark(vm, found.acked).ok()),
            error: extension.and_then(|found| found.error).map(|failure| failure.message),
        })
    }

    async fn of_store<T: Send + 'static>(
        &self,
        call: impl FnOnce(&replica::Store) -> replica::Result<T> + Send + 'static,
    ) -> Result<T, Refused> {
        self.store.run(call).await.map_err(|error| refused(error.into_refused()))
    }
}

fn is_stopped(extension: &VmStatus) -> bool {
    extension.error.as_ref().is_some_and(|error| !error.transient)
}

/// Whether the third site has a point, and gets the changes since.
fn is_through(extension: &VmStatus) -> bool {
    extension.phase == Phase::Replicating
}

fn as_refused(error: impl Into<Failure>) -> Refused {
    let failure = error.into();
    let class = if failure.transient { RefusedClass::Busy } else { RefusedClass::Conflict };
    Refused { transient: failure.transient, ..Refused::new(class, "not-moved", failure.message) }
}
