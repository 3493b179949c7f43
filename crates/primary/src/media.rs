//! An initial replication by media: its pass goes into a folder instead of over the line.
//!
//! ```text
//!  protect --initial media:DIR ─▶ logs of the pass ─▶ DIR ─ covered ─▶ end written ─▶ waits ── the replica's newest log ──▶ cycles
//!                 ▲                     │ bitmap lost, disk resized                     │      is the set's newest log
//!                 └─── a new set ◀──────┘                                               └─ given up ─▶ paused
//! ```
//!
//! The folder stands for the replica: it is asked which log is the newest that is whole there, as the replica would be.
//! Meanwhile the replica's site hears of the set, and of the key that opens it, by every offer. Bitmaps record as in every
//! pass, and after the last log until the import: so only what has changed since travels.

use std::cmp::Ordering;
use std::path::Path;

use media::MediaKey;
use model::{Head, InitialStart, LogId, MediaId, Phase, Shipped};
use steps::durable_step;
use wire::{Offer, OfferedMedia, RelationshipStatus};

use crate::cycle::DiskOf;
use crate::error::{Failure, FailureCode};
use crate::folder::{MediaFolder, check_empty};
use crate::ports::{Guest, Ports, Remote};
use crate::relationship::{Relationship, first_phase};
use crate::rows::{Media, Protected, Written};

impl<P: Ports> Relationship<P> {
    /// Where logs go now instead of to the replica.
    pub(crate) fn media_folder(&self) -> Option<MediaFolder> {
        let media = self.row.passes.media.as_ref().filter(|media| media.written.is_none())?;
        Some(MediaFolder::new(self.row.vm, media))
    }

    /// A new set for a folder that is empty.
    pub(crate) async fn begin_media(ports: &P, dir: &Path) -> Result<Media, Failure> {
        check_empty(dir).await?;
        let (set, key) = draw(ports)?;
        Ok(Media { dir: dir.to_owned(), set, key, before: None, moment: None, written: None })
    }

    /// Squares what is remembered with what is in the folder, and tells the replica's site, as far as it can be reached.
    pub(crate) async fn square_up_with_media(
        &mut self,
        folder: &MediaFolder,
        offer: &Offer,
        vm: &P::Guest,
        disks: &[DiskOf<P>],
    ) -> Result<(), Failure> {
        match self.remote()?.offer(offer).await {
            Ok(status) => self.check_media_fit(&status)?,
            Err(failure) if failure.transient => {
                tracing::debug!(vm = %self.row.name, %failure, "the replica's site was not told of the media");
            }
            Err(failure) => return Err(failure),
        }
        let is_begun = self.row.shipped.acked != Head::EMPTY;
        folder.open(is_begun).await?;
        let durable = folder.head(&self.row.shipped).await?;
        let reconciled = self.row.shipped.reconcile(durable).map_err(|why| {
            Failure::lasting(
                FailureCode::Media,
                format!("the media do not fit what was written to them: {why}"),
            )
        })?;
        if let Some(progress) = reconciled.arrived.and_then(|arrived| arrived.progress) {
            self.row.phase = Phase::InitialReplication { progress };
        }
        self.row.shipped = reconciled.shipped;
        let is_whole = self.row.is_whole_on_media();
        let bytes = match is_whole {
            true => folder.close(self.row.shipped.acked, self.random_log_id()?).await?,
            false => 0,
        };
        let now = self.shared.now();
        if let Some(media) = &mut self.row.passes.media {
            media.before = None;
            media.written = is_whole.then_some(Written { at: now, bytes });
        }
        durable_step("primary::media::saving");
        self.row.save(&self.shared.catalog).await?;
        durable_step("primary::media::saved");
        vm.cleanup(disks, Some(self.row.shipped.tracking)).await?;
        if is_whole { Err(self.media_awaited(Head::EMPTY)) } else { Ok(()) }
    }

    /// Whether the replica can begin with the set.
    fn check_media_fit(&self, status: &RelationshipStatus) -> Result<(), Failure> {
        if let Some(refused) = status.refused.as_ref().filter(|refused| !refused.transient) {
            return Err(Failure::lasting(FailureCode::ReplicaRefused, refused.message.clone()));
        }
        let has_images = matches!(status.phase, Phase::ResyncRequired { .. });
        if status.durable.0 == 0 && !has_images {
            return Ok(());
        }
        let (name, peer) = (&self.row.name, &self.row.settings.peer);
        let what = if has_images { "images of it".to_owned() } else { format!("{} logs", status.durable) };
        let message = format!(
            "{peer} has a part of {name} already ({what}), media cannot begin anew there; 'afterimage configure {name} --initial now' compares both sides and sends what differs"
        );
        Err(Failure::lasting(FailureCode::Media, message))
    }

    /// With the set whole: whether all of it is at the replica. From then on this is a relationship as any other.
    pub(crate) fn check_import(&mut self, status: &RelationshipStatus) -> Result<(), Failure> {
        let Some(media) = &self.row.passes.media else { return Ok(()) };
        let durable = Head { number: status.durable, id: status.durable_id };
        let goes_on = matches!(status.phase, Phase::InitialReplication { .. });
        match durable.number.cmp(&self.row.shipped.acked.number) {
            Ordering::Equal if durable == self.row.shipped.acked => {
                self.row.point_at = media.moment;
                self.row.enter(Phase::Replicating);
                Ok(())
            }
            Ordering::Less if goes_on => Err(self.media_awaited(durable)),
            // What is there is another chain, or a damaged one: that is for those to say who compare.
            _ => Ok(()),
        }
    }

    fn media_awaited(&self, imported: Head) -> Failure {
        let (name, peer, logs) = (&self.row.name, &self.row.settings.peer, self.row.shipped.acked.number);
        let dir = self.row.passes.media.as_ref().map(|media| media.dir.display().to_string());
        let message = format!(
            "{name} waits for its media to be imported at {peer}: bring what is in {} there and run 'afterimage replica import DIR' ({} of {logs} logs are in)",
            dir.unwrap_or_default(),
            imported.number
        );
        Failure::transient(FailureCode::MediaAwaited, message)
    }

    /// Begins the set anew in its folder: what is there cannot be continued.
    pub(crate) fn begin_media_anew(&mut self) -> Result<(), Failure> {
        let (set, key) = draw(&self.shared.ports)?;
        if let Some(media) = &mut self.row.passes.media {
            let before = media.before.or(Some(media.set));
            *media = Media { set, key, before, moment: None, written: None, dir: media.dir.clone() };
        }
        self.begin_pass_anew();
        Ok(())
    }

    /// Gives the set up, and removes it if it is at hand: without the key, which goes now, it is worth nothing.
    pub(crate) async fn give_up_media(&mut self) {
        let Some(media) = self.row.passes.media.take() else { return };
        if let Err(error) = MediaFolder::new(self.row.vm, &media).discard(media.set).await {
            tracing::warn!(vm = %self.row.name, %error, "the media that were given up stay as they are");
        }
        self.row.passes.initial = InitialStart::Now;
        self.row.error = None;
        self.row.failures = 0;
        self.begin_pass_anew();
    }

    fn begin_pass_anew(&mut self) {
        self.row.phase = first_phase(self.row.total_bytes());
        self.row.shipped = Shipped::NOTHING;
        self.squared = false;
    }

    /// Refuses what would need a replica that is not there before the import.
    pub(crate) fn check_no_media(&self, what: &str) -> Result<(), Failure> {
        if self.row.passes.media.is_none() {
            return Ok(());
        }
        let (name, peer) = (&self.row.name, &self.row.settings.peer);
        let message = format!(
            "{what} before the media of {name} are imported at {peer}; 'afterimage resync {name} --cancel' gives them up"
        );
        Err(Failure::lasting(FailureCode::Unfit, message))
    }

    fn random_log_id(&self) -> Result<LogId, Failure> {
        self.shared.ports.random_id().map(LogId::from_bytes)
    }
}

impl Protected {
    /// What the replica's site is to know of the set.
    pub(crate) fn offered_media(&self) -> Option<OfferedMedia> {
        let media = self.passes.media.as_ref()?;
        let logs = media.written.map(|_| self.shipped.acked.number);
        Some(OfferedMedia { set: media.set, key: media.key.clone(), logs })
    }

    /// Whether the pass goes into a folder, and all of it is there.
    pub(crate) fn is_whole_on_media(&self) -> bool {
        let covered = |phase: &Phase| match phase {
            Phase::InitialReplication { progress } => {
                progress.covered_bytes > 0 && progress.covered_bytes == progress.total_bytes
            }
            _ => false,
        };
        self.passes.media.is_some() && self.shipped.acked != Head::EMPTY && covered(&self.phase)
    }
}

fn draw<P: Ports>(ports: &P) -> Result<(MediaId, MediaKey), Failure> {
    let set = MediaId::from_bytes(ports.random_id()?);
    let mut key = [0; 32];
    for half in key.as_chunks_mut::<16>().0 {
        *half = ports.random_id()?;
    }
    Ok((set, MediaKey::from_bytes(key)))
}
