//! A writable export of a recovery point, mounted by libnbd's `nbdfuse` and exercised by `fsx` and by an
//! exerciser of our own: what was written is there, and the point below is as it was.

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::{DISKS, MIB, Shown, VM, World, path};
use e2e::exerciser::Exerciser;
use e2e::foreign::{Mount, nbdcopy};
use rig::tool;
use serde_json::Value;

/// The stretch that is exercised: what the guest had written, and some of what it had not.
const AT: u64 = 3 * MIB;
const LEN: u64 = 10 * MIB;

/// A VM with one point to be looked at.
struct Still {
    world: World,
    point: Value,
}

impl Still {
    fn new(seed: u64) -> Self {
        let mut world = World::new(seed);
        world.write(1, Duration::from_micros(300));
        world.protect("1s", &[]);
        world.replicating();
        world.branch.ok(&["sync", VM]).unwrap();
        world.quiet();
        world.branch.ok(&["sync", VM]).unwrap();
        world.branch.ok(&["pause", VM]).unwrap();
        let point = world.points().pop().unwrap();
        Self { world, point }
    }

    fn show(&self, more: &[&str]) -> Shown {
        self.world.export_point(&self.point, more).unwrap()
    }

    /// What an export's first disk holds.
    fn bytes(&self, shown: &Shown) -> Vec<u8> {
        let copy = self.folder("copy.raw");
        nbdcopy(&shown.uris[0], &copy, &[]).unwrap();
        let bytes = fs::read(&copy).unwrap();
        fs::remove_file(&copy).unwrap();
        assert_eq!(bytes.len() as u64, DISKS[0].1);
        bytes
    }

    fn folder(&self, name: &str) -> PathBuf {
        self.world.dir.path().join(name)
    }
}

/// `fsx` with this configuration, on the start of a file.
fn fsx(still: &Still, file: &Path, seed: u64, operations: u64, config: &str) {
    let (settings, artifacts) = (still.folder("fsx.toml"), still.folder("artifacts"));
    fs::create_dir_all(&artifacts).unwrap();
    fs::write(&settings, config).unwrap();
    let mut command = Command::new("fsx");
    command.args(["-q", "-f", path(&settings), "-P", path(&artifacts)]);
    command.args(["-N", &operations.to_string(), "-S", &seed.to_string(), path(file)]);
    tool(&mut command).unwrap();
}

/// Any bytes anywhere; no holes, for a discard of parts of blocks may be ignored.
const ANY_BYTES: &str = "
flen = 2097152
blockmode = true
[opsize]
min = 1
max = 65536
[weights]
close_open = 0
truncate = 0
read = 10
write = 10
mapread = 5
mapwrite = 5
invalidate = 1
fsync = 1
fdatasync = 1
sendfile = 2
posix_fadvise = 5
copy_file_range = 3
";

/// Whole blocks, and holes.
const BLOCKS_AND_HOLES: &str = "
flen = 4194304
blockmode = true
[opsize]
min = 4096
max = 131072
align = 4096
[weights]
close_open = 0
truncate = 0
read = 10
write = 10
mapread = 5
mapwrite = 5
punch_hole = 5
fsync = 1
posix_fadvise = 5
";

/// Exercises a writable export of one point; how many operations that were.
fn exercise(seed: u64, fsx_operations: u64, operations: u64) -> u64 {
    rig::need_crate("fsx").unwrap();
    let still = Still::new(seed);
    let read_only = still.show(&[]);
    let before = still.bytes(&read_only);
    assert!(before.iter().any(|&byte| byte != 0), "the guest has written");

    let shown = still.show(&["--writable"]);
    let mount = Mount::new(&still.folder("mounted"), &shown.uris[0]).unwrap();
    let model = before[AT as usize..][..LEN as usize].to_vec();
    let mut exerciser = Exerciser::new(&mount.file(), AT, model, seed).unwrap();
    exerciser.run(operations).unwrap();
    let (counts, model) = exerciser.end();
    mount.unmount().unwrap();
    let mut expected = before.clone();
    expected[AT as usize..][..LEN as usize].copy_from_slice(&model);
    assert!(still.bytes(&shown) == expected, "after the mount is gone, and outside of what was exercised");

    let mount = Mount::new(&still.folder("mounted"), &shown.uris[0]).unwrap();
    fsx(&still, &mount.file(), seed, fsx_operations, ANY_BYTES);
    fsx(&still, &mount.file(), seed + 1, fsx_operations, BLOCKS_AND_HOLES);
    // Its last operations cannot be known from outside; what it left alone can.
    let mut after = vec![0; before.len()];
    fs::File::open(mount.file()).unwrap().read_exact_at(&mut after, 0).unwrap();
    mount.unmount().unwrap();
    let flen = 4 * MIB as usize;
    assert!(after[flen..] == expected[flen..]);
    assert!(still.bytes(&shown) == after, "the kernel's view is what the server has");

    still.world.unexport(&shown);
    assert!(still.bytes(&read_only) == before, "the point is as it was");
    assert!(still.bytes(&still.show(&["--writable"])) == before, "what was written went with its export");
    println!("seed {seed}: {fsx_operations} and {fsx_operations} operations of fsx; {counts:?}");
    2 * fsx_operations + counts.all()
}

#[test]
fn a_writable_export_stands_up_to_fsx() {
    assert!(exercise(91, 2000, 3000) >= 7000);
}

#[test]
#[ignore = "minutes: make soak"]
fn a_writable_export_stands_up_to_fsx_for_long() {
    let operations: u64 = (0..6).map(|round| exercise(910 + round, 50_000, 50_000)).sum();
    println!("{operations} operations in all");
}
