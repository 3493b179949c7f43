//! The file that a disk is restored into.

use std::fs::File;
use std::io;
use std::path::Path;
use std::process::Command;

use steps::durable_step;

use super::{Format, qcow2, with_suffix};
use crate::direct::DirectFile;
use crate::error::Error;
use crate::list::Stretch;
use crate::zeros::is_zero;

/// Within data, stretches of zeros of this length are left out; shorter ones are not worth a fragment.
const HOLE_BYTES: usize = 64 * 1024;

/// A file being written, by several threads.
pub(crate) struct Target {
    file: DirectFile,
    /// Where each cluster goes, for qcow2; in a raw image it is its offset on the disk.
    layout: Option<qcow2::Layout>,
}

impl Target {
    /// Makes the file, with the metadata of its format.
    pub(crate) fn create(
        path: &Path,
        format: Format,
        size_bytes: u64,
        stretches: &[Stretch],
    ) -> io::Result<Self> {
        let file = DirectFile::create(path)?;
        match format {
            Format::Raw | Format::Vhdx => {
                file.file().set_len(size_bytes)?;
                Ok(Self { file, layout: None })
            }
            Format::Qcow2 => {
                let layout = qcow2::Layout::new(size_bytes, stretches);
                layout.write_metadata(file.file())?;
                Ok(Self { file, layout: Some(layout) })
            }
        }
    }

    /// Writes bytes of a stretch with data, and says how many that took: what is zero in them is left out.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<u64> {
        let start = self.layout.as_ref().map_or(offset, |layout| layout.place_of(offset));
        let (mut place, mut written) = (0, 0);
        while place < bytes.len() {
            let full = bytes[place..].chunks(HOLE_BYTES).take_while(|piece| !is_zero(piece));
            let len: usize = full.map(<[u8]>::len).sum();
            self.file.write_all_at(&bytes[place..place + len], start + place as u64)?;
            written += len as u64;
            place += len + HOLE_BYTES;
        }
        Ok(written)
    }

    /// Makes it durable.
    pub(crate) fn make_durable(&self) -> io::Result<()> {
        self.file.sync_all()
    }
}

/// Whether `qemu-img` can be run.
pub(crate) fn check_qemu_img() -> Result<(), Error> {
    match Command::new("qemu-img").arg("--version").output() {
        Ok(_) => Ok(()),
        Err(_) => Err(Error::ProgramMissing { program: "qemu-img", install: "apt-get install qemu-utils" }),
    }
}

/// Replaces a raw image by the same disk as VHDX.
pub(crate) fn convert_to_vhdx(raw: &Path) -> Result<(), Error> {
    let converted = with_suffix(raw, ".vhdx");
    let failed = |why| Error::ProgramFailed { program: "qemu-img convert", why };
    let output = Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "vhdx", "-o", "subformat=dynamic"])
        .args([raw, &converted])
        .output()
        .map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        let _ = std::fs::remove_file(&converted);
        return Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    let failed = |source| Error::io("cannot write", &converted, source);
    durable_step("repository::convert::written");
    File::open(&converted).and_then(|file| file.sync_all()).map_err(failed)?;
    durable_step("repository::convert::synced");
    std::fs::rename(&converted, raw).map_err(failed)?;
    durable_step("repository::convert::named");
    Ok(())
}
