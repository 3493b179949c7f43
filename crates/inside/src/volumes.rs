//! The volumes of a VM: its disks, their partitions, and the logical volumes over all of them.

use std::sync::Arc;

use crate::detect::{Content, detect};
use crate::lvm;
use crate::partitions::partitions;
use crate::source::{ReadAt, Window};

/// Something that may hold a file system.
#[derive(Clone)]
pub struct Volume {
    /// Its name: `vda` for a disk, `vda/1` for its first partition, `group/volume` for a logical volume.
    pub name: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// What it holds.
    pub content: Content,
    /// Its bytes; none if they lie in a way that is not read here.
    pub source: Option<Arc<dyn ReadAt>>,
}

impl Volume {
    fn of(name: String, source: Arc<dyn ReadAt>) -> Self {
        let (size_bytes, content) = (source.size_bytes(), detect(source.as_ref()));
        Self { name, size_bytes, content, source: Some(source) }
    }
}

/// The volumes of a VM's disks. A disk with partitions is not a volume itself.
#[must_use]
pub fn volumes(disks: Vec<(String, Arc<dyn ReadAt>)>) -> Vec<Volume> {
    let mut found = Vec::new();
    for (name, disk) in disks {
        let whole = Volume::of(name, disk.clone());
        // A file system on the whole disk may have what looks like a table in its first sector.
        let parts = match whole.content {
            Content::Unknown | Content::Fat => partitions(disk.as_ref()),
            _ => Vec::new(),
        };
        if parts.is_empty() {
            found.push(whole);
            continue;
        }
        let part = |(number, bytes)| {
            let window = Window::new(vec![(disk.clone(), bytes)])?;
            Some(Volume::of(format!("{}/{number}", whole.name), Arc::new(window) as Arc<dyn ReadAt>))
        };
        found.extend(parts.into_iter().filter_map(part));
    }
    let is_physical = |volume: &&Volume| volume.content == Content::Lvm;
    let physical: Vec<_> =
        found.iter().filter(is_physical).filter_map(|volume| volume.source.clone()).collect();
    for (name, window) in lvm::logical_volumes(&physical) {
        found.push(match window {
            Some(window) => Volume::of(name, Arc::new(window)),
            None => Volume { name, size_bytes: 0, content: Content::Unknown, source: None },
        });
    }
    found
}
