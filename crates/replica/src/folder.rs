//! Where a VM's files are, and how they are called.

use std::path::PathBuf;

use model::{DiskName, LogId, LogNumber};
use steps::durable_step;

use crate::error::Result;
use crate::fs::Files;

/// The folder of one VM.
#[derive(Debug, Clone)]
pub(crate) struct Folder {
    pub files: Files,
    pub path: PathBuf,
}

impl Folder {
    pub fn disks(&self) -> PathBuf {
        self.path.join("disks")
    }

    pub fn logs(&self) -> PathBuf {
        self.path.join("logs")
    }

    pub fn incoming(&self) -> PathBuf {
        self.path.join("incoming")
    }

    pub fn changes(&self) -> PathBuf {
        self.path.join("changes")
    }

    pub fn failover(&self) -> PathBuf {
        self.path.join("failover")
    }

    /// Says that the folder is a running VM's: its failover was completed.
    pub fn released(&self) -> PathBuf {
        self.path.join("released.json")
    }

    pub fn disk(&self, name: &DiskName) -> PathBuf {
        self.disks().join(format!("{name}.raw"))
    }

    pub fn map(&self, name: &DiskName) -> PathBuf {
        self.changes().join(format!("{name}.map"))
    }

    pub fn log(&self, file: &str) -> PathBuf {
        self.logs().join(file)
    }

    pub fn partial(&self, number: LogNumber, id: LogId) -> PathBuf {
        self.incoming().join(format!("{number}-{id}.partial"))
    }

    /// What is known of the VM without the catalog.
    pub fn description(&self) -> PathBuf {
        self.path.join("vm.json")
    }

    /// Makes the folders that are not there, durably.
    pub fn create(&self) -> Result<()> {
        for folder in [self.disks(), self.logs(), self.incoming(), self.changes()] {
            self.files.make_folder(&folder)?;
        }
        durable_step("replica::folder::made");
        self.files.sync_folder(&self.path)?;
        durable_step("replica::folder::synced");
        self.path.parent().map_or(Ok(()), |parent| self.files.sync_folder(parent))?;
        durable_step("replica::folder::settled");
        Ok(())
    }
}

/// The number and id that a partial file's name tells.
pub(crate) fn parse_partial(name: &str) -> Option<(LogNumber, LogId)> {
    let (number, id) = name.strip_suffix(".partial")?.split_once('-')?;
    Some((LogNumber(number.parse().ok()?), id.parse().ok()?))
}

/// The first and last number that a log file's name tells: `7.log` or, merged, `3-7.log`.
pub(crate) fn parse_log(name: &str) -> Option<(LogNumber, LogNumber)> {
    let stem = name.strip_suffix(".log")?;
    let (first, last) = stem.split_once('-').unwrap_or((stem, stem));
    Some((LogNumber(first.parse().ok()?), LogNumber(last.parse().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_files_tell_what_they_are() {
        let id = LogId::from_bytes([0xab; 16]);
        let folder = Folder { files: Files::os(), path: "/vm".into() };
        let partial = folder.partial(LogNumber(7), id);
        assert_eq!(parse_partial(partial.file_name().unwrap().to_str().unwrap()), Some((LogNumber(7), id)));
        assert_eq!(parse_log("7.log"), Some((LogNumber(7), LogNumber(7))));
        assert_eq!(parse_log("3-7.log"), Some((LogNumber(3), LogNumber(7))));
        for other in ["", "x.log", "7.log.new", "7-.log", "7.partial", "3-7.merging"] {
            assert_eq!(parse_log(other), None, "{other}");
            assert_eq!(parse_partial(other), None, "{other}");
        }
    }
}
