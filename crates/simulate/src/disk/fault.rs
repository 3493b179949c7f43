//! Errors that a disk gives.

/// What kind of call an error strikes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Reads, and looking up names.
    Read,
    /// Writes, and changes of names.
    Write,
    /// Syncs of files and folders.
    Sync,
}

/// Errors that strike calls of one kind.
#[derive(Debug, Clone, Copy)]
pub struct DiskFault {
    /// Which calls.
    pub class: Class,
    /// So many more of them go well first.
    pub skip: u64,
    /// Then so many fail; a large number lasts until the disk is healed.
    pub count: u64,
}

impl DiskFault {
    pub(super) fn strikes(&mut self, class: Class) -> bool {
        if class != self.class || self.count == 0 {
            return false;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        self.count -= 1;
        true
    }

    pub(super) fn is_over(&self) -> bool {
        self.count == 0
    }
}
