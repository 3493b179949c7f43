//! What a person says of a pass: run it now, end it, only at these times. The rule itself is `model::may_run`.

use model::{
    InitialStart, MayRun, Phase, Progress, ResyncPolicy, ResyncReason, ResyncWord, check_initial_start,
};

use crate::error::{Failure, FailureCode};
use crate::ports::{Guest, Ports};
use crate::relationship::Relationship;

impl<P: Ports> Relationship<P> {
    /// Has both sides compared, and what differs sent, whatever the policy says. A pass that is under way, or rests,
    /// goes on where it is; after [`Relationship::cancel_resync`] the next one begins anew.
    pub async fn resync(&mut self) -> Result<(), Failure> {
        self.check_is_ours()?;
        self.check_no_media("there is nothing to compare with")?;
        let begins = match self.row.phase {
            // Nothing has been shipped: there is nothing to compare with.
            Phase::InitialReplication { .. } if self.row.shipped.acked.number.0 == 0 => return Ok(()),
            Phase::ResyncRequired { .. } | Phase::Resynchronizing { .. } => false,
            _ => true,
        };
        self.row.passes.word = ResyncWord::Asked;
        if begins {
            self.require_resync(ResyncReason::Requested).await?;
        }
        self.resume().await
    }

    /// Ends a resynchronization. It is required as before, nothing is replicated, and it waits for a person, or for the
    /// next window of the policy. An initial replication by media is given up; then it is paused, so that nothing goes over
    /// the line that nobody has asked for.
    pub async fn cancel_resync(&mut self) -> Result<(), Failure> {
        if self.row.passes.media.is_some() {
            self.give_up_media().await;
            self.row.paused = true;
            self.announce().await;
            return self.pause().await;
        }
        if !matches!(self.row.phase, Phase::ResyncRequired { .. } | Phase::Resynchronizing { .. }) {
            let message = format!(
                "no resynchronization of {} is required or under way (it is in phase {}); there is nothing to cancel",
                self.row.name,
                self.row.phase.name()
            );
            return Err(Failure::lasting(FailureCode::Unfit, message));
        }
        self.row.passes.word = ResyncWord::Cancelled { at: self.shared.now() };
        self.row.error = None;
        let why = self.row.passes.why.clone().unwrap_or(ResyncReason::Requested);
        self.require_resync(why).await.map(drop)
    }

    pub(crate) fn set_policy(&mut self, policy: ResyncPolicy) {
        self.row.settings.resync = policy;
        // The compare with a seed is an initial replication, which no policy holds up.
        if self.row.passes.why != Some(ResyncReason::Seeded) {
            self.row.passes.word = ResyncWord::None;
        }
    }

    pub(crate) async fn set_initial(&mut self, initial: InitialStart) -> Result<(), Failure> {
        if !self.row.has_not_begun() && self.row.passes.media.is_none() {
            let message = format!(
                "the initial replication of {} has begun already; 'afterimage pause' and 'resume' stop it and let it go on",
                self.row.name
            );
            return Err(Failure::lasting(FailureCode::Unfit, message));
        }
        let media = match &initial {
            InitialStart::Media { dir } => Some(Self::begin_media(&self.shared.ports, dir).await?),
            InitialStart::At { at } => {
                check_initial_start(*at, self.shared.now())
                    .map_err(|message| Failure::lasting(FailureCode::Unfit, message))?;
                None
            }
            InitialStart::Now | InitialStart::Seed => None,
        };
        self.give_up_media().await;
        self.row.passes.media = media;
        self.row.passes.initial = initial;
        self.squared = false;
        self.row.error = None;
        self.book(std::time::Duration::ZERO);
        Ok(())
    }

    /// Tells the replica's site of a VM whose initial replication begins later, or goes by media, so that it is known now
    /// what is in the way. What may clear by itself until then is no matter.
    pub(crate) async fn announce(&mut self) {
        let told = async {
            let vm = self.connect_guest().await?;
            let disks = vm.resolve(&self.row.nodes()).await?;
            self.square_up(&vm, &disks).await
        };
        if let Err(failure) = told.await {
            tracing::warn!(vm = %self.row.name, %failure, "the replica's site was not told");
            self.row.error = Some(failure).filter(|failure| !failure.transient);
        }
    }

    /// A time that was set for the initial replication is none any more.
    pub(crate) fn begin_initial_now(&mut self) {
        if let InitialStart::At { .. } = self.row.passes.initial {
            self.row.passes.initial = InitialStart::Now;
        }
    }

    /// Refuses what would need a pass that rests.
    pub(crate) fn check_rest(&self) -> Result<(), Failure> {
        let name = &self.row.name;
        let until = match (self.row.may_run(self.shared.now()), self.row.settings.resync) {
            (MayRun::Now, _) => return Ok(()),
            (MayRun::From(_), ResyncPolicy::Daily(window)) => format!("until {} UTC", window.opens()),
            (MayRun::From(_) | MayRun::WhenAsked, _) => "until it is asked for".into(),
        };
        let message =
            format!("the resynchronization of {name} rests {until}; 'afterimage resync {name}' runs it now");
        Err(Failure { code: FailureCode::Rests, message, transient: until.contains("UTC") })
    }

    /// Without the images that it is to begin with, an initial replication does not begin.
    pub(crate) fn check_seed(&self) -> Result<(), Failure> {
        if self.row.passes.initial != InitialStart::Seed || !self.row.has_not_begun() {
            return Ok(());
        }
        let (name, peer) = (&self.row.name, &self.row.settings.peer);
        let disks: Vec<String> =
            self.row.disks.iter().map(|disk| format!(" --disk {}=FILE", disk.name)).collect();
        let message = format!(
            "{name} waits for images at {peer}: run 'afterimage replica seed {name}{}' there, or 'afterimage configure {name} --initial now' here to send everything",
            disks.concat()
        );
        Err(Failure::transient(FailureCode::SeedAwaited, message))
    }
}

impl crate::rows::Protected {
    /// Nothing of the initial replication has been sent, or is on its way.
    fn has_not_begun(&self) -> bool {
        matches!(self.phase, Phase::InitialReplication { progress: Progress { covered_bytes: 0, .. } })
            && self.shipped.acked.number.0 == 0
            && self.shipped.attempt.is_none()
    }
}
