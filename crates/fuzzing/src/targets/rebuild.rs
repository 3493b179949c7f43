//! A replica's folder without its catalog: `vm.json` and log files that may have rotted or been written by
//! somebody else.

use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use catalog::Catalog;
use replica::{Config, Store, rebuild as rebuild_catalog};

use super::log::sealed;

/// The folder of all inputs; in memory, where the machine has such a place.
static DIR: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    let memory = Path::new("/dev/shm");
    let made = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    made.expect("a folder")
});

/// The first two bytes say where `vm.json` ends; then come logs, each after a mode and its length in two bytes.
pub(crate) fn rebuild(data: &[u8]) {
    let Some((cut, bytes)) = data.split_first_chunk::<2>() else { return };
    let (description, mut logs) = bytes.split_at(usize::from(u16::from_le_bytes(*cut)).min(bytes.len()));
    // What cannot be read is passed over before anything else is looked at.
    if serde_json::from_slice::<serde_json::Value>(description).is_err() {
        return;
    }
    let site = DIR.path().join("site");
    let _ = fs::remove_dir_all(&site);
    let folder = site.join("vms").join("0101010101010101010101010101010a");
    for part in ["logs", "disks", "incoming", "changes"] {
        fs::create_dir_all(folder.join(part)).expect("a folder");
    }
    fs::write(folder.join("vm.json"), description).expect("a file");
    for _ in 0..3 {
        let [mode, low, high, rest @ ..] = logs else { break };
        let (log, rest) = rest.split_at(usize::from(u16::from_le_bytes([*low, *high])).min(rest.len()));
        let log = sealed(*mode, log);
        // A file of another name than its log is passed over.
        let number =
            log.get(64..72).map_or(0, |bytes| u64::from_le_bytes(bytes.try_into().unwrap_or([0; 8])));
        fs::write(folder.join("logs").join(format!("{number}.log")), log).expect("a file");
        logs = rest;
    }
    let catalog = Catalog::in_memory().expect("a catalog");
    let config = Config { workers: 0, apply_threads: 1, free_reserve_bytes: 0, ..Config::new(&site) };
    if rebuild_catalog(&catalog, &config).is_ok()
        && let Ok(store) = Store::open(catalog, config)
    {
        for vm in store.list() {
            let _ = store.status(vm);
            let _ = store.points(vm);
        }
    }
}
