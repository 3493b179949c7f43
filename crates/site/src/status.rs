//! Relationships as `status` shows them, from either side.

use model::{
    ApplyState, Assessment, Consistency, GroupName, InitialStart, MayRun, Phase, Progress, ResyncPolicy,
    ResyncWord, Timestamp, VmId,
};
use primary::Relocating;
use serde::Serialize;
use wire::Relocation;

use crate::clock::{rfc3339, seconds, serialize_moment, serialize_optional_moment};
use crate::media::MediaView;

/// One relationship, for scripts and for tables. Names are stable.
#[derive(Debug, Clone, Serialize)]
pub struct VmView {
    /// The VM's name.
    pub name: String,
    /// Its id, the same on both sides.
    pub id: VmId,
    /// `primary`, `replica`, or `extension`: a replica of this site, passed on to a third one.
    pub role: &'static str,
    /// The other side.
    pub peer: String,
    /// Where the relationship stands.
    pub state: &'static str,
    /// How far a pass is.
    pub progress: Option<Progress>,
    /// Paused by a person.
    pub paused: bool,
    /// `normal`, `warning` or `critical`.
    pub health: model::Health,
    /// Why it is not normal.
    pub health_reason: String,
    /// How old the newest recovery point is, in seconds.
    pub lag_s: Option<f64>,
    /// Bytes changed and not shipped yet, as far as known (primary).
    pub pending_bytes: Option<u64>,
    /// The moment of the newest recovery point.
    #[serde(serialize_with = "serialize_optional_moment")]
    pub last_point: Option<Timestamp>,
    /// The interval between cycles, in seconds.
    pub interval_s: u64,
    /// Hourly points beside the latest.
    pub points: u8,
    /// The group that it is in.
    pub group: Option<GroupName>,
    /// The disks.
    pub disks: Vec<DiskView>,
    /// The side's own part.
    #[serde(flatten)]
    pub side: Side,
}

/// A disk.
#[derive(Debug, Clone, Serialize)]
pub struct DiskView {
    /// Its name.
    pub name: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// So much of a disk that has joined is at the replica; it is in no point before all of it is (primary).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub copied_bytes: Option<u64>,
}

/// What only one side knows.
#[derive(Debug, Clone, Serialize)]
#[serde(untagged)]
pub enum Side {
    /// The primary's.
    Primary(Box<PrimarySide>),
    /// The replica's.
    Replica(Box<ReplicaSide>),
}

/// The primary's part.
#[derive(Debug, Clone, Serialize)]
pub struct PrimarySide {
    /// The newest log known to be durable at the replica.
    pub acked: u64,
    /// Cycles failed in a row.
    pub failures: u32,
    /// Why the last one failed.
    pub error: Option<primary::Failure>,
    /// Why its pass does not run just now, and until when.
    pub rests: Option<RestView>,
    /// When both sides are compared without being asked: `auto`, `manual` or a window.
    pub resync: ResyncPolicy,
    /// Why both sides are compared, or are to be.
    pub resync_reason: Option<String>,
    /// The media that its initial replication goes by.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub media: Option<MediaView>,
    /// Seconds between application-consistent points.
    pub app_every_s: Option<u64>,
    /// The guest agent's socket, where one was named.
    pub guest_agent: Option<String>,
    /// The most that is sent, in bytes per second.
    pub bandwidth_bytes_per_s: Option<u64>,
    /// What shows that the VM has booted, for boot checks of its replica.
    pub sign_of_life: Option<String>,
    /// The move of the replica to another site.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub moving: Option<MovingView>,
    /// When the next one is due.
    #[serde(serialize_with = "serialize_moment")]
    pub next_cycle_at: Timestamp,
    /// The last one that ended well.
    pub last_cycle: Option<CycleView>,
    /// Bytes of logs sent since the site was started.
    pub sent_bytes: u64,
}

/// A replica on its way to another site, as its primary sees it.
#[derive(Debug, Clone, Serialize)]
pub struct MovingView {
    /// Where it goes; none if it is there, and the site before has not heard of it.
    pub to: Option<String>,
    /// Where it was.
    pub from: String,
    /// How much of the oldest point is there, while that is being sent.
    pub progress: Option<Progress>,
    /// Bytes of logs that are still to be sent.
    pub pending_bytes: Option<u64>,
    /// Why it does not go on just now.
    pub error: Option<String>,
}

impl MovingView {
    fn of(status: &primary::VmStatus) -> Option<Self> {
        let (to, from) = match status.settings.relocating.as_ref()? {
            Relocating::To { peer, .. } => (Some(peer.clone()), status.settings.peer.clone()),
            Relocating::From { peer, .. } => (None, peer.clone()),
        };
        let Relocation { progress, pending_bytes, error, .. } = status.relocation.clone();
        Some(Self { to, from, progress, pending_bytes, error })
    }
}

/// A pass that waits.
#[derive(Debug, Clone, Serialize)]
pub struct RestView {
    /// Until then; none if it waits for a person.
    #[serde(serialize_with = "serialize_optional_moment")]
    pub until: Option<Timestamp>,
    /// One sentence for a person.
    pub message: String,
}

impl RestView {
    fn of(status: &primary::VmStatus) -> Option<Self> {
        let name = &status.name;
        let until = match status.may_run {
            MayRun::Now => return None,
            MayRun::From(at) => Some(at),
            MayRun::WhenAsked => None,
        };
        let cancelled = matches!(status.passes.word, ResyncWord::Cancelled { .. });
        let message = match (until, &status.passes.initial, status.settings.resync) {
            (Some(at), InitialStart::At { .. }, _) => format!(
                "the initial replication begins at {}; 'afterimage resume {name}' begins it now",
                rfc3339(at)
            ),
            (Some(_), _, ResyncPolicy::Daily(window)) => format!(
                "{} until {} UTC; 'afterimage resync {name}' runs it now",
                if cancelled { "it was cancelled and rests" } else { "it rests" },
                window.opens()
            ),
            _ if cancelled => format!("it was cancelled; 'afterimage resync {name}' starts it anew"),
            _ => format!("run 'afterimage resync {name}'"),
        };
        Some(Self { until, message })
    }
}

/// The replica's part.
#[derive(Debug, Clone, Serialize)]
pub struct ReplicaSide {
    /// The newest durable log.
    pub received: u64,
    /// The newest log that is folded into the base.
    pub applied: u64,
    /// `idle`, `running`, `interrupted` or `failed`.
    pub apply: &'static str,
    /// Since when the storage is being moved.
    #[serde(serialize_with = "serialize_optional_moment")]
    pub migrating_since: Option<Timestamp>,
    /// The site that it is on its way to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub moving_to: Option<String>,
    /// Why the primary's last cycle failed, as it told.
    pub primary_error: Option<String>,
    /// Where the replica is.
    pub storage: String,
    /// Bytes of the logs that are not folded into the base.
    pub log_bytes: u64,
    /// How many recovery points are pinned by hand.
    pub pinned: usize,
    /// The bytes of logs that only these pins keep.
    pub pin_bytes: u64,
    /// What the base takes up on its disk.
    pub base_bytes: u64,
    /// How many views are open.
    pub views: usize,
    /// The primary no longer protects the VM.
    pub withdrawn: bool,
    /// What was lost here, until a resynchronization has made it good.
    pub damage: Option<String>,
    /// The media that its initial replication comes on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub media: Option<MediaView>,
}

/// One cycle.
#[derive(Debug, Clone, Serialize)]
pub struct CycleView {
    /// Its moment.
    #[serde(serialize_with = "serialize_moment")]
    pub moment: Timestamp,
    /// The consistency of the point that it made.
    pub point: Option<Consistency>,
    /// Why it is less than was wanted.
    pub note: Option<String>,
    /// Logs shipped.
    pub logs: u32,
    /// Their bytes.
    pub log_bytes: u64,
    /// Bytes of disk in them.
    pub data_bytes: u64,
    /// Bytes of zeros in them.
    pub zero_bytes: u64,
    /// How long the moment stayed fixed, in seconds.
    pub reading_s: f64,
    /// From the moment to the durable acknowledgement, in seconds.
    pub total_s: f64,
}

/// The progress of a pass, if one is under way.
pub(crate) fn progress(phase: &Phase) -> Option<Progress> {
    match phase {
        Phase::InitialReplication { progress } | Phase::Resynchronizing { progress } => Some(*progress),
        _ => None,
    }
}

/// The name of an apply state.
pub(crate) fn apply_name(apply: &ApplyState) -> &'static str {
    match apply {
        ApplyState::Idle => "idle",
        ApplyState::Running { .. } => "running",
        ApplyState::Interrupted { .. } => "interrupted",
        ApplyState::Failed { .. } => "failed",
    }
}

/// Which of its roles the sending side of a relationship has.
pub(crate) fn sending_role(status: &primary::VmStatus) -> &'static str {
    if status.settings.monitor == primary::Monitor::Replica { "extension" } else { "primary" }
}

impl VmView {
    /// A VM protected here, or passed on from here.
    #[must_use]
    pub fn of_primary(status: &primary::VmStatus, now: Timestamp) -> Self {
        let Assessment { health, reason } = status.health.clone();
        let settings = &status.settings;
        let rests = RestView::of(status);
        let health_reason = match &rests {
            Some(rest) if !reason.is_empty() => format!("{reason}; {}", rest.message),
            _ => reason,
        };
        Self {
            name: status.name.to_string(),
            id: status.vm,
            role: sending_role(status),
            peer: settings.peer.clone(),
            state: status.phase.name(),
            progress: progress(&status.phase),
            paused: status.paused,
            health,
            health_reason,
            lag_s: status.last_point_at.map(|at| seconds(now.since(at))),
            pending_bytes: status.pending_bytes,
            last_point: status.last_point_at,
            interval_s: settings.interval.as_secs(),
            points: settings.points,
            group: status.group.clone(),
            disks: status
                .disks
                .iter()
                .map(|disk| DiskView {
                    name: disk.name.to_string(),
                    size_bytes: disk.size_bytes,
                    copied_bytes: disk.joining,
                })
                .collect(),
            side: Side::Primary(Box::new(PrimarySide {
                // What is on media is not at the replica.
                acked: if status.passes.media.is_some() { 0 } else { status.acked.0 },
                failures: status.failures,
                error: status.error.clone(),
                rests,
                resync: settings.resync,
                resync_reason: status.passes.why.as_ref().map(ToString::to_string),
                media: MediaView::of_primary(status),
                moving: MovingView::of(status),
                app_every_s: settings.app_every.map(|every| every.as_secs()),
                guest_agent: settings.guest_agent.as_ref().map(|socket| socket.display().to_string()),
                bandwidth_bytes_per_s: settings.bandwidth_bytes_per_s,
                sign_of_life: settings.sign_of_life.clone(),
                next_cycle_at: status.next_at,
                last_cycle: status.last_cycle.as_ref().map(CycleView::of),
                sent_bytes: status.sent_bytes,
            })),
        }
    }
}

impl VmView {
    /// Lets its health say what is no trouble of the relationship itself, and will be if nobody looks.
    pub(crate) fn warn(&mut self, reason: &str) {
        if self.health == model::Health::Normal {
            self.health = model::Health::Warning;
            reason.clone_into(&mut self.health_reason);
        }
    }

    /// A replica kept here.
    #[must_use]
    pub fn of_replica(vm: VmId, status: &replica::ReplicaStatus, now: Timestamp) -> Self {
        let last_point = status.points.iter().max_by_key(|point| point.number).map(|point| point.taken_at);
        let Assessment { health, reason } = status.facts.health.clone();
        Self {
            name: status.name.to_string(),
            id: vm,
            role: "replica",
            peer: status.peer.clone(),
            state: status.facts.phase.name(),
            progress: progress(&status.facts.phase),
            paused: status.reported.paused,
            health,
            health_reason: reason,
            lag_s: last_point.map(|at| seconds(now.since(at))),
            pending_bytes: None,
            last_point,
            interval_s: status.interval_s,
            points: status.points_wanted,
            group: status.group.clone(),
            disks: status
                .disks
                .iter()
                .map(|disk| DiskView {
                    name: disk.name.to_string(),
                    size_bytes: disk.size_bytes,
                    copied_bytes: None,
                })
                .collect(),
            side: Side::Replica(Box::new(ReplicaSide {
                received: status.head.number.0,
                applied: status.applied.0,
                apply: apply_name(&status.facts.apply),
                migrating_since: status.facts.migrating_since,
                moving_to: status.moving_to.clone(),
                primary_error: status.reported.error.clone(),
                storage: status.folder.display().to_string(),
                log_bytes: status.log_bytes,
                pinned: status.pinned,
                pin_bytes: status.pin_bytes,
                base_bytes: status.base_bytes,
                views: status.views,
                withdrawn: status.withdrawn,
                damage: status.damage.clone(),
                media: MediaView::of_replica(status),
            })),
        }
    }
}

impl CycleView {
    fn of(report: &primary::CycleReport) -> Self {
        Self {
            moment: report.moment,
            point: report.point,
            note: report.note.clone(),
            logs: report.logs,
            log_bytes: report.log_bytes,
            data_bytes: report.data_bytes,
            zero_bytes: report.zero_bytes,
            reading_s: seconds(report.reading),
            total_s: seconds(report.total),
        }
    }
}
