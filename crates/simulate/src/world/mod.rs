//! A world: VMs, two sites, the line between them, and what is known to be true.

mod backups;
mod causes;
mod check;
mod end;
mod faults;
mod primary_site;
mod readers;
mod replica_site;
mod stray;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use model::{VmId, VmName};

use crate::chance::{Chance, splitmix};
use crate::clock::Time;
use crate::coverage::Coverage;
use crate::event::{Event, Side};
use crate::guest::SimVm;
use crate::plan::Plan;
use crate::ports::{Line, SimPorts};
use crate::power::Power;
use crate::truth::Truth;
use crate::turns::Turns;

use backups::Jobs;
use causes::Causes;
use primary_site::PrimarySite;
use replica_site::ReplicaSite;

/// Something that must never happen has happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation(pub String);

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The outcome of what a world does.
pub type Checked<T = ()> = Result<T, Violation>;

/// Makes a violation, for `return wrong(...)`.
pub(crate) fn wrong<T>(what: impl Into<String>) -> Checked<T> {
    Err(Violation(what.into()))
}

/// A VM of the world.
struct WorldVm {
    name: VmName,
    machine: SimVm,
    /// Its id, once it is protected.
    id: Option<VmId>,
}

/// A world.
pub struct World {
    plan: Plan,
    time: Time,
    truth: Truth,
    line: Line,
    vms: Vec<WorldVm>,
    primary: PrimarySite,
    replica: ReplicaSite,
    jobs: Jobs,
    causes: Vec<Causes>,
    /// The replica's disk or catalog was made to fail.
    storage_failed: bool,
    chance: Chance,
    /// What happened, in figures.
    pub coverage: Coverage,
    trace: Option<Vec<String>>,
    depth: usize,
}

impl World {
    /// The world of a seed, before anything has happened in it.
    pub fn new(seed: u64, plan: &Plan, traced: bool) -> Checked<Self> {
        let part = |part: u64| splitmix(splitmix(seed) ^ part);
        let (time, truth) = (Time::default(), Truth::default());
        let (primary_power, replica_power) = (Power::default(), Power::default());
        let vms: Vec<WorldVm> = plan
            .vms
            .iter()
            .enumerate()
            .map(|(place, vm)| {
                let name = format!("vm{place}").parse().expect("a plain name");
                WorldVm { name, machine: SimVm::new(&vm.blocks), id: None }
            })
            .collect();
        let replica = ReplicaSite::new(replica_power.clone(), &time, plan, part(1));
        let line = Line::new(replica.end(), replica_power, time.clone(), part(2));
        let machines: BTreeMap<_, _> =
            vms.iter().map(|vm| (primary_site::monitor(&vm.name), vm.machine.clone())).collect();
        let ports = SimPorts {
            power: primary_power,
            clock: time.clock(),
            vms: Arc::new(machines),
            line: line.clone(),
            truth: truth.clone(),
            turns: Turns::new(part(3)),
            chance: Arc::new(Mutex::new(Chance::new(part(4)))),
        };
        let mut world = Self {
            plan: plan.clone(),
            time,
            truth,
            line,
            vms,
            primary: PrimarySite::new(ports),
            replica,
            storage_failed: false,
            causes: vec![Causes::default(); plan.vms.len()],
            jobs: Jobs::default(),
            chance: Chance::new(part(5)),
            coverage: Coverage::default(),
            trace: traced.then(Vec::new),
            depth: 0,
        };
        world.boot_replica(crate::disk::Loss::Nothing)?;
        world.boot_primary()?;
        world.protect_all()?;
        Ok(world)
    }

    /// What happened, line by line, if it was to be traced.
    #[must_use]
    pub fn trace(&self) -> &[String] {
        self.trace.as_deref().unwrap_or_default()
    }

    /// How much time has passed.
    #[must_use]
    pub fn passed(&self) -> Duration {
        self.time.passed()
    }

    fn note(&mut self, line: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            let (at, indent) = (self.time.passed(), "  ".repeat(self.depth));
            trace.push(format!("{:>12.3} s {indent}{}", at.as_secs_f64(), line()));
        }
    }

    /// The place of a VM that an event names.
    fn vm_place(&self, vm: u64) -> usize {
        usize::try_from(vm % self.vms.len() as u64).unwrap_or(0)
    }

    /// Something happens; then everything that must be true is looked at.
    pub fn happen(&mut self, event: &Event) -> Checked {
        self.note(|| format!("{event:?}"));
        self.depth += 1;
        self.coverage.event(event);
        let outcome = self.take(event).and_then(|()| self.after_event());
        self.depth -= 1;
        outcome
    }

    fn after_event(&mut self) -> Checked {
        self.notice_deaths();
        self.check_all()
    }

    fn take(&mut self, event: &Event) -> Checked {
        match *event {
            Event::Write { vm, disk, sector, count, zeros } => self.write(vm, disk, sector, count, zeros),
            Event::Resize { vm, disk, blocks } => self.resize(vm, disk, blocks),
            Event::Pass { seconds } => self.time.pass(Duration::from_secs(seconds)),
            Event::Jump { side, seconds } => self.clock(side).jump(seconds),
            Event::Order { vm, order } => self.order(self.vm_place(vm), order),
            Event::Turns { turns } => return self.turns(turns),
            Event::Finish { vm } => return self.finish(self.vm_place(vm)),
            Event::Maintain { vm, steps, looks } => return self.maintain(self.vm_place(vm), steps, looks),
            Event::Mend { vm } => self.mend(self.vm_place(vm)),
            Event::Late => {
                let late = self.line.deliver_late();
                self.coverage.count("late calls", late as u64);
            }
            Event::Line { down } => self.line.lock().down = down,
            Event::Trouble { percent, segment_bytes } => {
                let mut line = self.line.lock();
                (line.trouble, line.segment_bytes) = (percent, segment_bytes.max(1));
            }
            Event::Trust { trust } => self.line.lock().trust = trust,
            Event::Cut { side, steps, after } => self.cut(side, steps, after),
            Event::Boot { side, loss } => return self.boot(side, loss),
            Event::Disk { class, skip, count } => {
                self.storage_failed = true;
                self.replica.disk_fault(class, skip, count);
            }
            Event::Commits { side, skip, count, kept } => match side {
                Side::Primary => self.primary.ports.power.fail_commits(skip, count, kept),
                Side::Replica => {
                    self.storage_failed = true;
                    self.replica.power.fail_commits(skip, count, kept);
                }
            },
            Event::Full { full } => self.replica.set_full(full),
            Event::Heal => self.replica.heal(),
            Event::Rot { file, at } => self.rot(file, at),
            Event::Restart { vm } => {
                let place = self.vm_place(vm);
                self.causes[place].restarted = true;
                self.machine(vm, crate::guest::Machine::restart);
            }
            Event::Deaf { vm, commands } => self.machine(vm, |machine| machine.failing = commands),
            Event::Scratch { vm, blocks } => {
                self.machine(vm, |machine| {
                    machine.scratch_blocks = usize::try_from(blocks).unwrap_or(usize::MAX)
                });
            }
            Event::Agent { vm, well } => self.machine(vm, |machine| machine.freezes = well),
            Event::OpenView { vm, point, strict } => return self.open_view(self.vm_place(vm), point, strict),
            Event::Look => return self.look_at_readers(),
            Event::CloseView { which } => self.close_view(which),
            Event::OpenHold { vm, seconds } => return self.open_hold(self.vm_place(vm), seconds),
            Event::Release { which } => self.release(which),
            Event::Backup { vm, wish } => self.want_backup(self.vm_place(vm), wish),
            Event::Jobs { ref meanwhile } => return self.run_jobs(meanwhile),
            Event::Stray { vm, stray } => return self.send_stray(self.vm_place(vm), stray),
            Event::Migrate { vm } => return self.migrate(self.vm_place(vm)),
            Event::Failover { vm, point } => return self.failover(self.vm_place(vm), point),
            Event::CancelFailover { vm } => self.cancel_failover(self.vm_place(vm)),
        }
        Ok(())
    }
}
