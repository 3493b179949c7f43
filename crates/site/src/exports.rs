//! Recovery points and backups over NBD, on a unix socket: to look at, to copy from, to boot from.
//!
//! An export lives as long as the site runs or until `unexport`. A point that is exported is pinned: applies
//! stop below it. What is written to a writable export lies in a sparse file and is gone with it.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use model::gate::Access;
use model::{DiskName, VmId};
use nbd::{CowDisk, Disk, Server, StatusExtent};
use replica::{ConsistentView, DiskSize, FailoverView, Store};
use repository::BackupReader;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::backup::replica_named;
use crate::failure::{Code, Failure};
use crate::points::point_or_newest;
use crate::random;
use crate::repositories::OpenRepositories;
use crate::request::{Export, Exported};

/// The exports of a site.
pub(crate) struct Exports {
    store: Store,
    repositories: Arc<OpenRepositories>,
    server: Server,
    socket: PathBuf,
    open: Mutex<BTreeMap<String, Vec<String>>>,
}

impl Exports {
    /// Makes the socket in `run_dir`, and removes what exports of a run before this one had written.
    pub fn open(run_dir: &Path, store: Store, repositories: Arc<OpenRepositories>) -> Result<Self, Failure> {
        let layers = run_dir.join("layers");
        if let Err(error) = fs::remove_dir_all(&layers)
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(Failure::io("empty", &layers, &error));
        }
        let socket = run_dir.join("nbd.sock");
        let server = Server::bind(&socket).map_err(|error| Failure::new(Code::Io, error.to_string()))?;
        Ok(Self { store, repositories, server, socket, open: Mutex::default() })
    }

    /// Serves until `stop`.
    pub fn serve(&self, stop: CancellationToken) -> impl Future<Output = ()> + Send + 'static {
        let server = self.server.clone();
        async move {
            if let Err(error) = server.serve(stop.cancelled_owned()).await {
                tracing::error!(%error, "the NBD server failed");
            }
        }
    }

    /// Shows the disks of a point or of a backup.
    pub async fn add(self: &Arc<Self>, export: Export) -> Result<Shown, Failure> {
        let exports = self.clone();
        let added = tokio::task::spawn_blocking(move || exports.add_blocking(&export)).await;
        added.map_err(|error| Failure::new(Code::Internal, error.to_string()))?
    }

    /// Shows what lies below the layers of a VM that is failed over, until [`Self::hide_failover`]; it does not
    /// matter if it is shown already.
    pub async fn show_failover(self: &Arc<Self>, vm: VmId) -> Result<(), Failure> {
        let exports = self.clone();
        let shown = tokio::task::spawn_blocking(move || exports.show_failover_blocking(vm)).await;
        shown.map_err(|error| Failure::new(Code::Internal, error.to_string()))?
    }

    fn show_failover_blocking(&self, vm: VmId) -> Result<(), Failure> {
        let id = failover_id(vm);
        if self.lock().contains_key(&id) {
            return Ok(());
        }
        let view = self.store.failover_view(vm)?;
        let disks = view.disks();
        let mut names = Vec::new();
        for (disk, below) in disks_of(view, disks) {
            let name = replica::failover_export(vm, &disk);
            self.server.add(&name, below).map_err(|error| Failure::new(Code::Internal, error.to_string()))?;
            names.push(name);
        }
        self.lock().insert(id, names);
        Ok(())
    }

    /// Whether a VM's QEMU still reads what [`Self::show_failover`] shows.
    pub fn is_failover_read(&self, vm: VmId) -> bool {
        let names = self.lock().get(&failover_id(vm)).cloned().unwrap_or_default();
        names.iter().any(|name| self.server.is_used(name))
    }

    /// Ends what [`Self::show_failover`] began.
    pub async fn hide_failover(&self, vm: VmId) {
        let names = self.lock().remove(&failover_id(vm)).unwrap_or_default();
        for name in &names {
            self.server.remove(name).await;
        }
    }

    /// Ends an export.
    pub async fn remove(&self, id: &str) -> Result<Value, Failure> {
        let names = self.lock().remove(id).ok_or_else(|| {
            Failure::new(
                Code::NoSuchExport,
                format!("there is no export {id}; it was ended, or the site was restarted"),
            )
        })?;
        for name in &names {
            self.server.remove(name).await;
        }
        let layers = self.layers(id);
        match fs::remove_dir_all(&layers) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Failure::io("remove", &layers, &error))
            }
            _ => Ok(json!({ "unexported": id })),
        }
    }

    fn add_blocking(&self, export: &Export) -> Result<Shown, Failure> {
        let id = hex::encode(random::bytes::<6>()?);
        let (definition, seen, disks) = match &export.what {
            Exported::Point { vm, point } => {
                let vm = replica_named(&self.store, vm)?;
                let point = point_or_newest(&self.store, vm, point.as_ref())?;
                let view = self.store.open_view(self.store.admit(vm, Access::Pinned, point.number)?)?;
                (view.definition().unwrap_or_default(), point.id.to_string(), disks_of_view(view))
            }
            Exported::Backup { backup, repository } => {
                let repository = self.repositories.get(repository)?;
                let backup = repository.find(backup)?;
                // Damaged or not, it keeps nobody from the disks.
                let definition = repository.definition(&backup).unwrap_or_default();
                (definition, backup.id.to_string(), disks_of_backup(repository.reader(&backup)?))
            }
        };
        let mut shown = Vec::new();
        for (disk_name, disk) in disks {
            let disk = if export.writable { self.writable(&id, &disk_name, disk)? } else { disk };
            let boot_rank = rank(disk.as_ref());
            let name = format!("{id}-{disk_name}");
            self.server.add(&name, disk).map_err(|error| Failure::new(Code::Internal, error.to_string()))?;
            shown.push(ShownDisk { name: disk_name, export: name, boot_rank });
        }
        self.lock().insert(id.clone(), shown.iter().map(|disk| disk.export.clone()).collect());
        Ok(Shown {
            id,
            seen,
            definition,
            writable: export.writable,
            disks: shown,
            socket: self.socket.clone(),
        })
    }

    /// Shows the disks of a backup under names that stay the same, until [`Self::hide_backup`]; it does not matter
    /// if it is shown already. Gives how likely a guest boots from each. Blocks.
    pub fn show_backup(&self, id: &str, reader: BackupReader) -> Result<Vec<u8>, Failure> {
        let (mut names, mut ranks) = (Vec::new(), Vec::new());
        let is_shown = self.lock().contains_key(id);
        for (disk_name, disk) in disks_of_backup(reader) {
            ranks.push(rank(disk.as_ref()));
            let name = backup_export(id, &disk_name);
            if !is_shown {
                self.server
                    .add(&name, disk)
                    .map_err(|error| Failure::new(Code::Internal, error.to_string()))?;
            }
            names.push(name);
        }
        self.lock().insert(id.to_owned(), names);
        Ok(ranks)
    }

    /// Ends what [`Self::show_backup`] began.
    pub async fn hide_backup(&self, id: &str) {
        let names = self.lock().remove(id).unwrap_or_default();
        for name in &names {
            self.server.remove(name).await;
        }
    }

    /// The server's socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// A layer over a disk that takes what is written.
    fn writable(&self, id: &str, name: &str, disk: Arc<dyn Disk>) -> Result<Arc<dyn Disk>, Failure> {
        let layers = self.layers(id);
        let path = layers.join(name);
        let made = fs::create_dir_all(&layers).and_then(|()| {
            let file: File = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
            CowDisk::new(disk, file)
        });
        Ok(Arc::new(made.map_err(|error| Failure::io("make", &path, &error))?))
    }

    fn layers(&self, id: &str) -> PathBuf {
        self.socket.with_file_name("layers").join(id)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Vec<String>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An export.
pub(crate) struct Shown {
    pub id: String,
    /// The id of the point or of the backup.
    pub seen: String,
    /// The VM's definition.
    pub definition: Value,
    writable: bool,
    pub disks: Vec<ShownDisk>,
    /// The NBD server's socket.
    pub socket: PathBuf,
}

/// A disk of an export.
pub(crate) struct ShownDisk {
    pub name: String,
    /// Its name as an NBD export.
    pub export: String,
    /// See [`boot::boot_rank`].
    pub boot_rank: u8,
}

impl Shown {
    /// As commands show it.
    pub fn shown(&self) -> Value {
        let uri = |export: &str| format!("nbd+unix:///{export}?socket={}", self.socket.display());
        let disk = |disk: &ShownDisk| json!({ "name": disk.name, "uri": uri(&disk.export) });
        let disks: Vec<Value> = self.disks.iter().map(disk).collect();
        json!({ "export": self.id, "writable": self.writable, "disks": disks })
    }
}

/// Disks as they were at one moment, of which the store shows two kinds.
trait View: Send + Sync + 'static {
    fn read_at(&self, disk: &DiskName, offset: u64, buffer: &mut [u8]) -> replica::Result<()>;
    fn data_extents(&self, disk: &DiskName, range: Range<u64>) -> replica::Result<Vec<Range<u64>>>;
}

/// A pinned point.
impl View for ConsistentView {
    fn read_at(&self, disk: &DiskName, offset: u64, buffer: &mut [u8]) -> replica::Result<()> {
        self.read_at(disk, offset, buffer)
    }

    fn data_extents(&self, disk: &DiskName, range: Range<u64>) -> replica::Result<Vec<Range<u64>>> {
        self.data_extents(disk, range)
    }
}

/// What lies below the layers of a failed-over VM.
impl View for FailoverView {
    fn read_at(&self, disk: &DiskName, offset: u64, buffer: &mut [u8]) -> replica::Result<()> {
        self.read_at(disk, offset, buffer)
    }

    fn data_extents(&self, disk: &DiskName, range: Range<u64>) -> replica::Result<Vec<Range<u64>>> {
        self.data_extents(disk, range)
    }
}

/// A disk of a view.
struct ViewDisk<V> {
    view: Arc<V>,
    disk: DiskSize,
}

/// The disks of a view, each with its name.
fn disks_of<V: View>(view: V, disks: Vec<DiskSize>) -> Vec<(DiskName, Arc<dyn Disk>)> {
    let view = Arc::new(view);
    let shown = |disk: DiskSize| {
        let name = disk.name.clone();
        (name, Arc::new(ViewDisk { view: view.clone(), disk }) as Arc<dyn Disk>)
    };
    disks.into_iter().map(shown).collect()
}

fn disks_of_view(view: ConsistentView) -> Vec<(String, Arc<dyn Disk>)> {
    let disks = view.disks();
    disks_of(view, disks).into_iter().map(|(name, disk)| (name.to_string(), disk)).collect()
}

impl<V: View> Disk for ViewDisk<V> {
    fn size_bytes(&self) -> u64 {
        self.disk.size_bytes
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.view.read_at(&self.disk.name, offset, buffer).map_err(io::Error::other)
    }

    fn extents(&self, range: Range<u64>) -> io::Result<Vec<StatusExtent>> {
        let data = self.view.data_extents(&self.disk.name, range.clone()).map_err(io::Error::other)?;
        Ok(status(range, data))
    }
}

/// How likely a guest boots from a disk.
fn rank(disk: &dyn Disk) -> u8 {
    boot::boot_rank(|sector| match disk.size_bytes() >= sector.len() as u64 {
        true => disk.read_at(0, sector),
        false => Err(io::ErrorKind::UnexpectedEof.into()),
    })
}

/// What [`Exports::show_backup`] calls a disk.
pub(crate) fn backup_export(id: &str, disk: &str) -> String {
    format!("{id}-{disk}")
}

/// How the exports of a failover are found again.
fn failover_id(vm: VmId) -> String {
    format!("failover-{vm}")
}

/// A disk of a backup.
struct BackupDisk {
    reader: Arc<BackupReader>,
    disk: usize,
    size_bytes: u64,
}

fn disks_of_backup(reader: BackupReader) -> Vec<(String, Arc<dyn Disk>)> {
    let reader = Arc::new(reader);
    let disk = |(place, disk): (usize, &repository::BackupDisk)| {
        let shown = BackupDisk { reader: reader.clone(), disk: place, size_bytes: disk.size_bytes };
        (disk.name.to_string(), Arc::new(shown) as Arc<dyn Disk>)
    };
    reader.backup().disks.iter().enumerate().map(disk).collect()
}

impl Disk for BackupDisk {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.reader.read_at(self.disk, offset, buffer).map_err(io::Error::other)
    }

    fn extents(&self, range: Range<u64>) -> io::Result<Vec<StatusExtent>> {
        Ok(status(range.clone(), self.reader.data_extents(self.disk, range)))
    }
}

/// What is data and what is zero, without gaps.
fn status(range: Range<u64>, data: Vec<Range<u64>>) -> Vec<StatusExtent> {
    let mut extents = Vec::new();
    let mut at = range.start;
    for extent in data {
        if extent.start > at {
            extents.push(StatusExtent::zeros(extent.start - at));
        }
        extents.push(StatusExtent::data(extent.end - extent.start));
        at = extent.end;
    }
    if at < range.end {
        extents.push(StatusExtent::zeros(range.end - at));
    }
    extents
}
