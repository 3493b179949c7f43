//! Damage: each kind has its own error, unharmed parts can be saved, and the next backup mends what it can.

mod support;

use std::path::Path;
use std::sync::atomic::AtomicBool;

use repository::{
    BackupInfo, Damage, Error, ErrorKind, Repository, RestoreOptions, RestoreReport, VerifyOptions,
};
use support::*;

fn open(path: &Path) -> Result<Repository, Error> {
    Repository::open(path, PASSWORD)
}

fn restore(
    repository: &Repository,
    info: &BackupInfo,
    keep_going: bool,
    to: &Path,
) -> Result<RestoreReport, Error> {
    let options = RestoreOptions { keep_going, overwrite: true, ..RestoreOptions::to(to) };
    repository.restore(info, &options, &|_| (), &AtomicBool::new(false))
}

fn verify(repository: &Repository, read_data: bool) -> Vec<Damage> {
    let options = VerifyOptions { read_data, ..VerifyOptions::default() };
    repository.verify(&options, &|_| (), &AtomicBool::new(false)).unwrap().damaged
}

#[test]
fn what_cannot_be_opened_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("r");
    let missing = open(&path).unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::RepositoryMissing);
    assert!(missing.to_string().contains("make one first"), "{missing}");

    drop(Repository::create(&path, PASSWORD).unwrap());
    assert_eq!(Repository::create(&path, PASSWORD).unwrap_err().kind(), ErrorKind::RepositoryExists);
    assert_eq!(Repository::open(&path, "wrong").unwrap_err().kind(), ErrorKind::WrongPassword);
    drop(open(&path).unwrap());

    let key = &files(&path, "keys")[0];
    let good = std::fs::read(key).unwrap();
    for place in [10, good.len() / 2, good.len() - 3] {
        flip(key, place);
        let error = open(&path).unwrap_err();
        assert!(error.to_string().contains("its key") && error.kind() == ErrorKind::Damaged, "{error}");
        std::fs::write(key, &good).unwrap();
    }
    let config = path.join("config");
    flip(&config, 40);
    let error = open(&path).unwrap_err();
    assert!(error.to_string().contains("'config'") && error.kind() == ErrorKind::Damaged, "{error}");
    std::fs::remove_file(&config).unwrap();
    assert_eq!(open(&path).unwrap_err().kind(), ErrorKind::RepositoryMissing);
    // A repository that has lost its config is not made anew over its keys.
    assert_eq!(Repository::create(&path, PASSWORD).unwrap_err().kind(), ErrorKind::Damaged);
}

/// Two backups; the second changes one chunk of `a` and adds a pack of its own.
fn two_backups(path: &Path) -> (Repository, [BackupInfo; 2], [Vec<u8>; 2], Vec<u8>) {
    let repository = Repository::create(path, PASSWORD).unwrap();
    let a = Chance::new(1).bytes(6 * CHUNK);
    let b = Chance::new(2).bytes(2 * CHUNK);
    let first = backup(&repository, &Disks::new(1, &[("a", &a), ("b", &b)]), None).unwrap().backup;
    let mut changed = a.clone();
    changed[3 * CHUNK] ^= 1;
    let place = 3 * CHUNK as u64;
    let source =
        Disks::new(2, &[("a", &changed), ("b", &b)]).with_changes(1, vec![vec![place..place + 1], vec![]]);
    let second = backup(&repository, &source, Some(&first)).unwrap().backup;
    (repository, [first, second], [a, changed], b)
}

/// Packs by whether they hold chunks: those of trees are small here.
fn data_packs(path: &Path) -> Vec<std::path::PathBuf> {
    let mut packs = files(path, "data");
    packs.retain(|pack| pack.metadata().unwrap().len() > CHUNK as u64);
    packs.sort_by_key(|pack| pack.metadata().unwrap().len());
    packs
}

#[test]
fn a_damaged_chunk_is_named_and_the_rest_can_be_saved() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("r");
    let (repository, [first, second], [a, changed], b) = two_backups(&path);
    assert_eq!(verify(&repository, true), []);
    // The pack of the second backup's own chunk.
    let pack = &data_packs(&path)[0];
    flip(pack, 1000);
    assert_eq!(verify(&repository, false), [], "only reading shows it");
    let damage = verify(&repository, true);
    let [found] = &damage[..] else { panic!("{damage:?}") };
    let expected = (Some(second.id), Some(VM), Some(second.point.number), Some("a".parse().unwrap()));
    assert_eq!((found.backup, found.vm, found.point, found.disk.clone()), expected);
    assert!(found.offset + found.len <= a.len() as u64 && found.len > 0, "{found:?}");
    assert!(found.why.contains("pack"), "{found:?}");

    let to = folder.path().join("out");
    let error = restore(&repository, &second, false, &to).unwrap_err();
    let Error::ChunkDamaged { disk, offset, len, .. } = &error else { panic!("{error}") };
    assert_eq!((disk.as_str(), *offset, *len), ("a", found.offset, found.len));
    assert!(error.to_string().contains("--keep-going"), "{error}");
    assert_eq!(std::fs::read_dir(&to).unwrap().count(), 0, "no half disk is left");

    let report = restore(&repository, &second, true, &to).unwrap();
    let [range] = &report.damaged[..] else { panic!("{report:?}") };
    assert_eq!((range.offset, range.len), (found.offset, found.len));
    let mut expected = changed.clone();
    let gap = usize::try_from(found.offset).unwrap()..usize::try_from(found.offset + found.len).unwrap();
    expected[gap].fill(0);
    assert!(std::fs::read(to.join("a.raw")).unwrap() == expected);
    assert!(std::fs::read(to.join("b.raw")).unwrap() == b);
    // The other backup is as it was.
    assert_restores(&repository, &first, &[("a", &a), ("b", &b)]);
}

#[test]
fn a_lost_pack_is_named_and_the_next_backup_mends_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("r");
    let (_, [first, second], [_, changed], b) = two_backups(&path);
    let lost = data_packs(&path).pop().unwrap();
    std::fs::remove_file(&lost).unwrap();
    let repository = open(&path).unwrap();
    let damage = verify(&repository, false);
    let of = |info: &BackupInfo| {
        damage.iter().filter(|damage| damage.backup == Some(info.id) && damage.disk.is_some()).count()
    };
    assert_eq!(of(&first), 2, "both disks, each as one range: {damage:?}");
    assert!(of(&second) >= 2, "what has changed is still there: {damage:?}");
    let place = 3 * CHUNK as u64;
    let hits = |damage: &Damage| damage.offset <= place && place < damage.offset + damage.len;
    let of_a = |damage: &&Damage| damage.disk.as_ref().is_some_and(|disk| disk.as_str() == "a");
    assert!(!damage.iter().filter(of_a).any(|damage| damage.backup == Some(second.id) && hits(damage)));
    assert!(damage.iter().all(|damage| damage.why.contains("is missing")), "{damage:?}");
    assert_eq!(restore(&repository, &first, false, folder.path()).unwrap_err().kind(), ErrorKind::Damaged);

    // The parent's chunks are gone: what it would have taken over is read again, and old backups heal too.
    let source = Disks::new(3, &[("a", &changed), ("b", &b)]).with_changes(2, vec![vec![], vec![]]);
    let report = backup(&repository, &source, Some(&second)).unwrap();
    let all = (changed.len() + b.len()) as u64;
    assert_eq!(report.bytes_read, all - second.bytes_read, "all but what is still there");
    assert_restores(&repository, &report.backup, &[("a", &changed), ("b", &b)]);
    assert_restores(&repository, &second, &[("a", &changed), ("b", &b)]);
}

#[test]
fn a_pack_cut_short_is_seen_without_reading_it() {
    let folder = tempfile::tempdir().unwrap();
    let (repository, ..) = two_backups(folder.path());
    let pack = std::fs::File::options().write(true).open(&data_packs(folder.path())[0]).unwrap();
    pack.set_len(100).unwrap();
    let damage = verify(&repository, false);
    let in_disks: Vec<_> = damage.iter().filter(|damage| damage.disk.is_some()).collect();
    assert!(in_disks.len() == 1 && in_disks[0].why.contains("too short"), "{damage:?}");
}

#[test]
fn a_damaged_index_is_named_with_its_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("r");
    let (_, [first, second], [a, changed], b) = two_backups(&path);
    let index = files(&path, "index");
    assert_eq!(index.len(), 2);
    index.iter().for_each(|file| flip(file, 60));
    let repository = open(&path).unwrap();
    let damage = verify(&repository, false);
    assert_eq!(damage.len(), 4, "two files, and two backups whose lists they name: {damage:?}");
    assert!(damage.iter().all(|damage| damage.why.contains("restic rebuild-index")), "{damage:?}");
    let error = restore(&repository, &first, false, folder.path()).unwrap_err();
    assert!(error.to_string().contains("restic rebuild-index"), "{error}");

    // Without its parent's list a backup reads everything, and is whole.
    let source = Disks::new(3, &[("a", &changed), ("b", &b)]).with_changes(2, vec![vec![], vec![]]);
    let report = backup(&repository, &source, Some(&second)).unwrap();
    assert_eq!(report.incremental_disks, 0);
    assert_restores(&repository, &report.backup, &[("a", &changed), ("b", &b)]);

    // The remedy works.
    index.iter().for_each(|file| std::fs::remove_file(file).unwrap());
    restic_ok(&path, &["rebuild-index"]);
    assert_eq!(verify(&repository, true), []);
    assert_restores(&repository, &first, &[("a", &a), ("b", &b)]);
}

#[test]
fn a_damaged_snapshot_hides_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let (repository, [first, second], [a, _], b) = two_backups(folder.path());
    flip(&folder.path().join("snapshots").join(second.id.to_string()), 50);
    assert_eq!(repository.backups(None).unwrap(), std::slice::from_ref(&first));
    let error = repository.find(&second.id.short()).unwrap_err();
    assert!(matches!(&error, Error::BackupDamaged { .. }), "{error}");
    let damage = verify(&repository, false);
    assert!(damage.len() == 1 && damage[0].backup == Some(second.id), "{damage:?}");
    assert_restores(&repository, &first, &[("a", &a), ("b", &b)]);
}

#[test]
fn every_flipped_bit_of_a_pack_is_noticed_or_harmless() {
    let folder = tempfile::tempdir().unwrap();
    let repository = Repository::create(folder.path(), PASSWORD).unwrap();
    let disk = image(5, CHUNK + 10_000);
    let info = backup(&repository, &Disks::new(1, &[("a", &disk)]), None).unwrap().backup;
    let mut chance = Chance::new(11);
    for pack in files(folder.path(), "data") {
        let good = std::fs::read(&pack).unwrap();
        for _ in 0..40 {
            flip(&pack, usize::try_from(chance.below(good.len() as u64)).unwrap());
            let to = tempfile::tempdir().unwrap();
            match restore(&repository, &info, false, to.path()) {
                Ok(_) => assert!(std::fs::read(to.path().join("a.raw")).unwrap() == disk),
                Err(error) => assert_eq!(error.kind(), ErrorKind::Damaged, "{error}"),
            }
            std::fs::write(&pack, &good).unwrap();
        }
    }
}

#[test]
fn ids_are_found_by_their_beginning() {
    let folder = tempfile::tempdir().unwrap();
    let (repository, [first, second], ..) = two_backups(folder.path());
    assert_eq!(repository.find(&first.id.to_string()).unwrap(), first);
    assert_eq!(repository.find(&second.id.short().to_uppercase()).unwrap(), second);
    for none in ["", "zz", "../../config", &"0".repeat(64), &"f".repeat(65)] {
        assert_eq!(repository.find(none).unwrap_err().kind(), ErrorKind::BackupNotFound, "{none:?}");
    }
    let mut ids: Vec<String> = vec![first.id.to_string(), second.id.to_string()];
    let mut number = 3;
    // Among seventeen backups two begin with the same digit.
    let ambiguous = loop {
        ids.sort();
        if let Some(pair) = ids.windows(2).find(|pair| pair[0][..1] == pair[1][..1]) {
            break pair[0][..1].to_owned();
        }
        ids.push(backup(&repository, &Disks::new(number, &[]), None).unwrap().backup.id.to_string());
        number += 1;
    };
    let error = repository.find(&ambiguous).unwrap_err();
    assert!(
        error.kind() == ErrorKind::BackupAmbiguous && error.to_string().contains("more digits"),
        "{error}"
    );
}
