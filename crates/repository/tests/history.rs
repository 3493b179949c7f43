//! Random images, random changes, chains of incremental backups: each restores exactly, and none reads more
//! than it must.

mod support;

use std::ops::Range;
use std::sync::Arc;

use repository::{BackupInfo, Repository};
use support::*;

/// Changes a disk at random and says where; now and then it grows or shrinks.
fn change(disk: &mut Vec<u8>, chance: &mut Chance) -> Vec<Range<u64>> {
    let mut changed = Vec::new();
    if chance.below(5) == 0 {
        let (old_len, len) = (disk.len() as u64, 1 + chance.below(50 * CHUNK as u64));
        disk.resize(usize::try_from(len).unwrap(), 0);
        // Between two backups a disk may shrink and grow again: growing is a change too.
        changed.extend((len > old_len).then_some(old_len..len));
    }
    for _ in 0..chance.below(5) {
        let offset = chance.below(disk.len() as u64);
        let len = 1 + chance.below((disk.len() as u64 - offset).min(CHUNK as u64 + 5000));
        let range = usize::try_from(offset).unwrap()..usize::try_from(offset + len).unwrap();
        match chance.below(3) {
            0 => disk[range].fill(0),
            1 => disk[range].fill(9),
            _ => {
                let bytes = chance.bytes(range.len());
                disk[range].copy_from_slice(&bytes);
            }
        }
        changed.push(offset..offset + len);
    }
    changed.sort_by_key(|range| range.start);
    changed
}

struct Made {
    info: BackupInfo,
    number: u64,
    disks: [Vec<u8>; 2],
}

fn history(seed: u64) {
    let folder = tempfile::tempdir().unwrap();
    let repository = Repository::create(folder.path(), PASSWORD).unwrap();
    let mut chance = Chance::new(seed);
    let mut disks = [image(seed, 40 * CHUNK + 77), image(seed + 1, 9 * CHUNK)];
    let mut changes: Vec<[Vec<Range<u64>>; 2]> = Vec::new();
    let mut made: Vec<Made> = Vec::new();
    for number in 1..10_u64 {
        let [first, second] = &mut disks;
        changes.push([change(first, &mut chance), change(second, &mut chance)]);
        // Any earlier backup can be the parent; what has changed since is the union over all points between.
        let parent = (chance.below(4) > 0 && !made.is_empty())
            .then(|| &made[usize::try_from(chance.below(made.len() as u64)).unwrap()]);
        let named = [("a", &disks[0][..]), ("b", &disks[1][..])];
        let mut source = Disks::new(number, &named);
        if let Some(parent) = parent {
            let since = |disk: usize| {
                changes[usize::try_from(parent.number).unwrap()..]
                    .iter()
                    .flat_map(|c| c[disk].clone())
                    .collect()
            };
            source = source.with_changes(parent.number, vec![since(0), since(1)]);
        }
        let report = backup(&repository, &source, parent.map(|parent| &parent.info)).unwrap();
        assert_eq!(report.bytes_read, source.bytes_read(), "what was read is what was counted");
        if let Some(parent) = parent {
            assert_eq!(report.incremental_disks, 2, "seed {seed}, point {number}");
            assert_only_changes_were_read(&source, parent);
        }
        made.push(Made { info: report.backup, number, disks: disks.clone() });
    }
    let repository = Arc::new(Repository::open(folder.path(), PASSWORD).unwrap());
    let listed = repository.backups(None).unwrap();
    assert_eq!(listed, made.iter().map(|made| made.info.clone()).collect::<Vec<_>>());
    for made in &made {
        assert_restores(&repository, &made.info, &[("a", &made.disks[0]), ("b", &made.disks[1])]);
        assert_reads_anywhere(&repository, made, &mut chance);
    }
    let report = repository
        .verify(
            &repository::VerifyOptions { read_data: true, ..Default::default() },
            &|_| (),
            &std::sync::atomic::AtomicBool::new(false),
        )
        .unwrap();
    assert_eq!((report.backups, report.damaged), (made.len(), vec![]));
    restic_ok(folder.path(), &["check", "--read-data"]);
}

/// Every read is near a change (within the longest chunk), or past the end of what was, and in no hole.
fn assert_only_changes_were_read(source: &Disks, parent: &Made) {
    let longest = (3 << 20) + (128 << 10);
    for (disk, read) in source.reads.lock().unwrap().iter() {
        let size = source.bytes[*disk].len() as u64;
        let old_size = parent.disks[*disk].len() as u64;
        let resized = (size != old_size).then(|| size.min(old_size)..size.max(old_size));
        let all = source.changed[&parent.number][*disk].iter().cloned().chain(resized);
        let near =
            all.into_iter().any(|range| range.start < read.end + longest && read.start < range.end + longest);
        assert!(near, "disk {disk}: {read:?} was read, and nothing changed there");
        let start = usize::try_from(read.start).unwrap();
        let bytes = &source.bytes[*disk][start..usize::try_from(read.end).unwrap()];
        assert!(bytes.chunks(4096).all(|block| block.iter().any(|byte| *byte != 0)), "a hole was read");
    }
    assert!(source.bytes_read() <= allowed(source, parent, longest));
}

/// What may be read at most: each change with a chunk before and behind it.
fn allowed(source: &Disks, parent: &Made, longest: u64) -> u64 {
    let of_disk = |disk: usize| {
        let changes = source.changed[&parent.number][disk].iter();
        let resized = (source.bytes[disk].len()).saturating_sub(parent.disks[disk].len()) as u64 + longest;
        changes.map(|range| range.end - range.start + 2 * longest).sum::<u64>() + resized
    };
    of_disk(0) + of_disk(1)
}

fn assert_reads_anywhere(repository: &Arc<Repository>, made: &Made, chance: &mut Chance) {
    let reader = repository.reader(&made.info).unwrap();
    for _ in 0..20 {
        let disk = usize::try_from(chance.below(2)).unwrap();
        let bytes = &made.disks[disk];
        let offset = usize::try_from(chance.below(bytes.len() as u64)).unwrap();
        let len = usize::try_from(chance.below((bytes.len() - offset) as u64 + 1)).unwrap();
        let mut buffer = vec![0xee; len];
        reader.read_at(disk, offset as u64, &mut buffer).unwrap();
        assert!(buffer == bytes[offset..offset + len]);
    }
    assert!(reader.read_at(0, made.disks[0].len() as u64, &mut [0]).is_err());
    assert!(reader.read_at(2, 0, &mut [0]).is_err());
    assert!(reader.read_at(0, u64::MAX, &mut [0]).is_err());
}

#[test]
fn every_backup_of_a_random_history_restores_exactly() {
    for seed in 0..4 {
        history(seed);
    }
}

#[test]
fn a_parent_of_a_later_point_or_another_vm_is_not_trusted() {
    let folder = tempfile::tempdir().unwrap();
    let repository = Repository::create(folder.path(), PASSWORD).unwrap();
    let (old, new) = (image(8, 3 * CHUNK), image(9, 3 * CHUNK));
    let later = backup(&repository, &Disks::new(9, &[("a", &new)]), None).unwrap().backup;
    // Nothing has changed since point 9 says nothing of point 5.
    let source = Disks::new(5, &[("a", &old)]).with_changes(9, vec![vec![]]);
    let earlier = backup(&repository, &source, Some(&later)).unwrap();
    assert_eq!((earlier.incremental_disks, earlier.backup.parent), (0, None));
    assert_restores(&repository, &earlier.backup, &[("a", &old)]);

    let other = model::VmId::from_bytes([8; 16]);
    let source = Disks::of(other, 9, &[("a", &old)]).with_changes(9, vec![vec![]]);
    let report = backup(&repository, &source, Some(&later)).unwrap();
    assert_eq!(report.incremental_disks, 0);
    assert_restores(&repository, &report.backup, &[("a", &old)]);
    assert_eq!(repository.backups(Some(other)).unwrap(), [report.backup]);

    // The same point again: nothing is read.
    let source = Disks::new(9, &[("a", &new)]).with_changes(9, vec![vec![]]);
    let again = backup(&repository, &source, Some(&later)).unwrap();
    assert_eq!((again.bytes_read, again.chunks_added), (0, 0), "but for what is small");
    assert_restores(&repository, &again.backup, &[("a", &new)]);
}

#[test]
fn where_changes_are_not_known_everything_is_read_but_nothing_is_stored_twice() {
    let folder = tempfile::tempdir().unwrap();
    let repository = Repository::create(folder.path(), PASSWORD).unwrap();
    let disk = Chance::new(3).bytes(8 * CHUNK);
    let first = backup(&repository, &Disks::new(1, &[("a", &disk)]), None).unwrap();
    let source = Disks::new(2, &[("a", &disk)]);
    let second = backup(&repository, &source, Some(&first.backup)).unwrap();
    assert_eq!(second.bytes_read, disk.len() as u64);
    assert!(second.bytes_added < 10_000, "{} bytes", second.bytes_added);
    // A disk that the parent has not is read whole, beside one that it has.
    let source = Disks::new(3, &[("a", &disk), ("b", &disk)]).with_changes(1, vec![vec![], vec![]]);
    let third = backup(&repository, &source, Some(&first.backup)).unwrap();
    assert_eq!((third.incremental_disks, third.bytes_read), (1, disk.len() as u64));
    assert_restores(&repository, &third.backup, &[("a", &disk), ("b", &disk)]);
}
