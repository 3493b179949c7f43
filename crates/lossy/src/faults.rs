//! Errors on demand.

use std::io;

use nix::errno::Errno;

/// Which calls fail. All of it can be changed while the file system is mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Faults {
    /// The write after this many more fails with `EIO`, once.
    pub write_fails_after: Option<u64>,
    /// The sync after this many more fails with `EIO`, once. What it had to make durable is lost for good,
    /// and the next sync succeeds all the same: so it is on Linux.
    pub sync_fails_after: Option<u64>,
    /// Whatever would need more room fails with `ENOSPC`.
    pub no_space: bool,
    /// Each write that does not grow its file takes this many microseconds more: a disk that is slow to be written at
    /// random, and fast to be appended to.
    pub slow_us: u64,
}

impl Faults {
    /// Whether this write goes through.
    pub(crate) fn write(&mut self, grows: bool) -> io::Result<()> {
        if self.no_space && grows {
            return Err(Errno::ENOSPC.into());
        }
        if !grows && self.slow_us > 0 {
            std::thread::sleep(std::time::Duration::from_micros(self.slow_us));
        }
        count_down(&mut self.write_fails_after)
    }

    /// Whether this sync goes through.
    pub(crate) fn sync(&mut self) -> io::Result<()> {
        count_down(&mut self.sync_fails_after)
    }

    /// Whether something can be made.
    pub(crate) fn make(&self) -> io::Result<()> {
        if self.no_space { Err(Errno::ENOSPC.into()) } else { Ok(()) }
    }
}

fn count_down(left: &mut Option<u64>) -> io::Result<()> {
    match left {
        Some(0) => {
            *left = None;
            Err(Errno::EIO.into())
        }
        Some(more) => {
            *more -= 1;
            Ok(())
        }
        None => Ok(()),
    }
}
