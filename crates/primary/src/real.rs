//! The ports of a site: QEMU, its NBD server, the wire, the system's clock and chance.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use model::{DiskName, LogNumber, Timestamp, Tracking, VmId, VmName};
use nbd::DirtyExtent;
use qemu::{Monitor, Names, NbdAccess, Vm, VmAddress};
use serde_json::Value;
use wire::{
    Client, DigestRequest, HandOver, HandedOver, InStep, Offer, RelationshipStatus, Relocate, Relocation,
    Report, TakenOver, Uploader,
};

use crate::error::{Failure, FailureCode};
use crate::ports::{
    AgentAddress, Ahead, Capture, CaptureRequest, Disk, DiskReader, GroupMoment, Guest, LogUpload, Ports,
    Remote, Upload, Which,
};
use crate::rows::{KnownDisk, Settings};

/// Connections per disk: QEMU serves each on its own, so two keep both of its sides busy.
const CONNECTIONS: usize = 2;

/// Finds the client for a peer; the site implements it from its table of peers.
pub trait PeerClients: Send + Sync {
    /// The client for the peer of this name; none if there is no such peer (any more).
    fn client(&self, peer: &str) -> Option<Arc<Client>>;
}

/// QEMU on this machine, and the peers over HTTPS.
pub struct Real {
    /// The peers.
    pub peers: Arc<dyn PeerClients>,
    /// Where sockets are made (short path: a unix socket's path has at most 107 bytes).
    pub run_dir: PathBuf,
    /// Where the guests' overwritten bytes go while a moment is fixed.
    pub scratch_dir: PathBuf,
    /// Where both are for domains of libvirt's, whose QEMU may be another user's: a folder for each.
    pub libvirt_dir: PathBuf,
    /// The most that one cycle's scratch may take, in bytes; the cycle is given up before it takes more.
    pub scratch_limit_bytes: u64,
}

impl Ports for Real {
    type Guest = QemuGuest;
    type Remote = WireRemote;

    async fn connect(&self, vm: VmId, settings: &Settings) -> Result<QemuGuest, Failure> {
        let (run_dir, scratch_dir) = match settings.monitor {
            Monitor::Socket(_) | Monitor::Replica => (self.run_dir.clone(), self.scratch_dir.clone()),
            Monitor::Libvirt(_) => {
                let folder = self.libvirt_dir.join(Names::new(vm).prefix());
                (folder.clone(), folder)
            }
        };
        let nbd = match &settings.nbd {
            Some(socket) => NbdAccess::Existing(socket.clone()),
            None => NbdAccess::Own(run_dir),
        };
        let address = VmAddress { id: vm, monitor: settings.monitor.clone(), nbd };
        Ok(QemuGuest {
            vm: Vm::connect(address).await.map_err(qemu_failure)?,
            scratch_dir,
            scratch_limit_bytes: self.scratch_limit_bytes,
        })
    }

    async fn is_off(&self, settings: &Settings) -> bool {
        use std::io::ErrorKind::{ConnectionRefused, NotFound};
        match &settings.monitor {
            Monitor::Socket(socket) => match tokio::net::UnixStream::connect(socket).await {
                Ok(_) => false,
                Err(error) => matches!(error.kind(), ConnectionRefused | NotFound),
            },
            Monitor::Libvirt(domain) => {
                let found = qemu::libvirt::Domain::connect(domain).await;
                matches!(
                    found,
                    Err(qemu::libvirt::Error::NoDomain { .. } | qemu::libvirt::Error::NotRunning { .. })
                )
            }
            Monitor::Replica => true,
        }
    }

    fn remote(&self, peer: &str) -> Option<WireRemote> {
        self.peers.client(peer).map(WireRemote)
    }

    fn now(&self) -> Timestamp {
        Timestamp::from(std::time::SystemTime::now())
    }

    fn random_id(&self) -> Result<[u8; 16], Failure> {
        random_id()
    }
}

/// Sixteen bytes of the system's chance.
pub fn random_id() -> Result<[u8; 16], Failure> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(|error| {
        Failure::transient(FailureCode::Catalog, format!("the system gave no random bytes: {error}"))
    })?;
    Ok(bytes)
}

/// A VM by its QEMU.
pub struct QemuGuest {
    vm: Vm,
    scratch_dir: PathBuf,
    scratch_limit_bytes: u64,
}

impl QemuGuest {
    fn request(&self, asked: CaptureRequest<'_, qemu::Disk>) -> qemu::CaptureRequest {
        qemu::CaptureRequest {
            disks: asked.disks.to_vec(),
            fresh: asked.fresh.to_vec(),
            base: asked.base,
            next: asked.next,
            again: asked.again,
            scratch_dir: self.scratch_dir.clone(),
            scratch_limit_bytes: self.scratch_limit_bytes,
            seat: asked.seat,
        }
    }
}

impl Guest for QemuGuest {
    type Disk = qemu::Disk;
    type Capture = qemu::Capture;
    type Ahead = qemu::Ahead;

    fn is_alive(&self) -> bool {
        self.vm.is_alive()
    }

    async fn disks(&self) -> Result<Vec<qemu::Disk>, Failure> {
        self.vm.disks().await.map_err(qemu_failure)
    }

    async fn resolve(&self, nodes: &[String]) -> Result<Vec<qemu::Disk>, Failure> {
        self.vm.resolve(nodes).await.map_err(qemu_failure)
    }

    async fn definition(&self) -> Result<Value, Failure> {
        self.vm.definition().await.map_err(qemu_failure)
    }

    async fn is_quiet(&self) -> Result<bool, Failure> {
        self.vm.is_quiet().await.map_err(qemu_failure)
    }

    async fn power_down(&self) -> Result<(), Failure> {
        self.vm.power_down().await.map_err(qemu_failure)
    }

    async fn quit(&self) -> Result<(), Failure> {
        self.vm.quit().await.map_err(qemu_failure)
    }

    async fn inspect(&self, disks: &[qemu::Disk], since: LogNumber) -> Result<Tracking, Failure> {
        self.vm.inspect(disks, since).await.map_err(qemu_failure)
    }

    async fn pending_bytes(&self, disks: &[qemu::Disk], since: LogNumber) -> Result<u64, Failure> {
        self.vm.pending_bytes(disks, since).await.map_err(qemu_failure)
    }

    async fn begin_ahead(&self, disks: &[qemu::Disk], base: LogNumber) -> Result<qemu::Ahead, Failure> {
        self.vm.begin_ahead(disks, base).await.map_err(qemu_failure)
    }

    async fn end_ahead(&self, ahead: qemu::Ahead) -> Result<(), Failure> {
        self.vm.end_ahead(ahead).await.map_err(qemu_failure)
    }

    async fn begin_capture(&self, request: CaptureRequest<'_, qemu::Disk>) -> Result<qemu::Capture, Failure> {
        self.vm.begin_capture(self.request(request)).await.map_err(qemu_failure)
    }

    async fn begin_capture_frozen(
        &self,
        request: CaptureRequest<'_, qemu::Disk>,
        agent: &AgentAddress,
    ) -> Result<(qemu::Capture, Result<(), String>), Failure> {
        let begun = self.vm.begin_capture_frozen(self.request(request), agent).await;
        let (capture, frozen) = begun.map_err(qemu_failure)?;
        Ok((capture, frozen.map_err(|error| error.to_string())))
    }

    async fn end_reading(&self, capture: qemu::Capture) -> Result<(), Failure> {
        self.vm.end_reading(capture).await.map_err(qemu_failure)
    }

    async fn commit(
        &self,
        disks: &[qemu::Disk],
        base: Option<LogNumber>,
        next: LogNumber,
    ) -> Result<(), Failure> {
        self.vm.commit(disks, base, next).await.map_err(qemu_failure)
    }

    async fn give_back(&self, disks: &[qemu::Disk], base: Option<LogNumber>) -> Result<(), Failure> {
        self.vm.give_back(disks, base).await.map_err(qemu_failure)
    }

    async fn cleanup(&self, disks: &[qemu::Disk], since: Option<LogNumber>) -> Result<(), Failure> {
        self.vm.cleanup(disks, since).await.map_err(qemu_failure)
    }

    async fn stop_tracking(&self, disks: &[qemu::Disk]) -> Result<(), Failure> {
        self.vm.stop_tracking(disks).await.map_err(qemu_failure)
    }
}

impl Disk for qemu::Disk {
    fn known(&self) -> KnownDisk {
        KnownDisk {
            node: self.node.clone(),
            name: self.name.clone(),
            size_bytes: self.size_bytes,
            image: self.image.clone(),
            joining: None,
        }
    }
}

impl Capture for qemu::Capture {
    type Reader = NbdReader;

    fn moment(&self) -> Timestamp {
        self.moment
    }

    fn shared(&self) -> Option<GroupMoment> {
        self.shared.clone()
    }

    async fn readers(&self) -> Result<Vec<NbdReader>, Failure> {
        readers(&self.disks).await
    }

    async fn watch(&self) -> Failure {
        qemu_failure(qemu::Capture::watch(self).await)
    }
}

impl Ahead for qemu::Ahead {
    type Reader = NbdReader;

    async fn readers(&self) -> Result<Vec<NbdReader>, Failure> {
        readers(&self.disks).await
    }
}

async fn readers(disks: &[qemu::CapturedDisk]) -> Result<Vec<NbdReader>, Failure> {
    let mut readers = Vec::with_capacity(disks.len());
    for disk in disks {
        readers.push(NbdReader::open(disk).await?);
    }
    Ok(readers)
}

/// A captured disk over several NBD connections.
#[derive(Clone)]
pub struct NbdReader {
    disk: Arc<qemu::CapturedDisk>,
    pool: nbd::Pool,
}

impl NbdReader {
    async fn open(disk: &qemu::CapturedDisk) -> Result<Self, Failure> {
        let mut contexts = vec![nbd::BASE_ALLOCATION];
        contexts.extend(disk.bitmap_context.as_deref());
        contexts.extend(disk.again_context.as_deref());
        let pool = nbd::Pool::connect(&disk.nbd_socket, &disk.export, &contexts, CONNECTIONS)
            .await
            .map_err(|error| read_failure(&disk.name, &error))?;
        Ok(Self { disk: Arc::new(disk.clone()), pool })
    }
}

impl DiskReader for NbdReader {
    fn name(&self) -> &DiskName {
        &self.disk.name
    }

    fn size_bytes(&self) -> u64 {
        self.disk.size_bytes
    }

    async fn extents(&self, range: Range<u64>, which: Which) -> Result<Vec<DirtyExtent>, Failure> {
        let bitmap = match which {
            Which::Changed => self.disk.bitmap_context.as_deref(),
            Which::Again => self.disk.again_context.as_deref(),
            Which::Data => None,
        };
        let extents = nbd::dirty_extents(&self.pool, bitmap, range).await;
        extents.map_err(|error| read_failure(&self.disk.name, &error))
    }

    async fn read(&self, offset: u64, len: u64) -> Result<Bytes, Failure> {
        self.pool.read(offset, len).await.map_err(|error| read_failure(&self.disk.name, &error))
    }
}

/// A peer's site over HTTPS.
#[derive(Clone)]
pub struct WireRemote(Arc<Client>);

impl WireRemote {
    /// The site that this client talks to.
    #[must_use]
    pub const fn new(client: Arc<Client>) -> Self {
        Self(client)
    }
}

impl Remote for WireRemote {
    type Upload = Uploader;

    async fn offer(&self, offer: &Offer) -> Result<RelationshipStatus, Failure> {
        self.0.offer(offer).await.map_err(|error| link_failure(&error))
    }

    async fn report(&self, vm: VmId, report: &Report) -> Result<(), Failure> {
        self.0.report(vm, report).await.map_err(|error| link_failure(&error))
    }

    async fn withdraw(&self, vm: VmId) -> Result<(), Failure> {
        self.0.withdraw(vm).await.map_err(|error| link_failure(&error))
    }

    async fn hand_over(&self, vm: VmId, newest: &HandOver) -> Result<HandedOver, Failure> {
        self.0.hand_over(vm, newest).await.map_err(|error| link_failure(&error))
    }

    async fn relocate(&self, vm: VmId, wanted: &Relocate) -> Result<Relocation, Failure> {
        self.0.relocate(vm, wanted).await.map_err(|error| link_failure(&error))
    }

    async fn take_over(&self, name: &VmName, in_step: InStep) -> Result<TakenOver, Failure> {
        self.0.take_over(name, Some(in_step)).await.map_err(|error| link_failure(&error))
    }

    async fn digests(&self, vm: VmId, request: &DigestRequest) -> Result<Vec<[u8; 16]>, Failure> {
        self.0.digests(vm, request).await.map_err(|error| link_failure(&error))
    }

    fn upload(&self, log: LogUpload<'_>) -> Uploader {
        let LogUpload { vm, head, patience, limiter } = log;
        Uploader::new(self.0.clone(), vm, head.number, head.id, patience, limiter.cloned())
    }
}

impl Upload for Uploader {
    async fn write(&mut self, bytes: Bytes) -> Result<(), Failure> {
        Uploader::write(self, bytes).await.map_err(|error| link_failure(&error))
    }

    async fn finish(self) -> Result<(), Failure> {
        Uploader::finish(self).await.map_err(|error| link_failure(&error))
    }
}

/// What QEMU refuses is tried again: disks come back, jobs of other tools end, a scratch empties.
fn qemu_failure(error: qemu::Error) -> Failure {
    let code = match &error {
        qemu::Error::ScratchFull { .. } => FailureCode::ScratchFull,
        qemu::Error::InTheWay { .. } => FailureCode::InTheWay,
        error if error.is_gone() => FailureCode::QemuGone,
        _ => FailureCode::Qemu,
    };
    Failure::transient(code, error.to_string())
}

/// A read of the fixed moment that fails is the moment's end, not the disk's: with
/// `on-cbw-error=break-snapshot` QEMU reports EINVAL or EIO once the scratch is lost.
fn read_failure(disk: &DiskName, error: &nbd::Error) -> Failure {
    Failure::transient(FailureCode::Qemu, format!("reading disk {disk} at the cycle's moment: {error}"))
}

/// What a replica refuses a log with that does not continue its chain.
const CHAIN_CHANGED: [&str; 2] = ["wrong-number", "wrong-predecessor"];

/// Sorts what the link says into what may clear by itself and what may not.
fn link_failure(error: &wire::Error) -> Failure {
    let message = error.to_string();
    match error.kind() {
        wire::ErrorKind::WrongCertificate => Failure::lasting(FailureCode::Certificate, message),
        // Our certificate is not (or no longer) one that the replica's site trusts.
        wire::ErrorKind::Forbidden if error.has_code(wire::codes::UNKNOWN_PEER) => {
            Failure::lasting(FailureCode::Certificate, message)
        }
        wire::ErrorKind::Unauthorized => Failure::lasting(FailureCode::Certificate, message),
        // Of these two either people get new ones, by and by.
        wire::ErrorKind::CertificateNotToday => Failure::transient(FailureCode::Certificate, message),
        wire::ErrorKind::Forbidden if error.has_code(wire::codes::CERTIFICATE_NOT_TODAY) => {
            Failure::transient(FailureCode::Certificate, message)
        }
        wire::ErrorKind::Forbidden => Failure::lasting(FailureCode::NotAuthorized, message),
        // Its chain is not what it was when the last cycle ended: it was put back from an older copy, say. What it is
        // now, the next cycle asks.
        wire::ErrorKind::Refused if CHAIN_CHANGED.iter().any(|code| error.has_code(code)) => {
            Failure::transient(FailureCode::ReplicaRefused, message)
        }
        wire::ErrorKind::Refused => {
            Failure { code: FailureCode::ReplicaRefused, message, transient: error.transient() }
        }
        _ => Failure::transient(FailureCode::Link, message),
    }
}
