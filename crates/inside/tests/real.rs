//! Disks that real programs have made: what was written into them comes out again.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use inside::{Content, Entry, Error, FileSystem, Kind, ReadAt, Volume, Walk, open, volumes};
use rig::{need, tool};

const MIB: u64 = 1 << 20;

struct Disk(File);

impl ReadAt for Disk {
    fn size_bytes(&self) -> u64 {
        self.0.metadata().map_or(0, |metadata| metadata.len())
    }
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(buffer, offset)
    }
}

fn opened(paths: &[(&str, &Path)]) -> Vec<Volume> {
    let disk = |(name, path): &(&str, &Path)| {
        ((*name).to_owned(), Arc::new(Disk(File::open(path).unwrap())) as Arc<dyn ReadAt>)
    };
    volumes(paths.iter().map(disk).collect())
}

fn image(dir: &Path, name: &str, bytes: u64) -> PathBuf {
    let path = dir.join(name);
    File::create(&path).unwrap().set_len(bytes).unwrap();
    path
}

/// Files that a volume is to have.
fn tree(dir: &Path) -> PathBuf {
    let root = dir.join("tree");
    fs::create_dir_all(root.join("etc/deep/deeper")).unwrap();
    fs::write(root.join("etc/fstab"), "UUID=x / ext4 defaults 0 1\n").unwrap();
    fs::write(root.join("etc/deep/deeper/big.bin"), rig::noise(7, 3 << 20)).unwrap();
    fs::write(root.join("empty"), "").unwrap();
    let sparse = File::create(root.join("sparse")).unwrap();
    sparse.set_len(5 << 20).unwrap();
    sparse.write_all_at(b"end", (5 << 20) - 3).unwrap();
    std::os::unix::fs::symlink("/etc/fstab", root.join("link")).unwrap();
    std::os::unix::fs::symlink("link2", root.join("link2")).unwrap();
    root
}

fn ext4(path: &Path, root: &Path, more: &[&str]) {
    need("mkfs.ext4", "e2fsprogs").unwrap();
    tool(Command::new("mkfs.ext4").args(["-q", "-F", "-d"]).arg(root).args(more).arg(path)).unwrap();
}

fn read(files: &dyn FileSystem, path: &str) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    files.read(path.as_bytes(), &mut bytes)?;
    Ok(bytes)
}

fn names(entries: &[Entry]) -> Vec<String> {
    entries.iter().map(|entry| String::from_utf8_lossy(&entry.name).into_owned()).collect()
}

/// Everything in `root` is there, and is what it is in `root`.
fn assert_has_tree(files: &dyn FileSystem, root: &Path) {
    assert!(read(files, "/sparse").unwrap() == fs::read(root.join("sparse")).unwrap());
    assert_has_most(files, root);
}

/// The same but for a file with large holes.
fn assert_has_most(files: &dyn FileSystem, root: &Path) {
    for file in ["etc/fstab", "etc/deep/deeper/big.bin", "empty"] {
        assert!(read(files, &format!("/{file}")).unwrap() == fs::read(root.join(file)).unwrap(), "{file}");
    }
    let listed = files.list(b"/etc").unwrap();
    assert_eq!(names(&listed), ["deep", "fstab"]);
    assert_eq!((&listed[0].kind, &listed[1].kind, listed[1].size_bytes), (&Kind::Folder, &Kind::File, 27));
    let entry = files.entry(b"/etc/fstab").unwrap();
    let modified = fs::metadata(root.join("etc/fstab")).unwrap().modified().unwrap();
    let seconds = modified.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    assert!(entry.modified_s.abs_diff(i64::try_from(seconds).unwrap()) < 120, "{entry:?}");
    assert!(matches!(read(files, "/nothing"), Err(Error::NotFound(_))));
    assert!(matches!(read(files, "/etc"), Err(Error::WrongKind { .. })));
    assert!(files.list(b"/etc/fstab").is_err());
    let mut found = Vec::new();
    files.walk(b"/", &mut |path, entry| {
        if entry.is_ok_and(|entry| inside::matches(b"*.bin", &entry.name)) {
            found.push(String::from_utf8_lossy(path).into_owned());
        }
        Walk::On
    });
    assert_eq!(found, ["/etc/deep/deeper/big.bin"]);
}

#[test]
fn ext4_on_a_disk_without_partitions() {
    let dir = tempfile::tempdir().unwrap();
    let root = tree(dir.path());
    for (name, options) in
        [("ext4", &["-b", "4096"][..]), ("small", &["-b", "1024"]), ("ext2", &["-t", "ext2"])]
    {
        let path = image(dir.path(), name, 64 * MIB);
        ext4(&path, &root, options);
        let [volume] = &opened(&[("vda", &path)])[..] else { panic!("one volume") };
        assert_eq!((volume.name.as_str(), volume.content), ("vda", Content::Ext));
        let files = open(volume).unwrap();
        if name == "ext2" {
            // Known of ext4-view 1.0: a hole as large as a whole block of block numbers is not read without extents.
            assert!(matches!(read(files.as_ref(), "/sparse"), Err(Error::FileSystem(_))));
            assert_has_most(files.as_ref(), &root);
        } else {
            assert_has_tree(files.as_ref(), &root);
        }
        assert_eq!(read(files.as_ref(), "/link").unwrap(), fs::read(root.join("etc/fstab")).unwrap());
        let link = files.list(b"/").unwrap().into_iter().find(|entry| entry.name == b"link").unwrap();
        assert_eq!(link.kind, Kind::Link(b"/etc/fstab".to_vec()));
        assert!(read(files.as_ref(), "/link2").is_err(), "a link to itself");
    }
}

#[test]
fn partitions_of_both_kinds_of_tables() {
    need("sfdisk", "fdisk").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let root = tree(dir.path());
    let part = image(dir.path(), "part", 64 * MIB);
    ext4(&part, &root, &[]);
    for label in ["gpt", "dos"] {
        let path = image(dir.path(), label, 200 * MIB);
        let script = match label {
            "gpt" => "label: gpt\nstart=2048,size=16M\nstart=40960,size=64M\n",
            _ => {
                "label: dos\nstart=2048,size=16M,type=83\nstart=36864,size=170M,type=5\nstart=40960,size=64M,type=83\n"
            }
        };
        let script_path = dir.path().join("script");
        fs::write(&script_path, script).unwrap();
        let status = Command::new("sfdisk")
            .args(["--quiet", "--no-reread", "--no-tell-kernel"])
            .arg(&path)
            .stdin(File::open(&script_path).unwrap())
            .status()
            .unwrap();
        assert!(status.success());
        let disk = File::options().write(true).open(&path).unwrap();
        disk.write_all_at(&fs::read(&part).unwrap(), 40_960 * 512).unwrap();
        let found = opened(&[("vda", &path)]);
        let second = if label == "gpt" { "vda/2" } else { "vda/5" };
        let shown: Vec<_> = found.iter().map(|volume| (volume.name.as_str(), volume.content)).collect();
        assert_eq!(shown, [("vda/1", Content::Unknown), (second, Content::Ext)], "{label}");
        assert_has_tree(open(&found[1]).unwrap().as_ref(), &root);
        assert!(matches!(open(&found[0]), Err(Error::Unsupported(_))));
    }
}

#[test]
fn a_journal_that_was_not_replayed_counts() {
    need("debugfs", "e2fsprogs").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let root = tree(dir.path());
    let path = image(dir.path(), "disk", 64 * MIB);
    ext4(&path, &root, &["-b", "4096"]);
    // The folder's block of before is overwritten by one of the journal: as after a power cut.
    let debugfs =
        |command: &str| tool(Command::new("debugfs").args(["-w", "-R", command]).arg(&path)).unwrap();
    let block = debugfs("blocks /etc").trim().to_owned();
    let wanted = dir.path().join("block");
    let place = block.parse::<u64>().unwrap() * 4096;
    let mut bytes = vec![0; 4096];
    File::open(&path).unwrap().read_exact_at(&mut bytes, place).unwrap();
    let at = bytes.windows(5).position(|window| window == b"fstab").unwrap();
    bytes[at..at + 5].copy_from_slice(b"FSTAB");
    fs::write(&wanted, &bytes).unwrap();
    let script = dir.path().join("script");
    fs::write(&script, format!("jo -c\njw -b {block} {}\njc\n", wanted.display())).unwrap();
    tool(Command::new("debugfs").args(["-w", "-f"]).args([&script, &path])).unwrap();
    let volume = &opened(&[("vda", &path)])[0];
    match open(volume).and_then(|files| files.list(b"/etc")) {
        // The block's checksum was made for its first content: what matters is that the journal's block is read.
        Ok(entries) => assert_eq!(names(&entries), ["FSTAB", "deep"]),
        Err(Error::FileSystem(why)) => assert!(why.contains("checksum"), "{why}"),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn ntfs() {
    need("mkntfs", "ntfs-3g").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let root = tree(dir.path());
    let path = image(dir.path(), "disk", 64 * MIB);
    tool(Command::new("mkntfs").args(["-q", "-F", "-f"]).arg(&path)).unwrap();
    let mounted = dir.path().join("mounted");
    fs::create_dir(&mounted).unwrap();
    tool(Command::new("ntfs-3g").args([&path, &mounted])).unwrap();
    let copied = tool(
        Command::new("cp")
            .args(["-r", "--preserve=timestamps"])
            .args(["etc", "empty", "sparse"])
            .arg(&mounted)
            .current_dir(&root),
    );
    tool(Command::new("fusermount3").arg("-u").arg(&mounted)).unwrap();
    copied.unwrap();
    let [volume] = &opened(&[("vda", &path)])[..] else { panic!("one volume") };
    assert_eq!(volume.content, Content::Ntfs);
    let files = open(volume).unwrap();
    assert_has_tree(files.as_ref(), &root);
    // As Windows sees it, capitals make no difference.
    assert_eq!(read(files.as_ref(), "/ETC/FSTAB").unwrap(), fs::read(root.join("etc/fstab")).unwrap());
}

/// A file as a block device, until it is dropped.
struct Loop(String);

impl Loop {
    fn new(file: &Path) -> Self {
        Self(tool(Command::new("losetup").args(["--find", "--show"]).arg(file)).unwrap().trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = tool(Command::new("losetup").args(["--detach", &self.0]));
    }
}

#[test]
fn a_logical_volume_over_two_disks() {
    need("lvm", "lvm2").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let root = tree(dir.path());
    let part = image(dir.path(), "part", 120 * MIB);
    ext4(&part, &root, &[]);
    let disks = ["a", "b"].map(|name| image(dir.path(), name, 80 * MIB));
    {
        let loops = [Loop::new(&disks[0]), Loop::new(&disks[1])];
        let (one, other) = (loops[0].0.as_str(), loops[1].0.as_str());
        let group = format!("ai{}", std::process::id());
        let filter =
            format!("devices {{ filter=[\"a|^{one}$|\",\"a|^{other}$|\",\"r|.*|\"] use_devicesfile=0 }}");
        let lvm = |arguments: &[&str]| {
            tool(Command::new("lvm").args(arguments).args(["--config", &filter])).unwrap()
        };
        lvm(&["vgcreate", "-q", &group, one, other]);
        // Nothing is activated: that is what needs the kernel's device mapper.
        let quiet = ["lvcreate", "-q", "--driverloaded", "n", "-an", "-Zn", "-Wn"];
        let (first, second) = (format!("{one}:0-17"), format!("{other}:0-11"));
        lvm(&[&quiet[..], &["-L", "120M", "-n", "root", &group, &first, &second]].concat());
        lvm(&[&quiet[..], &["-i", "2", "-L", "8M", "-n", "striped", &group]].concat());
    }
    let found = opened(&[("vda", &disks[0]), ("vdb", &disks[1])]);
    let root_volume = found.iter().find(|volume| volume.name.ends_with("/root")).expect("it is found");
    assert_eq!(root_volume.size_bytes, 120 * MIB);
    let striped = found.iter().find(|volume| volume.name.ends_with("/striped")).unwrap();
    assert!(striped.source.is_none(), "what is not read is named");
    write_through(&disks, &fs::read(&part).unwrap());
    let found = opened(&[("vda", &disks[0]), ("vdb", &disks[1])]);
    let root_volume = found.iter().find(|volume| volume.name.ends_with("/root")).unwrap();
    assert_eq!(root_volume.content, Content::Ext);
    assert_has_tree(open(root_volume).unwrap().as_ref(), &root);
}

/// Writes a file system to where LVM has put the logical volume: extents of 4 MiB from 1 MiB on, one disk after the other.
fn write_through(disks: &[PathBuf; 2], bytes: &[u8]) {
    let extent = 4 * MIB;
    let first = 18;
    for (number, piece) in (0..).zip(bytes.chunks(usize::try_from(extent).unwrap())) {
        let (disk, at) = if number < first { (&disks[0], number) } else { (&disks[1], number - first) };
        let file = File::options().write(true).open(disk).unwrap();
        file.write_all_at(piece, MIB + at * extent).unwrap();
    }
}

#[test]
fn a_disk_that_was_damaged_anywhere_is_an_error_or_another_answer() {
    let dir = tempfile::tempdir().unwrap();
    let root = tree(dir.path());
    let path = image(dir.path(), "disk", 16 * MIB);
    ext4(&path, &root, &["-b", "1024"]);
    let whole = fs::read(&path).unwrap();
    let noise = rig::noise(3, 4096);
    for (round, chance) in noise.chunks(4).enumerate().take(200) {
        let mut bytes = whole.clone();
        for byte in 0..40 {
            // Most of it into what describes the file system.
            let spread = if byte % 2 == 0 { 64 * 1024 } else { 1 << 20 };
            let place = usize::from(chance[byte % 4]) * 7919 * (byte + 1) + round * 131;
            bytes[1024 + place % spread] ^= chance[(byte + 1) % 4] | 1;
        }
        let volume = &volumes(vec![("vda".into(), Arc::new(Memory(bytes)) as Arc<dyn ReadAt>)])[0];
        let Ok(files) = open(volume) else { continue };
        let mut told = 0;
        files.walk(b"/", &mut |path, entry| {
            told += 1;
            if entry.is_ok_and(|entry| entry.kind == Kind::File) {
                let _ = files.read(path, &mut io::sink());
            }
            if told > 10_000 { Walk::End } else { Walk::On }
        });
    }
}

struct Memory(Vec<u8>);

impl ReadAt for Memory {
    fn size_bytes(&self) -> u64 {
        self.0.len() as u64
    }
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let end = start.checked_add(buffer.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(self.0.get(start..end).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}
