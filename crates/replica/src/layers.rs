//! Who makes the writable layers of a failover.

use std::fmt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use crate::error::{Error, Result};

type Make = dyn Fn(&Path, &Path, u64) -> std::io::Result<()> + Send + Sync;

/// Makes the writable qcow2 layers over flat files.
#[derive(Clone)]
pub struct Layers(Option<Arc<Make>>);

impl Layers {
    /// `qemu-img`, which needs the operating system's files.
    #[must_use]
    pub const fn qemu_img() -> Self {
        Self(None)
    }

    /// Something else, for a store whose files are not the operating system's: it makes a layer of so many bytes
    /// over the first path at the second one.
    pub fn from_fn(make: impl Fn(&Path, &Path, u64) -> std::io::Result<()> + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(make)))
    }

    /// Whether layers can be made at all.
    pub(crate) fn check(&self) -> Result<()> {
        match self.0 {
            None => qemu_img(&["--version".as_ref()]),
            Some(_) => Ok(()),
        }
    }

    pub(crate) fn make(&self, base: &Path, layer: &Path, size_bytes: u64) -> Result<()> {
        if let Some(make) = &self.0 {
            return make(base, layer, size_bytes).map_err(Error::io("making", layer));
        }
        let options = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"].map(AsRef::as_ref);
        let size = size_bytes.to_string();
        let paths = [base.as_os_str(), layer.as_os_str(), size.as_ref()];
        qemu_img(&[&options[..], &paths[..]].concat())
    }
}

impl fmt::Debug for Layers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Layers")
    }
}

fn qemu_img(args: &[&std::ffi::OsStr]) -> Result<()> {
    let failed = |why| Error::Program { program: "qemu-img", why };
    let output = Command::new("qemu-img").args(args).output().map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}
