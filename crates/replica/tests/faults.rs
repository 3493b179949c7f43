//! Full and failing file systems, lost and damaged files, a lost catalog. Real mounts: to be run as root.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use catalog::Catalog;
use common::*;
use model::gate::{Access, Condition};
use model::{ApplyState, LogNumber, Phase, PointName, Purpose};
use replica::{Config, Error, Step, Store};

/// A small file system of our own, gone with the test.
struct Mount(PathBuf);

impl Mount {
    fn tmpfs(at: &Path, size: &str) -> Self {
        fs::create_dir_all(at).unwrap();
        run(
            "mount",
            &["-t", "tmpfs", "-o", &format!("size={size}"), "afterimage-test", at.to_str().unwrap()],
        );
        Self(at.to_path_buf())
    }

    fn remount(&self, options: &str) {
        run("mount", &["-o", &format!("remount,{options}"), self.0.to_str().unwrap()]);
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn run(program: &str, args: &[&str]) {
    let status = Command::new(program).args(args).status().expect("it can be started");
    assert!(
        status.success(),
        "`{program} {}` failed: this test mounts file systems and must run as root",
        args.join(" ")
    );
}

struct Bench {
    dir: tempfile::TempDir,
    clock: TestClock,
    primary: Primary,
    chance: Chance,
}

fn bench() -> Bench {
    let primary = Primary::new(VM, &[("vda", 3 << 20), ("vdb", 64 * 1024)]);
    Bench { dir: tempfile::tempdir().unwrap(), clock: TestClock::new(), primary, chance: Chance(11) }
}

impl Bench {
    /// The primary says that it begins to compare.
    fn begin_anew(site: &Site) {
        let Phase::ResyncRequired { why } = site.store.status(VM).unwrap().facts.phase else {
            panic!("nothing is to be resynchronized")
        };
        site.store.report(PEER, VM, Phase::ResyncRequired { why }, None, false).unwrap();
    }

    /// Sends everything again, laid over whatever is left, and checks every point.
    fn resynchronize(&mut self, site: &Site) {
        Self::begin_anew(site);
        for (name, size) in [("vda", 3_u64 << 20), ("vdb", 64 * 1024)] {
            let now = self.primary.disks[name].clone();
            self.primary.write(name, 0..size, |at| now[at as usize]);
        }
        self.primary.ship(site, Purpose::Resync, POINT);
        site.settle(VM);
        site.check_points(&self.primary);
    }

    fn open(&self) -> Site {
        self.open_with(config(self.dir.path(), &self.clock))
    }

    /// The catalog lies beside the file system that is full, as it may.
    fn open_with(&self, config: Config) -> Site {
        let catalog = Catalog::open(self.dir.path().join("catalog.sqlite")).unwrap();
        Site { store: Store::open(catalog, config).unwrap(), clock: self.clock.clone() }
    }

    fn fill(&mut self, mark: u64) {
        // Nothing that compresses.
        let mut chance = Chance(mark);
        let noise: Vec<u8> = (0..2 << 20).map(|_| chance.below(255) as u8 + 1).collect();
        self.primary.write("vda", 0..2 << 20, |at| noise[at as usize]);
    }

    fn cycle(&mut self, site: &Site) -> LogNumber {
        self.primary.write_some(&mut self.chance, 60);
        self.clock.pass(Duration::from_secs(30));
        let first = self.primary.head.number == LogNumber::ZERO;
        self.primary.ship(site, if first { Purpose::Initial } else { Purpose::Changes }, POINT)
    }

    fn folder(&self) -> PathBuf {
        self.dir.path().join("vms").join(VM.to_string())
    }
}

#[track_caller]
fn refused(site: &Site, access: Access, condition: Condition) {
    let point = site.store.points(VM).unwrap().last().map_or(LogNumber(1), |point| point.number);
    match site.store.admit(VM, access, point) {
        Err(Error::Gate(refusal)) => assert_eq!(refusal.condition, condition),
        other => panic!("{condition} was expected: {other:?}"),
    }
}

#[test]
fn no_space_refuses_the_log_and_leaves_the_chain_whole() {
    let mut bench = bench();
    let mount = Mount::tmpfs(&bench.dir.path().join("vms"), "5m");
    let site = bench.open();
    site.store.offer(PEER, bench.primary.offer()).unwrap();
    bench.primary.write("vda", 0..20_000, |at| at as u8 | 1);
    bench.cycle(&site);
    site.settle(VM);
    let ballast = bench.dir.path().join("vms/ballast");
    fs::write(&ballast, vec![1; 7 << 19]).unwrap();
    bench.fill(1);
    let (header, bytes) = bench.primary.make_log(Purpose::Changes, POINT, bench.clock.now());
    match site.send(&header, &bytes, 100_000) {
        Err(Error::Refused(refused)) => {
            assert_eq!((refused.code, refused.transient), ("no-space", true));
            assert!(refused.message.contains("free some"), "{refused}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(fs::read_dir(bench.folder().join("incoming")).unwrap().count(), 0, "the partial log is gone");
    site.check_points(&bench.primary);
    fs::remove_file(&ballast).unwrap();
    site.send(&header, &bytes, 100_000).unwrap();
    bench.primary.shipped(&header);
    site.check_points(&bench.primary);
    // Its apply has no room beside the log: it fails, says why, and goes on when there is.
    fs::write(&ballast, vec![1; 2 << 20]).unwrap();
    let error = site.store.maintain(VM).unwrap_err();
    assert_eq!(error.code(), "no-space", "{error}");
    assert!(
        error.to_string().contains("vda.raw") && error.to_string().contains("free some space"),
        "{error}"
    );
    refused(&site, Access::Pinned, Condition::ApplyFailed);
    mount.remount("size=16m");
    assert_eq!(site.store.maintain(VM).unwrap(), Step::Idle, "it is not tried again at once");
    bench.clock.pass(site.store.config().tick);
    site.settle(VM);
    site.check_points(&bench.primary);
    assert_eq!(site.store.applied(VM).unwrap(), bench.primary.head.number);
}

#[test]
fn the_reserve_is_kept_back_from_new_logs() {
    let mut bench = bench();
    let _mount = Mount::tmpfs(&bench.dir.path().join("vms"), "16m");
    let site =
        bench.open_with(Config { free_reserve_bytes: 12 << 20, ..config(bench.dir.path(), &bench.clock) });
    site.store.offer(PEER, bench.primary.offer()).unwrap();
    bench.cycle(&site);
    fs::write(bench.dir.path().join("vms/ballast"), vec![1; 6 << 20]).unwrap();
    let (header, bytes) = bench.primary.make_log(Purpose::Changes, POINT, bench.clock.now());
    assert_eq!(site.send(&header, &bytes, 100_000).unwrap_err().code(), "no-space");
    site.settle(VM);
    fs::remove_file(bench.dir.path().join("vms/ballast")).unwrap();
    site.send(&header, &bytes, 100_000).unwrap();
}

#[test]
fn an_apply_that_fails_refuses_every_read_until_it_was_mended() {
    let mut bench = bench();
    let site = bench.open();
    site.store.offer(PEER, bench.primary.offer()).unwrap();
    let mount = Mount::tmpfs(&bench.folder().join("disks"), "16m");
    bench.cycle(&site);
    site.settle(VM);
    let two = bench.cycle(&site);
    mount.remount("ro");
    let error = site.store.maintain(VM).unwrap_err().to_string();
    assert!(error.contains("disks/vd") && error.contains("Read-only"), "{error}");
    for access in [Access::Pinned, Access::Strict, Access::Hold] {
        refused(&site, access, Condition::ApplyFailed);
    }
    let ApplyState::Failed { since, .. } = site.store.facts(VM).unwrap().apply else {
        panic!("it has failed")
    };
    assert_eq!(site.store.maintain(VM).unwrap(), Step::Idle, "it is not tried again at once");
    bench.cycle(&site); // logs go on arriving
    drop(site);
    let site = bench.open();
    let ApplyState::Failed { since: still, error } = site.store.facts(VM).unwrap().apply else {
        panic!("still")
    };
    assert_eq!(still, since);
    assert!(error.contains("Read-only"), "{error}");
    refused(&site, Access::Pinned, Condition::ApplyFailed);
    assert!(site.store.maintain(VM).is_err());
    mount.remount("rw");
    bench.clock.pass(Duration::from_secs(301));
    assert!(matches!(site.store.maintain(VM).unwrap(), Step::Applied { through, .. } if through >= two));
    site.settle(VM);
    site.check_points(&bench.primary);
}

#[test]
fn a_lost_log_ends_the_chain_before_it_and_says_so() {
    let mut bench = bench();
    bench.primary.points = 3;
    let site = bench.open();
    site.store.offer(PEER, bench.primary.offer()).unwrap();
    for _ in 0..5 {
        bench.cycle(&site);
    }
    let parent = site.view(VM, LogNumber(4)).unwrap().point().id;
    drop(site);
    fs::remove_file(bench.folder().join("logs/3.log")).unwrap();
    let site = bench.open();
    let standing = site.store.offer(PEER, bench.primary.offer()).unwrap();
    assert_eq!(standing.head, bench.primary.head, "numbers never mean two things");
    let Phase::ResyncRequired { why } = standing.phase else { panic!("{:?}", standing.phase) };
    assert!(why.to_string().contains("3.log"), "{why}");
    refused(&site, Access::Pinned, Condition::Resync);
    let shown: Vec<u64> = site.store.points(VM).unwrap().iter().map(|point| point.number.0).collect();
    assert_eq!(shown, [1, 2]);

    // A compare with what is left brings back everything, in logs that follow the old numbers.
    let now = bench.primary.disks["vda"].clone();
    let digests = site.store.digests(PEER, VM, &disk("vda"), 0, now.len() as u64, 4096).unwrap();
    for (block, digest) in digests.iter().enumerate() {
        let range = block * 4096..(block + 1) * 4096;
        if digest[..] != blake3::hash(&now[range.clone()]).as_bytes()[..16] {
            bench.primary.write("vda", range.start as u64..range.end as u64, |at| now[at as usize]);
        }
    }
    let small = bench.primary.disks["vdb"].clone();
    bench.primary.write("vdb", 0..small.len() as u64, |at| small[at as usize]);
    // What a primary sends that does not know of the loss was compared with what is no longer there.
    let (header, bytes) = bench.primary.make_log(Purpose::Resync, POINT, site.clock.now());
    assert_eq!(site.send(&header, &bytes, 64 * 1024).unwrap_err().code(), "wrong-phase");
    Bench::begin_anew(&site);
    let point = bench.primary.ship(&site, Purpose::Resync, POINT);
    assert_eq!(point, LogNumber(6));
    site.settle(VM);
    site.check_points(&bench.primary);
    let view = site.view(VM, point).unwrap();
    assert_eq!(
        view.changed_since(&disk("vda"), parent).unwrap(),
        None,
        "point 4 is lost, nothing is told against it"
    );
    assert_eq!(site.store.status(VM).unwrap().damage, None);
}

#[test]
fn a_damaged_log_is_found_by_whoever_reads_it_and_never_applied() {
    let mut bench = bench();
    let site = bench.open();
    site.store.offer(PEER, bench.primary.offer()).unwrap();
    bench.cycle(&site);
    site.settle(VM);
    bench.fill(5);
    let two = bench.cycle(&site);
    let path = bench.folder().join("logs/2.log");
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, bytes).unwrap();
    let view = site.view(VM, two).unwrap();
    let mut buf = vec![0; 3 << 20];
    assert_eq!(view.read_at(&disk("vda"), 0, &mut buf).unwrap_err().code(), "damaged-log");
    drop(view);
    let error = site.store.maintain(VM).unwrap_err();
    assert_eq!(error.code(), "damaged-log", "{error}");
    refused(&site, Access::Pinned, Condition::Resync);
    let status = site.store.status(VM).unwrap();
    assert!(status.damage.unwrap().contains("2.log") && status.points.is_empty());
    assert_eq!(status.head, bench.primary.head);
    bench.resynchronize(&site);
}

#[test]
fn a_lost_base_is_said_too() {
    let mut bench = bench();
    let site = bench.open();
    site.store.offer(PEER, bench.primary.offer()).unwrap();
    bench.cycle(&site);
    site.settle(VM);
    drop(site);
    fs::remove_file(bench.folder().join("disks/vda.raw")).unwrap();
    let site = bench.open();
    refused(&site, Access::Pinned, Condition::Resync);
    assert!(site.store.points(VM).unwrap().is_empty());
    bench.resynchronize(&site);
}

/// Threads of a store that was dropped may have its catalog open for a moment; at their end they would remove the
/// write-ahead log of the one that is made in its place.
fn wait_until_closed(catalog: &Path) {
    let is_open = || {
        let open = fs::read_dir("/proc/self/fd").unwrap().flatten();
        open.filter_map(|fd| fs::read_link(fd.path()).ok()).any(|file| file == catalog)
    };
    for _ in 0..6000 {
        if !is_open() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("{} is still open a minute after its store was dropped", catalog.display());
}

#[test]
fn a_lost_catalog_is_made_again_from_the_files() {
    let mut bench = bench();
    bench.primary.points = 2;
    let site = bench.open();
    site.store.offer(PEER, bench.primary.offer()).unwrap();
    for _ in 0..20 {
        bench.clock.pass(Duration::from_secs(17 * 60));
        bench.primary.write("vda", 0..100_000, |at| (at as u8).wrapping_mul(3));
        bench.cycle(&site);
        site.settle(VM);
        if bench.primary.head.number == LogNumber(4) {
            let name = Some(PointName::new("kept").unwrap());
            site.store.pin_point(VM, &"latest".parse().unwrap(), name).unwrap();
        }
    }
    let before = site.store.status(VM).unwrap();
    assert_eq!((before.applied, before.pinned), (LogNumber(4), 1), "the base stays at the pinned point");
    drop(site);
    wait_until_closed(&bench.dir.path().join("catalog.sqlite"));
    for name in ["catalog.sqlite", "catalog.sqlite-wal", "catalog.sqlite-shm"] {
        let _ = fs::remove_file(bench.dir.path().join(name));
    }
    let config = config(bench.dir.path(), &bench.clock);
    let catalog = Catalog::open(bench.dir.path().join("catalog.sqlite")).unwrap();
    assert_eq!(replica::rebuild(&catalog, &config).unwrap(), [VM]);
    assert_eq!(replica::rebuild(&catalog, &config).unwrap(), [], "what is known is left alone");
    drop(catalog);
    let site = bench.open();
    let after = site.store.status(VM).unwrap();
    assert_eq!((after.head, after.applied, after.name), (before.head, before.applied, before.name));
    assert_eq!(after.facts.phase, Phase::Replicating);
    assert_eq!(site.store.find_point(VM, &"kept".parse().unwrap()).unwrap().number, LogNumber(4));
    assert!(before.points.iter().all(|point| after.points.contains(point)));
    site.check_points(&bench.primary);
    bench.cycle(&site);
    site.settle(VM);
    site.check_points(&bench.primary);
}
