//! A backup is restored over disks of a VM that is protected: behind QEMU's back, so that no bitmap knows of it.
//!
//! QEMU is off then, and what it had of bitmaps is gone; the next cycle would find that out. But that is a conclusion,
//! and this is knowledge: it is written down before the first byte is.

use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use catalog::Catalog;
use model::{DiskName, Phase, ResyncReason, VmName};

use crate::error::{Error, Failure};
use crate::ports::Ports;
use crate::relationship::Relationship;
use crate::rows::{self, KnownDisk, Protected};

impl<P: Ports> Relationship<P> {
    /// Has both sides compared before anything else is replicated, because `disks` are about to be written over.
    pub async fn overwritten(&mut self, disks: String) -> Result<(), Failure> {
        match needs_fence(self.row()) {
            true => self.require_resync(ResyncReason::Restored(disks)).await.map(drop),
            false => Ok(()),
        }
    }
}

/// The same for a site that does not run: it finds it when it starts. Nobody else may change its catalog meanwhile.
/// Gives the disks that lie at these places, each with its VM. Blocks.
pub fn overwritten_offline(catalog: &Catalog, places: &[PathBuf]) -> Result<Vec<(VmName, DiskName)>, Error> {
    rows::migrate(catalog)?;
    let mut all = Vec::new();
    for mut row in rows::load(catalog)? {
        let found: Vec<_> = lying_at(&row.name, &row.disks, places).collect();
        // Media that are being written begin anew by themselves, now that the bitmaps are gone.
        if !found.is_empty() && needs_fence(&row) && row.passes.media.is_none() {
            row.must_resync(ResyncReason::Restored(named(&found)));
            row.save_blocking(catalog)?;
        }
        all.extend(found);
    }
    Ok(all)
}

/// Disks, for a person.
pub(crate) fn named(disks: &[(VmName, DiskName)]) -> String {
    disks.iter().map(|(_, disk)| disk.as_str()).collect::<Vec<_>>().join(", ")
}

/// A VM that runs elsewhere now is compared when it comes back, and one of which nothing was sent has nothing to compare.
fn needs_fence(row: &Protected) -> bool {
    match row.phase {
        Phase::FailedOver => false,
        Phase::InitialReplication { .. } => row.shipped.acked.number.0 > 0,
        _ => true,
    }
}

/// Those of a VM's disks that lie at one of these places.
pub(crate) fn lying_at<'a>(
    vm: &'a VmName,
    disks: &'a [KnownDisk],
    places: &'a [PathBuf],
) -> impl Iterator<Item = (VmName, DiskName)> + 'a {
    let is_there = |disk: &&KnownDisk| {
        disk.image.as_ref().is_some_and(|image| places.iter().any(|place| is_same(&image.path, place)))
    };
    disks.iter().filter(is_there).map(|disk| (vm.clone(), disk.name.clone()))
}

/// Whether two paths lead to the same file or the same device.
fn is_same(one: &Path, other: &Path) -> bool {
    let (Ok(one), Ok(other)) = (one.metadata(), other.metadata()) else { return one == other };
    match (one.file_type().is_block_device(), other.file_type().is_block_device()) {
        (true, true) => one.rdev() == other.rdev(),
        (false, false) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use qemu::Image;

    use super::*;

    #[test]
    fn a_disk_is_found_under_any_name_of_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link, hard) = (dir.path().join("a"), dir.path().join("b"), dir.path().join("c"));
        std::fs::write(&file, "x").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        std::fs::hard_link(&file, &hard).unwrap();
        let other = dir.path().join("d");
        std::fs::write(&other, "x").unwrap();
        let image = Some(Image { path: link, format: "raw".into() });
        let disk = KnownDisk {
            node: "vda".into(),
            name: "vda".parse().unwrap(),
            size_bytes: 1,
            image,
            joining: None,
        };
        let vm: VmName = "web".parse().unwrap();
        let found = |places: &[PathBuf]| lying_at(&vm, std::slice::from_ref(&disk), places).count();
        assert_eq!((found(&[file]), found(&[hard]), found(&[other]), found(&[])), (1, 1, 0, 0));
    }
}
