//! QEMU's NBD server. A process has only one: ours, or one that somebody started for all.

use std::path::{Path, PathBuf};

use serde_json::json;
use tokio::net::UnixStream;

use crate::error::Error;
use crate::qmp::{Command, Qmp};

/// The longest path of a unix socket, in bytes.
const SOCKET_PATH_MAX: usize = 107;

/// Starts QEMU's NBD server on `socket`, unless it runs there already since an earlier run of ours.
pub(crate) async fn start(qmp: &Qmp, socket: &Path) -> Result<(), Error> {
    if socket.as_os_str().len() > SOCKET_PATH_MAX {
        return Err(Error::SocketPath(socket.to_owned()));
    }
    let address = json!({"addr": {"type": "unix", "data": {"path": socket}}});
    match qmp.run(Command::new("nbd-server-start", address)).await {
        Err(Error::Refused { desc, .. }) if desc.contains("already running") => {
            // The path is ours alone: who listens there is the server that we started.
            let ours = UnixStream::connect(socket).await;
            ours.map(drop).map_err(|_| Error::NbdServerRunning)
        }
        outcome => outcome.map(drop),
    }
}

/// Stops the server that we started, if nothing uses it.
pub(crate) async fn stop_if_idle(qmp: &Qmp, socket: &Path) -> Result<(), Error> {
    let exports = qmp.run(Command::bare("query-block-exports")).await?;
    let idle = exports.as_array().is_none_or(Vec::is_empty);
    if idle && UnixStream::connect(socket).await.is_ok() {
        qmp.run(Command::bare("nbd-server-stop")).await?;
        remove_socket(socket);
    }
    Ok(())
}

fn remove_socket(socket: &Path) {
    if let Err(error) = std::fs::remove_file(socket)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::debug!(socket = %PathBuf::from(socket).display(), %error, "the NBD socket stays behind");
    }
}
