//! What must be known before a backup is restored over something: that it is no part of a replica or of this site,
//! and whose disk it is.
//!
//! A restore is a process of its own, and needs no site that runs. If one runs it is asked; if none does, its control
//! socket is taken, which keeps one from starting, and what there is to write down goes into its catalog.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use catalog::Catalog;
use model::{DiskName, VmName};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::commands::Site;
use crate::control;
use crate::events::{Event, Events};
use crate::failure::{Code, Failure};
use crate::request::Request;

/// A disk of a protected VM that is about to be written over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fenced {
    /// The VM; both sides are compared before it is replicated again.
    pub vm: VmName,
    /// Its disk.
    pub disk: DiskName,
}

/// Refuses places that belong to a replica or to the site in `dir`. For each disk of a VM that is protected by that
/// site it is written down, before this comes back, that both sides must be compared.
pub async fn fence(dir: &Path, places: Vec<PathBuf>) -> Result<Vec<Fenced>, Failure> {
    let dir = std::path::absolute(dir).map_err(|error| Failure::io("find", dir, &error))?;
    places.iter().try_for_each(|place| check_place(&dir, place))?;
    let request = Request::Overwriting { places: places.clone() };
    match control::ask(&dir, &request, |_| ()).await {
        Ok(answer) => serde_json::from_value(answer["fenced"].clone())
            .map_err(|error| Failure::new(Code::Internal, format!("the site's answer: {error}"))),
        Err(failure) if failure.code == Code::NotRunning => fence_offline(&dir, places).await,
        Err(failure) => Err(failure),
    }
}

async fn fence_offline(dir: &Path, places: Vec<PathBuf>) -> Result<Vec<Fenced>, Failure> {
    let path = dir.join("catalog.sqlite");
    if !path.exists() {
        return Ok(Vec::new());
    }
    let socket = control::socket(dir);
    let keeps_others_out = control::listen(&socket).await?;
    let fenced = write_down(path, places).await;
    drop(keeps_others_out);
    let _ = std::fs::remove_file(&socket);
    fenced
}

async fn write_down(catalog: PathBuf, places: Vec<PathBuf>) -> Result<Vec<Fenced>, Failure> {
    let done = tokio::task::spawn_blocking(move || {
        let catalog = Catalog::open(catalog)?;
        let found = primary::overwritten_offline(&catalog, &places)?;
        Ok::<_, Failure>((Events::open(catalog)?, found))
    });
    let (events, found) = done.await.map_err(|error| Failure::new(Code::Internal, error.to_string()))??;
    for (vm, disks) in by_vm(&found) {
        events.note(event(&vm, &disks)).await;
    }
    Ok(fenced(found))
}

impl Site {
    /// A restore is about to begin.
    pub(crate) async fn overwriting(&self, places: &[PathBuf]) -> Result<Value, Failure> {
        let found = self.primary.disks_at(places);
        for (vm, disks) in by_vm(&found) {
            self.primary.overwritten(&vm, disks.clone()).await?;
            self.events.note(event(&vm, &disks)).await;
        }
        Ok(json!({ "fenced": fenced(found) }))
    }
}

fn by_vm(found: &[(VmName, DiskName)]) -> BTreeMap<VmName, String> {
    let mut vms: BTreeMap<VmName, String> = BTreeMap::new();
    for (vm, disk) in found {
        let disks = vms.entry(vm.clone()).or_default();
        let comma = if disks.is_empty() { "" } else { ", " };
        *disks = format!("{disks}{comma}{disk}");
    }
    vms
}

fn event(vm: &VmName, disks: &str) -> Event {
    let what = format!(
        "a backup is restored over its disks ({disks}); both sides are compared before it is replicated again"
    );
    Event::new("restored-over", what).vm(vm)
}

fn fenced(found: Vec<(VmName, DiskName)>) -> Vec<Fenced> {
    found.into_iter().map(|(vm, disk)| Fenced { vm, disk }).collect()
}

/// Refuses a place in the site's folder, or in any site's folder of a replica: that is known by its files.
fn check_place(dir: &Path, place: &Path) -> Result<(), Failure> {
    let dir = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    let is_replica = |folder: &Path| folder.join("vm.json").exists() && folder.join("logs").is_dir();
    if place.ancestors().skip(1).any(is_replica) {
        return Err(of_replica(place));
    }
    if place.starts_with(&dir) {
        let message = format!(
            "{} is in the folder of a site, nothing is restored into it; choose another place",
            place.display()
        );
        return Err(Failure::new(Code::Target, message));
    }
    Ok(())
}

fn of_replica(place: &Path) -> Failure {
    let message = format!(
        "{} belongs to a replica, whose points would be lost; restore to another place, or fail over to the point that is wanted",
        place.display()
    );
    Failure::new(Code::Target, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replica_is_known_by_its_files_and_a_site_by_its_folder() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let (site, replica) = (root.join("site"), root.join("storage/web"));
        for folder in [site.join("sub"), replica.join("disks"), replica.join("logs"), root.join("vm")] {
            std::fs::create_dir_all(folder).unwrap();
        }
        std::fs::write(replica.join("vm.json"), "{}").unwrap();
        let refused = |place: &Path| check_place(&site, place).err().map(|failure| failure.message);
        assert!(refused(&replica.join("disks/vda.raw")).is_some_and(|why| why.contains("replica")));
        assert!(refused(&site.join("sub/x.raw")).is_some_and(|why| why.contains("site")));
        assert_eq!(refused(&root.join("vm/x.raw")), None);
        assert_eq!(refused(Path::new("/dev/sdb")), None);
    }
}
