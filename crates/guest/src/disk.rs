//! A guest's disk: a block node of QEMU.

use std::path::{Path, PathBuf};

use rig::{Result, nbd_address};

/// The disk with ext4 and SQLite.
pub const SYSTEM: &str = "system";
/// The disk with XFS and PostgreSQL.
pub const DATA: &str = "data";

/// A disk: the name of its block node, and where its bytes are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    name: String,
    source: Source,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Source {
    File { path: PathBuf, format: &'static str },
    Nbd { socket: PathBuf, export: String },
}

impl Disk {
    /// A raw image.
    #[must_use]
    pub fn raw(name: &str, path: &Path) -> Self {
        Self { name: name.into(), source: Source::File { path: path.into(), format: "raw" } }
    }

    /// A qcow2 image.
    #[must_use]
    pub fn qcow2(name: &str, path: &Path) -> Self {
        Self { name: name.into(), source: Source::File { path: path.into(), format: "qcow2" } }
    }

    /// An NBD export, named as Afterimage names them: `nbd+unix:///EXPORT?socket=PATH`.
    pub fn nbd(name: &str, uri: &str) -> Result<Self> {
        let (export, socket) = nbd_address(uri)?;
        Ok(Self { name: name.into(), source: Source::Nbd { socket: socket.into(), export: export.into() } })
    }

    /// The name of its block node.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// QEMU's `-blockdev`.
    pub(crate) fn blockdev(&self) -> String {
        let name = &self.name;
        match &self.source {
            Source::File { path, format } => {
                let path = escaped(&path.display().to_string());
                format!(
                    "driver={format},node-name={name},discard=unmap,file.driver=file,file.filename={path}"
                )
            }
            Source::Nbd { socket, export } => {
                let (socket, export) = (escaped(&socket.display().to_string()), escaped(export));
                format!(
                    "driver=raw,node-name={name},discard=unmap,file.driver=nbd,file.server.type=unix,\
                     file.server.path={socket},file.export={export}"
                )
            }
        }
    }
}

/// A comma would end the value.
fn escaped(value: &str) -> String {
    value.replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_named_to_qemu_by_where_its_bytes_are() {
        let disk = Disk::qcow2("data", Path::new("/a,b/c"));
        assert_eq!(
            disk.blockdev(),
            "driver=qcow2,node-name=data,discard=unmap,file.driver=file,file.filename=/a,,b/c"
        );
        let disk = Disk::nbd("data", "nbd+unix:///e1?socket=/run/nbd.sock").unwrap();
        let shown = disk.blockdev();
        assert!(shown.ends_with("file.server.path=/run/nbd.sock,file.export=e1"), "{shown}");
        assert!(Disk::nbd("data", "nbd://host/e1").is_err());
    }
}
