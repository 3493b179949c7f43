//! How fast backups and restores are, on an image file.
//!
//! ```text
//! backup_speed full IMAGE REPOSITORY            back the whole image up; makes the repository
//! backup_speed change IMAGE CHANGES PER-MILLE   change so much of the image at random, and say where
//! backup_speed next IMAGE REPOSITORY CHANGES    back up what has changed
//! backup_speed restore REPOSITORY FOLDER [qcow2]
//! ```
//!
//! Each prints seconds, MB/s and the process's peak memory. The password is `speed`, so that
//! `RESTIC_PASSWORD=speed restic -r REPOSITORY check` works on the result.

use std::error::Error;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use model::gate::{Access, Admission, Facts, admit};
use model::{ApplyState, Consistency, DiskName, Health, LogId, LogNumber, Phase, PointInfo, Timestamp, VmId};
use nix::unistd::{Whence, lseek};
use repository::{BackupMeta, Format, Repository, RestoreOptions, Source, SourceDisk};

const PASSWORD: &str = "speed";
const VM: VmId = VmId::from_bytes([1; 16]);

/// An image file as the disk of an admitted point.
struct Image {
    file: File,
    disks: [SourceDisk; 1],
    admission: Admission,
    changes: Option<Vec<Range<u64>>>,
}

impl Image {
    fn open(path: &str, number: u64, changes: Option<Vec<Range<u64>>>) -> Result<Self, Box<dyn Error>> {
        let file = File::open(path)?;
        let disk = SourceDisk { name: "disk".parse::<DiskName>()?, size_bytes: file.metadata()?.len() };
        let facts = Facts {
            vm: VM,
            phase: &Phase::Replicating,
            phase_since: Timestamp(0),
            apply: &ApplyState::Idle,
            health: Health::Normal,
            health_since: Timestamp(0),
            migrating_since: None,
        };
        let admission = admit(&facts, Access::Pinned, LogNumber(number), Timestamp(1))?;
        Ok(Self { file, disks: [disk], admission, changes })
    }

    fn seek(&self, offset: u64, to: Whence) -> io::Result<Option<u64>> {
        match lseek(&self.file, offset.cast_signed(), to) {
            Ok(place) => Ok(Some(place.cast_unsigned())),
            Err(nix::errno::Errno::ENXIO) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl Source for Image {
    fn admission(&self) -> &Admission {
        &self.admission
    }
    fn disks(&self) -> &[SourceDisk] {
        &self.disks
    }
    fn data_extents(&self, _disk: usize, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
        let mut extents = Vec::new();
        let mut place = range.start;
        while let Some(start) = self.seek(place, Whence::SeekData)?.filter(|start| *start < range.end) {
            let end = self.seek(start, Whence::SeekHole)?.unwrap_or(range.end).min(range.end);
            extents.push(start..end);
            place = end;
        }
        Ok(extents)
    }
    fn changed_since(&self, _disk: usize, _parent: LogNumber) -> io::Result<Option<Vec<Range<u64>>>> {
        Ok(self.changes.clone())
    }
    fn read_at(&self, _disk: usize, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }
    fn still_valid(&self) -> Result<(), String> {
        Ok(())
    }
}

fn meta(number: u64) -> Result<BackupMeta, Box<dyn Error>> {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&number.to_be_bytes());
    Ok(BackupMeta {
        vm: VM,
        vm_name: "speed".parse()?,
        point: PointInfo {
            id: LogId::from_bytes(id),
            number: LogNumber(number),
            taken_at: Timestamp::from(std::time::SystemTime::now()),
            consistency: Consistency::Crash,
        },
        definition: serde_json::json!({}),
        policy: None,
    })
}

/// Changes a share of the image in stretches of 64 to 512 KiB, half of them random, half text.
fn change(image: &str, per_mille: u64) -> Result<Vec<Range<u64>>, Box<dyn Error>> {
    let file = File::options().write(true).open(image)?;
    let size = file.metadata()?.len();
    let mut random = File::open("/dev/urandom")?;
    let mut changes = Vec::new();
    let mut left = size / 1000 * per_mille;
    while left > 0 {
        let mut dice = [0; 16];
        random.read_exact(&mut dice)?;
        let dice = u128::from_le_bytes(dice);
        let len = (64 << 10) + u64::try_from(dice % (448 << 10))? / 4096 * 4096;
        let offset = u64::try_from((dice >> 32) % u128::from(size - len))? / 4096 * 4096;
        let mut bytes = vec![0; usize::try_from(len)?];
        if dice & 1 == 0 {
            random.read_exact(&mut bytes)?;
        } else {
            let line = format!("changed {dice:x} at {offset}\n");
            bytes.iter_mut().zip(line.bytes().cycle()).for_each(|(to, byte)| *to = byte);
        }
        file.write_all_at(&bytes, offset)?;
        changes.push(offset..offset + len);
        left = left.saturating_sub(len);
    }
    changes.sort_by_key(|range| range.start);
    Ok(changes)
}

fn told(what: &str, began: Instant, bytes: u64) -> Result<(), Box<dyn Error>> {
    let seconds = began.elapsed().as_secs_f64();
    let status = std::fs::read_to_string("/proc/self/status")?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or("?").trim();
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    let speed = bytes as f64 / 1e6 / seconds;
    println!("{what}: {seconds:.2} s, {speed:.0} MB/s, peak {peak}");
    Ok(())
}

fn back_up(repository: &Repository, image: &Image, number: u64) -> Result<(), Box<dyn Error>> {
    let parent = repository.backups(Some(VM))?.pop();
    let never = AtomicBool::new(false);
    let report = repository.backup(image, meta(number)?, parent.as_ref(), &|_| (), &never)?;
    println!(
        "read {} MB, added {} MB, {} of {} chunks looked at, {} new, {:.2} s without opening",
        report.bytes_read / 1_000_000,
        report.bytes_added / 1_000_000,
        report.chunks_read,
        report.chunks,
        report.chunks_added,
        report.seconds
    );
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let began = Instant::now();
    match arguments[..] {
        ["full", image, path] => {
            let image = Image::open(image, 1, None)?;
            back_up(&Repository::create(path, PASSWORD)?, &image, 1)?;
            told("full", began, image.disks[0].size_bytes)
        }
        ["change", image, list, per_mille] => {
            let changes = change(image, per_mille.parse()?)?;
            let bytes = changes.iter().map(|range| range.end - range.start).sum();
            std::fs::write(list, serde_json::to_vec(&changes)?)?;
            told("change", began, bytes)
        }
        ["next", image, path, list] => {
            let changes: Vec<Range<u64>> = serde_json::from_slice(&std::fs::read(list)?)?;
            let bytes = changes.iter().map(|range| range.end - range.start).sum();
            let repository = Repository::open(path, PASSWORD)?;
            let number = repository.backups(Some(VM))?.last().map_or(1, |last| last.point.number.0 + 1);
            back_up(&repository, &Image::open(image, number, Some(changes))?, number)?;
            told("next", began, bytes)
        }
        ["restore", path, folder, ref format @ ..] => {
            let repository = Repository::open(path, PASSWORD)?;
            let backup = repository.backups(Some(VM))?.pop().ok_or("there is no backup")?;
            let format = if format.contains(&"qcow2") { Format::Qcow2 } else { Format::Raw };
            let options = RestoreOptions { format, overwrite: true, ..RestoreOptions::to(folder) };
            repository.restore(&backup, &options, &|_| (), &AtomicBool::new(false))?;
            told("restore", began, backup.disk_bytes())
        }
        _ => Err("see the head of examples/backup_speed.rs".into()),
    }
}
