//! What guests start from: a kernel, an initramfs, and two disks with empty databases. Made once from the
//! packages, and kept for as long as those and our scripts stay the same.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use rig::{Result, Trouble, doing, need, tool};
use sha2::{Digest, Sha256};

use crate::check::BOOT;
use crate::disk::{DATA, Disk, SYSTEM};
use crate::initramfs;
use crate::machine::{Guest, Mode};
use crate::packages::Packages;

const KERNEL: &str = "vmlinuz";
const INITRAMFS: &str = "initramfs.cpio";
/// The disks; XFS takes none that is smaller than 300 MiB. Most of them is a hole.
const DISKS: [(&str, u64); 2] = [(SYSTEM, 96 << 20), (DATA, 320 << 20)];
/// Changes when this code makes something else of the same parts.
const VERSION: &str = "1";

/// A kernel, an initramfs, and disks to begin with.
#[derive(Debug, Clone)]
pub struct GuestImage {
    dir: PathBuf,
}

impl GuestImage {
    /// The image; made now if it is not there. Takes seconds then, and one boot of the guest.
    pub fn build() -> Result<Self> {
        let cache = cache_dir()?;
        std::fs::create_dir_all(&cache).map_err(doing(cache.display()))?;
        let packages = Packages::find()?;
        let dir = cache.join(key(&packages));
        // One of several that need it makes it; the others wait.
        let path = cache.join("lock");
        let lock =
            File::create(&path).and_then(|file| file.lock().map(|()| file)).map_err(doing(path.display()))?;
        if !dir.exists() {
            let new = cache.join("new");
            remove(&new)?;
            make(&packages, &new)?;
            std::fs::rename(&new, &dir).map_err(doing(dir.display()))?;
        }
        drop(lock);
        Ok(Self { dir })
    }

    /// Copies the disks that a guest begins with into a folder: file systems, databases, empty ledgers.
    pub fn install(&self, to: &Path) -> Result<Vec<Disk>> {
        let copied = DISKS.map(|(name, _)| {
            let (from, to) = (disk_path(&self.dir, name), disk_path(to, name));
            tool(Command::new("cp").args(["--sparse=always", "--reflink=auto"]).arg(from).arg(&to))?;
            Ok(Disk::raw(name, &to))
        });
        copied.into_iter().collect()
    }

    /// Its kernel.
    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.dir.join(KERNEL)
    }

    /// Its initramfs.
    #[must_use]
    pub fn initramfs(&self) -> PathBuf {
        self.dir.join(INITRAMFS)
    }
}

/// Makes everything in a folder.
fn make(packages: &Packages, dir: &Path) -> Result<()> {
    need("qemu-system-x86_64", "qemu-system-x86")?;
    let root = dir.join("root");
    let kernel = packages.kernel()?;
    packages.unpack(&packages.programs_and_libraries(), &root)?;
    packages.unpack(&[kernel], &root)?;
    initramfs::write(&root, &dir.join(INITRAMFS))?;
    let version = kernel.trim_start_matches("linux-image-");
    let from = root.join(format!("boot/vmlinuz-{version}"));
    std::fs::copy(&from, dir.join(KERNEL)).map_err(doing(from.display()))?;
    remove(&root)?;

    let image = GuestImage { dir: dir.to_owned() };
    let mut disks = Vec::new();
    for (name, bytes) in DISKS {
        let path = disk_path(dir, name);
        File::create(&path).and_then(|file| file.set_len(bytes)).map_err(doing(path.display()))?;
        disks.push(Disk::raw(name, &path));
    }
    let mut guest = Guest::start(&image, &disks, Mode::Install, dir)?;
    guest.console().wait_for("installed", BOOT)?;
    guest.wait_ended(BOOT)
}

fn disk_path(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.raw"))
}

/// The same for the same parts: a package's file is named by its version.
fn key(packages: &Packages) -> String {
    let mut hash = Sha256::new();
    hash.update(VERSION);
    for version in packages.versions() {
        hash.update(version.as_bytes());
        hash.update(b"\n");
    }
    for (name, text) in initramfs::SCRIPTS {
        hash.update(name);
        hash.update(text);
    }
    hex::encode(&hash.finalize()[..8])
}

/// Cargo's target folder is the nearest one above the running program that has cargo's tag in it.
fn cache_dir() -> Result<PathBuf> {
    if let Some(named) = std::env::var_os("AFTERIMAGE_GUEST_CACHE") {
        return Ok(named.into());
    }
    let running = std::env::current_exe().map_err(doing("finding the running program"))?;
    let target = running.ancestors().find(|dir| dir.join("CACHEDIR.TAG").exists());
    let target = target
        .ok_or_else(|| Trouble("not below cargo's target folder: set AFTERIMAGE_GUEST_CACHE".into()))?;
    Ok(target.join("guest"))
}

fn remove(dir: &Path) -> Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(doing(dir.display())(error)),
        _ => Ok(()),
    }
}
