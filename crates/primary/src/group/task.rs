//! The task of one group: at each interval it opens a meeting, and gives the members that take part their seats.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use model::group::{GroupMoment, Missing, absence, due_in, freeze_is_due};
use model::{MomentId, VmName};
use qemu::Meeting;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::error::{Failure, FailureCode};
use crate::group::{GroupRow, Handles, Synced};
use crate::ports::Ports;
use crate::relationship::Shared;
use crate::runner::Order;
use crate::{VmStatus, runner::Handle};

/// How long after a moment that could not be begun at all the next one is tried.
const AGAIN: Duration = Duration::from_secs(1);

/// How a member's cycle ended.
type Ended = (VmName, Result<(), Failure>);

pub(crate) struct Task<P: Ports> {
    row: GroupRow,
    shared: Arc<Shared<P>>,
    handles: Handles,
    last: Arc<Mutex<Option<GroupMoment>>>,
    /// The members that still do what the last moments gave them to do.
    sending: JoinSet<Ended>,
    busy: Vec<VmName>,
}

impl<P: Ports> Task<P> {
    pub fn new(
        row: GroupRow,
        shared: Arc<Shared<P>>,
        handles: Handles,
        last: Arc<Mutex<Option<GroupMoment>>>,
    ) -> Self {
        Self { row, shared, handles, last, sending: JoinSet::new(), busy: Vec::new() }
    }

    pub async fn run(mut self, mut orders: mpsc::Receiver<oneshot::Sender<Result<Synced, Failure>>>) {
        let mut begun: Option<Instant> = None;
        loop {
            let wait = begun.map_or(Duration::ZERO, |begun| {
                due_in(begun.elapsed(), self.row.interval, !self.busy.is_empty())
            });
            tokio::select! {
                biased;
                order = orders.recv() => {
                    let Some(done) = order else { return };
                    begun = Some(Instant::now());
                    let _ = done.send(self.sync().await);
                }
                Some(ended) = self.sending.join_next() => { self.ended(ended); }
                () = sleep(wait) => {
                    begun = Some(Instant::now());
                    if let Err(failure) = self.moment().await {
                        tracing::warn!(group = %self.row.group.name, %failure, "no moment could be begun");
                        sleep(AGAIN).await;
                    }
                }
            }
        }
    }

    /// Fixes a moment as soon as nobody sends any more, and waits until everything of it is sent.
    async fn sync(&mut self) -> Result<Synced, Failure> {
        self.settle().await;
        let moment = self.moment().await?;
        let failed = self.settle().await;
        Ok(Synced { moment, failed })
    }

    /// Waits until nobody sends any more. Gives whose cycle failed.
    async fn settle(&mut self) -> Vec<(VmName, Failure)> {
        let mut failed = Vec::new();
        while let Some(ended) = self.sending.join_next().await {
            if let Some((vm, Err(failure))) = self.ended(ended) {
                failed.push((vm, failure));
            }
        }
        failed
    }

    fn ended(&mut self, ended: Result<Ended, tokio::task::JoinError>) -> Option<Ended> {
        let ended = ended.ok()?;
        self.busy.retain(|vm| *vm != ended.0);
        Some(ended)
    }

    /// Has all members that can come to one moment. Gives what came of it, while they still send.
    async fn moment(&mut self) -> Result<GroupMoment, Failure> {
        let id = MomentId::from_bytes(self.shared.ports().random_id()?);
        let (coming, absent) = self.who_comes();
        let asked: Vec<_> = coming.iter().map(|vm| (vm.settings.app_every, vm.app_at)).collect();
        let freezes = freeze_is_due(self.shared.now(), &asked);
        let names: Vec<VmName> = coming.into_iter().map(|vm| vm.name).collect();
        let name = self.row.group.name.clone();
        let (meeting, seats) = Meeting::open(id, name, names.clone(), absent, freezes);
        for (vm, seat) in names.into_iter().zip(seats) {
            let (done, answer) = oneshot::channel();
            let orders = self.lock().get(&vm).map(|handle| handle.orders.clone());
            // Without a runner that takes it the seat is dropped, and with that left.
            if orders.is_some_and(|orders| orders.try_send(Order::Together(seat, done)).is_ok()) {
                self.busy.push(vm.clone());
                self.sending.spawn(async move { (vm, answer.await.unwrap_or_else(|_| Err(gone()))) });
            }
        }
        let moment = meeting.outcome().await;
        if !moment.is_whole() {
            let missing: Vec<&str> = moment.missing.iter().map(|missing| missing.vm.as_str()).collect();
            tracing::info!(group = %moment.group, missing = missing.join(", "), "a moment is not complete");
        }
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(moment.clone());
        Ok(moment)
    }

    /// The members that are asked, and those that are not.
    fn who_comes(&self) -> (Vec<VmStatus>, Vec<Missing>) {
        let (mut coming, mut absent) = (Vec::new(), Vec::new());
        for member in &self.row.group.members {
            let status = self.lock().get(&member.vm).map(Handle::status);
            let why = match &status {
                None => Some("it is not protected here any more".to_owned()),
                Some(_) if self.busy.contains(&member.vm) => {
                    Some("it was still sending what the moment before had".to_owned())
                }
                Some(status) => {
                    let error = status.error.as_ref().map(|failure| failure.message.as_str());
                    absence(&status.phase, status.paused, error)
                }
            };
            match (status, why) {
                (Some(status), None) => coming.push(status),
                (_, why) => absent.push(Missing::new(&member.vm, &why.unwrap_or_default())),
            }
        }
        (coming, absent)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, std::collections::BTreeMap<VmName, Handle>> {
        self.handles.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn gone() -> Failure {
    Failure::transient(FailureCode::Stopped, "its cycle was given up")
}
