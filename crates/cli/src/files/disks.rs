//! The disks that are looked into: of a backup straight from its repository, of a recovery point over the site's export.

use std::io;
use std::sync::Arc;

use inside::ReadAt;
use model::VmName;
use nbd::Client;
use repository::BackupReader;
use serde_json::Value;
use site::{Code, Config, Export, Exported, Failure, Request};
use tokio::runtime::Handle;

use super::FilesOf;
use crate::args::Arguments;
use crate::show::{list, text};

/// Disks that are shown for as long as the command runs.
#[derive(Clone)]
pub(super) struct Shown {
    disks: Vec<(String, Arc<dyn ReadAt>)>,
    export: Option<String>,
}

impl Shown {
    /// The disks, each with its name.
    pub fn disks(&self) -> Vec<(String, Arc<dyn ReadAt>)> {
        self.disks.clone()
    }

    /// Ends what was begun for it.
    pub async fn end(&self, arguments: &Arguments) {
        if let Some(export) = &self.export {
            let request = Request::Unexport { export: export.clone() };
            let _ = site::ask(&arguments.dir, &request, |_| ()).await;
        }
    }
}

/// Shows the disks of what is named.
pub(super) async fn show(arguments: &Arguments, vm: &VmName, of: &FilesOf) -> Result<Shown, Failure> {
    match &of.backup {
        Some(backup) => of_backup(arguments, vm, backup, &of.repository.repository).await,
        None => of_point(arguments, vm, of).await,
    }
}

async fn of_backup(arguments: &Arguments, vm: &VmName, wanted: &str, name: &str) -> Result<Shown, Failure> {
    let (dir, vm, wanted, name) = (arguments.dir.clone(), vm.clone(), wanted.to_owned(), name.to_owned());
    let opened = tokio::task::spawn_blocking(move || {
        let repository = Arc::new(site::open_repository(&dir, &Config::load(&dir)?, &name)?);
        let backup = site::find_backup(&repository, &vm, &wanted)?;
        let reader = Arc::new(repository.reader(&backup)?);
        let disk = |(place, disk): (usize, &repository::BackupDisk)| {
            let shown = OfBackup { reader: reader.clone(), place, size_bytes: disk.size_bytes };
            (disk.name.to_string(), Arc::new(shown) as Arc<dyn ReadAt>)
        };
        let disks = backup.disks.iter().enumerate().map(disk).collect();
        Ok::<_, Failure>(Shown { disks, export: None })
    });
    opened.await.map_err(|error| Failure::new(Code::Internal, error.to_string()))?
}

struct OfBackup {
    reader: Arc<BackupReader>,
    place: usize,
    size_bytes: u64,
}

impl ReadAt for OfBackup {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.reader.read_at(self.place, offset, buffer).map_err(io::Error::other)
    }
}

async fn of_point(arguments: &Arguments, vm: &VmName, of: &FilesOf) -> Result<Shown, Failure> {
    let what = Exported::Point { vm: vm.clone(), point: of.point.clone() };
    let request = Request::Export(Export { what, writable: false });
    let answer = site::ask(&arguments.dir, &request, |_| ()).await?;
    let mut shown = Shown { disks: Vec::new(), export: Some(text(&answer["export"]).to_owned()) };
    for disk in list(&answer["disks"]) {
        match open(disk).await {
            Ok(opened) => shown.disks.push((text(&disk["name"]).to_owned(), Arc::new(opened))),
            Err(failure) => {
                shown.end(arguments).await;
                return Err(failure);
            }
        }
    }
    Ok(shown)
}

async fn open(disk: &Value) -> Result<OfPoint, Failure> {
    let uri = text(&disk["uri"]);
    let wrong = |why: String| Failure::new(Code::Io, format!("the export {uri} cannot be read: {why}"));
    let (export, socket) = uri
        .strip_prefix("nbd+unix:///")
        .and_then(|rest| rest.split_once("?socket="))
        .ok_or_else(|| wrong("it is not one of this site's".into()))?;
    let client = Client::connect(socket, export, &[]).await.map_err(|error| wrong(error.to_string()))?;
    Ok(OfPoint { client, runtime: Handle::current() })
}

struct OfPoint {
    client: Client,
    runtime: Handle,
}

impl ReadAt for OfPoint {
    fn size_bytes(&self) -> u64 {
        self.client.size_bytes()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        if buffer.is_empty() {
            return Ok(());
        }
        self.runtime.block_on(self.client.read_into(offset, buffer)).map_err(io::Error::other)
    }
}
