//! One task per protected VM: waits for the next cycle or a person's word, and does one thing at a time.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use model::DiskName;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Interval, MissedTickBehavior};

use qemu::Seat;
use wire::{HandedOver, KeyId};

use crate::error::Failure;
use crate::group::Membership;
use crate::ports::Ports;
use crate::relationship::{Relationship, Stopper};
use crate::{Changes, VmStatus};

/// Between two cycles QEMU is asked this often how much has changed, at the most and at the least: each time it
/// describes all its disks, and a site may have a thousand VMs.
const LOOK_INTERVALS: [Duration; 2] = [Duration::from_secs(2), Duration::from_secs(10)];

/// What a person asks of a runner. Each is answered with the VM's status after it.
pub(crate) enum Order {
    Sync(oneshot::Sender<Result<(), Failure>>),
    Pause(oneshot::Sender<Result<(), Failure>>),
    Resume(oneshot::Sender<Result<(), Failure>>),
    Resync(oneshot::Sender<Result<(), Failure>>),
    /// A backup is being restored over some of its disks.
    Overwritten(String, oneshot::Sender<Result<(), Failure>>),
    AddDisks(Vec<String>, oneshot::Sender<Result<(), Failure>>),
    RemoveDisks(Vec<DiskName>, oneshot::Sender<Result<(), Failure>>),
    CancelResync(oneshot::Sender<Result<(), Failure>>),
    Configure(Changes, oneshot::Sender<Result<(), Failure>>),
    /// Have the replica moved to this peer, or no more.
    Relocate(Option<(String, KeyId)>, oneshot::Sender<Result<(), Failure>>),
    /// Give the VM to the replica's site.
    HandOver(Option<Duration>, oneshot::Sender<Result<HandedOver, Failure>>),
    /// End if the VM is off; the answer says whether it is.
    StandDown(oneshot::Sender<bool>),
    /// Run a cycle whose moment is its group's.
    Together(Seat, oneshot::Sender<Result<(), Failure>>),
    /// It is in this group from now on, or in none.
    Join(Option<Membership>),
    /// Begin a new monitoring window.
    Reset(oneshot::Sender<Result<(), Failure>>),
    /// Say whether the guest is off.
    CheckOff(oneshot::Sender<Result<(), Failure>>),
    /// Remove our bitmaps from QEMU and end.
    Forget(oneshot::Sender<Result<(), Failure>>),
    /// End, leaving the bitmaps to the next start of the site.
    End,
}

/// A handle on a runner.
pub(crate) struct Handle {
    pub orders: mpsc::Sender<Order>,
    pub stopper: Stopper,
    status: Arc<Mutex<VmStatus>>,
    pub task: tokio::task::JoinHandle<()>,
}

impl Handle {
    /// Starts the task of a VM.
    pub fn spawn<P: Ports>(relationship: Relationship<P>) -> Self {
        let (orders, received) = mpsc::channel(16);
        relationship.publish();
        let (stopper, status) = (relationship.stopper(), relationship.published());
        let task = tokio::spawn(run(relationship, received));
        Self { orders, stopper, status, task }
    }

    pub fn status(&self) -> VmStatus {
        self.status.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

async fn run<P: Ports>(mut relationship: Relationship<P>, mut orders: mpsc::Receiver<Order>) {
    let mut looks = looks_every(relationship.row().settings.interval);
    loop {
        let due = relationship.due_in();
        tokio::select! {
            // A person's word comes before the next cycle.
            biased;
            order = orders.recv() => match order {
                None | Some(Order::End) => return,
                Some(Order::Forget(done)) => {
                    let _ = done.send(relationship.forget().await);
                    return;
                }
                Some(Order::StandDown(done)) => {
                    let is_off = relationship.is_off().await;
                    let _ = done.send(is_off);
                    if is_off {
                        return;
                    }
                }
                Some(Order::HandOver(shut_down, done)) => {
                    let outcome = relationship.hand_over(shut_down).await;
                    relationship.publish();
                    let _ = done.send(outcome);
                }
                Some(Order::Together(seat, done)) => {
                    let outcome = relationship.cycle_together(seat).await.map(drop);
                    relationship.publish();
                    let _ = done.send(outcome);
                }
                Some(Order::Join(membership)) => relationship.join_group(membership),
                Some(order) => {
                    let before = relationship.row().settings.interval;
                    obey(&mut relationship, order).await;
                    let interval = relationship.row().settings.interval;
                    if interval != before {
                        looks = looks_every(interval);
                    }
                }
            },
            () = sleep_for(due) => {
                if !relationship.has_sent_everything().await {
                    let _ = relationship.cycle_now().await;
                }
            }
            _ = looks.tick() => relationship.look().await,
        }
        relationship.publish();
    }
}

fn looks_every(interval: Duration) -> Interval {
    let [shortest, longest] = LOOK_INTERVALS;
    let mut looks = tokio::time::interval((interval / 3).clamp(shortest, longest));
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    looks
}

async fn obey<P: Ports>(relationship: &mut Relationship<P>, order: Order) {
    let (done, result) = match order {
        Order::Sync(done) => (done, relationship.sync().await),
        Order::Pause(done) => (done, relationship.pause().await),
        Order::Resume(done) => (done, relationship.resume().await),
        Order::Resync(done) => (done, relationship.resync().await),
        Order::Overwritten(disks, done) => (done, relationship.overwritten(disks).await),
        Order::AddDisks(nodes, done) => (done, relationship.add_disks(&nodes).await),
        Order::RemoveDisks(names, done) => (done, relationship.remove_disks(&names).await),
        Order::CancelResync(done) => (done, relationship.cancel_resync().await),
        Order::Configure(changes, done) => (done, relationship.configure(changes).await),
        Order::Relocate(to, done) => (done, relationship.relocate(to).await),
        Order::CheckOff(done) => (done, relationship.check_off().await),
        Order::Reset(done) => (done, relationship.reset_measurements().await),
        Order::HandOver(..)
        | Order::Together(..)
        | Order::Join(_)
        | Order::StandDown(_)
        | Order::Forget(_)
        | Order::End => return,
    };
    relationship.publish();
    let _ = done.send(result);
}

async fn sleep_for(due: Option<Duration>) {
    match due {
        Some(due) => tokio::time::sleep(due).await,
        None => std::future::pending().await,
    }
}
