//! What can go wrong with a boot, apart from a guest that shows no sign of life: that is an outcome.

use std::path::PathBuf;
use std::time::Duration;

/// Why a guest could not be booted at all.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// QEMU is not there.
    #[error(
        "cannot start {program}: {source}; install it (apt-get install qemu-system-x86) or name it in [boot] of config.toml"
    )]
    Program {
        /// The program.
        program: String,
        /// Why.
        source: std::io::Error,
    },
    /// QEMU ended before its monitor answered.
    #[error("QEMU ended at once: {said}")]
    Ended {
        /// What it said.
        said: String,
    },
    /// A file or folder.
    #[error("cannot {doing} {}: {source}", .path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// The path.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The VM boots by UEFI and there is no firmware for that here.
    #[error("the VM boots by UEFI, and {} is not there: apt-get install ovmf", .0.display())]
    NoFirmware(PathBuf),
    /// It runs already.
    #[error("it runs already (process {process})")]
    Runs {
        /// Its process.
        process: i32,
    },
    /// The guest does not shut down.
    #[error("it has not shut down within {} s; wait longer, or pull the plug with --kill", .within.as_secs())]
    KeepsRunning {
        /// How long it was waited for.
        within: Duration,
    },
    /// The owner's command line leaves a disk out.
    #[error(
        "the command line has no place for disk {disk}: write {{disk:{disk}}} where its file's path is to be"
    )]
    DiskNotUsed {
        /// The disk.
        disk: String,
    },
    /// The owner's command line names a disk that the VM does not have.
    #[error("the command line names disk {disk}, and the VM has no such disk")]
    NoSuchDisk {
        /// The disk.
        disk: String,
    },
    /// A command line of no words.
    #[error("the command line is empty")]
    NoCommand,
    /// QEMU's monitor.
    #[error("QEMU's monitor: {0}")]
    Qmp(#[from] qemu::Error),
}

impl Error {
    pub(crate) fn io(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { doing, path, source }
    }
}
