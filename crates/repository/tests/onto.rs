//! Restores over what is there: whatever was there before, and wherever a restore was cut off, the target is the disk
//! in the end, and only what differed was written.

mod support;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use repository::{BackupInfo, Error, OntoOptions, OntoReport, Repository};
use support::*;

fn onto(
    repository: &Repository,
    backup: &BackupInfo,
    path: &Path,
    overwrite: bool,
) -> Result<OntoReport, Error> {
    let options =
        OntoOptions { disks: vec![("a".parse().unwrap(), path.to_owned())], keep_going: false, overwrite };
    repository.onto(backup, &options)?.run(&|_| (), &AtomicBool::new(false))
}

#[test]
fn a_target_becomes_the_disk_whatever_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let repository = Repository::create(folder.path().join("repository"), PASSWORD).unwrap();
    let target = folder.path().join("target");
    let mut chance = Chance::new(5);
    let disk = image(1, 20 * CHUNK + 1000);
    let made = backup(&repository, &Disks::new(1, &[("a", &disk)]), None).unwrap().backup;
    for was in [Vec::new(), image(2, disk.len()), vec![7; disk.len()], vec![0; disk.len()], disk.clone()] {
        std::fs::write(&target, &was).unwrap();
        let report = onto(&repository, &made, &target, true).unwrap();
        assert!(std::fs::read(&target).unwrap() == disk);
        assert_eq!(report.disks[0].written_bytes == 0, was == disk);
    }
    for _ in 0..20 {
        // A few blocks differ: they and no others are written.
        let mut other = disk.clone();
        let mut blocks = std::collections::BTreeSet::new();
        for _ in 0..chance.below(6) {
            let place = usize::try_from(chance.below(disk.len() as u64)).unwrap();
            other[place] ^= 1;
            blocks.insert(place / 4096);
        }
        std::fs::write(&target, &other).unwrap();
        let report = onto(&repository, &made, &target, true).unwrap();
        assert!(std::fs::read(&target).unwrap() == disk);
        // A byte that was changed twice is as it was.
        let differs = |block: &&usize| {
            let range = *block * 4096..disk.len().min((*block + 1) * 4096);
            other[range.clone()] != disk[range]
        };
        let bytes = |block: &usize| (disk.len() - block * 4096).min(4096) as u64;
        let expected: u64 = blocks.iter().filter(differs).map(bytes).sum();
        assert_eq!(report.disks[0].written_bytes, expected);
    }
}

#[test]
fn a_restore_that_was_stopped_says_what_the_target_is_and_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let repository = Repository::create(folder.path().join("repository"), PASSWORD).unwrap();
    let target = folder.path().join("target");
    let disk = Chance::new(9).bytes(64 << 20);
    let made = backup(&repository, &Disks::new(1, &[("a", &disk)]), None).unwrap().backup;
    std::fs::write(&target, vec![1; disk.len()]).unwrap();
    let options = OntoOptions {
        disks: vec![("a".parse().unwrap(), target.clone())],
        keep_going: false,
        overwrite: true,
    };
    let prepared = repository.onto(&made, &options).unwrap();
    let refused = repository.onto(&made, &options).err().unwrap().to_string();
    assert!(refused.contains("in use"), "two restores onto one target: {refused}");
    let cancel = AtomicBool::new(true);
    match prepared.run(&|_| (), &cancel) {
        Ok(_) => panic!("it was to be stopped"),
        Err(Error::Cancelled) => {}
        Err(error @ Error::HalfWritten { .. }) => {
            assert!(error.to_string().contains("goes on"), "{error}");
        }
        Err(error) => panic!("{error}"),
    }
    cancel.store(false, Ordering::SeqCst);
    let done = prepared.run(&|_| (), &cancel).unwrap();
    assert!(done.disks[0].written_bytes <= disk.len() as u64);
    assert!(std::fs::read(&target).unwrap() == disk);
}

#[test]
fn a_damaged_chunk_is_named_and_zeros_are_in_its_place_if_that_is_wished() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("repository");
    let repository = Repository::create(&path, PASSWORD).unwrap();
    let target = folder.path().join("target");
    let disk = Chance::new(4).bytes(4 * CHUNK);
    let made = backup(&repository, &Disks::new(1, &[("a", &disk)]), None).unwrap().backup;
    let largest = files(&path, "data").into_iter().max_by_key(|file| file.metadata().unwrap().len()).unwrap();
    flip(&largest, 100_000);
    let mut options = OntoOptions {
        disks: vec![("a".parse().unwrap(), target.clone())],
        keep_going: false,
        overwrite: true,
    };
    let run = |options: &OntoOptions| {
        repository.onto(&made, options).and_then(|onto| onto.run(&|_| (), &AtomicBool::new(false)))
    };
    run(&options).unwrap_err();
    options.keep_going = true;
    let report = run(&options).unwrap();
    let [lost] = &report.damaged[..] else { panic!("{report:?}") };
    let mut expected = disk.clone();
    let lost = usize::try_from(lost.offset).unwrap()..usize::try_from(lost.offset + lost.len).unwrap();
    expected[lost].fill(0);
    assert!(std::fs::read(&target).unwrap() == expected);
    // What is on the target already need not be read: it heals a backup's damage there.
    std::fs::write(&target, &disk).unwrap();
    options.keep_going = false;
    assert_eq!(run(&options).unwrap().disks[0].written_bytes, 0);
}
