//! The primary's ports onto a simulated VM and a simulated link.

mod guest;
mod link;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use model::{Timestamp, VmId};
use primary::ports::Ports;
use primary::{Failure, FailureCode, Monitor, Settings};

pub use guest::{SimCapture, SimGuest, SimReader};
pub use link::{Line, LineState, ReplicaEnd, SimRemote, SimUpload, Trust};

use crate::chance::Chance;
use crate::clock::SiteClock;
use crate::guest::SimVm;
use crate::power::Power;
use crate::truth::Truth;
use crate::turns::Turns;

/// The name of the replica's site on the primary.
pub const PEER: &str = "replica";
/// The name of the primary's site on the replica.
pub const PRIMARY: &str = "primary";

/// What the relationships of the simulated primary touch; clones share it.
#[derive(Clone)]
pub struct SimPorts {
    /// The primary's power: what was begun in another life is left behind.
    pub power: Power,
    /// Its clock.
    pub clock: SiteClock,
    /// The VMs, by the path of their monitor.
    pub vms: Arc<BTreeMap<PathBuf, SimVm>>,
    /// The way to the replica.
    pub line: Line,
    /// The truth.
    pub truth: Truth,
    /// Who goes on when.
    pub turns: Turns,
    /// Where ids come from.
    pub chance: Arc<Mutex<Chance>>,
}

impl Ports for SimPorts {
    type Guest = SimGuest;
    type Remote = SimRemote;

    async fn connect(&self, vm: VmId, settings: &Settings) -> Result<SimGuest, Failure> {
        self.turns.pass().await;
        let found = match &settings.monitor {
            Monitor::Socket(socket) => self.vms.get(socket).cloned(),
            Monitor::Libvirt(_) | Monitor::Replica => None,
        };
        let Some(machine) = found else {
            return Err(failure(FailureCode::QemuGone, "no VM is there"));
        };
        let process = {
            let mut machine = machine.lock();
            machine.id = Some(vm);
            machine.process
        };
        Ok(SimGuest { vm: machine, process, ports: self.clone() })
    }

    async fn is_off(&self, _settings: &Settings) -> bool {
        false
    }

    fn remote(&self, peer: &str) -> Option<SimRemote> {
        let known = peer == PEER && self.line.lock().trust != Trust::Unknown;
        known.then(|| SimRemote { ports: self.clone() })
    }

    fn now(&self) -> Timestamp {
        self.clock.now()
    }

    fn random_id(&self) -> Result<[u8; 16], Failure> {
        Ok(self.chance.lock().unwrap_or_else(PoisonError::into_inner).bytes())
    }
}

/// A failure that may clear by itself.
fn failure(code: FailureCode, message: impl Into<String>) -> Failure {
    Failure { code, message: message.into(), transient: true }
}
