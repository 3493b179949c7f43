use std::path::Path;

use files::{FileSystem, Open};

use super::*;

fn disk(seed: u64) -> (SimDisk, Power) {
    let power = Power::default();
    (SimDisk::new(power.clone(), seed), power)
}

fn cut(disk: &SimDisk, power: &Power, loss: Loss) {
    power.cut();
    disk.settle(loss);
    power.boot();
}

fn read(disk: &SimDisk, path: &str) -> Option<Vec<u8>> {
    let file = disk.open(Path::new(path), Open::Read).ok()?;
    let mut bytes = vec![0; usize::try_from(file.len().unwrap()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    Some(bytes)
}

#[test]
fn what_was_synced_stays_and_the_rest_is_chance() {
    let (mut names, mut torn) = (0, 0);
    for seed in 0..200 {
        let (disk, power) = disk(seed);
        disk.create_dir_all(Path::new("/a")).unwrap();
        let file = disk.open(Path::new("/a/kept"), Open::Create).unwrap();
        file.write_all_at(&[1; 8192], 0).unwrap();
        file.sync_all().unwrap();
        disk.sync_dir(Path::new("/a")).unwrap();
        disk.sync_dir(Path::new("/")).unwrap();
        file.write_all_at(&[2; 8192], 0).unwrap();
        disk.open(Path::new("/a/new"), Open::CreateNew).unwrap();
        cut(&disk, &power, Loss::Sectors);
        assert!(file.read_at(&mut [0], 0).is_err(), "a handle does not outlive its process");
        let bytes = read(&disk, "/a/kept").unwrap();
        assert_eq!(bytes.len(), 8192);
        let twos = bytes.iter().filter(|byte| **byte == 2).count();
        assert!(twos % 512 == 0 && bytes.iter().all(|byte| matches!(byte, 1 | 2)));
        torn += usize::from(bytes.chunks(4096).any(|block| block.iter().any(|byte| *byte != block[0])));
        names += usize::from(read(&disk, "/a/new").is_some());
    }
    assert!((50..150).contains(&names) && torn > 190, "{names} {torn}");
}

#[test]
fn a_kill_loses_nothing_but_what_the_cut_after_it_takes() {
    let (disk, power) = disk(1);
    let file = disk.open(Path::new("/f"), Open::Create).unwrap();
    file.write_all_at(b"abc", 0).unwrap();
    cut(&disk, &power, Loss::Nothing);
    assert_eq!(read(&disk, "/f").unwrap(), b"abc");
    cut(&disk, &power, Loss::Everything);
    assert_eq!(read(&disk, "/f"), None);
}

#[test]
fn what_was_removed_and_not_synced_comes_back_whole_after_a_kill_and_a_cut() {
    let (disk, power) = disk(1);
    disk.create_dir_all(Path::new("/a")).unwrap();
    let file = disk.open(Path::new("/a/f"), Open::Create).unwrap();
    file.write_all_at(b"abc", 0).unwrap();
    file.sync_all().unwrap();
    disk.sync_dir(Path::new("/a")).unwrap();
    disk.sync_dir(Path::new("/")).unwrap();
    disk.remove_dir_all(Path::new("/a")).unwrap();
    cut(&disk, &power, Loss::Nothing);
    assert_eq!(read(&disk, "/a/f"), None);
    cut(&disk, &power, Loss::Everything);
    assert_eq!(read(&disk, "/a/f").unwrap(), b"abc");
}

#[test]
fn a_sync_that_failed_is_not_made_good_by_the_next() {
    let mut lost = 0;
    for seed in 0..50 {
        let (disk, power) = disk(seed);
        let file = disk.open(Path::new("/f"), Open::Create).unwrap();
        disk.sync_dir(Path::new("/")).unwrap();
        file.write_all_at(&[7; 4096], 0).unwrap();
        disk.inject(DiskFault { class: Class::Sync, skip: 0, count: 1 });
        assert!(file.sync_data().is_err());
        assert!(file.sync_data().is_ok());
        cut(&disk, &power, Loss::Sectors);
        lost += usize::from(read(&disk, "/f").unwrap() != [7; 4096]);
    }
    assert!((10..48).contains(&lost), "{lost}");
}

#[test]
fn a_site_dies_at_a_step_and_leaves_no_further_trace() {
    for after in [false, true] {
        let (disk, power) = disk(3);
        power.cut_at(2, after);
        let file = disk.open(Path::new("/f"), Open::Create).unwrap();
        assert!(file.write_all_at(b"abc", 0).is_err());
        assert!(file.write_all_at(b"def", 3).is_err() && disk.metadata(Path::new("/f")).is_err());
        cut(&disk, &power, Loss::Nothing);
        assert_eq!(read(&disk, "/f").unwrap(), if after { &b"abc"[..] } else { b"" });
    }
}

#[test]
fn names_are_replaced_whole_within_a_folder() {
    for seed in 0..100 {
        let (disk, power) = disk(seed);
        for (name, byte) in [("/f", 1), ("/f.new", 2)] {
            let file = disk.open(Path::new(name), Open::Create).unwrap();
            file.write_all_at(&[byte], 0).unwrap();
            file.sync_all().unwrap();
            if byte == 1 {
                disk.sync_dir(Path::new("/")).unwrap();
            }
        }
        disk.rename(Path::new("/f.new"), Path::new("/f")).unwrap();
        cut(&disk, &power, Loss::CUTS[seed as usize % 4]);
        assert!(matches!(read(&disk, "/f").unwrap()[..], [1 | 2]));
    }
}

#[test]
fn a_full_disk_takes_what_needs_no_space() {
    let (disk, _) = disk(4);
    let file = disk.open(Path::new("/f"), Open::Create).unwrap();
    file.write_all_at(&[1; 4096], 0).unwrap();
    file.set_len(8192).unwrap();
    disk.set_full(true);
    assert!(file.write_all_at(&[2; 4096], 0).is_ok());
    assert!(file.write_all_at(&[2; 4096], 4096).is_err());
    assert!(disk.open(Path::new("/g"), Open::Create).is_err());
    assert_eq!(disk.free_bytes(Path::new("/")).unwrap(), 0);
    assert_eq!(file.data_ranges(0..8192).unwrap(), std::slice::from_ref(&(0..4096)));
}
