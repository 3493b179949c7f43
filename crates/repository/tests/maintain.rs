//! Forget, prune, copy, keys and locks, beside backups and kills: every backup that is listed restores.

mod support;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use repository::{BackupInfo, ErrorKind, Progress, PruneOptions, Repository, VerifyOptions};
use support::*;

static NEVER: AtomicBool = AtomicBool::new(false);

fn prune(repository: &Repository) -> repository::PruneReport {
    repository.prune(&PruneOptions { unused_percent: 0, ..PruneOptions::default() }, &NEVER).unwrap()
}

fn is_whole(repository: &Repository) {
    let options = VerifyOptions { read_data: true, ..VerifyOptions::default() };
    assert_eq!(repository.verify(&options, &|_| (), &NEVER).unwrap().damaged, []);
}

/// The disk of a point: a part of it is new in each, and what was new comes back.
fn disk(number: u64) -> Vec<u8> {
    let mut disk = Chance::new(99).bytes(60 * CHUNK);
    for step in 1..=number {
        let place = usize::try_from(step * 7 % 40).unwrap() * CHUNK;
        disk[place..place + 15 * CHUNK].copy_from_slice(&Chance::new(step % 11).bytes(15 * CHUNK));
    }
    disk
}

fn make(repository: &Repository, number: u64) -> BackupInfo {
    let disk = disk(number);
    backup(repository, &Disks::new(number, &[("a", &disk)]), None).unwrap().backup
}

#[test]
fn forgotten_backups_give_their_room_back_and_the_others_stay() {
    let folder = tempfile::tempdir().unwrap();
    let repository = Repository::create(folder.path(), PASSWORD).unwrap();
    let made: Vec<_> = (1..=5).map(|number| make(&repository, number)).collect();
    let forgotten = repository.forget(&[made[0].id, made[3].id, made[0].id]).unwrap();
    assert_eq!(forgotten, [made[0].id, made[3].id]);
    assert_eq!(repository.forget(&[made[0].id]).unwrap(), []);
    let report = prune(&repository);
    assert!(report.bytes < report.bytes_before && report.packs > 0, "{report:?}");
    let left = repository.backups(None).unwrap();
    assert_eq!(left.iter().map(|info| info.id).collect::<Vec<_>>(), [made[1].id, made[2].id, made[4].id]);
    for info in &left {
        assert_restores(&repository, info, &[("a", &disk(info.point.number.0))]);
    }
    // The one that was open all the while goes on, on what is left.
    let next = make(&repository, 6);
    assert_restores(&repository, &next, &[("a", &disk(6))]);
    is_whole(&repository);
    let check = repository.check(true, &|_| (), &NEVER).unwrap();
    assert!(check.is_well() && check.unindexed.files == 0 && check.locks.is_empty(), "{check:?}");
    restic_ok(folder.path(), &["check", "--read-data"]);
    repository
        .forget(&repository.backups(None).unwrap().iter().map(|info| info.id).collect::<Vec<_>>())
        .unwrap();
    assert_eq!(prune(&repository).packs, 0);
}

#[test]
fn a_prune_and_a_backup_keep_each_other_out() {
    let folder = tempfile::tempdir().unwrap();
    let repository = Repository::create(folder.path(), PASSWORD).unwrap();
    let bytes = disk(1);
    let refused = Mutex::new(None);
    let source = Disks { slow: Duration::from_millis(20), ..Disks::new(1, &[("a", &bytes)]) };
    let progress = |_: Progress| {
        let other = || Repository::open(folder.path(), PASSWORD).unwrap();
        refused.lock().unwrap().get_or_insert_with(|| other().prune(&PruneOptions::default(), &NEVER));
    };
    repository.backup(&source, meta(VM, 1), None, &progress, &NEVER).unwrap();
    let refused = refused.into_inner().unwrap().unwrap().unwrap_err();
    assert!(refused.kind() == ErrorKind::Locked && refused.to_string().contains("process"), "{refused}");
    // Whoever waits gets its turn.
    let patient = PruneOptions { patience: Duration::from_secs(60), ..PruneOptions::default() };
    std::thread::scope(|scope| {
        let other = Repository::open(folder.path(), PASSWORD).unwrap();
        let running = scope.spawn(|| make(&repository, 2));
        other.prune(&patient, &NEVER).unwrap();
        running.join().unwrap();
    });
    is_whole(&repository);
}

#[test]
fn a_copy_has_the_same_chunks_and_reads_only_what_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (folder.path().join("first"), folder.path().join("second"));
    let from = Repository::create(&first, PASSWORD).unwrap();
    let made: Vec<_> = (1..=3).map(|number| make(&from, number)).collect();
    let to = Repository::create(&second, PASSWORD).unwrap();
    let report = from.copy(&made[..2], &to, &|_| (), &NEVER).unwrap();
    assert_eq!((report.copied.len(), report.there.len(), report.damaged.len()), (2, 0, 0));
    let report = from.copy(&made, &to, &|_| (), &NEVER).unwrap();
    assert_eq!((report.copied.len(), report.there.len()), (1, 2));
    assert!(report.bytes_read < 30 * CHUNK as u64 && report.bytes_added > 0, "{report:?}");
    let report = from.copy(&made, &to, &|_| (), &NEVER).unwrap();
    assert_eq!((report.copied.len(), report.bytes_read, report.bytes_added), (0, 0, 0));
    let copies = to.backups(None).unwrap();
    assert_eq!(copies.len(), 3);
    for (copy, original) in copies.iter().zip(&made) {
        assert_eq!(
            (copy.point, copy.made_at, &copy.disks),
            (original.point, original.made_at, &original.disks)
        );
        assert_restores(&to, copy, &[("a", &disk(copy.point.number.0))]);
    }
    // A backup straight into it finds the chunks there.
    let bytes = disk(3);
    assert_eq!(backup(&to, &Disks::new(3, &[("a", &bytes)]), None).unwrap().chunks_added, 0);
    restic_ok(&second, &["check", "--read-data"]);

    // What is damaged is passed over, and what is whole copied.
    let mut packs = files(&first, "data");
    packs.sort_by_key(|pack| std::fs::metadata(pack).unwrap().modified().unwrap());
    packs.retain(|pack| pack.metadata().unwrap().len() > CHUNK as u64);
    flip(packs.last().unwrap(), 1000);
    let third = Repository::create(folder.path().join("third"), PASSWORD).unwrap();
    let report = from.copy(&made, &third, &|_| (), &NEVER).unwrap();
    assert!(!report.damaged.is_empty() && report.damaged.len() + report.copied.len() == 3, "{report:?}");
    assert_eq!(third.backups(None).unwrap().len(), report.copied.len());
    is_whole(&third);
}

#[test]
fn passwords_and_keys_come_and_go() {
    let folder = tempfile::tempdir().unwrap();
    let repository = Repository::create(folder.path(), PASSWORD).unwrap();
    let info = make(&repository, 1);
    let added = repository.add_key("another", "tenant").unwrap();
    assert!(repository.add_key("", "tenant").is_err());
    let keys = repository.keys().unwrap();
    assert_eq!(keys.len(), 2);
    assert!(keys.iter().any(|key| key.id == added && key.user == "tenant" && !key.current));
    let old = keys.iter().find(|key| key.current).unwrap().id.to_string();
    assert!(repository.remove_key(&old).unwrap_err().to_string().contains("was opened with"));
    let other = Repository::open(folder.path(), "another").unwrap();
    assert_restores(&other, &info, &[("a", &disk(1))]);
    other.remove_key(&old[..8]).unwrap();
    assert_eq!(Repository::open(folder.path(), PASSWORD).unwrap_err().kind(), ErrorKind::WrongPassword);
    assert!(other.remove_key("ff00ff00ff").unwrap_err().to_string().contains("has no key"));
    assert_eq!(Repository::open(folder.path(), "another").unwrap().backups(None).unwrap(), [info]);
}

/// This test's binary again, as a process that makes backups, forgets and prunes until it is killed.
#[test]
fn a_worker_until_it_is_killed() {
    let Some(folder) = std::env::var_os("AFTERIMAGE_TEST_FOLDER").map(PathBuf::from) else { return };
    let seed: u64 = std::env::var("AFTERIMAGE_TEST_SEED").unwrap().parse().unwrap();
    let repository = Repository::open(folder.as_path(), PASSWORD).unwrap();
    let mut chance = Chance::new(seed);
    loop {
        let number = 1 + chance.below(40);
        let disk = disk(number);
        let outcome = match chance.below(4) {
            0 => {
                let mut backups = repository.backups(None).unwrap();
                backups.truncate(usize::try_from(chance.below(3)).unwrap());
                let ids: Vec<_> = backups.iter().map(|info| info.id).collect();
                repository.forget(&ids).map(drop)
            }
            1 => {
                let patience = Duration::from_millis(chance.below(3000));
                repository.prune(&PruneOptions { unused_percent: 0, patience }, &NEVER).map(drop)
            }
            _ => {
                let backups = repository.backups(None).unwrap();
                let mut source = Disks::new(number, &[("a", &disk)]);
                let parent = backups.iter().rfind(|info| info.point.number.0 <= number);
                if let Some(parent) = parent {
                    // What has changed since is known only roughly: anything.
                    let all = 0..disk.len() as u64;
                    source = source.with_changes(parent.point.number.0, vec![vec![all]]);
                }
                backup(&repository, &source, parent).map(drop)
            }
        };
        match outcome {
            Err(error) if error.kind() == ErrorKind::Locked => {}
            outcome => outcome.unwrap(),
        }
    }
}

fn worker(folder: &Path, seed: u64) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["a_worker_until_it_is_killed", "--exact", "--nocapture", "--test-threads=1"])
        .env("AFTERIMAGE_TEST_FOLDER", folder)
        .env("AFTERIMAGE_TEST_SEED", seed.to_string())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Two processes make backups, forget and prune in one repository until they are killed; then all is looked at.
fn interleave(rounds: u64) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("r");
    let repository = Repository::create(&path, PASSWORD).unwrap();
    make(&repository, 1);
    let seed = u64::from(std::process::id());
    let mut chance = Chance::new(seed);
    for round in 0..rounds {
        let mut workers = [worker(&path, seed + 2 * round), worker(&path, seed + 2 * round + 1)];
        std::thread::sleep(Duration::from_millis(1500 + chance.below(3000)));
        for worker in &mut workers {
            let ended = worker.try_wait().unwrap();
            worker.kill().unwrap();
            let mut said = String::new();
            std::io::Read::read_to_string(&mut worker.stderr.take().unwrap(), &mut said).unwrap();
            worker.wait().unwrap();
            assert!(ended.is_none(), "round {round}, seed {seed}: a worker ended by itself: {said}");
        }
        is_whole(&repository);
        for info in repository.backups(None).unwrap() {
            assert_restores(&repository, &info, &[("a", &disk(info.point.number.0))]);
        }
    }
    // What was cut off is cleared away, and stock restic finds nothing wrong.
    assert_eq!(repository.unlock(false).unwrap().kept, Vec::<String>::new());
    prune(&repository);
    is_whole(&repository);
    restic_ok(&path, &["check", "--read-data"]);
}

#[test]
fn prunes_beside_backups_and_kills_harm_no_backup() {
    interleave(4);
}

#[test]
#[ignore = "a soak test: it takes ten minutes"]
fn a_hundred_interleavings_and_kills_harm_no_backup() {
    interleave(100);
}
