//! What fails: a replica site dies and comes back, a primary host loses its VMs and they must be compared.

use model::{ApplyState, Phase, Progress};

use crate::churn::exponential;
use crate::clock::{MINUTE, Micros, micros, moment};
use crate::jobs::JobState;
use crate::scenario::Strategy;
use crate::site::{Event, Site};

impl Site<'_> {
    /// Draws the failures of the night.
    pub fn plan_failures(&mut self) {
        let failures = self.scenario.failures;
        let hosts = self.scenario.vms_per_site.div_ceil(failures.vms_per_host.max(1));
        if let Some((at, for_how_long)) = self.draw(failures.sites) {
            self.at(at, Event::SiteDown { for_how_long });
        }
        for host in 0..hosts {
            if let Some((at, for_how_long)) = self.draw(failures.hosts) {
                self.at(at, Event::HostDown { host, for_how_long });
            }
        }
    }

    /// Whether something fails with this probability, when in the window, and for how long.
    fn draw(&mut self, (probability, minutes): (f64, f64)) -> Option<(Micros, Micros)> {
        let chance = &mut self.failure_chance;
        let (fails, place) = (chance.f64() < probability, chance.f64());
        let for_how_long = exponential(minutes * 60.0, chance).max(MINUTE);
        let window = self.scenario.window;
        let at = window.from + ((window.until - window.from) as f64 * place) as Micros;
        fails.then_some((at, for_how_long))
    }

    /// Everything that was in memory is gone; what the catalog has comes back with the site.
    pub fn site_down(&mut self, for_how_long: Micros) {
        self.down = true;
        self.life += 1;
        for index in self.disk.cut_off(self.now) {
            self.vms[index as usize].working = false;
        }
        self.tally.orphaned_holds += self.vms.iter().filter(|vm| vm.held).count() as u64;
        self.queue.clear();
        self.waiting.clear();
        self.places = self.scenario.window.at_once;
        for vm in &mut self.vms {
            // A hold is a lease in the catalog, and outlives the night (24 h).
            vm.orphaned |= vm.held;
            (vm.queued, vm.barred, vm.held, vm.pin) = (false, false, false, None);
        }
        for job in &mut self.jobs {
            if !matches!(job.state, JobState::Waiting | JobState::Ended) {
                // Was running, is waiting when the site starts again: at once, without the barrier.
                (job.state, job.next_at, job.barrier) = (JobState::Waiting, self.now, false);
            }
        }
        self.at(self.now + for_how_long, Event::SiteUp);
    }

    pub fn site_up(&mut self) {
        self.down = false;
        for index in 0..self.vms.len() as u32 {
            let vm = &mut self.vms[index as usize];
            if vm.applying.is_some() {
                vm.apply = ApplyState::Interrupted { since: moment(self.now) };
            }
            self.wake(index);
        }
        for index in 0..self.jobs.len() as u32 {
            let job = &mut self.jobs[index as usize];
            if matches!(job.state, JobState::Waiting) && job.next_at <= self.now {
                job.next_at = self.now;
                self.at(self.now, Event::JobDue(index));
            }
        }
    }

    fn vms_of(&self, host: u32) -> std::ops::Range<u32> {
        let size = self.scenario.failures.vms_per_host;
        host * size..((host + 1) * size).min(self.vms.len() as u32)
    }

    pub fn host_down(&mut self, host: u32, for_how_long: Micros) {
        for index in self.vms_of(host) {
            self.vms[index as usize].primary.away = true;
        }
        self.at(self.now + for_how_long, Event::HostUp { host });
    }

    /// The VMs run again, their bitmaps are lost: both sides are compared, one VM after the other.
    pub fn host_up(&mut self, host: u32) {
        let failures = self.scenario.failures;
        let mut done = self.now;
        for index in self.vms_of(host) {
            let disk_seconds = failures.disk_bytes / failures.compare_bytes_per_s;
            done += exponential(disk_seconds, &mut self.failure_chance).min(micros(disk_seconds * 10.0));
            let vm = &mut self.vms[index as usize];
            vm.phase = Phase::Resynchronizing { progress: Progress::default() };
            vm.phase_since = self.now;
            self.at(done, Event::Compared(index));
        }
    }

    pub fn compared(&mut self, index: u32) {
        let vm = &mut self.vms[index as usize];
        vm.phase = Phase::Replicating;
        vm.phase_since = self.now;
        vm.primary.away = false;
        self.cycle_now(index);
    }

    /// Whether backups of this strategy pause replication.
    pub fn pauses(&self) -> bool {
        self.scenario.strategy == Strategy::Pause
    }
}
