//! What two sites say to each other, as JSON. `docs/format/wire-v1.md` describes it for other programs.

use media::MediaKey;
use model::group::{Group, GroupMoment};
use model::{
    DISK_BYTES_MAX, DiskName, Head, LogId, LogNumber, MediaId, Phase, Progress, ResyncReason, TravellingPin,
    VM_BYTES_MAX, VmId, VmName,
};
use serde::{Deserialize, Serialize};

use crate::certificate::KeyId;

/// A primary tells a replica's site what it protects; made again whenever the two must be squared.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Offer {
    /// The VM.
    pub vm: VmId,
    /// What people call it.
    pub vm_name: VmName,
    /// Its disks, in the order in which logs name them.
    pub disks: Vec<OfferedDisk>,
    /// The interval of its cycles in seconds.
    pub interval_s: u64,
    /// Hourly recovery points to keep beside the latest one.
    pub points: u8,
    /// The primary site's name.
    pub primary_name: String,
    /// What is needed to run the VM elsewhere, as the primary knows it.
    pub definition: serde_json::Value,
    /// Where the primary stands.
    pub phase: Phase,
    /// What keeps the primary from replicating, if it cannot clear by itself.
    pub error: Option<String>,
    /// A person has paused it.
    pub paused: bool,
    /// How often the VM has changed its site for good, and one more.
    #[serde(default = "first_generation")]
    pub generation: u64,
    /// The group that it is in, if it is in one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<Group>,
    /// The initial replication comes on media.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media: Option<OfferedMedia>,
    /// The points that are to be pinned once they are there: the replica moves to this site.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pins: Vec<TravellingPin>,
}

/// A set of media that the replica is to begin with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfferedMedia {
    /// The set.
    pub set: MediaId,
    /// What opens it.
    pub key: MediaKey,
    /// How many logs it has, once it is whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logs: Option<LogNumber>,
}

const fn first_generation() -> u64 {
    1
}

/// Pins that travel with one VM.
const PINS_MAX: usize = 4096;
/// Disks of one VM; as many as a log can name.
const DISKS_MAX: usize = 256;
/// The longest interval between cycles, in seconds: a month.
const INTERVAL_MAX_S: u64 = 31 * 86_400;

impl Offer {
    /// What is wrong with it, if it is none that a VM can have.
    pub fn check(&self) -> std::result::Result<(), String> {
        check_site_name(&self.primary_name).map_err(|error| error.to_string())?;
        if self.disks.len() > DISKS_MAX {
            return Err(format!("a VM of {} disks is not taken; {DISKS_MAX} at most", self.disks.len()));
        }
        if self.pins.len() > PINS_MAX {
            return Err(format!("{} pins are not taken; {PINS_MAX} at most", self.pins.len()));
        }
        let mut sum = 0_u64;
        for (place, OfferedDisk { name, size_bytes }) in self.disks.iter().enumerate() {
            if self.disks[..place].iter().any(|before| before.name == *name) {
                return Err(format!("two disks are named {name}"));
            }
            if *size_bytes > DISK_BYTES_MAX {
                return Err(format!(
                    "disk {name} has {size_bytes} bytes; at most {} TiB are taken",
                    DISK_BYTES_MAX >> 40
                ));
            }
            sum += size_bytes;
        }
        if sum > VM_BYTES_MAX {
            return Err(format!("the disks have {sum} bytes; at most {} TiB are taken", VM_BYTES_MAX >> 40));
        }
        if !(1..=INTERVAL_MAX_S).contains(&self.interval_s) {
            return Err(format!("an interval of {} s is none; 1 to {INTERVAL_MAX_S}", self.interval_s));
        }
        match &self.group {
            Some(group) if !group.has(&self.vm_name) => {
                return Err(format!("{} is not in its own group {}", self.vm_name, group.name));
            }
            Some(group) => group.check()?,
            None => {}
        }
        Ok(())
    }

    /// Makes the texts in it fit to be shown.
    pub(crate) fn tidy(&mut self) {
        if let Some(error) = &mut self.error {
            tidy(error);
        }
        tidy_phase(&mut self.phase);
    }
}

impl Report {
    /// Makes the texts in it fit to be shown.
    pub(crate) fn tidy(&mut self) {
        if let Some(error) = &mut self.error {
            tidy(error);
        }
        tidy_phase(&mut self.phase);
        if let Some(announced) = &mut self.moment {
            announced.moment.tidy();
        }
    }
}

/// The longest text of a stranger that is kept, in characters.
const TEXT_CHARS_MAX: usize = 1000;

/// Cuts a text that came from elsewhere, and takes out what would control a terminal.
pub(crate) fn tidy(text: &mut String) {
    let tidied: String =
        text.chars().take(TEXT_CHARS_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect();
    *text = tidied;
}

fn tidy_phase(phase: &mut Phase) {
    if let Phase::ResyncRequired { why } = phase {
        match why {
            ResyncReason::BitmapLost(text)
            | ResyncReason::BitmapInconsistent(text)
            | ResyncReason::DiskResized(text)
            | ResyncReason::DisksChanged(text)
            | ResyncReason::ChainBroken(text)
            | ResyncReason::Restored(text) => tidy(text),
            ResyncReason::Requested | ResyncReason::Reversed | ResyncReason::Seeded => {}
        }
    }
}

/// One disk of an [`Offer`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfferedDisk {
    /// Its name.
    pub name: DiskName,
    /// Its size in bytes.
    pub size_bytes: u64,
}

/// What a replica's site has of a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelationshipStatus {
    /// The number of the newest durable log; [`LogNumber::ZERO`] for none.
    pub durable: LogNumber,
    /// Its id; [`LogId::NONE`] for none.
    pub durable_id: LogId,
    /// Where the replica stands.
    pub phase: Phase,
    /// Why the replica would take no log now (a failover, no space), if it would not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<Refused>,
    /// How fast the replica's site takes this peer's logs, in bytes per second over all its VMs, if it does not take them
    /// as they come. Who sends faster waits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth_bytes_per_s: Option<u64>,
}

/// A primary tells where it stands, between offers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Where it stands.
    pub phase: Phase,
    /// What keeps it from replicating, if it cannot clear by itself.
    pub error: Option<String>,
    /// A person has paused it.
    pub paused: bool,
    /// The log that is arriving makes a point of a moment of the VM's group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moment: Option<Announced>,
}

/// A log that makes a point which a group's other VMs have, too. It is told before the log has ended, so that there is
/// never such a point of which that is not known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announced {
    /// The log's number.
    pub number: LogNumber,
    /// Its id.
    pub id: LogId,
    /// The moment.
    pub moment: GroupMoment,
}

/// A primary whose VM is off gives it to the replica's site: everything is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandOver {
    /// The number of the newest log, whose point the VM is to be started from.
    pub number: LogNumber,
    /// Its id.
    pub id: LogId,
    /// Only asks whether that was done already: an answer may have been lost.
    #[serde(default)]
    pub done: bool,
}

/// A peer wants to be the primary of a VM whose replica is here and another peer's: the VM was moved to its site, or the
/// replica to this one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TakeOver {
    /// What the VM is called at the replica's site.
    pub vm_name: VmName,
    /// Nothing is to be compared: the replica has all that the VM's primary has sent to the one that it was passed on from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub in_step: Option<InStep>,
}

/// Where two chains of one VM are one state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct InStep {
    /// The newest log of the chain that is taken over.
    pub there: LogNumber,
    /// The newest one of the chain that the primary comes from. Numbers never go back: the next log has one beyond both.
    pub here: LogNumber,
}

/// The VM is that peer's now, and only what it sends from now on is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TakenOver {
    /// The VM.
    pub vm: VmId,
    /// Its generation: older ones are of the primary before.
    pub generation: u64,
    /// The end of its chain, where the next log goes on; of a site that does not say so nothing is known.
    #[serde(default)]
    pub head: Option<Head>,
}

/// A primary has the replica of its VM moved from this site to another one, which both know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Relocate {
    /// That site, by its key: each site has a name of its own for it.
    pub to: KeyId,
    /// What is to be done.
    pub step: RelocateStep,
}

/// A step of a replica's move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "step")]
pub enum RelocateStep {
    /// To begin, and to tell how far it is.
    Begin,
    /// To take no more logs: with this one as the newest, if the other site has all of it.
    Seal {
        /// The newest log that the primary knows of.
        number: LogNumber,
        /// Its id.
        id: LogId,
    },
    /// To take logs again.
    Unseal,
    /// To end it; the replica stays here.
    Cancel,
    /// It is done: the other site is the replica's now, and this one has none any more.
    Done,
}

/// How far a replica's move is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Relocation {
    /// The newest log of the other site's chain, if that is all that this one has.
    pub in_step: Option<LogNumber>,
    /// No more logs are taken here.
    pub sealed: bool,
    /// How much of the oldest point is there, while that is being sent.
    pub progress: Option<Progress>,
    /// Bytes of logs that are still to be sent, as far as known.
    pub pending_bytes: Option<u64>,
    /// Why it does not go on just now.
    pub error: Option<String>,
}

impl Relocation {
    /// Makes the texts in it fit to be shown.
    pub(crate) fn tidy(&mut self) {
        if let Some(error) = &mut self.error {
            tidy(error);
        }
    }
}

/// What a VM that was handed over is to be started from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandedOver {
    /// Its disks.
    pub disks: Vec<HandedOverDisk>,
}

/// A disk at the site that took a VM over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandedOverDisk {
    /// Its name.
    pub name: DiskName,
    /// Its qcow2 file there.
    pub path: String,
}

impl HandedOver {
    /// Makes the texts in it fit to be shown.
    pub(crate) fn tidy(&mut self) {
        self.disks.truncate(DISKS_MAX);
        self.disks.iter_mut().for_each(|disk| tidy(&mut disk.path));
    }
}

/// Asks for the digests of the blocks of a stretch of a disk, in the replica's newest state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DigestRequest {
    /// The disk.
    pub disk: DiskName,
    /// Where the stretch starts, in bytes.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u64,
    /// One digest for each block of this many bytes; the last block may be shorter.
    pub block_bytes: u64,
}

impl DigestRequest {
    /// How many digests answer it.
    #[must_use]
    pub fn digests(&self) -> u64 {
        self.len.div_ceil(self.block_bytes.max(1))
    }
}

/// How much of a log that is being uploaded the replica has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct UploadState {
    /// Its first byte that the replica does not have: where the upload goes on.
    pub offset: u64,
    /// The whole log is on the replica's disk, verified, and part of its chain.
    pub durable: bool,
}

/// What a site tells of itself to a peer that it has accepted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SiteInfo {
    /// The site's name.
    pub name: String,
    /// The version of the program that it runs.
    pub version: String,
}

/// What sort of refusal it is; it decides the HTTP status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RefusedClass {
    /// The request itself is wrong: 400.
    Invalid,
    /// This peer may not do that: 403.
    Forbidden,
    /// There is no such thing: 404.
    NotFound,
    /// It contradicts what is there (a wrong number, predecessor, checksum, a phase): 409.
    Conflict,
    /// There is no room for it: 507.
    NoSpace,
    /// Not now: 503.
    Busy,
    /// The site itself failed (its disk, its catalog): 500.
    Internal,
}

impl RefusedClass {
    /// The HTTP status that carries it.
    #[must_use]
    pub const fn status(self) -> http::StatusCode {
        match self {
            Self::Invalid => http::StatusCode::BAD_REQUEST,
            Self::Forbidden => http::StatusCode::FORBIDDEN,
            Self::NotFound => http::StatusCode::NOT_FOUND,
            Self::Conflict => http::StatusCode::CONFLICT,
            Self::NoSpace => http::StatusCode::INSUFFICIENT_STORAGE,
            Self::Busy => http::StatusCode::SERVICE_UNAVAILABLE,
            Self::Internal => http::StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

/// A request that was understood and not granted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("{message}")]
pub struct Refused {
    /// Its sort.
    pub class: RefusedClass,
    /// Which refusal it is; stable, in kebab case (see [`codes`]).
    pub code: String,
    /// What happened, to what, and what to do.
    pub message: String,
    /// Whether it may clear by itself.
    pub transient: bool,
    /// When to ask again, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_s: Option<u64>,
}

impl Refused {
    /// A refusal that does not clear by itself, unless it is for want of space or time.
    pub fn new(class: RefusedClass, code: &str, message: impl Into<String>) -> Self {
        let transient = matches!(class, RefusedClass::NoSpace | RefusedClass::Busy | RefusedClass::Internal);
        Self { class, code: code.to_owned(), message: message.into(), transient, retry_after_s: None }
    }

    /// This peer may not do that.
    pub fn forbidden(code: &str, message: impl Into<String>) -> Self {
        Self::new(RefusedClass::Forbidden, code, message)
    }

    /// It contradicts what is there.
    pub fn conflict(code: &str, message: impl Into<String>) -> Self {
        Self::new(RefusedClass::Conflict, code, message)
    }

    /// The bytes sent do not continue what the replica has.
    #[must_use]
    pub fn wrong_offset(has: u64, sent: u64) -> Self {
        let message =
            format!("the replica has {has} bytes of this log; bytes from offset {sent} do not continue it");
        Self { transient: true, ..Self::conflict(codes::WRONG_OFFSET, message) }
    }

    /// The same refusal, which may clear by itself after so many seconds.
    #[must_use]
    pub fn retry_after(self, seconds: u64) -> Self {
        Self { transient: true, retry_after_s: Some(seconds), ..self }
    }
}

/// The codes of refusals that this crate itself makes or understands.
pub mod codes {
    /// No client certificate was presented (401).
    pub const NO_CERTIFICATE: &str = "no-certificate";
    /// The client's certificate is of no peer, or of one that was removed (403).
    pub const UNKNOWN_PEER: &str = "unknown-peer";
    /// An id, number or query in the address is not one (400).
    pub const BAD_ID: &str = "bad-id";
    /// A body is not what it should be (400).
    pub const BAD_BODY: &str = "bad-body";
    /// A body has no `Content-Length` (411).
    pub const NO_LENGTH: &str = "length-required";
    /// A body is longer than is taken (413).
    pub const TOO_LARGE: &str = "too-large";
    /// A body ended before its end.
    pub const TRUNCATED: &str = "truncated-body";
    /// A body came too slowly (408).
    pub const TOO_SLOW: &str = "too-slow";
    /// Too many wrong invites came from there (429).
    pub const TOO_MANY_ATTEMPTS: &str = "too-many-attempts";
    /// More segments arrive at once than the site takes (503).
    pub const BUSY: &str = "busy";
    /// The bytes do not continue what the replica has (409): ask for the state, then go on from there.
    pub const WRONG_OFFSET: &str = "wrong-offset";
    /// The client's certificate is one that our CA has issued for a peer, and its time is over or has not come (403).
    pub const CERTIFICATE_NOT_TODAY: &str = "certificate-not-today";
    /// All that the peer might do here was taken back (403).
    pub const REVOKED: &str = "revoked";
    /// An invite's secret is not one of this site's, or was used, or has expired (403).
    pub const BAD_INVITE: &str = "bad-invite";
}

/// The body of `POST /v1/peers`: the site that accepts an invite introduces itself. Its certificate is
/// that of the TLS connection.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Introduction {
    pub secret: crate::Secret,
    pub name: String,
    pub address: String,
}

/// The body of a refusal.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ErrorBody {
    pub error: Refused,
}

/// Longest name of a site, in bytes.
const SITE_NAME_BYTES_MAX: usize = 64;

/// Whether a site may be called so: what other sites show to people must not upset a terminal or a path.
pub fn check_site_name(name: &str) -> std::result::Result<(), SiteNameError> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    let good = (1..=SITE_NAME_BYTES_MAX).contains(&name.len())
        && !name.starts_with(['.', '-'])
        && name.bytes().all(allowed);
    if good { Ok(()) } else { Err(SiteNameError(name.chars().take(80).collect())) }
}

/// A site's name that is not usable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "site name {0:?} is not usable: use 1 to {SITE_NAME_BYTES_MAX} letters, digits, '.', '_' or '-', not starting with '.' or '-'"
)]
pub struct SiteNameError(String);
