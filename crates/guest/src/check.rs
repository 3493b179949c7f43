//! The check boot: what disks that a crash or a restore has left come to.

use std::path::Path;
use std::time::Duration;

use rig::{Result, Trouble};

use crate::disk::Disk;
use crate::image::GuestImage;
use crate::ledger::Checked;
use crate::machine::{Guest, Mode};

/// Long enough for any boot on a loaded machine; one takes seconds.
pub const BOOT: Duration = Duration::from_secs(600);

/// What the guest's last line begins with.
const CHECKED: &str = "checked ";

/// Boots disks, replays their journals, checks file systems and databases, and gives what is there. `dir` is
/// for the guest's sockets and console. The disks are written to, as by any boot.
pub fn check(image: &GuestImage, disks: &[Disk], dir: &Path) -> Result<Checked> {
    let mut guest = Guest::start(image, disks, Mode::Check, dir)?;
    let line = guest.console().wait_for(CHECKED, BOOT)?;
    guest.wait_ended(BOOT)?;
    let json = line.text.strip_prefix(CHECKED).unwrap_or_default();
    serde_json::from_str(json)
        .map_err(|error| Trouble(format!("the guest's check cannot be read ({error}): {json}")))
}
