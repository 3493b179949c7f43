//! A VM changes its site: given to its replica's site with everything, or taken over from it.

use std::sync::Arc;
use std::time::Duration;

use model::{Head, Phase, Progress, ResyncReason, ResyncWord, Shipped, VmId};
use steps::durable_step;
use tokio::time::Instant;
use wire::{HandOver, HandedOver};

use crate::ProtectRequest;
use crate::error::{Error, Failure, FailureCode};
use crate::ports::{Guest, Ports, Remote};
use crate::relationship::{Relationship, Shared};
use crate::rows::{self, Protected};

/// How often a guest that was asked to shut down is looked at.
const LOOK: Duration = Duration::from_millis(250);

impl<P: Ports> Relationship<P> {
    /// Gives the VM to its replica's site: the last changes are sent, the replica is failed over to them, QEMU ends.
    /// The guest must be off; with `shut_down` it is asked to be, and waited for that long. Nothing is lost: until the
    /// replica's site has said that it has taken over, the VM is this site's, and can be started again. Asked again, it
    /// goes on where it was cut off.
    pub async fn hand_over(&mut self, shut_down: Option<Duration>) -> Result<HandedOver, Failure> {
        self.check_no_media("there is nothing to fail over to")?;
        self.check_not_moving()?;
        let handed = match self.handed_over_before().await? {
            Some(handed) => handed,
            None => {
                self.bring_to_rest(shut_down).await?;
                self.sync().await?;
                // It would be missing over there. Nothing else changes any more: what is left goes fast.
                while self.row.has_joining() {
                    self.sync().await?;
                }
                // What changed while the last cycle ran would be lost: it has to be off after that, too.
                self.check_quiet().await?;
                self.ask_to_take_over(false).await?
            }
        };
        self.row.enter(Phase::FailedOver);
        durable_step("primary::handover::saving");
        self.row.save(&self.shared.catalog).await?;
        durable_step("primary::handover::saved");
        if let Ok(guest) = self.connect_guest().await {
            guest.quit().await?;
        }
        Ok(handed)
    }

    /// Whether it was handed over already: the answer may have been lost, or this site died before it wrote it down.
    async fn handed_over_before(&self) -> Result<Option<HandedOver>, Failure> {
        if self.row.shipped.acked == Head::EMPTY {
            return Ok(None);
        }
        match self.ask_to_take_over(true).await {
            Ok(handed) => Ok(Some(handed)),
            Err(failure) if failure.code == FailureCode::Link => Err(failure),
            Err(_) => Ok(None),
        }
    }

    async fn ask_to_take_over(&self, done: bool) -> Result<HandedOver, Failure> {
        let Head { number, id } = self.row.shipped.acked;
        self.remote()?.hand_over(self.row.vm, &HandOver { number, id, done }).await
    }

    async fn bring_to_rest(&mut self, shut_down: Option<Duration>) -> Result<(), Failure> {
        let guest = self.connect_guest().await?;
        if guest.is_quiet().await? {
            return Ok(());
        }
        let Some(patience) = shut_down else { return self.check_quiet().await };
        guest.power_down().await?;
        let asked = Instant::now();
        while asked.elapsed() < patience {
            if guest.is_quiet().await? {
                return Ok(());
            }
            tokio::time::sleep(LOOK).await;
        }
        let name = &self.row.name;
        let message = format!(
            "the guest of {name} was asked to shut down and still runs after {} s; shut it down from within and try again",
            patience.as_secs()
        );
        Err(Failure::transient(FailureCode::Qemu, message))
    }

    /// Whether it could be given over without being asked to shut down, or was before.
    pub(crate) async fn check_off(&mut self) -> Result<(), Failure> {
        match self.row.phase {
            Phase::FailedOver => Ok(()),
            _ => self.check_quiet().await,
        }
    }

    async fn check_quiet(&mut self) -> Result<(), Failure> {
        if self.connect_guest().await?.is_quiet().await? {
            return Ok(());
        }
        let message = format!(
            "{} runs: a planned failover is of a VM that is off. Add '--shutdown', or shut it down with QEMU kept ('-no-shutdown', or 'set-action' in its monitor) and try again",
            self.row.name
        );
        Err(Failure::transient(FailureCode::Qemu, message))
    }

    /// Whether the VM is off: nobody is at its monitor.
    pub async fn is_off(&self) -> bool {
        self.shared.ports.is_off(&self.row.settings).await
    }

    /// Begins to protect a VM that has come to this site (it was failed over, or moved), under the id that it has always
    /// had: both sides are compared, and what differs is sent.
    pub async fn take_over(
        shared: &Arc<Shared<P>>,
        request: ProtectRequest,
        vm: VmId,
        generation: u64,
        why: ResyncReason,
    ) -> Result<Self, Error> {
        let mut row = Self::first_row(shared, request, vm).await?;
        row.generation = generation;
        row.phase = Phase::ResyncRequired { why };
        row.passes.word = ResyncWord::Asked;
        durable_step("primary::takeover::saving");
        let is_new = row.save_new(&shared.catalog).await?;
        durable_step("primary::takeover::saved");
        if !is_new {
            return Err(Error::Exists(row.name));
        }
        let measured = rows::Measured::beginning(row.made_at);
        Ok(Self::new(row, measured, shared.clone()))
    }
}

impl Protected {
    /// What is known of a VM before its first cycle.
    pub(crate) fn first(
        vm: VmId,
        name: model::VmName,
        settings: rows::Settings,
        now: model::Timestamp,
    ) -> Self {
        Self {
            vm,
            name,
            settings,
            disks: Vec::new(),
            phase: Phase::InitialReplication { progress: Progress { covered_bytes: 0, total_bytes: 0 } },
            paused: false,
            shipped: Shipped::NOTHING,
            made_at: now,
            point_at: None,
            app_at: None,
            failures: 0,
            error: None,
            generation: 1,
            passes: rows::Passes::default(),
        }
    }
}
