//! What a person changes of a VM that is protected already.
//!
//! What both sides must know (interval, points, sign of life) the replica learns from the offer of the next cycle, which is due at
//! once. What cannot change on the way has its own command: disks, the peer, how QEMU is reached at all.

use std::path::PathBuf;
use std::time::Duration;

use model::{Change, InitialStart, ResyncPolicy};
use serde::{Deserialize, Serialize};
use steps::durable_step;

use crate::error::{Error, Failure, FailureCode};
use crate::ports::{Guest, Ports};
use crate::protect::{check_settings, find_domain};
use crate::relationship::Relationship;
use crate::rows::Settings;
use crate::{Monitor, Primary, VmName, VmStatus};

/// What a person wants to have otherwise for a protected VM. What is not named stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Changes {
    /// When both sides are compared without being asked.
    pub resync: Option<ResyncPolicy>,
    /// How its initial replication is to begin.
    pub initial: Option<InitialStart>,
    /// Between the starts of two cycles.
    pub interval: Option<Duration>,
    /// Hourly recovery points beside the latest.
    pub points: Option<u8>,
    /// Between two application-consistent points.
    pub app_every: Change<Duration>,
    /// The guest agent's socket.
    pub guest_agent: Change<PathBuf>,
    /// The most that is sent, in bytes per second.
    pub bandwidth_bytes_per_s: Change<u64>,
    /// What shows that the VM has booted, for boot checks of its replica.
    pub sign_of_life: Change<String>,
    /// The socket of the VM's monitor.
    pub qmp: Option<PathBuf>,
    /// The socket of the NBD server that QEMU has already.
    pub nbd: Change<PathBuf>,
}

impl Changes {
    /// The settings with what is to be otherwise.
    fn of(&self, before: &Settings) -> Settings {
        let before = before.clone();
        Settings {
            monitor: self.qmp.clone().map_or(before.monitor, Monitor::Socket),
            nbd: self.nbd.clone().of(before.nbd),
            interval: self.interval.unwrap_or(before.interval),
            points: self.points.unwrap_or(before.points),
            app_every: self.app_every.of(before.app_every),
            guest_agent: self.guest_agent.clone().of(before.guest_agent),
            bandwidth_bytes_per_s: self.bandwidth_bytes_per_s.of(before.bandwidth_bytes_per_s),
            sign_of_life: self.sign_of_life.clone().of(before.sign_of_life),
            ..before
        }
    }

    /// Whether they can be made at all of a VM with these settings.
    fn check(&self, name: &VmName, before: &Settings, interval_min_s: u64) -> Result<(), Error> {
        let after = self.of(before);
        if before.monitor == Monitor::Replica && self.needs_a_vm() {
            return Err(Error::Setting(format!(
                "the replica of {name} is passed on from here: only its interval, points, bandwidth and resynchronization can be set; configure the rest where the VM runs"
            )));
        }
        if self.qmp.is_some() && !matches!(before.monitor, Monitor::Socket(_)) {
            return Err(Error::Setting(format!(
                "{name} is reached as {}, and not by a QMP socket; 'afterimage unprotect {name}' and protect it anew to change that",
                before.monitor
            )));
        }
        check_settings(&after, interval_min_s)?;
        if after.app_every.is_some() && after.agent().is_none() {
            return Err(Error::Setting(format!(
                "application-consistent points of {name} need its guest agent: '--guest-agent SOCKET', or '--app-every none'"
            )));
        }
        Ok(())
    }

    fn needs_a_vm(&self) -> bool {
        self.initial.is_some()
            || self.app_every != Change::Keep
            || self.guest_agent != Change::Keep
            || self.sign_of_life != Change::Keep
            || self.qmp.is_some()
            || self.nbd != Change::Keep
    }
}

impl<P: Ports> Primary<P> {
    /// Changes how a VM is protected. What does not fit is refused, and then nothing has changed.
    pub async fn configure(&self, name: &VmName, changes: Changes) -> Result<VmStatus, Error> {
        let status = self.get(name).ok_or_else(|| Error::NoSuchVm(name.clone()))?;
        changes.check(name, &status.settings, self.shared.config.interval_min_s)?;
        if let (Some(group), Some(_)) = (&status.group, changes.interval) {
            return Err(Error::Setting(format!(
                "{name} is in group {group}, whose interval counts: 'afterimage group remove {group}', and create it anew with '--every'"
            )));
        }
        let after = changes.of(&status.settings);
        if let (Monitor::Libvirt(domain), Change::Set(_), None) =
            (&after.monitor, changes.app_every, &after.guest_agent)
        {
            find_domain(&domain.uri, &domain.name, true).await?;
        }
        self.order_configured(name, changes).await
    }
}

impl<P: Ports> Relationship<P> {
    /// Changes how the VM is protected. A new policy counts at once, also for what was asked for or cancelled before; what the
    /// replica's site must know goes there with the next cycle, which is due now.
    pub async fn configure(&mut self, changes: Changes) -> Result<(), Failure> {
        self.check_is_ours()?;
        let after = changes.of(&self.row.settings);
        if (&after.monitor, &after.nbd) != (&self.row.settings.monitor, &self.row.settings.nbd) {
            self.check_reached_by(&after).await?;
        }
        if let Some(initial) = changes.initial {
            self.set_initial(initial).await?;
        }
        if let Some(policy) = changes.resync {
            self.set_policy(policy);
        }
        if after != (Settings { resync: after.resync, ..self.row.settings.clone() }) {
            self.row.settings = Settings { resync: self.row.settings.resync, ..after };
            self.square_up_anew();
        }
        durable_step("primary::configure::saving");
        self.row.save(&self.shared.catalog).await?;
        durable_step("primary::configure::saved");
        Ok(())
    }

    /// Whether the VM is found where it is to be looked for from now on.
    async fn check_reached_by(&mut self, after: &Settings) -> Result<(), Failure> {
        // A monitor may serve one at a time.
        self.let_go_of_guest();
        let reached = async {
            let guest = self.shared.ports.connect(self.row.vm, after).await?;
            guest.resolve(&self.row.nodes()).await
        };
        let name = &self.row.name;
        reached.await.map(drop).map_err(|failure| {
            let message =
                format!("{name} is not found at {}, and stays as it was: {}", after.monitor, failure.message);
            Failure::transient(FailureCode::QemuGone, message)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(monitor: Monitor) -> Settings {
        Settings {
            monitor,
            nbd: None,
            nodes: Vec::new(),
            peer: "head".into(),
            interval: Duration::from_secs(30),
            points: 24,
            app_every: None,
            guest_agent: None,
            bandwidth_bytes_per_s: Some(1_000_000),
            sign_of_life: None,
            excluded: Vec::new(),
            relocating: None,
            resync: ResyncPolicy::Automatic,
        }
    }

    fn refusal(changes: &Changes, before: &Settings) -> String {
        let refused = changes.check(&"web".parse().unwrap(), before, 5).unwrap_err();
        assert!(matches!(refused, Error::Setting(_)), "{refused}");
        refused.to_string()
    }

    #[test]
    fn what_is_not_named_stays_and_what_cannot_be_is_refused() {
        let before = settings(Monitor::Socket("/run/qmp".into()));
        assert_eq!(Changes::default().of(&before), before);
        let changes = Changes {
            points: Some(3),
            bandwidth_bytes_per_s: Change::Clear,
            app_every: Change::Set(Duration::from_secs(3600)),
            ..Changes::default()
        };
        let told = refusal(&changes, &before);
        assert!(told.contains("--guest-agent"), "{told}");
        let changes = Changes { guest_agent: Change::Set("/run/agent".into()), ..changes };
        changes.check(&"web".parse().unwrap(), &before, 5).unwrap();
        let after = changes.of(&before);
        assert_eq!((after.points, after.bandwidth_bytes_per_s), (3, None));
        assert_eq!((after.interval, &after.peer), (before.interval, &before.peer));
        let agentless = Changes { guest_agent: Change::Clear, ..Changes::default() };
        assert!(refusal(&agentless, &after).contains("--app-every none"));
        for wrong in [
            Changes { interval: Some(Duration::from_secs(4)), ..Changes::default() },
            Changes { interval: Some(Duration::from_secs(901)), ..Changes::default() },
            Changes { points: Some(25), ..Changes::default() },
        ] {
            refusal(&wrong, &before);
        }
    }

    #[test]
    fn a_replica_that_is_passed_on_has_no_guest() {
        let before = settings(Monitor::Replica);
        let fine = Changes { points: Some(0), bandwidth_bytes_per_s: Change::Clear, ..Changes::default() };
        fine.check(&"web".parse().unwrap(), &before, 5).unwrap();
        let frozen = Changes { app_every: Change::Set(Duration::from_secs(3600)), ..Changes::default() };
        assert!(refusal(&frozen, &before).contains("where the VM runs"));
        let moved = Changes { qmp: Some("/run/other".into()), ..Changes::default() };
        assert!(refusal(&moved, &before).contains("where the VM runs"));
    }
}
