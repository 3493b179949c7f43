//! One replica site through one night, event by event.
//!
//! Sites share nothing, so a fleet is simulated site by site, in any order and on as many threads as there are.
//! Nearly all events are cycles, and all VMs of a site have one interval: whoever has run its cycle
//! goes to the end of a ring, and the ring stays in order without being sorted.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::Duration;

use model::{RetryPolicy, VmId};

use crate::churn::LogSizes;
use crate::clock::{HOUR, Micros, SECOND};
use crate::disk::Disk;
use crate::jobs::Job;
use crate::scenario::Scenario;
use crate::tally::Tally;
use crate::vm::{Kept, Point, Vm};

/// No night lasts longer; a job that has not ended by then is counted as such.
const HORIZON: Micros = 48 * HOUR;

/// What happens at its own time, beside cycles and the ends of applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Event {
    /// A job's time has come.
    JobDue(u32),
    /// A backup has read everything, if the site is still in the life in which it began.
    BackupRead { job: u32, life: u32 },
    /// An attempt has waited long enough for the running apply.
    BarrierTimeout { job: u32, life: u32, attempt: u32 },
    /// A cycle that is not in the ring: after a failure, a pause, a resynchronization.
    Cycle(u32),
    /// The site dies.
    SiteDown { for_how_long: Micros },
    /// It is back.
    SiteUp,
    /// A primary host loses its VMs.
    HostDown { host: u32, for_how_long: Micros },
    /// It is back, and its VMs must be compared.
    HostUp { host: u32 },
    /// A VM's two sides are the same again.
    Compared(u32),
}

/// One site.
pub(crate) struct Site<'a> {
    pub scenario: &'a Scenario,
    pub sizes: &'a LogSizes,
    pub policy: RetryPolicy,
    pub interval: Duration,
    /// One stream of chance each, so that a strategy that throws dice more often sees the same VMs as the others.
    pub change_chance: fastrand::Rng,
    pub job_chance: fastrand::Rng,
    pub failure_chance: fastrand::Rng,
    pub now: Micros,
    pub vms: Vec<Vm>,
    pub jobs: Vec<Job>,
    pub open_jobs: usize,
    /// The next cycles, in order.
    ring: VecDeque<(Micros, u32)>,
    /// The rest that is to come; what was put in first comes first.
    events: BinaryHeap<Reverse<(Micros, u64, Event)>>,
    events_made: u64,
    /// VMs that wait for a worker.
    pub queue: VecDeque<u32>,
    pub disk: Disk,
    pub down: bool,
    /// Raised by each death.
    pub life: u32,
    /// Places for backups that are free, and the jobs that wait for one.
    pub places: u32,
    pub waiting: VecDeque<u32>,
    pub tally: Tally,
}

impl<'a> Site<'a> {
    /// The site of this number, at the beginning of its night.
    pub fn new(scenario: &'a Scenario, sizes: &'a LogSizes, number: u32) -> Self {
        let mut seeds = fastrand::Rng::with_seed(mix(scenario.seed, u64::from(number)));
        let mut stream = || fastrand::Rng::with_seed(seeds.u64(..));
        let mut site = Self {
            scenario,
            sizes,
            policy: scenario.strategy.policy(&scenario.policy),
            interval: Duration::from_micros(scenario.interval.unsigned_abs()),
            change_chance: stream(),
            job_chance: stream(),
            failure_chance: stream(),
            now: scenario.window.from - scenario.warm_up,
            vms: Vec::new(),
            jobs: Vec::new(),
            open_jobs: 0,
            ring: VecDeque::new(),
            events: BinaryHeap::new(),
            events_made: 0,
            queue: VecDeque::new(),
            disk: Disk::default(),
            down: false,
            life: 0,
            places: scenario.window.at_once,
            waiting: VecDeque::new(),
            tally: Tally::default(),
        };
        site.make_vms(&mut stream());
        site.make_jobs(&mut stream());
        site.plan_failures();
        site
    }

    fn make_vms(&mut self, chance: &mut fastrand::Rng) {
        let scenario = self.scenario;
        let mut first: Vec<Micros> =
            (0..scenario.vms_per_site).map(|_| self.now + chance.i64(0..scenario.interval)).collect();
        first.sort_unstable();
        for (index, first) in (0..).zip(first) {
            let churn = scenario.churn.vm(self.now, chance);
            let kept = self.history(first - scenario.interval, &churn);
            let mut vm = Vm::new(VmId::from_bytes(chance.u128(..).to_le_bytes()), churn, kept);
            vm.primary.scheduled = true;
            self.vms.push(vm);
            self.ring.push_back((first, index));
        }
    }

    /// The points that a VM has from before, the latest at `latest`.
    fn history(&self, latest: Micros, churn: &crate::churn::VmChurn) -> Kept {
        let logs_per_hour = (HOUR / self.scenario.interval) as u64;
        let bytes_per_hour = self.sizes.expected(churn, self.scenario.interval) * logs_per_hour as f64;
        let extra = self.scenario.points;
        let point = |hours: u64, at| Point {
            number: 1 + hours * logs_per_hour,
            at,
            bytes: bytes_per_hour * hours as f64,
        };
        let hour_begins = latest.div_euclid(HOUR) * HOUR;
        let last_of_hour = |hours_ago: i64| hour_begins - (hours_ago - 1) * HOUR - SECOND;
        let mut kept = Kept::new(extra, point(0, last_of_hour(extra.max(1).into())));
        for hour in 1..u64::from(extra) {
            kept.push(point(hour, last_of_hour(i64::from(extra) - hour as i64)));
        }
        kept.push(point(extra.into(), latest));
        kept
    }

    /// Takes the night to its end.
    pub fn run(mut self) -> Tally {
        while self.open_jobs > 0 && self.now < HORIZON && self.step() {}
        self.tally.unfinished += self.open_jobs as u64;
        self.tally.still_paused += self.vms.iter().filter(|vm| vm.primary.paused).count() as u64;
        self.tally.observed_us +=
            (self.now - self.scenario.window.from).max(0) as u128 * self.vms.len() as u128;
        self.tally
    }

    /// The next thing that happens; false if there is none.
    fn step(&mut self) -> bool {
        let cycle = self.ring.front().map_or(Micros::MAX, |(at, _)| *at);
        let event = self.events.peek().map_or(Micros::MAX, |Reverse((at, ..))| *at);
        let apply = self.disk.next_end().map_or(Micros::MAX, |(at, _)| at);
        let next = cycle.min(event).min(apply);
        if next == Micros::MAX {
            return false;
        }
        self.now = next;
        if apply == next {
            self.apply_ended();
        } else if event == next
            && let Some(Reverse((_, _, event))) = self.events.pop()
        {
            self.happens(event);
        } else if let Some((_, vm)) = self.ring.pop_front()
            && !std::mem::take(&mut self.vms[vm as usize].primary.early)
        {
            self.cycle(vm);
        }
        true
    }

    fn happens(&mut self, event: Event) {
        match event {
            Event::JobDue(job) => self.job_due(job),
            Event::BackupRead { job, life } => self.backup_read(job, life),
            Event::BarrierTimeout { job, life, attempt } => self.barrier_timeout(job, life, attempt),
            Event::Cycle(vm) => self.cycle(vm),
            Event::SiteDown { for_how_long } => self.site_down(for_how_long),
            Event::SiteUp => self.site_up(),
            Event::HostDown { host, for_how_long } => self.host_down(host, for_how_long),
            Event::HostUp { host } => self.host_up(host),
            Event::Compared(vm) => self.compared(vm),
        }
    }

    pub fn at(&mut self, at: Micros, event: Event) {
        self.events_made += 1;
        self.events.push(Reverse((at.max(self.now), self.events_made, event)));
    }

    /// A VM's cycle is due. Shipping takes no time here: a moment counts from when its log is durable.
    fn cycle(&mut self, index: u32) {
        let vm = &mut self.vms[index as usize];
        vm.primary.scheduled = false;
        if vm.primary.paused || vm.primary.away {
            vm.primary.failures = 0;
            return; // whoever ends that has the next cycle run
        }
        vm.primary.scheduled = true;
        if self.down {
            vm.primary.failures += 1;
            let delay = self.scenario.backoff.delay(vm.primary.failures);
            let at = self.now + delay.as_micros() as Micros;
            return self.at(at, Event::Cycle(index));
        }
        vm.primary.failures = 0;
        let since = vm.kept.latest().at;
        let bytes = self.sizes.draw(&mut vm.churn, since, self.now, &mut self.change_chance);
        vm.arrived(self.now, bytes);
        self.tally.cycles += 1;
        self.ring.push_back((self.now + self.scenario.interval, index));
        self.wake(index);
    }

    /// Has a VM run a cycle now, unless it cannot.
    pub fn cycle_now(&mut self, index: u32) {
        let primary = &mut self.vms[index as usize].primary;
        if primary.away || primary.paused || primary.failures > 0 {
            return; // whoever ends that, or its backoff, has it run
        }
        // A place in the ring that it still has is given up for this one.
        primary.early = primary.scheduled;
        primary.scheduled = true;
        self.at(self.now, Event::Cycle(index));
    }
}

/// A seed for the site of this number.
fn mix(seed: u64, number: u64) -> u64 {
    // SplitMix64's finalizer: neighbouring numbers give unrelated seeds.
    let mut z =
        seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(number.wrapping_mul(0xd1b5_4a32_d192_ed03));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
