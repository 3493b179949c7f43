//! Runs that do not end well leave no backup; runs side by side do not disturb one another.

mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use model::VmId;
use repository::{BackupMeta, ErrorKind, Progress, Repository, RestoreOptions, VerifyOptions};
use support::*;

fn is_whole(repository: &Repository) {
    let options = VerifyOptions { read_data: true, ..VerifyOptions::default() };
    let report = repository.verify(&options, &|_| (), &AtomicBool::new(false)).unwrap();
    assert_eq!(report.damaged, []);
}

#[test]
fn a_source_that_fails_leaves_no_backup() {
    let folder = tempfile::tempdir().unwrap();
    let repository = Repository::create(folder.path(), PASSWORD).unwrap();
    let disk = Chance::new(1).bytes(90 * CHUNK);
    let broken_at = 70 * CHUNK as u64 + 9;
    let source = Disks { broken: Some((0, broken_at)), ..Disks::new(1, &[("a", &disk)]) };
    let error = backup(&repository, &source, None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Source);
    assert!(
        error.to_string().contains("disk a") && error.to_string().contains("no backup was made"),
        "{error}"
    );

    let source = Disks { valid: Err("the pin was taken away".into()), ..Disks::new(1, &[("a", &disk)]) };
    let error = backup(&repository, &source, None).unwrap_err();
    assert!(error.kind() == ErrorKind::Revoked && error.to_string().contains("pin"), "{error}");
    assert_eq!(repository.backups(None).unwrap(), []);
    assert_eq!(files(folder.path(), "locks").len(), 0);

    // What those runs stored is there to be used.
    let report = backup(&repository, &Disks::new(1, &[("a", &disk)]), None).unwrap();
    assert_eq!(report.chunks_added, 0);
    assert_restores(&repository, &report.backup, &[("a", &disk)]);
    restic_ok(folder.path(), &["check", "--read-data"]);
}

#[test]
fn a_cancelled_run_leaves_no_backup() {
    let folder = tempfile::tempdir().unwrap();
    let repository = Repository::create(folder.path(), PASSWORD).unwrap();
    let disk = Chance::new(2).bytes(40 * CHUNK);
    let source = Disks { slow: Duration::from_millis(150), ..Disks::new(1, &[("a", &disk)]) };
    let cancel = AtomicBool::new(false);
    let told = Mutex::new(Vec::new());
    let progress = |progress: Progress| {
        told.lock().unwrap().push(progress);
        if progress.done_bytes > 0 {
            cancel.store(true, Ordering::Relaxed);
        }
    };
    let error = repository.backup(&source, meta(VM, 1), None, &progress, &cancel).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    assert_eq!(repository.backups(None).unwrap(), []);
    let last = *told.lock().unwrap().last().unwrap();
    assert!(last.done_bytes < last.total_bytes && last.total_bytes == disk.len() as u64, "{last:?}");
}

#[test]
fn only_what_the_gate_admitted_is_backed_up() {
    let folder = tempfile::tempdir().unwrap();
    let repository = Repository::create(folder.path(), PASSWORD).unwrap();
    let source = Disks::new(3, &[("a", &[1])]);
    let never = AtomicBool::new(false);
    for wrong in [meta(VM, 4), BackupMeta { vm: VmId::from_bytes([1; 16]), ..meta(VM, 3) }] {
        let error = repository.backup(&source, wrong, None, &|_| (), &never).unwrap_err();
        assert!(error.to_string().contains("the gate admitted"), "{error}");
    }
    let twins = Disks::new(3, &[("a", &[1]), ("a", &[2])]);
    assert_eq!(backup(&repository, &twins, None).unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(repository.backups(None).unwrap(), []);
}

#[test]
fn several_vms_are_backed_up_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let repository = Repository::create(folder.path(), PASSWORD).unwrap();
    let shared = Chance::new(1).bytes(8 * CHUNK);
    let images: Vec<Vec<u8>> =
        (0..3_u64).map(|vm| [&shared[..], &Chance::new(vm + 5).bytes(8 * CHUNK)].concat()).collect();
    let reports: Vec<_> = std::thread::scope(|scope| {
        let runs = images.iter().enumerate().map(|(number, image)| {
            let (vm, repository) = (VmId::from_bytes([u8::try_from(number).unwrap(); 16]), &repository);
            scope.spawn(move || backup(repository, &Disks::of(vm, 1, &[("a", image)]), None).unwrap())
        });
        runs.collect::<Vec<_>>().into_iter().map(|run| run.join().unwrap()).collect()
    });
    for (report, image) in reports.iter().zip(&images) {
        assert_restores(&repository, &report.backup, &[("a", image)]);
    }
    assert_eq!(repository.backups(None).unwrap().len(), 3);
    is_whole(&repository);
    restic_ok(folder.path(), &["check", "--read-data"]);
}

#[test]
fn our_lock_and_restics_keep_each_other_out() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_owned();
    let repository = Repository::create(&path, PASSWORD).unwrap();
    let disk = Chance::new(3).bytes(30 * CHUNK);
    // While a backup runs, restic will not prune.
    let refused = Mutex::new(None);
    let source = Disks { slow: Duration::from_millis(100), ..Disks::new(1, &[("a", &disk)]) };
    let progress = |_: Progress| {
        refused.lock().unwrap().get_or_insert_with(|| restic(&path, &["prune"]));
    };
    repository.backup(&source, meta(VM, 1), None, &progress, &AtomicBool::new(false)).unwrap();
    let refused = refused.into_inner().unwrap().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("already locked"), "{said}");

    // While restic has an exclusive lock, we do not back up; a lock of the dead is cleared away.
    let mut pruning = restic_holding_exclusive_lock(&path);
    let error = backup(&repository, &Disks::new(2, &[("a", &disk)]), None).unwrap_err();
    assert!(error.kind() == ErrorKind::Locked && error.to_string().contains("repository unlock"), "{error}");
    pruning.kill().unwrap();
    pruning.wait().unwrap();
    assert_eq!(files(&path, "locks").len(), 1);
    backup(&repository, &Disks::new(2, &[("a", &disk)]), None).unwrap();
    assert_eq!(files(&path, "locks").len(), 0);

    // Somebody takes our lock away in the middle: nothing is certain any more.
    let progress = |_: Progress| {
        restic_ok(&path, &["unlock", "--remove-all"]);
    };
    let source = Disks { slow: Duration::from_millis(100), ..Disks::new(3, &[("a", &disk)]) };
    let error =
        repository.backup(&source, meta(VM, 3), None, &progress, &AtomicBool::new(false)).unwrap_err();
    assert!(error.to_string().contains("removed our lock"), "{error}");
    assert_eq!(repository.backups(None).unwrap().len(), 2);
}

/// restic at `prune`, stopped as soon as its exclusive lock is there.
fn restic_holding_exclusive_lock(path: &Path) -> std::process::Child {
    let mut child = need("restic", "restic")
        .args(["--no-cache", "--repo"])
        .arg(path)
        .args(["check", "--read-data"])
        .env("RESTIC_PASSWORD", PASSWORD)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
    // Its lock has another name while it is still being written.
    let locked = || files(path, "locks").iter().any(|lock| lock.file_name().unwrap().len() == 64);
    for _ in 0..2000 {
        if locked() {
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).unwrap();
            assert!(locked(), "restic was done before it could be stopped");
            return child;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    panic!("restic has taken no lock within 4 s");
}

#[test]
fn a_restore_overwrites_nothing_unasked_and_knows_its_disks() {
    let folder = tempfile::tempdir().unwrap();
    let repository = Repository::create(folder.path().join("r"), PASSWORD).unwrap();
    let (a, b) = (image(1, 2 * CHUNK), image(2, CHUNK));
    let info = backup(&repository, &Disks::new(1, &[("a", &a), ("b", &b)]), None).unwrap().backup;
    let to = folder.path().join("out");
    let never = AtomicBool::new(false);
    let only = |name: &str| Some(vec![name.parse().unwrap()]);
    let options = RestoreOptions { disks: only("b"), ..RestoreOptions::to(&to) };
    repository.restore(&info, &options, &|_| (), &never).unwrap();
    assert_eq!(std::fs::read_dir(&to).unwrap().count(), 1);
    std::fs::write(to.join("b.raw"), "mine").unwrap();
    let error = repository.restore(&info, &RestoreOptions::to(&to), &|_| (), &never).unwrap_err();
    assert!(error.kind() == ErrorKind::FileExists && error.to_string().contains("b.raw"), "{error}");
    assert_eq!(std::fs::read(to.join("b.raw")).unwrap(), b"mine");
    assert!(!to.join("a.raw").exists(), "it is looked at before anything is written");
    let options = RestoreOptions { overwrite: true, ..RestoreOptions::to(&to) };
    repository.restore(&info, &options, &|_| (), &never).unwrap();
    assert!(std::fs::read(to.join("b.raw")).unwrap() == b);
    let options = RestoreOptions { disks: only("c"), ..RestoreOptions::to(&to) };
    let error = repository.restore(&info, &options, &|_| (), &never).unwrap_err();
    assert!(error.to_string().contains("has no disk c; it has: a, b"), "{error}");
}

/// This test's binary again, as another process that runs only the test `name`.
fn again(name: &str, folder: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([name, "--exact", "--nocapture", "--test-threads=1"]);
    command.env("AFTERIMAGE_TEST_FOLDER", folder).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// Where this process was told to work, if it is the other one.
fn told() -> Option<PathBuf> {
    std::env::var_os("AFTERIMAGE_TEST_FOLDER").map(PathBuf::from)
}

/// The state of the disk at each point of the killed writer's history.
fn killed_disk(number: u64) -> Vec<u8> {
    let mut disk = Chance::new(77).bytes(100 * CHUNK);
    for step in 1..=number {
        let place = usize::try_from(step % 50).unwrap() * CHUNK;
        disk[place..place + 30 * CHUNK].copy_from_slice(&Chance::new(step).bytes(30 * CHUNK));
    }
    disk
}

/// How many backups a repository lists.
fn snapshots(folder: &Path) -> usize {
    folder.join("snapshots").read_dir().map_or(0, Iterator::count)
}

#[test]
fn a_killed_writer_leaves_only_whole_backups() {
    if let Some(folder) = told() {
        let repository = Repository::open(folder, PASSWORD).unwrap();
        let mut number = repository.backups(None).unwrap().last().map_or(0, |last| last.point.number.0);
        loop {
            number += 1;
            let disk = killed_disk(number);
            backup(&repository, &Disks::new(number, &[("a", &disk)]), None).unwrap();
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let repository = Repository::create(folder.path(), PASSWORD).unwrap();
    let mut chance = Chance::new(u64::from(std::process::id()));
    for _ in 0..6 {
        let before = snapshots(folder.path());
        let mut writer = again("a_killed_writer_leaves_only_whole_backups", folder.path()).spawn().unwrap();
        // However slow the machine is, it has made one, and is anywhere in the next ones.
        while snapshots(folder.path()) == before {
            assert!(writer.try_wait().unwrap().is_none(), "the writer ended by itself");
            std::thread::sleep(Duration::from_millis(5));
        }
        std::thread::sleep(Duration::from_millis(chance.below(700)));
        writer.kill().unwrap();
        writer.wait().unwrap();
        is_whole(&repository);
    }
    let backups = repository.backups(None).unwrap();
    assert!(backups.len() >= 6, "a backup that was made is not listed");
    for info in backups.iter().rev().take(3) {
        assert_restores(&repository, info, &[("a", &killed_disk(info.point.number.0))]);
    }
    let next = backups.last().unwrap().point.number.0 + 1;
    let disk = killed_disk(next);
    let report = backup(&repository, &Disks::new(next, &[("a", &disk)]), backups.last()).unwrap();
    assert_restores(&repository, &report.backup, &[("a", &disk)]);
    restic_ok(folder.path(), &["check", "--read-data"]);
}

#[test]
fn a_full_disk_is_told_and_nothing_is_left_half_done() {
    if let Some(folder) = told() {
        return on_a_small_disk(&folder);
    }
    let folder = tempfile::tempdir().unwrap();
    let child = again("a_full_disk_is_told_and_nothing_is_left_half_done", folder.path());
    // A file system of 24 MiB, in a mount namespace of the child's own.
    let rights: &[&str] =
        if nix::unistd::geteuid().is_root() { &["--mount"] } else { &["--mount", "--map-root-user"] };
    let output = need("unshare", "util-linux")
        .args(rights)
        .args([
            "sh",
            "-c",
            "mount -t tmpfs -o size=24m none \"$AFTERIMAGE_TEST_FOLDER\" && exec \"$0\" \"$@\"",
        ])
        .arg(child.get_program())
        .args(child.get_args())
        .env("AFTERIMAGE_TEST_FOLDER", folder.path())
        .output()
        .unwrap();
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

fn on_a_small_disk(folder: &Path) {
    let path = folder.join("r");
    let repository = Repository::create(&path, PASSWORD).unwrap();
    let small = Chance::new(1).bytes(8 * CHUNK);
    let info = backup(&repository, &Disks::new(1, &[("a", &small)]), None).unwrap().backup;
    let large = Chance::new(2).bytes(120 * CHUNK);
    let error = backup(&repository, &Disks::new(2, &[("a", &large)]), None).unwrap_err();
    assert!(error.kind() == ErrorKind::NoSpace && error.to_string().contains("make room"), "{error}");
    assert_eq!(repository.backups(None).unwrap(), std::slice::from_ref(&info));
    is_whole(&repository);

    std::fs::write(folder.join("ballast"), vec![1; 2 << 20]).unwrap();
    let to = folder.join("out");
    let fill = (0..).take_while(|number| {
        std::fs::write(folder.join(format!("ballast{number}")), vec![1; 1 << 20]).is_ok()
    });
    assert!(fill.count() > 0);
    let error =
        repository.restore(&info, &RestoreOptions::to(&to), &|_| (), &AtomicBool::new(false)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
    assert_eq!(std::fs::read_dir(&to).map_or(0, Iterator::count), 0, "no half disk is left");
}
