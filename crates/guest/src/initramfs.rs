//! What is in the guest: from a tree of unpacked packages, the programs that it runs, the libraries and
//! kernel modules that those need, and the scripts of ours that run them. Uncompressed: what is emulated
//! decompresses slowly.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufWriter;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rig::{Result, Trouble, doing, tool};

use crate::cpio::Archive;

/// Our scripts: the first process, and what it becomes.
pub(crate) const SCRIPTS: [(&str, &str); 6] = [
    ("init", include_str!("modes/init")),
    ("modes/common", include_str!("modes/common")),
    ("modes/install", include_str!("modes/install")),
    ("modes/run", include_str!("modes/run")),
    ("modes/check", include_str!("modes/check")),
    // Where BusyBox looks for what the power button does.
    ("etc/acpi/PWRF/00000080", include_str!("modes/off")),
];

/// What runs in the guest, and what it loads while it runs; each is put where its package has it.
const PROGRAMS: [&str; 13] = [
    "bin/busybox",
    "sbin/mke2fs",
    "sbin/e2fsck",
    "sbin/mkfs.xfs",
    "sbin/xfs_repair",
    "usr/bin/sqlite3",
    "usr/sbin/qemu-ga",
    "usr/lib/postgresql/15/bin/postgres",
    "usr/lib/postgresql/15/bin/initdb",
    "usr/lib/postgresql/15/bin/psql",
    "usr/lib/postgresql/15/lib/plpgsql.so",
    "usr/lib/postgresql/15/lib/dict_snowball.so",
    "usr/lib/postgresql/15/lib/amcheck.so",
];
/// Needs no library.
const STATIC: &str = "bin/busybox";
const DATA: [&str; 2] = ["etc/mke2fs.conf", "usr/share/postgresql/15"];
const MODULES: [&str; 7] =
    ["virtio_pci", "virtio_blk", "virtio_console", "virtio_net", "xfs", "button", "evdev"];
/// The packages' loader of shared libraries; it also tells which ones a program needs.
const LOADER: &str = "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2";
const LIBRARY_DIRS: [&str; 2] = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"];

const PASSWD: &str = "root:x:0:0:root:/run:/bin/sh\npostgres:x:100:100:postgres:/run:/bin/sh\n";
const GROUP: &str = "root:x:0:\npostgres:x:100:\n";

/// Everything that is to be in it, by path, so that the same parts make the same archive.
struct Contents(BTreeMap<String, Content>);

enum Content {
    Dir,
    Copy(PathBuf),
    Text { text: String, permissions: u32 },
}

/// Writes the initramfs for the kernel whose modules are in `root` too.
pub(crate) fn write(root: &Path, to: &Path) -> Result<()> {
    let mut contents = Contents(BTreeMap::new());
    for path in PROGRAMS {
        contents.copy(path, root.join(path))?;
    }
    for (name, path) in libraries(root)? {
        contents.copy(&format!("lib/{name}"), path)?;
    }
    contents.copy("lib64/ld-linux-x86-64.so.2", root.join(LOADER))?;
    for path in DATA {
        contents.copy(path, root.join(path))?;
    }
    let mut load = String::new();
    for module in modules(root)? {
        let name = module.file_name().unwrap_or_default().to_string_lossy().into_owned();
        contents.copy(&format!("lib/modules/{name}"), module)?;
        load += &format!("/lib/modules/{name}\n");
    }
    contents.text("lib/modules/load", load, 0o644);
    contents.text("etc/passwd", PASSWD.into(), 0o644);
    contents.text("etc/group", GROUP.into(), 0o644);
    for (path, text) in SCRIPTS {
        contents.text(path, text.into(), 0o755);
    }
    contents.write(to)
}

impl Contents {
    /// A file or everything in a folder of the packages, at `path` in the guest.
    fn copy(&mut self, path: &str, from: PathBuf) -> Result<()> {
        if !from.is_dir() {
            self.add(path, Content::Copy(from));
            return Ok(());
        }
        let entries = std::fs::read_dir(&from).map_err(doing(from.display()))?;
        for entry in entries {
            let entry = entry.map_err(doing(from.display()))?;
            // What leads out of the packages (documentation, mostly) is not needed.
            if entry.path().exists() {
                self.copy(&format!("{path}/{}", entry.file_name().to_string_lossy()), entry.path())?;
            }
        }
        Ok(())
    }

    fn text(&mut self, path: &str, text: String, permissions: u32) {
        self.add(path, Content::Text { text, permissions });
    }

    /// Adds something and the folders above it.
    fn add(&mut self, path: &str, content: Content) {
        for (at, _) in path.match_indices('/') {
            self.0.insert(path[..at].to_owned(), Content::Dir);
        }
        self.0.insert(path.to_owned(), content);
    }

    fn write(&self, to: &Path) -> Result<()> {
        let written = || doing(format!("writing {}", to.display()));
        let mut archive = Archive::new(BufWriter::new(File::create(to).map_err(written())?));
        // The kernel opens it for the first process, before that can have made it.
        archive.dir("dev").map_err(written())?;
        archive.character_device("dev/console", 5, 1).map_err(written())?;
        for (path, content) in &self.0 {
            match content {
                Content::Dir => archive.dir(path),
                Content::Text { text, permissions } => archive.file(path, *permissions, text.as_bytes()),
                Content::Copy(from) => {
                    let bytes = std::fs::read(from).map_err(doing(from.display()))?;
                    let mode = std::fs::metadata(from).map_err(doing(from.display()))?.permissions().mode();
                    archive.file(path, mode & 0o777, &bytes)
                }
            }
            .map_err(written())?;
        }
        archive.finish().map(drop).map_err(written())
    }
}

/// The shared libraries that the programs need: name → file. They must all be in the packages: what this
/// machine happens to have must not decide what works.
fn libraries(root: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let path = LIBRARY_DIRS.map(|dir| root.join(dir).display().to_string()).join(":");
    let mut found = BTreeMap::new();
    for program in PROGRAMS.iter().filter(|program| **program != STATIC) {
        let mut loader = Command::new(root.join(LOADER));
        loader.args(["--inhibit-cache", "--library-path", &path, "--list"]).arg(root.join(program));
        for (name, file) in needed(&tool(&mut loader)?) {
            if !file.starts_with(root) {
                return Err(Trouble(format!(
                    "{program} needs {name}, which no package in scripts/setup has: add the one that has {}",
                    file.display()
                )));
            }
            found.insert(name.to_owned(), file.to_owned());
        }
    }
    Ok(found)
}

/// Lines like `libz.so.1 => /lib/libz.so.1 (0x00007f…)`. The loader itself and the kernel's own library
/// have no arrow.
fn needed(listed: &str) -> impl Iterator<Item = (&str, &Path)> {
    listed.lines().filter_map(|line| {
        let (name, rest) = line.trim().split_once(" => ")?;
        let file = rest.rsplit_once(" (").map_or(rest, |(file, _)| file);
        Some((name, Path::new(file)))
    })
}

/// The kernel modules, in an order in which they can be loaded.
fn modules(root: &Path) -> Result<Vec<PathBuf>> {
    let base = root.join("lib/modules");
    let mut versions = std::fs::read_dir(&base).map_err(doing(base.display()))?;
    let version = versions.next().and_then(std::result::Result::ok);
    let dir =
        version.ok_or_else(|| Trouble(format!("no kernel's modules are in {}", base.display())))?.path();
    let name = dir.file_name().unwrap_or_default();
    tool(Command::new(root.join("bin/busybox")).arg("depmod").arg("-b").arg(root).arg(name))?;
    let file = dir.join("modules.dep");
    let listed = std::fs::read_to_string(&file).map_err(doing(file.display()))?;
    Ok(load_order(&listed, &MODULES)?.into_iter().map(|path| dir.join(path)).collect())
}

/// From depmod's lines, `module: those that it needs`.
fn load_order<'a>(listed: &'a str, wanted: &[&str]) -> Result<Vec<&'a str>> {
    let lines: BTreeMap<&str, &str> = listed.lines().filter_map(|line| line.split_once(':')).collect();
    let mut order = Vec::new();
    for name in wanted {
        let file = format!("{name}.ko");
        let path = lines.keys().find(|path| path.rsplit('/').next() == Some(&file));
        let path = path.ok_or_else(|| Trouble(format!("the kernel's package has no module {name}")))?;
        load(path, &lines, &mut order);
    }
    Ok(order)
}

fn load<'a>(path: &'a str, lines: &BTreeMap<&'a str, &'a str>, order: &mut Vec<&'a str>) {
    if order.contains(&path) {
        return;
    }
    for needed in lines.get(path).copied().unwrap_or_default().split_whitespace() {
        load(needed, lines, order);
    }
    order.push(path);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_comes_after_those_that_it_needs() {
        let listed = "k/fs/xfs.ko: k/lib/crc.ko\nk/lib/crc.ko:\nk/v/virtio_blk.ko: k/v/ring.ko k/v/virtio.ko\n\
                      k/v/ring.ko: k/v/virtio.ko\nk/v/virtio.ko:\n";
        let order = load_order(listed, &["virtio_blk", "xfs"]).unwrap();
        assert_eq!(
            order,
            ["k/v/virtio.ko", "k/v/ring.ko", "k/v/virtio_blk.ko", "k/lib/crc.ko", "k/fs/xfs.ko"]
        );
        assert!(load_order(listed, &["btrfs"]).unwrap_err().0.contains("btrfs"));
    }

    #[test]
    fn needed_libraries_are_those_with_an_arrow() {
        let listed = "\tlinux-vdso.so.1 (0x00007f)\n\tlibz.so.1 => /r/lib/libz.so.1 (0x00007f)\n\t/lib64/ld.so (0x7f)\n\
                      \tlibgone.so.1 => not found\n";
        let found: Vec<_> = needed(listed).collect();
        assert_eq!(
            found,
            [("libz.so.1", Path::new("/r/lib/libz.so.1")), ("libgone.so.1", Path::new("not found"))]
        );
    }
}
