//! What can go wrong between us and QEMU.

use std::path::PathBuf;
use std::time::Duration;

use model::ResyncReason;

use crate::libvirt;

/// QEMU's own classes of errors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ErrorClass {
    /// Everything that has no class of its own.
    Generic,
    /// This QEMU has no such command.
    CommandNotFound,
    /// The job or device exists no more.
    DeviceNotActive,
    /// There is no such device or node.
    DeviceNotFound,
    /// A class that we do not know.
    Other(String),
}

impl From<&str> for ErrorClass {
    fn from(class: &str) -> Self {
        match class {
            "GenericError" => Self::Generic,
            "CommandNotFound" => Self::CommandNotFound,
            "DeviceNotActive" => Self::DeviceNotActive,
            "DeviceNotFound" => Self::DeviceNotFound,
            other => Self::Other(other.to_owned()),
        }
    }
}

/// What can go wrong between us and QEMU.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The VM is known as a replica, and runs elsewhere.
    #[error("there is a replica of the VM here, and no QEMU that runs it; ask the site where it runs")]
    NoQemu,
    /// There is no QMP server at that path.
    #[error("cannot connect to the QMP socket {}: {source}; is the VM running with '-qmp unix:PATH,server=on,wait=off'?", .socket.display())]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Something listens, and does not greet.
    #[error("the QMP socket {} took our connection but has not greeted within {} s: a QMP socket serves one client at a time; give QEMU a second '-qmp' socket for Afterimage alone", .socket.display(), .waited.as_secs_f32())]
    Busy {
        /// The socket.
        socket: PathBuf,
        /// How long we waited.
        waited: Duration,
    },
    /// The connection ended: QEMU was stopped or killed.
    #[error("the connection to QEMU at {} is gone: {why}", .socket.display())]
    Gone {
        /// The socket.
        socket: PathBuf,
        /// How it ended.
        why: String,
    },
    /// QEMU did not answer a command in time.
    #[error("QEMU has not answered {command} within {} s", .after.as_secs_f32())]
    Timeout {
        /// The command, or what was waited for.
        command: String,
        /// How long we waited.
        after: Duration,
    },
    /// QEMU refused a command.
    #[error("QEMU refused {command}: {desc}")]
    Refused {
        /// The command, with what it was about.
        command: String,
        /// QEMU's class of the error.
        class: ErrorClass,
        /// QEMU's words.
        desc: String,
    },
    /// QEMU answered something that is not in its own protocol.
    #[error("QEMU's answer to {command} cannot be understood: {why}")]
    Answer {
        /// The command.
        command: String,
        /// What is wrong with it.
        why: String,
    },
    /// QEMU is older than the oldest that we drive.
    #[error("QEMU {found} is too old: 7.2 or later is needed")]
    TooOld {
        /// Its version.
        found: String,
    },
    /// QEMU has I/O threads and is of a version that would abort.
    #[error(
        "QEMU {found} has I/O threads ({threads}), and versions before 8.2 abort when a reader of a disk that an I/O thread serves goes away: run the VM without I/O threads, or with QEMU 8.2 or later"
    )]
    IoThreads {
        /// Its version.
        found: String,
        /// Their ids.
        threads: String,
    },
    /// QEMU has an NBD server that is not ours; a process can have only one.
    #[error(
        "QEMU already has an NBD server (a process can have only one): give its unix socket with '--nbd SOCKET'"
    )]
    NbdServerRunning,
    /// A path is longer than a unix socket's may be.
    #[error("the socket path {} is too long ({} bytes, at most 107): use a shorter run directory", .0.display(), .0.as_os_str().len())]
    SocketPath(PathBuf),
    /// A disk was named that QEMU does not have.
    #[error("QEMU has no disk node or device {node:?}; it has: {known}")]
    NoSuchDisk {
        /// What was asked for.
        node: String,
        /// What there is.
        known: String,
    },
    /// A disk that was named cannot be protected.
    #[error("disk {node:?} cannot be protected: {why}")]
    UnusableDisk {
        /// The disk.
        node: String,
        /// Why.
        why: String,
    },
    /// The bitmaps that a capture was to read are not what they should be.
    #[error("changes can no longer be told: {0}")]
    Tracking(ResyncReason),
    /// The scratch has come to its bound.
    #[error("the scratch in {} holds {used_bytes} bytes with {free_bytes} free, which is past its bound ({limit_bytes} bytes, and {reserve_bytes} to stay free): the guest overwrites faster than its changes are read; raise the scratch limit or give it a larger file system", .dir.display())]
    ScratchFull {
        /// Where it lies.
        dir: PathBuf,
        /// What it takes now.
        used_bytes: u64,
        /// What its file system has left.
        free_bytes: u64,
        /// What it may take.
        limit_bytes: u64,
        /// What must stay free.
        reserve_bytes: u64,
    },
    /// A file of the scratch could not be worked with.
    #[error("cannot {what} {}: {source}", .path.display())]
    Scratch {
        /// What was tried.
        what: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The fixed moment can no longer be read.
    #[error("the fixed moment is no longer kept: {0}")]
    CaptureBroken(String),
    /// Libvirt cannot be reached, or does not have the domain running.
    #[error(transparent)]
    Libvirt(#[from] libvirt::Error),
    /// Another program does something to the VM that must not be disturbed.
    #[error(
        "{what} of another program is under way in the VM: it is left alone, and the cycle is tried again until it has ended"
    )]
    InTheWay {
        /// What, by name.
        what: String,
    },
    /// QEMU, which libvirt runs as another user, cannot use the folder in which it is to meet us.
    #[error("QEMU cannot use the folder {}: {why}", .folder.display())]
    OutOfReach {
        /// The folder.
        folder: PathBuf,
        /// Why not, and what to do.
        why: String,
    },
    /// Another capture of this VM is still open.
    #[error("another capture of this VM is still open after {} s", .waited.as_secs_f32())]
    CaptureOpen {
        /// How long we waited for it.
        waited: Duration,
    },
}

impl Error {
    /// Whether the connection to QEMU is no more: make a new one before anything else.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Gone { .. } | Self::Connect { .. } | Self::Busy { .. } | Self::Libvirt(_))
    }

    /// Why both sides must be compared, where that is what the error means.
    #[must_use]
    pub fn resync_reason(&self) -> Option<&ResyncReason> {
        match self {
            Self::Tracking(why) => Some(why),
            _ => None,
        }
    }

    /// Whether QEMU said that it has no such command.
    pub(crate) fn is_unknown_command(&self) -> bool {
        matches!(self, Self::Refused { class: ErrorClass::CommandNotFound, .. })
    }
}
