//! Writes the archive that Linux unpacks as its first root file system: cpio, format "newc".

use std::io::{self, Write};

const MODE_FILE: u32 = 0o100_000;
const MODE_DIR: u32 = 0o040_000;
const MODE_CHARACTER_DEVICE: u32 = 0o020_000;
const END: &str = "TRAILER!!!";

/// An archive that is being written. Everything in it belongs to root.
pub(crate) struct Archive<W> {
    out: W,
    entries: u32,
}

impl<W: Write> Archive<W> {
    pub fn new(out: W) -> Self {
        Self { out, entries: 0 }
    }

    /// A folder; those above it must be there already.
    pub fn dir(&mut self, path: &str) -> io::Result<()> {
        self.entry(path, MODE_DIR | 0o755, (0, 0), &[])
    }

    /// A file; `permissions` as for chmod.
    pub fn file(&mut self, path: &str, permissions: u32, bytes: &[u8]) -> io::Result<()> {
        self.entry(path, MODE_FILE | permissions, (0, 0), bytes)
    }

    /// A character device.
    pub fn character_device(&mut self, path: &str, major: u32, minor: u32) -> io::Result<()> {
        self.entry(path, MODE_CHARACTER_DEVICE | 0o600, (major, minor), &[])
    }

    /// Ends the archive.
    pub fn finish(mut self) -> io::Result<W> {
        self.entry(END, 0, (0, 0), &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), bytes: &[u8]) -> io::Result<()> {
        self.entries += 1;
        let path = path.trim_start_matches('/');
        let len = u32::try_from(bytes.len()).map_err(|_| io::Error::other(format!("{path} is too large")))?;
        let name_len = path.len() as u32 + 1;
        // inode, mode, uid, gid, links, mtime, size, device of the file, device that it is, name, checksum
        let fields = [self.entries, mode, 0, 0, 1, 0, len, 0, 0, device.0, device.1, name_len, 0]
            .map(|n| format!("{n:08x}"));
        let header = format!("070701{}{path}\0", fields.concat());
        self.out.write_all(header.as_bytes())?;
        self.pad(header.len())?;
        self.out.write_all(bytes)?;
        self.pad(bytes.len())
    }

    fn pad(&mut self, len: usize) -> io::Result<()> {
        self.out.write_all(&[0; 3][..len.wrapping_neg() % 4])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    /// As busybox lists it, the program that unpacks archives in many an initramfs.
    #[test]
    fn an_archive_is_read_by_another_program() {
        let mut archive = Archive::new(Vec::new());
        archive.dir("/bin").unwrap();
        archive.file("/bin/five", 0o755, b"12345").unwrap();
        archive.character_device("/console", 5, 1).unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);

        let packages = crate::packages::Packages::find().unwrap();
        let dir = tempfile::tempdir().unwrap();
        packages.unpack(&["busybox-static"], dir.path()).unwrap();
        let mut cpio = Command::new(dir.path().join("bin/busybox"));
        cpio.args(["cpio", "-t", "-v"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut cpio = cpio.spawn().unwrap();
        cpio.stdin.take().unwrap().write_all(&bytes).unwrap();
        let output = cpio.wait_with_output().unwrap();
        let listed = String::from_utf8(output.stdout).unwrap();
        let shown: Vec<Vec<&str>> = listed.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(shown.len(), 3, "{listed}");
        assert!(shown[0][0] == "drwxr-xr-x" && shown[0].ends_with(&["bin"]), "{listed}");
        assert!(
            shown[1][0] == "-rwxr-xr-x" && shown[1][2] == "5" && shown[1].ends_with(&["bin/five"]),
            "{listed}"
        );
        assert!(shown[2][0] == "crw-------" && shown[2].ends_with(&["console"]), "{listed}");
    }
}
