//! Who uses a target: mounts, the kernel's own users of devices, loop devices, programs that have it open.
//!
//! What is asked of `/proc` and `/sys` is true of that moment only. What lasts is the kernel's exclusive open of a device,
//! and the lock that QEMU takes on every image and device: held by us, it keeps a VM from being started from the
//! target while that is neither the old disk nor the new one.

use std::fs::{self, File, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::sys::stat::{major, minor};

use crate::error::Error;

/// The bytes that QEMU locks, one for each thing that it does with an image or lets others do.
const QEMU_LOCKS: std::ops::Range<i64> = 100..300;

/// Refuses a target that is in use.
pub(super) fn check(path: &Path, metadata: &Metadata) -> Result<(), Error> {
    let by = if metadata.file_type().is_block_device() {
        mounted(metadata.rdev()).or_else(|| part_of(metadata.rdev()))
    } else {
        looped(path)
    };
    match by.or_else(|| opened(path, metadata)) {
        Some(by) => Err(Error::TargetInUse { path: path.to_owned(), by }),
        None => Ok(()),
    }
}

/// The kernel did not let us have it.
pub(super) fn busy(path: &Path) -> Error {
    Error::TargetInUse { path: path.to_owned(), by: "the kernel (a mount, LVM, RAID or swap)".into() }
}

/// Keeps QEMU from a target for as long as the file is open.
pub(super) fn keep(path: &Path, file: &File) -> Result<(), Error> {
    let lock = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: QEMU_LOCKS.start,
        l_len: QEMU_LOCKS.end - QEMU_LOCKS.start,
        l_pid: 0,
    };
    match fcntl(file, FcntlArg::F_OFD_SETLK(&lock)) {
        Ok(_) => Ok(()),
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) => Err(Error::TargetInUse {
            path: path.to_owned(),
            by: "a QEMU, or another restore, that has locked it".into(),
        }),
        // A file system without locks has none of QEMU's either.
        Err(_) => Ok(()),
    }
}

/// Where a device, or a partition of it, is mounted.
fn mounted(device: u64) -> Option<String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let mut devices = vec![numbers(device)];
    devices.extend(partitions(device));
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (device, folder) = (fields.nth(2)?, fields.nth(1)?);
        devices.iter().any(|known| known == device).then(|| format!("a mount at {folder}"))
    })
}

fn numbers(device: u64) -> String {
    format!("{}:{}", major(device), minor(device))
}

fn partitions(device: u64) -> Vec<String> {
    let folder = format!("/sys/dev/block/{}", numbers(device));
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let device = |entry: fs::DirEntry| {
        entry.path().join("partition").exists().then(|| fs::read_to_string(entry.path().join("dev")).ok())?
    };
    entries.filter_map(device).map(|text| text.trim().to_owned()).collect()
}

/// What is built on a device.
fn part_of(device: u64) -> Option<String> {
    let holders = fs::read_dir(format!("/sys/dev/block/{}/holders", numbers(device))).ok()?;
    let holder = holders.flatten().next()?;
    Some(format!("{}, which is built on it", holder.file_name().to_string_lossy()))
}

/// The loop device that shows a file.
fn looped(path: &Path) -> Option<String> {
    let devices = fs::read_dir("/sys/block").ok()?.flatten();
    devices.filter(|device| device.file_name().to_string_lossy().starts_with("loop")).find_map(|device| {
        let file = fs::read_to_string(device.path().join("loop/backing_file")).ok()?;
        (Path::new(file.trim_end_matches('\n')) == path)
            .then(|| format!("the loop device /dev/{}", device.file_name().to_string_lossy()))
    })
}

/// A program that has it open, as far as we may see.
fn opened(path: &Path, metadata: &Metadata) -> Option<String> {
    let me = std::process::id().to_string();
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let is_process = |name: &str| name.bytes().all(|byte| byte.is_ascii_digit()) && name != me;
    processes
        .filter_map(|process| process.file_name().into_string().ok())
        .filter(|name| is_process(name))
        .find_map(|process| {
            let opened = fs::read_dir(format!("/proc/{process}/fd")).ok()?.flatten();
            opened.map(|link| link.path()).find(|link| leads_to(link, path, metadata))?;
            let program = fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default();
            Some(format!("process {process} ({})", program.trim()))
        })
}

fn leads_to(link: &Path, path: &Path, wanted: &Metadata) -> bool {
    let Ok(named) = fs::read_link(link) else { return false };
    if named == path {
        return true;
    }
    // Under another name: only such names are looked at, because a file system that does not answer would stop us.
    let may_be = named.is_absolute() && named.file_name() == path.file_name() || named.starts_with("/dev");
    may_be
        && fs::metadata(link).is_ok_and(|found| match wanted.file_type().is_block_device() {
            true => found.file_type().is_block_device() && found.rdev() == wanted.rdev(),
            false => (found.dev(), found.ino()) == (wanted.dev(), wanted.ino()),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_another_program_has_open_is_in_use() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.raw");
        fs::write(&path, b"x").unwrap();
        let metadata = fs::metadata(&path).unwrap();
        check(&path, &metadata).unwrap();
        let mut reader =
            std::process::Command::new("sleep").arg("60").stdin(File::open(&path).unwrap()).spawn().unwrap();
        let refused = check(&path, &metadata).unwrap_err().to_string();
        assert!(refused.contains(&reader.id().to_string()) && refused.contains("sleep"), "{refused}");
        reader.kill().unwrap();
        reader.wait().unwrap();
        check(&path, &metadata).unwrap();
    }

    #[test]
    fn the_lock_that_qemu_takes_is_taken_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.raw");
        fs::write(&path, b"x").unwrap();
        let open = || File::options().read(true).write(true).open(&path).unwrap();
        let (first, second) = (open(), open());
        keep(&path, &first).unwrap();
        assert!(matches!(keep(&path, &second), Err(Error::TargetInUse { .. })));
        drop(first);
        keep(&path, &second).unwrap();
    }
}
