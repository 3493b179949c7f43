//! Whether KVM is to be had: not whether its device is there, but whether a guest runs under it.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::process::Command;
use tokio::time::{Instant, sleep};

use crate::error::Error;

/// How long SeaBIOS may take to say its first word. It takes 0.1 s where KVM works.
const FIRST_WORD: Duration = Duration::from_secs(5);

/// What a guest's processor is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Accelerator {
    /// The processor itself.
    Kvm,
    /// An emulator: 10 to 30 times slower, and always there.
    Tcg,
}

impl Accelerator {
    /// As QEMU calls it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// Whether a guest runs under KVM here: a machine without disks is started, and its firmware has to say something.
/// In a VM whose host nests badly the device is there and guests stand still. Even this is no proof: there a firmware may
/// run and a kernel not, so what does not boot under KVM is worth a try without it.
pub async fn works(program: &str, dir: &Path) -> Result<bool, Error> {
    let said = dir.join("kvm-probe.log");
    let _ = std::fs::remove_file(&said);
    let mut command = Command::new(program);
    command.args([
        "-machine",
        "pc",
        "-accel",
        "kvm",
        "-cpu",
        "max",
        "-m",
        "32",
        "-nodefaults",
        "-no-user-config",
    ]);
    command.args(["-display", "none", "-chardev"]).arg(format!("file,id=said,path={}", escaped(&said)));
    command.args(["-device", "isa-debugcon,iobase=0x402,chardev=said"]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    let mut child =
        command.spawn().map_err(|source| Error::Program { program: program.to_owned(), source })?;
    let deadline = Instant::now() + FIRST_WORD;
    let mut works = false;
    while Instant::now() < deadline && !works && matches!(child.try_wait(), Ok(None)) {
        sleep(Duration::from_millis(50)).await;
        works = std::fs::metadata(&said).is_ok_and(|said| said.len() > 0);
    }
    let _ = child.kill().await;
    let _ = std::fs::remove_file(&said);
    Ok(works)
}

/// A path as a value within one of QEMU's options: a comma is written twice.
pub(crate) fn escaped(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}
