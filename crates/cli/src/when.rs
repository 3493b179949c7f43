//! When passes run, and what a replica begins with: `--resync`, `--initial`, `replica seed`.

use std::path::PathBuf;
use std::time::SystemTime;

use model::{DiskName, InitialStart, Timestamp};
use site::{Failure, Request, SeedRequest};

use crate::absolute;
use crate::args::{Replica, SeedFormat};

/// `now`, `seed`, `media:DIR`, `at:+3h` or `at:2026-12-01T22:00:00Z`.
pub fn initial(text: &str) -> Result<InitialStart, String> {
    initial_at(text, SystemTime::now().into())
}

fn initial_at(text: &str, now: Timestamp) -> Result<InitialStart, String> {
    let wrong = || {
        format!(
            "{text:?} is not now, seed, media:DIR or at:TIME, with TIME such as +3h or 2026-12-01T22:00:00Z"
        )
    };
    match text {
        "now" => return Ok(InitialStart::Now),
        "seed" => return Ok(InitialStart::Seed),
        _ => {}
    }
    if let Some(dir) = text.strip_prefix("media:") {
        // The site runs in another folder.
        let dir = std::path::absolute(dir).map_err(|_| "name the folder: media:DIR")?;
        return Ok(InitialStart::Media { dir });
    }
    let time = text.strip_prefix("at:").ok_or_else(wrong)?;
    let at = match time.strip_prefix('+') {
        Some(later) => now.plus(humantime::parse_duration(later).map_err(|_| wrong())?),
        None => Timestamp(time.parse::<jiff::Timestamp>().map_err(|_| wrong())?.as_microsecond()),
    };
    Ok(InitialStart::At { at })
}

/// `NAME=FILE`.
pub fn seed_disk(text: &str) -> Result<(DiskName, PathBuf), String> {
    let (name, file) = text.split_once('=').filter(|(_, file)| !file.is_empty()).ok_or("use NAME=FILE")?;
    Ok((name.parse::<DiskName>().map_err(|error| error.to_string())?, file.into()))
}

pub fn replica(replica: &Replica) -> Result<Request, Failure> {
    let (vm, disks, format) = match replica {
        Replica::Seed { vm, disks, format } => (vm, disks, format),
        Replica::Import { from } => return Ok(Request::Import { dir: absolute(from)? }),
    };
    let absolute = |(name, file): &(DiskName, PathBuf)| Ok((name.clone(), absolute(file)?));
    let format = match format {
        SeedFormat::Raw => "raw",
        SeedFormat::Qcow2 => "qcow2",
        SeedFormat::Vhdx => "vhdx",
        SeedFormat::Vmdk => "vmdk",
    };
    let disks = disks.iter().map(absolute).collect::<Result<_, Failure>>()?;
    Ok(Request::Seed(SeedRequest { vm: vm.clone(), disks, format: format.into() }))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn an_initial_replication_begins_now_later_or_with_a_seed() {
        let now = Timestamp(1_700_000_000_000_000);
        let at = |text: &str| initial_at(text, now);
        assert_eq!((at("now"), at("seed")), (Ok(InitialStart::Now), Ok(InitialStart::Seed)));
        let later = now.plus(Duration::from_secs(3 * 3600));
        assert_eq!(at("at:+3h"), Ok(InitialStart::At { at: later }));
        assert_eq!(at("at:2023-11-14T22:13:20Z"), Ok(InitialStart::At { at: now }));
        assert_eq!(at("at:2023-11-15T00:13:20+02:00"), Ok(InitialStart::At { at: now }));
        assert_eq!(at("media:/mnt/usb"), Ok(InitialStart::Media { dir: "/mnt/usb".into() }));
        assert!(matches!(at("media:usb"), Ok(InitialStart::Media { dir }) if dir.is_absolute()));
        for bad in ["", "later", "media", "media:", "at:", "at:+", "at:tomorrow", "at:22:00", "+3h"] {
            assert!(at(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_image_is_named_with_its_disk() {
        let (name, file) = seed_disk("vda=/old/a=b.raw").unwrap();
        assert_eq!((name.as_str(), file), ("vda", PathBuf::from("/old/a=b.raw")));
        for bad in ["vda", "vda=", "=file", "a/b=file"] {
            assert!(seed_disk(bad).is_err(), "{bad}");
        }
    }
}
