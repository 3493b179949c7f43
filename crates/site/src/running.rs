//! VMs that were failed over to this site and are run by it: started from the failover's disks, connected to this site's
//! networks, given addresses through the guest agent. They go on running whatever becomes of the site; what is known
//! of each is in `DIR/running/VM` ([`boot::Live`]).

use std::fs::File;
use std::io::Read as _;
use std::sync::Arc;
use std::time::Duration;

use boot::{Cabled, Connection, GuestSystem, IpSettings, Live, LiveDisk, LiveOrder, Machine};
use model::{VmId, VmName};
use qemu::GuestAgent;
use replica::FailoverDisk;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use crate::commands::{Site, no_such_vm};
use crate::events::Event;
use crate::failure::{Code, Failure};

/// How long a guest may take until its agent answers.
const AGENT_PATIENCE: Duration = Duration::from_secs(15 * 60);
/// How often its agent is looked for.
const AGENT_LOOK: Duration = Duration::from_secs(1);
/// How long a command that sets an address may take.
const ADDRESS_TIME: Duration = Duration::from_secs(60);
/// How long a start waits for the end of a failover that was completed.
const RELEASE_PATIENCE: Duration = Duration::from_secs(10);
/// How often it is looked whether it has come.
const RELEASE_LOOK: Duration = Duration::from_millis(50);
/// The file that says that a guest has not been given its addresses yet.
const PENDING: &str = "addresses-pending";

/// The file that says that the VM was handed over from here.
const MOVED: &str = "moved";

/// A VM that ran here was handed over.
#[derive(Debug, Serialize, Deserialize)]
struct Moved {
    /// To which site.
    to: String,
    /// The generation that ran here.
    generation: u64,
}

/// How a VM is to be stopped.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Stop {
    /// The power button is pressed, and the guest waited for.
    ShutDown(Duration),
    /// As a power cut does.
    PullThePlug,
}

/// What is about to be started.
pub(crate) struct Prepared {
    pub command: Vec<String>,
    nics: Vec<Cabled>,
    pub addresses: Vec<IpSettings>,
}

impl Site {
    /// The VM of that name, as far as it runs here.
    pub(crate) fn live(&self, vm: &VmName) -> Live {
        Live::at(self.dir.join("running").join(vm.as_str()))
    }

    /// Starts a VM that is failed over to this site, or only shows how it would be.
    pub(crate) async fn start_vm(self: &Arc<Self>, vm: &VmName, only_show: bool) -> Result<Value, Failure> {
        let live = self.live(vm);
        self.wait_for_release(vm).await;
        let prepared = match self.store.find(vm) {
            Some(id) => self.of_failover(id, vm, &live).await?,
            None => self.of_released(vm, &live).await?,
        };
        if only_show {
            return Ok(shown(vm, &live, &prepared));
        }
        let named = |error: boot::Error| Failure::new(Code::Boot, format!("{vm} cannot be started: {error}"));
        if !prepared.addresses.is_empty() {
            live.make_folder().map_err(named)?;
            let pending = live.path(PENDING);
            std::fs::write(&pending, "").map_err(|error| Failure::io("write", &pending, &error))?;
        }
        live.start(&prepared.command).await.map_err(named)?;
        self.events.note(Event::new("vm-started", "it was started at this site").vm(vm)).await;
        self.give_addresses(vm.clone(), live.clone(), prepared.addresses.clone());
        Ok(shown(vm, &live, &prepared))
    }

    /// Stops a VM that was started here.
    pub(crate) async fn stop_vm(&self, vm: &VmName, how: Stop) -> Result<Value, Failure> {
        let live = self.live(vm);
        if live.process().is_none() {
            let message = format!(
                "{vm} was not started by this site, or does not run any more; 'afterimage failover start {vm}' starts it"
            );
            return Err(Failure::new(Code::NoSuchVm, message));
        }
        self.stop_live(vm, &live, how).await
    }

    /// Stops a VM that this site has started, wherever its folder is.
    pub(crate) async fn stop_live(&self, vm: &VmName, live: &Live, how: Stop) -> Result<Value, Failure> {
        let stopped = match how {
            Stop::ShutDown(within) => live.shut_down(within).await,
            Stop::PullThePlug => live.pull_the_plug().await,
        };
        stopped.map_err(|error| Failure::new(Code::Boot, format!("{vm}: {error}")))?;
        self.events.note(Event::new("vm-stopped", "it was stopped at this site").vm(vm)).await;
        Ok(json!({ "vm": vm, "running": false }))
    }

    /// Ends a VM whose disks are about to go, and forgets that it ran here.
    pub(crate) async fn end_vm(&self, vm: &VmName) -> Result<(), Failure> {
        let live = self.live(vm);
        let ended = match live.pull_the_plug().await {
            Ok(()) => live.forget(),
            failed => failed,
        };
        ended.map_err(|error| {
            Failure::new(Code::Boot, format!("{vm}, which runs here, cannot be ended: {error}"))
        })
    }

    /// A failover that is final is at its end in a moment, unless there is much to fold in; a VM that is started in
    /// between only needs us for longer.
    async fn wait_for_release(&self, vm: &VmName) {
        let begun = Instant::now();
        while let Some(id) = self.store.find(vm)
            && begun.elapsed() < RELEASE_PATIENCE
            && self
                .store
                .status(id)
                .is_ok_and(|status| status.failover.is_some_and(|failover| failover.completing))
            && self.live(vm).process().is_none()
        {
            sleep(RELEASE_LOOK).await;
        }
    }

    /// From the disks of a failover that lasts.
    async fn of_failover(&self, id: VmId, vm: &VmName, live: &Live) -> Result<Prepared, Failure> {
        let status = self.store.status(id)?;
        if !status.failover.is_some_and(|failover| failover.ready) {
            let message = format!(
                "{vm} is a replica that is not failed over, and so cannot be started: 'afterimage failover test {vm}' tries it \
                 beside replication, 'afterimage failover unplanned {vm} --start' takes its primary's place"
            );
            return Err(Failure::new(Code::Failover, message));
        }
        self.exports.show_failover(id).await?;
        let definition = self.store.definition(id)?;
        let disks = self.store.run(move |store| ranked(store, id)).await?;
        self.prepare(vm, live, &definition, disks, true).await
    }

    /// From the disks of a VM that was failed over to this site for good.
    async fn of_released(&self, vm: &VmName, live: &Live) -> Result<Prepared, Failure> {
        let Some(released) = self.store.released_vm(vm)? else { return Err(no_such_vm(vm)) };
        if let Some(moved) = Moved::read(live).filter(|moved| moved.generation >= released.generation) {
            let message = format!(
                "{vm} was handed over to site {}, and its disks here are of before that; it is started there",
                moved.to
            );
            return Err(Failure::new(Code::Failover, message));
        }
        // Its flat file is at rest below its layer.
        let ranked = |disk: FailoverDisk| {
            let rank = boot::boot_rank(|sector| File::open(&disk.base)?.read_exact(sector));
            (rank, live_disk(disk))
        };
        let disks = released.disks.into_iter().map(ranked).collect();
        self.prepare(vm, live, &released.definition, disks, true).await
    }

    /// What a VM is started with; without cables if it is not to be `connected`.
    pub(crate) async fn prepare(
        &self,
        vm: &VmName,
        live: &Live,
        definition: &Value,
        mut disks: Vec<(u8, LiveDisk)>,
        connected: bool,
    ) -> Result<Prepared, Failure> {
        let local = self.checks.local(vm)?;
        let machine = Machine::of_definition(definition);
        // A kernel that is started directly finds its disks where they always were.
        if local.kernel.is_none() {
            disks.sort_by_key(|(rank, _)| *rank);
        }
        let maps = [&local.networks, &self.config.networks];
        let cabled = |nic: &boot::Nic| {
            let to = if connected { boot::connection(&nic.network, &maps) } else { Connection::None };
            Cabled { nic: nic.clone(), to }
        };
        let nics: Vec<Cabled> = machine.nics.iter().map(cabled).collect();
        let addresses = local.ip.clone();
        let order = LiveOrder {
            program: self.config.boot.program.clone(),
            accelerator: self.checks.accelerator_now().await?,
            name: vm.to_string(),
            machine,
            local,
            disks: disks.into_iter().map(|(_, disk)| disk).collect(),
            nics: nics.clone(),
            dir: live.folder().to_owned(),
        };
        live.make_folder()?;
        let command = order.command().await;
        let command =
            command.map_err(|error| Failure::new(Code::Boot, format!("machines/{vm}.toml: {error}")))?;
        Ok(Prepared { command, nics, addresses })
    }

    /// Notes that a VM was handed over from here, so that nobody starts its old disks.
    pub(crate) async fn note_moved(&self, vm: &VmName, to: &str, generation: u64) -> Result<(), Failure> {
        self.end_vm(vm).await?;
        let live = self.live(vm);
        live.make_folder()?;
        let (path, moved) = (live.path(MOVED), Moved { to: to.to_owned(), generation });
        let text = serde_json::to_vec(&moved).expect("plain values can be written as JSON");
        std::fs::write(&path, text).map_err(|error| Failure::io("write", &path, &error))
    }

    /// Gives guests their addresses that a run of before had not given them yet.
    pub(crate) fn take_up_addresses(self: &Arc<Self>) {
        let folders = std::fs::read_dir(self.dir.join("running")).into_iter().flatten().flatten();
        for vm in folders.filter_map(|folder| folder.file_name().to_str()?.parse::<VmName>().ok()) {
            if self.live(&vm).path(PENDING).exists() {
                let addresses = self.checks.local(&vm).map(|local| local.ip).unwrap_or_default();
                let live = self.live(&vm);
                self.give_addresses(vm, live, addresses);
            }
        }
    }

    /// Has a guest take its addresses once its agent answers.
    pub(crate) fn give_addresses(self: &Arc<Self>, vm: VmName, live: Live, addresses: Vec<IpSettings>) {
        if addresses.is_empty() {
            return;
        }
        let site = Arc::downgrade(self);
        tokio::spawn(async move {
            let outcome = set_addresses(&live, &addresses).await;
            let Some(site) = site.upgrade() else { return };
            let event = match outcome {
                Ok(()) => Event::new("addresses-set", "its guest has taken the addresses for this site"),
                Err(why) => Event::new(
                    "addresses-not-set",
                    format!("its guest has not taken the addresses for this site: {why}"),
                ),
            };
            let _ = std::fs::remove_file(live.path(PENDING));
            site.events.note(event.vm(&vm)).await;
        });
    }
}

/// The disks of a failover, each with how likely the guest boots from it.
fn ranked(store: &replica::Store, id: VmId) -> replica::Result<Vec<(u8, LiveDisk)>> {
    let view = store.failover_view(id)?;
    let disks = store
        .failover_disks(id)?
        .into_iter()
        .map(|disk| (boot::boot_rank(|sector| view.read_at(&disk.name, 0, sector)), live_disk(disk)));
    Ok(disks.collect())
}

fn live_disk(disk: FailoverDisk) -> LiveDisk {
    LiveDisk { name: disk.name.to_string(), path: disk.overlay }
}

impl Moved {
    fn read(live: &Live) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(live.path(MOVED)).ok()?).ok()
    }
}

pub(crate) fn shown(vm: &VmName, live: &Live, prepared: &Prepared) -> Value {
    let network =
        |cabled: &Cabled| json!({ "mac": cabled.nic.mac, "network": cabled.nic.network, "to": cabled.to });
    let process = live.process();
    json!({
        "vm": vm,
        "running": process.is_some(),
        "process": process,
        "qmp": live.people(),
        "console": live.console(),
        "screen": live.screen(),
        "guest_agent": live.agent(),
        "networks": prepared.nics.iter().map(network).collect::<Vec<_>>(),
        "command": prepared.command,
    })
}

/// Waits for the guest's agent, and has it set what is to be set; else why not.
async fn set_addresses(live: &Live, addresses: &[IpSettings]) -> Result<(), String> {
    let mut agent = agent_of(live).await?;
    let system = match agent.system().await.map_err(|error| error.to_string())?.as_str() {
        "mswindows" => GuestSystem::Windows,
        _ => GuestSystem::Unix,
    };
    let interfaces = agent.interfaces().await.map_err(|error| error.to_string())?;
    for settings in addresses {
        let mac = settings.mac.to_string();
        let (name, _) = interfaces
            .iter()
            .find(|(_, known)| *known == mac)
            .ok_or_else(|| format!("it has no network card {mac}"))?;
        for command in settings.commands(system, name) {
            agent.execute(&command, ADDRESS_TIME).await.map_err(|error| error.to_string())?;
        }
    }
    Ok(())
}

async fn agent_of(live: &Live) -> Result<GuestAgent, String> {
    let begun = Instant::now();
    loop {
        match GuestAgent::connect(&live.agent()).await {
            Ok(agent) => return Ok(agent),
            Err(_) if live.process().is_none() => return Err("the VM has ended".into()),
            Err(error) if begun.elapsed() > AGENT_PATIENCE => return Err(error.to_string()),
            Err(_) => sleep(AGENT_LOOK).await,
        }
    }
}
