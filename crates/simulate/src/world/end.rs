//! When faults end, promises hold: within a bounded time every replica is where its VM is, and a backup that is
//! wanted is made.

use std::time::Duration;

use model::gate::Access;
use model::{LogNumber, Phase};

use super::{Checked, World, wrong};
use crate::disk::Loss;
use crate::event::{Event, Order, Side, Wish};
use crate::ports::Trust;

/// A replica has caught up within this time: a failed cycle waits for half an hour at most, a resynchronization
/// takes a few cycles.
const CATCHES_UP_WITHIN: Duration = Duration::from_secs(3 * 3600);
/// A backup is made within this time.
const BACKED_UP_WITHIN: Duration = Duration::from_secs(3600);
/// More tries than any policy allows.
const TRIES_MAX: usize = 100;
/// Nothing takes more rounds.
const ROUNDS_MAX: usize = 2_000;

impl World {
    /// Lets all faults end, and holds the world to its promises.
    pub fn end(&mut self) -> Checked {
        self.note(|| "all faults end".into());
        self.heal_all()?;
        self.check_all()?;
        self.check_every_point()?;
        self.catch_up()?;
        self.end_jobs()?;
        self.catch_up()?;
        self.back_everything_up()?;
        self.check_every_point()?;
        self.check_backups()?;
        // And all of it is there after a power cut.
        self.boot(Side::Replica, Loss::Everything)?;
        if !self.replica.is_up() {
            return wrong("the replica's site does not start though nothing is wrong with it");
        }
        self.check_all()?;
        self.check_every_point()?;
        self.catch_up()?;
        self.let_a_job_give_up()
    }

    fn heal_all(&mut self) -> Checked {
        self.replica.heal();
        {
            let mut line = self.line.lock();
            (line.down, line.trouble, line.trust) = (false, 0, Trust::Full);
        }
        for vm in &self.vms {
            let mut machine = vm.machine.lock();
            (machine.scratch_blocks, machine.failing, machine.freezes) = (usize::MAX, 0, true);
        }
        for side in [Side::Primary, Side::Replica] {
            self.clock(side).set_right();
        }
        self.primary.ports.power.disarm();
        self.replica.power.disarm();
        if !self.primary.is_up() {
            self.boot_primary()?;
        }
        if !self.replica.is_up() {
            self.boot_replica(Loss::Everything)?;
        }
        if !self.replica.is_up() || !self.primary.is_up() {
            return wrong("a site does not start though nothing is wrong with it");
        }
        self.line.deliver_late();
        for place in self.places() {
            self.cancel_failover(place);
            self.finish(place)?;
            // Whatever a person or a lasting error has stopped, a person starts again.
            if self.stopped(place).is_some() {
                self.order(place, Order::Resume);
                self.finish(place)?;
            }
            self.mend(place);
        }
        self.send_readers_away();
        Ok(())
    }

    /// Time passes, and what is due is done, until every replica is where its VM is.
    fn catch_up(&mut self) -> Checked {
        let began = self.time.passed();
        for _ in 0..ROUNDS_MAX {
            self.round()?;
            if self.places().into_iter().all(|place| self.is_level(place)) {
                let took = (self.time.passed() - began).as_secs();
                self.coverage.count("seconds to catch up", took);
                return Ok(());
            }
            if self.time.passed() - began > CATCHES_UP_WITHIN {
                break;
            }
            self.pass_to_next();
        }
        let behind = self.places().into_iter().find(|place| !self.is_level(*place)).unwrap_or(0);
        let (name, why) = (self.vms[behind].name.clone(), self.describe(behind));
        wrong(format!(
            "{name} has not caught up within {CATCHES_UP_WITHIN:?}, though nothing is wrong: {why}"
        ))
    }

    /// What is due is done, at both sites.
    fn round(&mut self) -> Checked {
        for place in self.places() {
            if self.due_in(place) == Some(Duration::ZERO) {
                self.order(place, Order::Cycle);
                self.finish(place)?;
            }
        }
        self.maintain_all()?;
        self.run_jobs(&[])?;
        self.after_event()
    }

    /// Backups that were asked for long ago come to their end.
    fn end_jobs(&mut self) -> Checked {
        for _ in 0..ROUNDS_MAX {
            let Some(next) = self.next_job_in() else { break };
            self.pass(next.max(Duration::from_millis(1)));
            self.round()?;
        }
        if self.jobs.open() > 0 { wrong("a backup job does not come to its end") } else { Ok(()) }
    }

    /// To the moment when something is due next.
    fn pass_to_next(&mut self) {
        let cycles = self.places().into_iter().filter_map(|place| self.due_in(place)).min();
        let next = cycles.into_iter().chain(self.next_job_in()).min().unwrap_or(Duration::from_secs(60));
        // A store without workers looks around every ten seconds or so.
        self.pass(next.clamp(Duration::from_secs(30), Duration::from_secs(600)));
    }

    /// Whether the newest point of a replica is what its VM is now.
    fn is_level(&self, place: usize) -> bool {
        let (Some(store), Some(vm)) = (self.replica.store(), self.vms[place].id) else { return false };
        let replicating = store.facts(vm).is_ok_and(|facts| facts.phase == Phase::Replicating);
        let newest = store.points(vm).ok().and_then(|points| points.last().copied());
        let moment = newest.and_then(|point| self.truth.moment(vm, point.id));
        let machine = self.vms[place].machine.lock();
        let now = machine.history.now();
        replicating && moment.is_some_and(|moment| moment.state.disks == now.disks)
    }

    fn describe(&self, place: usize) -> String {
        let (Some(store), Some(vm)) = (self.replica.store(), self.vms[place].id) else {
            return "no site".into();
        };
        let phase = store.facts(vm).map(|facts| (facts.phase, facts.apply, facts.health));
        let head = store.head(vm).map_or(LogNumber::ZERO, |head| head.number);
        let due = self.due_in(place);
        format!("{phase:?}, log {head}, due in {due:?}, {}", self.stopped(place).unwrap_or_default())
    }

    /// A backup of each kind of each VM.
    fn back_everything_up(&mut self) -> Checked {
        for place in self.places() {
            for access in [Access::Pinned, Access::Hold] {
                let wish = Wish { access, application: false, no_retry: false };
                self.happen(&Event::Backup { vm: place as u64, wish })?;
                let began = self.time.passed();
                while self.jobs.open() > 0 && self.time.passed() - began < BACKED_UP_WITHIN {
                    let next = self.next_job_in().unwrap_or_default();
                    self.pass(next.max(Duration::from_millis(1)));
                    self.round()?;
                }
                // A log that rots in the chain fails what reads it until an apply comes to it.
                let rotten = self.vms[place].id.is_some_and(|vm| self.truth.may_lose(vm));
                if !self.jobs.newest_is_done() && !rotten {
                    let name = &self.vms[place].name;
                    let why = self.describe(place);
                    return wrong(format!(
                        "a backup of {name} ({access:?}) is not made, though nothing is wrong: {why}"
                    ));
                }
            }
        }
        Ok(())
    }

    /// A backup that is refused for as long as anybody asks: it comes to its end, within its window.
    fn let_a_job_give_up(&mut self) -> Checked {
        self.failover(0, 0)?;
        let wish = Wish { access: Access::Pinned, application: false, no_retry: false };
        self.happen(&Event::Backup { vm: 0, wish })?;
        for _ in 0..TRIES_MAX {
            let Some(next) = self.next_job_in() else { break };
            self.pass(next);
            self.run_jobs(&[])?;
        }
        if self.jobs.open() > 0 {
            return wrong("a backup that is always refused is tried for ever");
        }
        self.cancel_failover(0);
        self.catch_up()
    }
}
