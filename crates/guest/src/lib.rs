//! Real Linux guests: Debian's kernel under QEMU, an initramfs of ours, and two databases on two disks that
//! commit numbered transactions and say on the console which of them are acknowledged.
//!
//! ```no_run
//! # fn main() -> rig::Result<()> {
//! # let dir = std::path::Path::new("/tmp/guest");
//! let image = guest::GuestImage::build()?;
//! let disks = image.install(dir)?;
//! let mut guest = guest::Guest::start(&image, &disks, guest::Mode::Run, dir)?;
//! guest.console().wait_for("ack relay-sqlite 5", guest::BOOT)?;
//! println!("{}", guest.acked());
//! guest.kill();
//! println!("{}", guest::check(&image, &disks, dir)?);
//! # Ok(())
//! # }
//! ```
//!
//! * [`GuestImage`] is made from Debian's packages alone (`scripts/setup guest` downloads them; nothing is
//!   installed on this machine) and kept under cargo's target folder for as long as its parts stay the same.
//! * [`Guest`] is a running QEMU: a console, a QMP socket, the guest agent's socket. It ends with its owner.
//! * [`check()`] boots disks that a crash or a restore has left, and gives what is on them; [`Checked::judge`]
//!   says whether that is a prefix of what was acknowledged, over both disks together.
//!
//! A guest is emulated (TCG) unless `AFTERIMAGE_GUEST_ACCEL` names another accelerator: nested
//! virtualization is not to be relied on. Its network leads nowhere. Its power button switches it off in order.

mod check;
mod console;
mod cpio;
mod disk;
mod image;
mod initramfs;
mod ledger;
mod machine;
mod packages;

pub use check::{BOOT, check};
pub use console::{Console, Line};
pub use disk::{DATA, Disk, SYSTEM};
pub use image::GuestImage;
pub use ledger::{Acked, Checked, Found, LEDGERS};
pub use machine::{Guest, MAC, Mode};
