//! Extended replication: a replica of this site is passed on to a third one, as a relationship of its own.
//!
//! ```text
//!   VM ──▶ primary ═════▶ replica here ─▶ a relationship whose VM is that replica ═════▶ replica at the third site
//!          one log per cycle   points, logs          [`guest::ReplicaGuest`]               an ordinary one
//! ```
//!
//! The relationship is `primary`'s: offers, generations, uploads that go on, passes, health and figures are the ones of
//! every relationship. Only what it reads is not QEMU but the store: moments are the replica's points, and what changed
//! between two of them is what their logs say (`docs/decisions/0021-extended-replication.md`).

mod guest;
mod ports;

use std::time::Duration;

use model::{InitialStart, ResyncPolicy, VmId, VmName};
use primary::{Changes, Monitor, ProtectRequest, Settings};
use serde_json::{Value, json};

use crate::clock::now;
use crate::commands::Site;
use crate::events::Event;
use crate::failure::{Code, Failure};
use crate::request::Extend;
use crate::status::VmView;

pub(crate) use ports::ReplicaPorts;

/// The relationships of a site that pass replicas on.
pub(crate) type Extensions = primary::Primary<ReplicaPorts>;

impl Site {
    /// Begins to pass a replica on to another peer.
    pub(crate) async fn extend(&self, extend: Extend) -> Result<Value, Failure> {
        let Extend { vm: name, to, every_s, points, bandwidth_bytes_per_s } = extend;
        let vm = self.replica(&name)?;
        let there = self.store.run(move |store| store.forwardable(vm)).await?;
        check_extendable(&name, &to, every_s, &there)?;
        if let Some(found) = self.extensions.get(&name) {
            let message = format!(
                "{name} is extended to {} already; 'afterimage unextend {name}' ends that",
                found.settings.peer
            );
            return Err(Failure::new(Code::Exists, message));
        }
        let settings = Settings {
            monitor: Monitor::Replica,
            nbd: None,
            nodes: Vec::new(),
            peer: to.clone(),
            interval: Duration::from_secs(every_s.unwrap_or(there.interval_s)),
            points: points.unwrap_or(there.points),
            app_every: None,
            guest_agent: None,
            bandwidth_bytes_per_s,
            sign_of_life: None,
            excluded: Vec::new(),
            relocating: None,
            resync: ResyncPolicy::Automatic,
        };
        let request = ProtectRequest { name: name.clone(), settings, initial: InitialStart::Now };
        let status = self.extensions.begin(request, vm, there.generation).await?;
        self.events.note(Event::new("extended", format!("passed on to {to} from here")).vm(&name)).await;
        Ok(json!(VmView::of_primary(&status, now())))
    }

    /// Changes how a VM is protected from here, or how its replica is passed on.
    pub(crate) async fn configure(&self, name: &VmName, changes: Changes) -> Result<Value, Failure> {
        if !self.is_extended(name) {
            return self.of_primary(self.primary.configure(name, changes).await);
        }
        let vm = self.replica(name)?;
        let there = self.store.run(move |store| store.forwardable(vm)).await?;
        check_interval(name, changes.interval.map(|interval| interval.as_secs()), &there)?;
        self.of_primary(self.extensions.configure(name, changes).await)
    }

    /// Ends it; the third site keeps what it has.
    pub(crate) async fn unextend(&self, name: &VmName) -> Result<Value, Failure> {
        let status = self.extensions.unprotect(name).await.map_err(|error| match error {
            primary::Error::NoSuchVm(name) => Failure::new(
                Code::NoSuchVm,
                format!("{name} is not extended from here; 'afterimage status' lists what there is"),
            ),
            error => error.into(),
        })?;
        let what = format!("not passed on to {} any more", status.settings.peer);
        self.events.note(Event::new("extension-ended", what).vm(name)).await;
        Ok(json!(VmView::of_primary(&status, now())))
    }

    /// A VM that was failed over to this site is to be replicated from here: what was its extension ends. Where it is
    /// replicated to the third site now, the replica there goes on being its replica.
    pub(crate) async fn end_extension(&self, vm: VmId, name: &VmName, to: &str) -> Result<(), Failure> {
        match self.extensions.get(name).filter(|found| found.vm == vm) {
            None => {}
            Some(found) if found.settings.peer == to => {
                self.extensions.stand_down(name).await?;
                self.extensions.forget(name).await?;
            }
            Some(_) => self.unextend(name).await.map(drop)?,
        }
        Ok(())
    }
}

fn check_extendable(
    name: &VmName,
    to: &str,
    every_s: Option<u64>,
    there: &replica::Forwardable,
) -> Result<(), Failure> {
    if there.failed_over {
        let message = format!(
            "{name} was failed over to this site for good; 'afterimage failover reverse {name} --to {to}' replicates it from here"
        );
        return Err(Failure::new(Code::Failover, message));
    }
    if there.peer == to {
        let message = format!("{name} is replicated from {to}; extend it to a third site");
        return Err(Failure::new(Code::Usage, message));
    }
    if there.newest.is_none() {
        let message = format!(
            "{name} has no recovery point here yet: its initial replication is under way; extend it when that is complete"
        );
        return Err(Failure::transient(Code::Replica, message));
    }
    check_interval(name, every_s, there)
}

fn check_interval(name: &VmName, every_s: Option<u64>, there: &replica::Forwardable) -> Result<(), Failure> {
    match every_s {
        Some(every_s) if every_s < there.interval_s => {
            let message = format!(
                "{name} arrives here every {} s, so it cannot be passed on every {every_s} s; give '--every' {} s or more",
                there.interval_s, there.interval_s
            );
            Err(Failure::new(Code::Usage, message))
        }
        _ => Ok(()),
    }
}
