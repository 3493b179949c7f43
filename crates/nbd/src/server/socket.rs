//! The socket's file: made for this user alone, and removed with the server.

use std::fs::{File, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use socket2::{Domain, SockAddr, Socket, Type};
use tokio::net::UnixListener;

const BACKLOG: i32 = 128;

/// A socket in the file system.
#[derive(Debug)]
pub(super) struct SocketFile {
    pub path: PathBuf,
    /// Device and inode: what is removed is this socket, not a later server's at the same path.
    identity: (u64, u64),
    /// Set when it has been: the same number may be another's by then.
    removed: AtomicBool,
}

impl SocketFile {
    pub fn bind(path: &Path) -> io::Result<(Self, UnixListener)> {
        remove_stale(path)?;
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        // The file gets the mode that the socket has when it is bound: at no moment is it open to others.
        let file = File::from(OwnedFd::from(socket));
        file.set_permissions(Permissions::from_mode(0o600))?;
        let socket = Socket::from(OwnedFd::from(file));
        socket.bind(&SockAddr::unix(path)?)?;
        socket.set_nonblocking(true)?;
        let identity = identity(path)?;
        let bound = Self { path: path.to_owned(), identity, removed: AtomicBool::new(false) };
        let listening = socket
            .listen(BACKLOG)
            .and_then(|()| UnixListener::from_std(OwnedFd::from(socket).into()))
            .inspect_err(|_| bound.remove())?;
        Ok((bound, listening))
    }

    /// Removes the file, if it is there still.
    pub fn remove(&self) {
        if !self.removed.swap(true, Ordering::AcqRel)
            && identity(&self.path).is_ok_and(|found| found == self.identity)
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "an NBD socket could not be removed");
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = std::fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Removes a socket that nobody listens on; anything else at the path is left alone.
fn remove_stale(path: &Path) -> io::Result<()> {
    match std::fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => {}
        Ok(_) => {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a file that is no socket"));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    }
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    match socket.connect(&SockAddr::unix(path)?) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path),
        // Connected, or its queue is full: it is alive.
        Ok(()) => Err(io::ErrorKind::AddrInUse.into()),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(io::ErrorKind::AddrInUse.into()),
        Err(error) => Err(error),
    }
}
