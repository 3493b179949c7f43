//! A site's workers: they take the VMs that wait in turn, and fold in what the rules let.

use model::ApplyState;

use crate::clock::moment;
use crate::site::Site;

impl Site<'_> {
    /// Something has happened to a VM that may let its base go on.
    pub fn wake(&mut self, index: u32) {
        let vm = &mut self.vms[index as usize];
        // Whoever folds a VM's logs in looks again when it has ended.
        if !vm.queued && !vm.working {
            vm.queued = true;
            self.queue.push_back(index);
        }
        self.dispatch();
    }

    /// Gives work to the workers that are free.
    pub fn dispatch(&mut self) {
        while !self.down && self.disk.running() < self.scenario.apply_workers as usize {
            let Some(index) = self.queue.pop_front() else { return };
            self.vms[index as usize].queued = false;
            self.begin_apply(index);
        }
    }

    fn begin_apply(&mut self, index: u32) {
        let now = self.now;
        let vm = &mut self.vms[index as usize];
        let Some(through) = vm.apply_target(now) else { return };
        // One that was cut off stays cut off until it has been run again to its end.
        if vm.apply == ApplyState::Idle {
            vm.apply = ApplyState::Running { since: moment(now) };
        }
        vm.applying = Some(through);
        vm.working = true;
        let logs = through.number - vm.base.number;
        let bytes = self.sizes.survivors(through.bytes - vm.base.bytes, logs);
        self.disk.begin_apply(now, index, self.scenario.apply_work(bytes, logs));
        self.tally.applies += 1;
    }

    pub fn apply_ended(&mut self) {
        let Some(index) = self.disk.end_apply(self.now) else { return };
        let vm = &mut self.vms[index as usize];
        if let ApplyState::Running { since } = vm.apply {
            let from = since.0.max(self.scenario.window.from);
            self.tally.busy_us += (self.now - from).max(0) as u128;
        }
        vm.apply = ApplyState::Idle;
        vm.working = false;
        if let Some(through) = vm.applying.take() {
            vm.base = through;
        }
        self.apply_gave_way(index);
        self.wake(index);
    }
}
