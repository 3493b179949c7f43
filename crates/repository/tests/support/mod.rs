//! What the tests share: disks in memory behind the real gate, chance from a seed, real programs.
#![allow(dead_code, reason = "each test uses a part")]

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use model::gate::{Access, Admission, Facts, admit};
use model::{ApplyState, Consistency, Health, LogId, LogNumber, Phase, PointInfo, Timestamp, VmId};
use repository::{
    BackupInfo, BackupMeta, BackupReport, Error, Repository, RestoreOptions, Source, SourceDisk,
};

pub const PASSWORD: &str = "correct horse";
pub const VM: VmId = VmId::from_bytes([7; 16]);
const ZEROS: [u8; 4096] = [0; 4096];
pub const CHUNK: usize = 256 * 1024;

/// An admission for a point of `vm`, from the real gate.
pub fn admission(vm: VmId, point: u64) -> Admission {
    let facts = Facts {
        vm,
        phase: &Phase::Replicating,
        phase_since: Timestamp(0),
        apply: &ApplyState::Idle,
        health: Health::Normal,
        health_since: Timestamp(0),
        migrating_since: None,
    };
    admit(&facts, Access::Pinned, LogNumber(point), Timestamp(1)).expect("a quiet replica is admitted")
}

pub fn point(number: u64) -> PointInfo {
    let mut id = [0x5a; 16];
    id[..8].copy_from_slice(&number.to_be_bytes());
    PointInfo {
        id: LogId::from_bytes(id),
        number: LogNumber(number),
        taken_at: Timestamp(1_790_000_000_000_000 + i64::try_from(number).unwrap() * 60_000_000),
        consistency: if number.is_multiple_of(2) { Consistency::Application } else { Consistency::Crash },
    }
}

pub fn meta(vm: VmId, number: u64) -> BackupMeta {
    BackupMeta {
        vm,
        vm_name: "web".parse().unwrap(),
        point: point(number),
        definition: serde_json::json!({"name": "web", "memory_mib": 2048}),
        policy: None,
    }
}

/// Disks in memory. Stretches of 4 KiB that are zero are holes.
pub struct Disks {
    pub admission: Admission,
    pub disks: Vec<SourceDisk>,
    pub bytes: Vec<Vec<u8>>,
    /// For each parent point, what has changed since on each disk.
    pub changed: HashMap<u64, Vec<Vec<Range<u64>>>>,
    /// What was read: disk, range.
    pub reads: Mutex<Vec<(usize, Range<u64>)>>,
    /// A read that reaches this place fails.
    pub broken: Option<(usize, u64)>,
    pub valid: Result<(), String>,
    /// Each read takes this much longer.
    pub slow: std::time::Duration,
}

impl Disks {
    pub fn new(number: u64, disks: &[(&str, &[u8])]) -> Self {
        Self::of(VM, number, disks)
    }

    pub fn of(vm: VmId, number: u64, disks: &[(&str, &[u8])]) -> Self {
        let named = |(name, bytes): &(&str, &[u8])| SourceDisk {
            name: name.parse().unwrap(),
            size_bytes: bytes.len() as u64,
        };
        Self {
            admission: admission(vm, number),
            disks: disks.iter().map(named).collect(),
            bytes: disks.iter().map(|(_, bytes)| bytes.to_vec()).collect(),
            changed: HashMap::new(),
            reads: Mutex::default(),
            broken: None,
            valid: Ok(()),
            slow: std::time::Duration::ZERO,
        }
    }

    pub fn with_changes(mut self, since: u64, changed: Vec<Vec<Range<u64>>>) -> Self {
        self.changed.insert(since, changed);
        self
    }

    pub fn bytes_read(&self) -> u64 {
        self.reads.lock().unwrap().iter().map(|(_, range)| range.end - range.start).sum()
    }
}

impl Source for Disks {
    fn admission(&self) -> &Admission {
        &self.admission
    }
    fn disks(&self) -> &[SourceDisk] {
        &self.disks
    }
    fn data_extents(&self, disk: usize, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let mut extents: Vec<Range<u64>> = Vec::new();
        let mut place = range.start;
        while place < range.end {
            let end = ((place / 4096 + 1) * 4096).min(range.end);
            let block = &self.bytes[disk][usize::try_from(place).unwrap()..usize::try_from(end).unwrap()];
            if *block != ZEROS[..block.len()] {
                match extents.last_mut() {
                    Some(last) if last.end == place => last.end = end,
                    _ => extents.push(place..end),
                }
            }
            place = end;
        }
        Ok(extents)
    }
    fn changed_since(&self, disk: usize, parent: LogNumber) -> io::Result<Option<Vec<Range<u64>>>> {
        Ok(self.changed.get(&parent.0).map(|disks| disks[disk].clone()))
    }
    fn read_at(&self, disk: usize, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let range = offset..offset + buffer.len() as u64;
        if self.broken.is_some_and(|(broken, place)| broken == disk && range.contains(&place)) {
            return Err(io::Error::other("the disk does not answer"));
        }
        std::thread::sleep(self.slow);
        let start = usize::try_from(offset).unwrap();
        buffer.copy_from_slice(&self.bytes[disk][start..start + buffer.len()]);
        self.reads.lock().unwrap().push((disk, range));
        Ok(())
    }
    fn still_valid(&self) -> Result<(), String> {
        self.valid.clone()
    }
}

/// Backs up `source` as point `number` of its VM.
pub fn backup(
    repository: &Repository,
    source: &Disks,
    parent: Option<&BackupInfo>,
) -> Result<BackupReport, Error> {
    let (vm, number) = (source.admission.vm(), source.admission.point().0);
    repository.backup(source, meta(vm, number), parent, &|_| (), &AtomicBool::new(false))
}

/// Restores everything into a new folder and compares.
pub fn assert_restores(repository: &Repository, backup: &BackupInfo, disks: &[(&str, &[u8])]) {
    let folder = tempfile::tempdir().unwrap();
    let report = repository
        .restore(backup, &RestoreOptions::to(folder.path()), &|_| (), &AtomicBool::new(false))
        .unwrap();
    assert_eq!(report.disks.len(), disks.len());
    assert_eq!(report.damaged, []);
    for (name, bytes) in disks {
        let restored = std::fs::read(folder.path().join(format!("{name}.raw"))).unwrap();
        assert!(restored == *bytes, "disk {name} of backup {} differs", backup.id.short());
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), disks.len(), "nothing else is left there");
}

/// Chance that a seed decides.
pub struct Chance(u64);

impl Chance {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    pub fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 11) % bound
    }
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).take(len).collect()
    }
}

/// A disk with data, text, repetition and holes.
pub fn image(seed: u64, len: usize) -> Vec<u8> {
    let mut chance = Chance::new(seed);
    let mut image = vec![0; len];
    let mut place = 0;
    while place < len {
        let end = (place + 1 + usize::try_from(chance.below(3 * CHUNK as u64)).unwrap()).min(len);
        match chance.below(4) {
            0 => {}
            1 => image[place..end].copy_from_slice(&chance.bytes(end - place)),
            2 => image[place..end].fill(u8::try_from(chance.below(255)).unwrap() + 1),
            _ => {
                let word = format!("line {} of a file\n", chance.below(1000));
                image[place..end].iter_mut().zip(word.bytes().cycle()).for_each(|(to, byte)| *to = byte);
            }
        }
        place = end;
    }
    image
}

/// A program that must be there.
pub fn need(program: &'static str, package: &str) -> Command {
    let there = Command::new(program).arg("--help").output().is_ok();
    assert!(there, "the program '{program}' is missing: apt-get install {package}");
    Command::new(program)
}

/// Runs stock restic on a repository.
pub fn restic(repository: &Path, arguments: &[&str]) -> Output {
    need("restic", "restic")
        .args(["--no-cache", "--repo"])
        .arg(repository)
        .args(arguments)
        .env("RESTIC_PASSWORD", PASSWORD)
        .output()
        .unwrap()
}

/// The same, and it must succeed.
pub fn restic_ok(repository: &Path, arguments: &[&str]) -> Vec<u8> {
    let output = restic(repository, arguments);
    assert!(
        output.status.success(),
        "restic {arguments:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

/// All files of one kind in a repository.
pub fn files(repository: &Path, kind: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![repository.join(kind)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { folders.push(path) } else { found.push(path) }
        }
    }
    found.sort();
    found
}

pub fn flip(path: &Path, place: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    let place = place.min(bytes.len() - 1);
    bytes[place] ^= 0x40;
    std::fs::write(path, bytes).unwrap();
}
