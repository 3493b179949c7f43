//! What can go wrong between us and libvirt.

use std::path::PathBuf;
use std::time::Duration;

/// What can go wrong between us and libvirt.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The URI is of no use.
    #[error(
        "the libvirt URI {uri:?} cannot be used: {why}; use qemu:///system, or qemu:///session?socket=PATH"
    )]
    Uri {
        /// What was given.
        uri: String,
        /// What is wrong with it.
        why: String,
    },
    /// The daemon cannot be reached.
    #[error("cannot connect to libvirt at {}: {source}; is virtqemud or libvirtd running, and may this site's user connect to it?", shown(.tried))]
    Connect {
        /// Its sockets, as far as they were tried.
        tried: Vec<PathBuf>,
        /// Why not to the last one.
        source: std::io::Error,
    },
    /// The daemon does not let us in.
    #[error("libvirt at {socket} does not let this site in: {why}")]
    Auth {
        /// Its socket.
        socket: String,
        /// Why.
        why: String,
    },
    /// The connection to the daemon broke.
    #[error("the connection to libvirt at {socket} is gone: {why}")]
    Gone {
        /// Its socket.
        socket: String,
        /// How it ended.
        why: String,
    },
    /// The daemon did not answer in time.
    #[error("libvirt at {socket} has not answered within {} s, asked to {what}", .after.as_secs_f32())]
    Timeout {
        /// Its socket.
        socket: String,
        /// What it was asked.
        what: &'static str,
        /// How long we waited.
        after: Duration,
    },
    /// The daemon refused.
    #[error("libvirt refused to {what}: {message}")]
    Refused {
        /// What it was asked.
        what: &'static str,
        /// Its number of the error.
        code: i32,
        /// Its words.
        message: String,
    },
    /// The daemon answered something that is not in its own protocol.
    #[error("libvirt's answer, asked to {what}, cannot be understood: {why}")]
    Answer {
        /// What it was asked.
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// There is no such domain.
    #[error(
        "libvirt at {uri} has no domain {domain}: it was undefined, or it ran here without being defined and has ended or was migrated to another host; 'virsh -c {uri} list --all' lists those that there are"
    )]
    NoDomain {
        /// Where it was looked for.
        uri: String,
        /// Which.
        domain: String,
    },
    /// The domain does not run here.
    #[error("domain {domain} does not run here: {why}")]
    NotRunning {
        /// Which.
        domain: String,
        /// Why.
        why: &'static str,
    },
}

/// Libvirt's numbers of errors, as far as something follows from them.
pub(crate) mod code {
    pub const NO_DOMAIN: i32 = 42;
    pub const OPERATION_INVALID: i32 = 55;
}

fn shown(sockets: &[PathBuf]) -> String {
    sockets.iter().map(|socket| socket.display().to_string()).collect::<Vec<_>>().join(" or ")
}

impl Error {
    /// Whether libvirt said that this is not how the domain is now: it does not run (any more).
    pub(crate) fn is_not_running(&self) -> bool {
        matches!(
            self,
            Self::NotRunning { .. }
                | Self::NoDomain { .. }
                | Self::Refused { code: code::NO_DOMAIN | code::OPERATION_INVALID, .. }
        )
    }
}
