//! What the demo, the end-to-end tests and the bench are made of: sites, QEMU's storage daemon, servers, a writer,
//! and the check that disks show a moment that the writer took them through.
//!
//! Everything is a real process on this machine. A program that is missing is an error with the line that
//! installs it. What is started here ends with its owner.

mod daemon;
mod libvirt;
mod line;
mod lossy;
mod programs;
mod servers;
mod site;
mod writer;

pub use daemon::StorageDaemon;
pub use libvirt::Libvirt;
pub use line::Line;
pub use lossy::LossyDisk;
pub use programs::{Process, need, need_crate, this_program, tool, wait_for};
pub use servers::{RepositoryServer, ServerKind};
pub use site::{Output, Site, free_address};
pub use writer::{Writer, boot_sector, fill, nbd_address, noise, state_of_exports, state_of_files, write};

/// Why something could not be set up or did not do what it had to; the message says all.
#[derive(thiserror::Error)]
#[error("{0}")]
pub struct Trouble(pub String);

/// Tests show errors by `Debug`: a message is easier to read than its quotes and escapes.
impl std::fmt::Debug for Trouble {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// The outcome of everything here.
pub type Result<T> = std::result::Result<T, Trouble>;

/// Adds what was being done to an error.
pub fn doing<E: std::fmt::Display>(what: impl std::fmt::Display) -> impl FnOnce(E) -> Trouble {
    move |error| Trouble(format!("{what}: {error}"))
}
