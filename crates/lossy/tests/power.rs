//! What was synced survives every power cut; what was not can be lost, and can come through.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;

use lossy::{Faults, Lost, Mount};
use tempfile::TempDir;

/// A mount that is cut off from its power again and again.
struct Machine {
    dir: TempDir,
    mount: Option<Mount>,
}

impl Machine {
    fn new() -> Self {
        let mut machine = Self { dir: tempfile::tempdir().unwrap(), mount: None };
        machine.start();
        machine
    }

    fn start(&mut self) {
        let (at, backing) = (self.dir.path().join("mounted"), self.dir.path().join("disk"));
        self.mount = Some(Mount::new(&at, &backing).unwrap());
    }

    fn at(&self, name: &str) -> std::path::PathBuf {
        self.mount.as_ref().unwrap().path().join(name)
    }

    /// Cuts the power and starts again.
    fn cut(&mut self, seed: u64) -> Lost {
        let mount = self.mount.take().unwrap();
        let lost = mount.lose_power(seed).unwrap();
        mount.unmount().unwrap();
        self.start();
        lost
    }
}

fn sync_folder(path: &Path) {
    File::open(path).unwrap().sync_all().unwrap();
}

fn write_synced(path: &Path, bytes: &[u8]) {
    let mut file = File::create(path).unwrap();
    file.write_all(bytes).unwrap();
    file.sync_all().unwrap();
    sync_folder(path.parent().unwrap());
}

/// What came of a story over many seeds.
fn outcomes<T: Ord>(
    seeds: u64,
    mut story: impl FnMut(&mut Machine),
    look: impl Fn(&Machine) -> T,
) -> BTreeSet<T> {
    (0..seeds)
        .map(|seed| {
            let mut machine = Machine::new();
            story(&mut machine);
            machine.cut(seed);
            look(&machine)
        })
        .collect()
}

#[test]
fn synced_bytes_survive_and_others_are_kept_lost_or_torn() {
    const BLOCKS: usize = 6;
    let found = outcomes(
        40,
        |machine| {
            write_synced(&machine.at("file"), &[1; BLOCKS * 4096]);
            write_synced(&machine.at("synced"), &[7; 5000]);
            let file = OpenOptions::new().write(true).open(machine.at("file")).unwrap();
            file.write_all_at(&[2; BLOCKS * 4096], 0).unwrap();
        },
        |machine| {
            assert_eq!(fs::read(machine.at("synced")).unwrap(), [7; 5000]);
            let bytes = fs::read(machine.at("file")).unwrap();
            assert_eq!(bytes.len(), BLOCKS * 4096);
            let block = |block: &[u8]| match (block.contains(&1), block.contains(&2)) {
                (true, false) => "old",
                (false, true) => "new",
                (true, true) => "torn",
                (false, false) => panic!("bytes that nobody wrote"),
            };
            for sector in bytes.chunks(512) {
                assert!(sector.iter().all(|byte| *byte == sector[0]), "a sector is whole");
            }
            bytes.chunks(4096).map(block).collect::<Vec<_>>()
        },
    );
    for state in ["old", "new", "torn"] {
        assert!(found.iter().any(|blocks| blocks.contains(&state)), "never {state}: {found:?}");
    }
    assert!(found.contains(&vec!["old"; BLOCKS]) && found.contains(&vec!["new"; BLOCKS]));
    // A later block without an earlier one: writes are not kept in order.
    assert!(found.iter().any(|blocks| blocks[0] == "old" && blocks[1..].contains(&"new")));
}

#[test]
fn a_file_that_was_only_appended_to_may_be_shorter_or_end_in_zeros() {
    let found = outcomes(
        60,
        |machine| {
            write_synced(&machine.at("log"), &[1; 4096]);
            let mut file = OpenOptions::new().append(true).open(machine.at("log")).unwrap();
            file.write_all(&[2; 4096]).unwrap();
        },
        |machine| {
            let bytes = fs::read(machine.at("log")).unwrap();
            assert_eq!(bytes[..4096], [1; 4096]);
            match &bytes[4096..] {
                [] => "shorter",
                rest if rest.iter().all(|byte| *byte == 0) => "zeros",
                rest if rest.iter().all(|byte| *byte == 2) => "whole",
                _ => "torn",
            }
        },
    );
    assert_eq!(found, BTreeSet::from(["shorter", "zeros", "whole", "torn"]));
}

#[test]
fn a_name_needs_the_sync_of_its_folder() {
    let made = |sync: bool| {
        outcomes(
            20,
            |machine| {
                let file = File::create(machine.at("file")).unwrap();
                file.write_all_at(b"bytes", 0).unwrap();
                file.sync_all().unwrap();
                if sync {
                    sync_folder(&machine.at(""));
                }
            },
            |machine| fs::read(machine.at("file")).ok(),
        )
    };
    assert_eq!(made(false), BTreeSet::from([None, Some(b"bytes".to_vec())]));
    assert_eq!(made(true), BTreeSet::from([Some(b"bytes".to_vec())]));
}

#[test]
fn a_folder_needs_the_sync_of_its_own_folder() {
    let made = |sync: bool| {
        outcomes(
            20,
            |machine| {
                fs::create_dir(machine.at("folder")).unwrap();
                write_synced(&machine.at("folder/file"), b"bytes");
                if sync {
                    sync_folder(&machine.at(""));
                }
            },
            |machine| fs::read(machine.at("folder/file")).ok(),
        )
    };
    assert_eq!(made(false), BTreeSet::from([None, Some(b"bytes".to_vec())]));
    assert_eq!(made(true), BTreeSet::from([Some(b"bytes".to_vec())]));
}

#[test]
fn a_file_replaced_by_a_rename_is_the_old_or_the_new_one_and_whole_only_if_it_was_synced() {
    let replaced = |sync_file: bool, sync_name: bool| {
        outcomes(
            60,
            |machine| {
                write_synced(&machine.at("config"), &[1; 4096]);
                let file = File::create(machine.at("config.new")).unwrap();
                file.write_all_at(&[2; 4096], 0).unwrap();
                if sync_file {
                    file.sync_all().unwrap();
                }
                fs::rename(machine.at("config.new"), machine.at("config")).unwrap();
                if sync_name {
                    sync_folder(&machine.at(""));
                }
            },
            |machine| match fs::read(machine.at("config")).unwrap() {
                old if old == [1; 4096] => "old",
                new if new == [2; 4096] => "new",
                _ => "neither",
            },
        )
    };
    assert_eq!(replaced(true, true), BTreeSet::from(["new"]));
    assert_eq!(replaced(true, false), BTreeSet::from(["old", "new"]));
    assert_eq!(replaced(false, false), BTreeSet::from(["old", "new", "neither"]));
    assert_eq!(replaced(false, true), BTreeSet::from(["new", "neither"]));
}

#[test]
fn what_was_removed_may_come_back_until_its_folder_is_synced() {
    let removed = |sync: bool| {
        outcomes(
            20,
            |machine| {
                fs::create_dir(machine.at("folder")).unwrap();
                write_synced(&machine.at("folder/file"), b"bytes");
                sync_folder(&machine.at(""));
                fs::remove_dir_all(machine.at("folder")).unwrap();
                if sync {
                    sync_folder(&machine.at(""));
                }
            },
            |machine| (machine.at("folder").exists(), fs::read(machine.at("folder/file")).ok()),
        )
    };
    let (gone, back) = ((false, None), (true, Some(b"bytes".to_vec())));
    assert_eq!(removed(false), BTreeSet::from([gone.clone(), back, (true, None)]));
    assert_eq!(removed(true), BTreeSet::from([gone]));
}

#[test]
fn without_a_power_cut_nothing_is_lost() {
    let mut machine = Machine::new();
    fs::write(machine.at("file"), b"not synced").unwrap();
    machine.mount.take().unwrap().unmount().unwrap();
    machine.start();
    assert_eq!(fs::read(machine.at("file")).unwrap(), b"not synced");
}

#[test]
fn the_same_seed_loses_the_same() {
    let lose = || {
        let mut machine = Machine::new();
        for number in 0..20 {
            fs::write(machine.at(&number.to_string()), vec![number; 10_000]).unwrap();
        }
        let lost = machine.cut(5);
        let read = |number: u8| fs::read(machine.at(&number.to_string())).ok();
        (lost, (0..20).map(read).collect::<Vec<_>>())
    };
    assert_eq!(lose(), lose());
}

#[test]
fn without_power_every_call_fails() {
    let machine = Machine::new();
    let file = File::create(machine.at("file")).unwrap();
    machine.mount.as_ref().unwrap().lose_power(1).unwrap();
    assert_eq!(file.write_all_at(b"x", 0).unwrap_err().raw_os_error(), Some(5));
    assert_eq!(file.sync_all().unwrap_err().raw_os_error(), Some(5));
    assert!(File::create(machine.at("other")).is_err());
    assert!(machine.mount.as_ref().unwrap().lose_power(1).is_err());
}

#[test]
fn after_a_sync_that_failed_the_bytes_are_lost_though_the_next_one_succeeds() {
    let mut machine = Machine::new();
    write_synced(&machine.at("file"), &[1; 4096]);
    let file = OpenOptions::new().write(true).open(machine.at("file")).unwrap();
    let set = |machine: &Machine, faults| machine.mount.as_ref().unwrap().set_faults(faults);
    set(&machine, Faults { write_fails_after: Some(1), ..Faults::default() });
    file.write_all_at(&[2; 4096], 0).unwrap();
    assert_eq!(file.write_all_at(&[3; 4096], 0).unwrap_err().raw_os_error(), Some(5));
    set(&machine, Faults { sync_fails_after: Some(0), ..Faults::default() });
    assert_eq!(file.sync_all().unwrap_err().raw_os_error(), Some(5));
    file.sync_all().unwrap();
    assert!(fs::read(machine.at("file")).unwrap() == [2; 4096]);
    drop(file);
    machine.cut(3);
    assert!(fs::read(machine.at("file")).unwrap() == [1; 4096]);
}

#[test]
fn a_full_disk_takes_what_needs_no_room() {
    let machine = Machine::new();
    let file = File::create(machine.at("file")).unwrap();
    file.write_all_at(&[1; 4096], 0).unwrap();
    machine.mount.as_ref().unwrap().set_faults(Faults { no_space: true, ..Faults::default() });
    file.write_all_at(&[2; 100], 0).unwrap();
    assert_eq!(file.write_all_at(b"x", 4096).unwrap_err().raw_os_error(), Some(28));
    assert_eq!(File::create(machine.at("more")).unwrap_err().raw_os_error(), Some(28));
    assert_eq!(nix::sys::statvfs::statvfs(&machine.at("")).unwrap().blocks_available(), 0);
}
