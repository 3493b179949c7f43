//! Who makes the writable layers of a failover.

use std::fmt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::seed::Seed;

type Make = dyn Fn(&str, &Path, u64) -> std::io::Result<()> + Send + Sync;
type Rest = dyn Fn(&Path, &Path) -> std::io::Result<bool> + Send + Sync;

/// Makes the writable qcow2 layers of a failover, and lays them on flat files.
#[derive(Clone)]
pub struct Layers(Option<(Arc<Make>, Arc<Rest>)>);

impl Layers {
    /// `qemu-img`, which needs the operating system's files.
    #[must_use]
    pub const fn qemu_img() -> Self {
        Self(None)
    }

    /// Something else, for a store whose files are not the operating system's. `make` makes a layer of so many
    /// bytes, over what QEMU opens under the name that comes first; `rest` lays a layer on a flat file, or says
    /// that it is in use.
    pub fn from_fn(
        make: impl Fn(&str, &Path, u64) -> std::io::Result<()> + Send + Sync + 'static,
        rest: impl Fn(&Path, &Path) -> std::io::Result<bool> + Send + Sync + 'static,
    ) -> Self {
        Self(Some((Arc::new(make), Arc::new(rest))))
    }

    /// Whether layers can be made at all.
    pub(crate) fn check(&self) -> Result<()> {
        match self.0 {
            None => qemu_img(&["--version".as_ref()]).map(drop),
            Some(_) => Ok(()),
        }
    }

    pub(crate) fn make(&self, below: &str, layer: &Path, size_bytes: u64) -> Result<()> {
        if let Some((make, _)) = &self.0 {
            return make(below, layer, size_bytes).map_err(Error::io("making", layer));
        }
        // What lies below need not be shown yet: the size is known.
        let options = ["create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", below].map(AsRef::as_ref);
        let size = size_bytes.to_string();
        qemu_img(&[&options[..], &[layer.as_os_str(), size.as_ref()]].concat()).map(drop)
    }

    /// Copies an image to a flat file that is not there yet, with its holes.
    pub(crate) fn flatten(&self, seed: &Seed, flat: &Path) -> Result<()> {
        if self.0.is_some() {
            let unsupported = std::io::ErrorKind::Unsupported.into();
            return Err(Error::io("copying", &seed.path)(unsupported));
        }
        let options = ["convert", "-q", "-S", "4k", "-O", "raw", "-f", &seed.format].map(AsRef::as_ref);
        qemu_img(&[&options[..], &[seed.path.as_os_str(), flat.as_os_str()]].concat()).map(drop)
    }

    /// Lays a layer on a flat file that has the bytes which lay below it so far. False if somebody has it open.
    pub(crate) fn rest(&self, layer: &Path, base: &Path) -> Result<bool> {
        if let Some((_, rest)) = &self.0 {
            return rest(layer, base).map_err(Error::io("changing", layer));
        }
        let below = Path::new("../disks").join(base.file_name().unwrap_or_default());
        if rests_on(layer)?.as_deref() == below.to_str() {
            return Ok(true);
        }
        let options = ["rebase", "-u", "-f", "qcow2", "-F", "raw", "-b"].map(AsRef::as_ref);
        match qemu_img(&[&options[..], &[below.as_os_str(), layer.as_os_str()]].concat()) {
            Ok(_) => Ok(true),
            Err(Error::Program { why, .. }) if why.contains("lock") => Ok(false),
            Err(error) => Err(error),
        }
    }
}

impl fmt::Debug for Layers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Layers")
    }
}

/// The name of what lies below a layer, also of one that a QEMU has open.
fn rests_on(layer: &Path) -> Result<Option<String>> {
    let info = ["info", "-U", "-f", "qcow2", "--output=json"].map(AsRef::as_ref);
    let info = qemu_img(&[&info[..], &[layer.as_os_str()]].concat())?;
    let info: serde_json::Value = serde_json::from_slice(&info).unwrap_or_default();
    Ok(info["backing-filename"].as_str().map(str::to_owned))
}

fn qemu_img(args: &[&std::ffi::OsStr]) -> Result<Vec<u8>> {
    let failed = |why| Error::Program { program: "qemu-img", why };
    let output = Command::new("qemu-img").args(args).output().map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}
