//! Files that are being written: `<name>-tmp-<machine>-<process>-<life>`. restic and rustic ignore such names, and
//! so do we. Those of a process that is dead are nobody's; whoever finds its lock sweeps them away.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::SystemTime;

use crate::owner::{is_alive, machine};

const MARK: &str = "-tmp-";

/// Tells this process from a former one of the same number.
static LIFE: LazyLock<String> = LazyLock::new(|| {
    let began = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    format!("{:x}", began.as_nanos())
});

/// What a file is called while it is written.
pub(crate) fn name(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!("{MARK}{}-{}-{}", machine(), std::process::id(), *LIFE));
    name.into()
}

/// Whether a file was being written by a process of this machine that is dead.
pub(crate) fn is_abandoned(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let Some((_, writer)) = name.split_once(MARK) else { return false };
    let mut parts = writer.rsplitn(3, '-');
    let (Some(life), Some(process), Some(host)) = (parts.next(), parts.next(), parts.next()) else {
        return false;
    };
    let Ok(process) = process.parse::<i32>() else { return false };
    if host != machine() || process <= 0 {
        return false;
    }
    if process == std::process::id().cast_signed() {
        return life != *LIFE;
    }
    !is_alive(process)
}

/// Removes what dead processes had half written. What cannot be removed stays: it harms nobody.
pub(crate) fn sweep(repository: &Path) {
    let data = repository.join("data");
    let packs = fs::read_dir(&data).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
    let others = ["locks", "index", "snapshots", "keys"].map(|name| repository.join(name));
    for folder in packs.chain(others) {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            if is_abandoned(&entry.path()) {
                tracing::info!(file = %entry.path().display(), "removed what a dead process had half written");
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_dead_of_this_machine_left_is_abandoned() {
        let ours = name(Path::new("/r/index/abcd"));
        assert!(!is_abandoned(&ours));
        let text = ours.to_str().unwrap();
        assert!(is_abandoned(Path::new(&format!("{text}0"))), "a former life of the same number");
        // The largest number that a process can have here is far below this.
        let of = |host: &str, process: &str| format!("/r/index/abcd-tmp-{host}-{process}-1f");
        let here = machine();
        assert!(is_abandoned(Path::new(&of(here, "2147483646"))));
        assert!(!is_abandoned(Path::new(&of("another-host", "2147483646"))));
        assert!(!is_abandoned(Path::new(&of(here, "1"))));
        for other in ["/r/index/abcd", "/r/index/abcd-tmp-", "/r/index/abcd-tmp-123", "/r/abcd-tmp-x-y-z"] {
            assert!(!is_abandoned(Path::new(other)), "{other}");
        }
    }

    #[test]
    fn a_sweep_leaves_everything_else() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("data/ab");
        fs::create_dir_all(&folder).unwrap();
        let (pack, ours) = (folder.join("abcd"), name(&folder.join("abce")));
        let dead = folder.join(format!("abcf-tmp-{}-2147483646-1f", machine()));
        for path in [&pack, &ours, &dead] {
            fs::write(path, "").unwrap();
        }
        sweep(dir.path());
        assert!(pack.exists() && ours.exists() && !dead.exists());
    }
}
