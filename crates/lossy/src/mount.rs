//! A mounted lossy file system.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};

use fuser::{BackgroundSession, Config, MountOption};

use crate::Faults;
use crate::chance::Chance;
use crate::fs::Lossy;
use crate::shared::Shared;

/// What a power cut took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Lost {
    /// Blocks that are the old ones again.
    pub blocks: usize,
    /// Blocks that are partly the old ones.
    pub torn: usize,
    /// Blocks that had not been synced and came through.
    pub kept: usize,
    /// Files that have their old lengths again.
    pub lengths: usize,
    /// Names made, removed or changed that this did not happen to after all.
    pub names: usize,
    /// The same, not synced, and came through.
    pub names_kept: usize,
}

/// A lossy file system, mounted as long as this lives.
pub struct Mount {
    at: PathBuf,
    shared: Arc<Mutex<Shared>>,
    session: Option<BackgroundSession>,
}

impl Mount {
    /// Mounts the folder `backing` at the folder `at`; both are made if they are not there.
    pub fn new(at: &Path, backing: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(at)?;
        std::fs::create_dir_all(backing)?;
        let shared = Arc::new(Mutex::new(Shared::open(backing)?));
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("lossy".into()), MountOption::NoAtime];
        let session = fuser::spawn_mount(Lossy::new(shared.clone()), at, &config).map_err(|error| {
            let hint = "it takes /dev/fuse and fusermount3: apt-get install fuse3";
            io::Error::new(error.kind(), format!("mounting {}: {error} ({hint})", at.display()))
        })?;
        Ok(Self { at: at.to_owned(), shared, session: Some(session) })
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.at
    }

    /// Changes which calls fail.
    pub fn set_faults(&self, faults: Faults) {
        self.lock().faults = faults;
    }

    /// The power is gone: of what was not synced a part is lost, chosen by `seed`, and every call fails from
    /// now on. Mounted again ([`Mount::new`]), the backing folder is what the machine finds.
    pub fn lose_power(&self, seed: u64) -> io::Result<Lost> {
        self.lock().lose_power(&mut Chance::new(seed))
    }

    /// Unmounts it. Nothing is lost by that.
    pub fn unmount(mut self) -> io::Result<()> {
        self.end()
    }

    fn end(&mut self) -> io::Result<()> {
        let Some(session) = self.session.take() else { return Ok(()) };
        match session.umount_and_join() {
            Ok(()) => Ok(()),
            // Somebody has a file open still.
            Err(_) => Command::new("umount").arg("-l").arg(&self.at).status().map(drop),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = self.end();
    }
}
