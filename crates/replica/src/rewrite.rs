//! Writing the flat files anew, where a sync of them may have failed and what was written will not come again.

use files::File;
use model::DiskName;
use steps::durable_step;

use crate::error::{Error, Result};
use crate::folder::Folder;
use crate::maintain::Step;
use crate::store::Store;
use crate::vm::Vm;

/// So much is read and written at a time.
const PIECE_BYTES: usize = 4 << 20;

impl Store {
    /// Writes the flat files anew, each byte as it is shown, and syncs them: from here on what is read is what a
    /// power cut leaves. After a sync that failed no other sync makes that good (the system has given the pages up
    /// and calls them clean), only writing them again does. Under the VM's `work` lock.
    pub(crate) fn rewrite(&self, vm: &Vm, folder: &Folder, disks: &[DiskName]) -> Result<Step> {
        for disk in disks {
            let path = folder.disk(disk);
            if folder.files.exists(&path)? {
                let file = folder.files.open_or_create(&path)?;
                rewrite_file(&*file).map_err(Error::io("writing", &path))?;
            }
        }
        durable_step("replica::rewrite::settling");
        folder.files.sync_folder(&folder.disks())?;
        durable_step("replica::rewrite::settled");
        let mut state = vm.live()?;
        let mut row = state.row.clone();
        row.doc.unsure = false;
        durable_step("replica::rewrite::noting");
        self.commit_row(&mut state, row)?;
        durable_step("replica::rewrite::noted");
        Ok(Step::Rewritten)
    }
}

fn rewrite_file(file: &dyn File) -> std::io::Result<()> {
    let len = file.len()?;
    let mut buf = vec![0; PIECE_BYTES];
    let mut hole = 0;
    for data in file.data_ranges(0..len)? {
        file.make_zero(hole, data.start - hole)?;
        for at in data.clone().step_by(PIECE_BYTES) {
            let part = &mut buf[..usize::try_from(data.end - at).unwrap_or(usize::MAX).min(PIECE_BYTES)];
            file.read_exact_at(part, at)?;
            file.write_all_at(part, at)?;
        }
        hole = data.end;
    }
    file.make_zero(hole, len - hole)?;
    file.set_len(len)?;
    durable_step("replica::rewrite::written");
    file.sync_all()?;
    durable_step("replica::rewrite::flushed");
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use files::{FileSystem, Open, Os};

    use super::*;

    #[test]
    fn what_is_written_anew_is_what_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let open = |path: &Path| Os.open(path, Open::Create).unwrap();
        for holes in [vec![], vec![(0, 1 << 20)], vec![(1 << 20, PIECE_BYTES as u64), (9 << 20, 1 << 20)]] {
            let file = open(&path);
            let bytes: Vec<u8> = (0..10 << 20).map(|at: u32| at.wrapping_mul(167) as u8 | 1).collect();
            file.write_all_at(&bytes, 0).unwrap();
            holes.iter().for_each(|(at, len)| file.make_zero(*at, *len).unwrap());
            let show = || {
                let mut shown = vec![0; 10 << 20];
                file.read_exact_at(&mut shown, 0).unwrap();
                (blake3::hash(&shown), file.data_ranges(0..10 << 20).unwrap(), file.len().unwrap())
            };
            let before = show();
            rewrite_file(&*file).unwrap();
            assert_eq!(show(), before);
        }
        let empty = open(&dir.path().join("empty"));
        rewrite_file(&*empty).unwrap();
        assert_eq!(empty.len().unwrap(), 0);
    }
}
