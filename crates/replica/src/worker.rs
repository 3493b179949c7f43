//! The background: a few threads that maintain the VMs that need it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use model::VmId;

use crate::maintain::Step;
use crate::store::{Inner, Store};

/// The threads and what waits for them.
#[derive(Default)]
pub(crate) struct Workers {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    arrived: Condvar,
    stopping: AtomicBool,
}

#[derive(Default)]
struct Queue {
    /// No VM is in it twice.
    vms: VecDeque<VmId>,
    next_tick: Option<Instant>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Workers {
    pub fn is_stopping(&self) -> bool {
        self.shared.stopping.load(Ordering::Relaxed)
    }

    fn stop(&self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        self.shared.arrived.notify_all();
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Store {
    pub(crate) fn start_workers(&self) {
        let workers = &self.inner.workers;
        let mut threads = workers.threads.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..self.inner.config.workers {
            let (shared, inner) = (workers.shared.clone(), Arc::downgrade(&self.inner));
            let tick = self.inner.config.tick;
            let spawned =
                std::thread::Builder::new().name("replica".into()).spawn(move || work(&shared, &inner, tick));
            match spawned {
                Ok(thread) => threads.push(thread),
                Err(error) => tracing::error!(%error, "a worker of the store could not be started"),
            }
        }
    }

    /// Something has happened to a VM that may let it go on.
    pub(crate) fn wake(&self, vm: VmId) {
        if self.inner.config.workers == 0 {
            return;
        }
        let shared = &self.inner.workers.shared;
        let mut queue = shared.lock();
        if !queue.vms.contains(&vm) {
            queue.vms.push_back(vm);
            shared.arrived.notify_one();
        }
    }

    /// Ends the background. An apply that is running stops where it is and is run again at the next start.
    pub fn shutdown(&self) {
        self.inner.workers.stop();
        let threads: Vec<_> = {
            let mut threads = self.inner.workers.threads.lock().unwrap_or_else(PoisonError::into_inner);
            threads.drain(..).collect()
        };
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a worker of the store has panicked");
            }
        }
    }
}

fn work(shared: &Shared, inner: &Weak<Inner>, tick: Duration) {
    while !shared.stopping.load(Ordering::Relaxed) {
        let vm = next(shared, tick);
        let Some(inner) = inner.upgrade() else { return };
        let store = Store { inner };
        match vm {
            Some(vm) => match store.maintain(vm) {
                Ok(Step::Idle) => {}
                Ok(_) => store.wake(vm),
                Err(error) => tracing::warn!(%vm, %error, "maintaining a replica failed; it is tried again"),
            },
            None => store.list().into_iter().for_each(|vm| store.wake(vm)),
        }
    }
}

/// The next VM to look at; none when it is time to look at all.
fn next(shared: &Shared, tick: Duration) -> Option<VmId> {
    let mut queue = shared.lock();
    loop {
        if let Some(vm) = queue.vms.pop_front() {
            return Some(vm);
        }
        let now = Instant::now();
        let next_tick = *queue.next_tick.get_or_insert(now);
        if next_tick <= now || shared.stopping.load(Ordering::Relaxed) {
            queue.next_tick = Some(now + tick);
            return None;
        }
        queue = match shared.arrived.wait_timeout(queue, next_tick - now) {
            Ok((queue, _)) => queue,
            Err(poisoned) => poisoned.into_inner().0,
        };
    }
}
