//! From a seed to a world's shape and its schedule.
//!
//! Seeds differ in what may happen at all: a world in which everything goes wrong all the time never gets far, and
//! what only shows after a long calm is found in calm worlds.

use model::gate::Access;

use crate::chance::{Chance, splitmix};
use crate::disk::{Class, Loss};
use crate::event::{Event, Order, Side, Stray, Wish};
use crate::ports::Trust;

/// The shape of one VM.
#[derive(Debug, Clone)]
pub struct VmPlan {
    /// Its disks, in blocks of 4 KiB.
    pub blocks: Vec<usize>,
    /// Hourly points to keep.
    pub points: u8,
    /// Seconds between application-consistent points, if it has an agent.
    pub app_every_s: Option<u64>,
    /// Seconds between cycles.
    pub interval_s: u64,
}

/// The shape of a world.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Its VMs.
    pub vms: Vec<VmPlan>,
    /// The newest points that are kept in any case.
    pub recent_points: usize,
    /// A pass is cut into logs of about so many bytes.
    pub initial_log_bytes: u64,
    /// An apply or a merge plans for at most so many extents at once.
    pub plan_extents_max: usize,
    /// Cycles at once.
    pub cycles_at_once: usize,
}

/// A world and what happens in it.
#[derive(Debug, Clone)]
pub struct Schedule {
    /// The seed that it is of.
    pub seed: u64,
    /// The world.
    pub plan: Plan,
    /// What happens.
    pub events: Vec<Event>,
}

impl Schedule {
    /// The schedule of a seed, with so many events.
    #[must_use]
    pub fn of(seed: u64, events: usize) -> Self {
        let mut chance = Chance::new(splitmix(seed ^ 0x5c4e_d01e));
        let plan = plan(&mut chance);
        let mut mix = Mix::new(&mut chance);
        let mut all = first_events(&plan, &mut chance);
        while all.len() < events {
            mix.next(&mut chance, &mut all);
        }
        Self { seed, plan, events: all }
    }
}

fn plan(chance: &mut Chance) -> Plan {
    let vms = [1, 1, 1, 2, 2, 3][chance.place(6)];
    let vm = |chance: &mut Chance| {
        let blocks = |chance: &mut Chance| match chance.below(8) {
            // More than one chunk of a change map, and several blocks of a compare.
            0 => chance.within(60, 150),
            _ => chance.within(3, 20),
        };
        let disks = chance.within(1, 3);
        VmPlan {
            blocks: (0..disks).map(|_| usize::try_from(blocks(chance)).unwrap_or(1)).collect(),
            points: [0, 0, 1, 3][chance.place(4)],
            app_every_s: chance.one_in(2).then(|| chance.within(30, 600)),
            interval_s: [5, 30, 300][chance.place(3)],
        }
    };
    Plan {
        vms: (0..vms).map(|_| vm(chance)).collect(),
        recent_points: chance.place(4),
        initial_log_bytes: [1 << 12, 1 << 15, 1 << 30][chance.place(3)],
        plan_extents_max: [4, 64, 1 << 19][chance.place(3)],
        cycles_at_once: [1, 4][chance.place(2)],
    }
}

/// Some bytes on the disks, and mostly an initial replication that comes through.
fn first_events(plan: &Plan, chance: &mut Chance) -> Vec<Event> {
    let mut events = Vec::new();
    for vm in 0..plan.vms.len() as u64 {
        events.extend((0..chance.below(6)).map(|_| write(chance, vm)));
        if chance.percent(80) {
            events.push(Event::Order { vm, order: Order::Sync });
            events.push(Event::Finish { vm });
        }
    }
    events
}

fn write(chance: &mut Chance, vm: u64) -> Event {
    Event::Write {
        vm,
        disk: chance.below(6),
        sector: chance.next() >> 32,
        count: match chance.below(4) {
            0 => chance.within(9, 80),
            _ => chance.within(1, 8),
        },
        zeros: chance.one_in(6),
    }
}

/// What may happen, and how often.
struct Mix {
    weights: Vec<(u64, Kind)>,
    total: u64,
    /// Dead sites are to be started after so many more events.
    boots: Vec<(usize, Side)>,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Write,
    Cycle,
    Turns,
    Maintain,
    Pass,
    View,
    Look,
    Hold,
    Backup,
    Jobs,
    Person,
    Line,
    Trust,
    CutPrimary,
    CutReplica,
    Kill,
    Disk,
    Full,
    Commits,
    Rot,
    Guest,
    Resize,
    Clock,
    Stray,
    Migrate,
    Failover,
}

/// How much there is of what always happens, in how many of a hundred worlds the rest happens at all, and how much
/// of it there is then.
const KINDS: [(Kind, u64, u64); 26] = [
    (Kind::Write, 100, 26),
    (Kind::Cycle, 100, 22),
    (Kind::Turns, 100, 16),
    (Kind::Maintain, 100, 14),
    (Kind::Pass, 100, 6),
    (Kind::View, 80, 5),
    (Kind::Look, 80, 3),
    (Kind::Hold, 50, 5),
    (Kind::Backup, 70, 4),
    (Kind::Jobs, 90, 6),
    (Kind::Person, 40, 3),
    (Kind::Line, 50, 4),
    (Kind::Trust, 10, 1),
    (Kind::CutPrimary, 45, 4),
    (Kind::CutReplica, 60, 6),
    (Kind::Kill, 30, 2),
    (Kind::Disk, 35, 4),
    (Kind::Full, 20, 2),
    (Kind::Commits, 15, 2),
    (Kind::Rot, 15, 2),
    (Kind::Guest, 35, 3),
    (Kind::Resize, 20, 2),
    (Kind::Clock, 25, 3),
    (Kind::Stray, 30, 3),
    (Kind::Migrate, 15, 2),
    (Kind::Failover, 15, 2),
];

impl Mix {
    fn new(chance: &mut Chance) -> Self {
        let mut weights = Vec::new();
        for (kind, percent, weight) in KINDS {
            if chance.percent(percent) {
                weights.push((chance.within(1, weight * 2), kind));
            }
        }
        let total = weights.iter().map(|(weight, _)| weight).sum();
        Self { weights, total, boots: Vec::new() }
    }

    fn next(&mut self, chance: &mut Chance, events: &mut Vec<Event>) {
        if let Some(due) = self.boots.iter().position(|(at, _)| *at <= events.len()) {
            let (_, side) = self.boots.swap_remove(due);
            events.push(boot(chance, side));
            return;
        }
        let mut left = chance.below(self.total);
        let chosen = self.weights.iter().find(|(weight, _)| {
            let found = left < *weight;
            left = left.saturating_sub(*weight);
            found
        });
        let kind = chosen.map_or(Kind::Write, |(_, kind)| *kind);
        self.add(kind, chance, events);
    }

    fn add(&mut self, kind: Kind, chance: &mut Chance, events: &mut Vec<Event>) {
        let vm = chance.below(6);
        match kind {
            Kind::CutPrimary | Kind::CutReplica => {
                let side = if matches!(kind, Kind::CutPrimary) { Side::Primary } else { Side::Replica };
                let most = [4, 12, 40][chance.place(3)];
                events.push(Event::Cut { side, steps: chance.within(1, most), after: chance.one_in(2) });
                self.boots.push((events.len() + chance.place(12) + 1, side));
            }
            Kind::Kill => {
                let side = if chance.one_in(2) { Side::Primary } else { Side::Replica };
                events.push(boot(chance, side));
            }
            Kind::Full => {
                events.push(Event::Full { full: true });
                self.boots.retain(|(_, side)| *side == Side::Primary);
                events.extend((0..chance.place(5)).map(|_| calm(chance)));
                events.push(Event::Full { full: false });
            }
            Kind::Jobs => {
                let meanwhile = (0..chance.place(8)).map(|_| aside(chance)).collect();
                events.push(Event::Jobs { meanwhile });
            }
            Kind::Cycle => {
                events.push(Event::Order { vm, order: Order::Cycle });
                if chance.one_in(2) {
                    events.push(Event::Finish { vm });
                }
            }
            _ => events.push(simple(kind, vm, chance)),
        }
    }
}

/// An event that stands for itself.
fn simple(kind: Kind, vm: u64, chance: &mut Chance) -> Event {
    match kind {
        Kind::Turns => Event::Turns { turns: chance.within(1, 30) },
        Kind::Maintain => Event::Maintain { vm, steps: chance.within(1, 6), looks: chance.below(4) },
        Kind::Pass => Event::Pass {
            seconds: [chance.within(1, 60), chance.within(60, 1200), chance.within(1200, 7200)]
                [chance.place(3)],
        },
        Kind::View if chance.one_in(3) => Event::CloseView { which: chance.below(8) },
        Kind::View => Event::OpenView { vm, point: chance.below(12), strict: chance.one_in(4) },
        Kind::Look => Event::Look,
        Kind::Hold if chance.one_in(2) => Event::Release { which: chance.below(4) },
        Kind::Hold => Event::OpenHold { vm, seconds: chance.within(10, 900) },
        Kind::Backup => Event::Backup { vm, wish: wish(chance) },
        Kind::Person => person(vm, chance),
        Kind::Line => match chance.below(4) {
            0 => Event::Line { down: chance.one_in(2) },
            1 => Event::Late,
            _ => Event::Trouble {
                percent: [0, 5, 20, 50][chance.place(4)],
                segment_bytes: [512, 8192, 1 << 20][chance.place(3)],
            },
        },
        Kind::Trust => {
            let trust = [Trust::Full, Trust::Full, Trust::Unknown, Trust::Certificate, Trust::Authorization];
            Event::Trust { trust: trust[chance.place(5)] }
        }
        Kind::Disk if chance.one_in(3) => Event::Heal,
        Kind::Disk => Event::Disk {
            class: [Class::Read, Class::Write, Class::Sync, Class::Sync][chance.place(4)],
            skip: chance.below(30),
            count: [1, 1, 1, 3, 1 << 40][chance.place(5)],
        },
        Kind::Commits => Event::Commits {
            side: if chance.one_in(2) { Side::Primary } else { Side::Replica },
            skip: chance.below(12),
            count: chance.within(1, 2),
            kept: chance.one_in(3),
        },
        Kind::Rot => Event::Rot { file: chance.next() >> 32, at: chance.next() >> 32 },
        Kind::Guest => match chance.below(6) {
            0 | 1 => Event::Restart { vm },
            2 => Event::Deaf { vm, commands: 1 + u32::from(chance.one_in(3)) },
            3 => Event::Agent { vm, well: chance.one_in(2) },
            _ => Event::Scratch { vm, blocks: [0, 1, 2, 4, 1 << 20][chance.place(5)] },
        },
        Kind::Resize => Event::Resize { vm, disk: chance.below(6), blocks: chance.within(1, 24) },
        Kind::Clock => Event::Jump {
            side: if chance.one_in(2) { Side::Primary } else { Side::Replica },
            seconds: clock_jump(chance),
        },
        Kind::Stray => Event::Stray { vm, stray: Stray::ALL[chance.place(Stray::ALL.len())] },
        Kind::Migrate => Event::Migrate { vm },
        Kind::Failover if chance.one_in(2) => Event::CancelFailover { vm },
        Kind::Failover => Event::Failover { vm, point: chance.below(12) },
        _ => write(chance, vm),
    }
}

fn clock_jump(chance: &mut Chance) -> i64 {
    let seconds = [5, 600, 7200, 100_000][chance.place(4)];
    if chance.one_in(2) { seconds } else { -seconds }
}

fn person(vm: u64, chance: &mut Chance) -> Event {
    let orders = [Order::Pause, Order::Resume, Order::Resume, Order::Resync, Order::Sync];
    match chance.below(6) {
        0 => Event::Mend { vm },
        _ => Event::Order { vm, order: orders[chance.place(5)] },
    }
}

fn wish(chance: &mut Chance) -> Wish {
    Wish {
        access: [Access::Pinned, Access::Pinned, Access::Strict, Access::Hold][chance.place(4)],
        application: chance.one_in(4),
        no_retry: chance.one_in(4),
    }
}

fn boot(chance: &mut Chance, side: Side) -> Event {
    let loss = if chance.one_in(4) { Loss::Nothing } else { Loss::CUTS[chance.place(4)] };
    Event::Boot { side, loss }
}

/// What goes on while there is no space.
fn calm(chance: &mut Chance) -> Event {
    let vm = chance.below(6);
    match chance.below(4) {
        0 => write(chance, vm),
        1 => Event::Finish { vm },
        2 => Event::Maintain { vm, steps: 3, looks: 0 },
        _ => Event::Order { vm, order: Order::Cycle },
    }
}

/// What goes on while a backup reads.
fn aside(chance: &mut Chance) -> Event {
    let vm = chance.below(6);
    match chance.below(16) {
        0..=3 => write(chance, vm),
        4..=6 => Event::Maintain { vm, steps: chance.within(1, 4), looks: 0 },
        7..=8 => Event::Order { vm, order: Order::Cycle },
        9..=11 => Event::Finish { vm },
        12 => Event::Pass { seconds: chance.within(1, 2000) },
        13 => Event::Cut { side: Side::Replica, steps: chance.within(1, 20), after: chance.one_in(2) },
        14 => Event::Release { which: chance.below(4) },
        _ => Event::Turns { turns: chance.within(1, 20) },
    }
}
