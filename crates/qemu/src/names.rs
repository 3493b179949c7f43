//! The names of what we make in QEMU. Pure.

use model::{LogNumber, VmId};

/// The names of everything of one VM: `afterimage-<first 8 hex digits of its id>-...`.
///
/// QEMU cuts node names at 31 bytes, which is why the id is not there in full.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names {
    prefix: String,
}

impl Names {
    /// The names for this VM.
    #[must_use]
    pub fn new(vm: VmId) -> Self {
        Self { prefix: format!("afterimage-{}", &vm.to_string()[..8]) }
    }

    /// What all of them start with.
    #[must_use]
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Whether a name is one of ours.
    #[must_use]
    pub fn is_ours(&self, name: &str) -> bool {
        name.strip_prefix(&self.prefix).is_some_and(|rest| rest.starts_with('-'))
    }

    /// Bitmap `k`: every change since the moment of log `k`.
    #[must_use]
    pub fn bitmap(&self, k: LogNumber) -> String {
        format!("{}-{k}", self.prefix)
    }

    /// The number of a bitmap of ours.
    #[must_use]
    pub fn bitmap_number(&self, name: &str) -> Option<LogNumber> {
        let digits = name.strip_prefix(&self.prefix)?.strip_prefix('-')?;
        let number = digits.parse().ok()?;
        // "+7" and "007" parse too, and are not names that we give.
        (digits == format!("{number}")).then_some(LogNumber(number))
    }

    /// The bitmap of what had changed when reading ahead began.
    pub(crate) fn seen(&self) -> String {
        format!("{}-seen", self.prefix)
    }

    /// The bitmap of what has changed since.
    pub(crate) fn again(&self) -> String {
        format!("{}-again", self.prefix)
    }

    /// The NBD export of a disk that is read ahead of its moment.
    pub(crate) fn export_ahead(&self, disk: usize) -> String {
        format!("{}-l{disk}", self.prefix)
    }

    /// The node of the overlay that holds what the guest overwrites of a disk.
    pub(crate) fn overlay(&self, disk: usize) -> String {
        format!("{}-o{disk}", self.prefix)
    }

    /// The node of the file below the overlay.
    pub(crate) fn file(&self, disk: usize) -> String {
        format!("{}-s{disk}", self.prefix)
    }

    /// The filter that a job puts on a disk.
    pub(crate) fn filter(&self, disk: usize) -> String {
        format!("{}-f{disk}", self.prefix)
    }

    /// Whether a node is a filter of ours: those come and go with their jobs.
    pub(crate) fn is_filter(&self, name: &str) -> bool {
        name.strip_prefix(&self.prefix).is_some_and(|rest| rest.starts_with("-f"))
    }

    /// The job that copies before the guest overwrites.
    pub(crate) fn job(&self, disk: usize) -> String {
        format!("{}-j{disk}", self.prefix)
    }

    /// The job that makes a scratch file.
    pub(crate) fn create_job(&self, disk: usize) -> String {
        format!("{}-c{disk}", self.prefix)
    }

    /// The NBD export of a disk at the moment of log `k`; the number keeps a late reader off the next one.
    pub(crate) fn export(&self, k: LogNumber, disk: usize) -> String {
        format!("{}-e{k}-{disk}", self.prefix)
    }

    /// The scratch file's name.
    pub(crate) fn scratch_file(&self, k: LogNumber, disk: usize) -> String {
        format!("{}-{k}-{disk}.qcow2", self.prefix)
    }

    /// The socket of the NBD server that we start.
    pub(crate) fn socket_file(&self) -> String {
        format!("{}.nbd", self.prefix)
    }
}

/// Whether a node was made by Afterimage for any VM: never a disk to protect.
pub(crate) fn is_any_ours(name: &str) -> bool {
    name.strip_prefix("afterimage-").is_some_and(|rest| {
        rest.len() > 9 && rest.as_bytes()[..8].iter().all(u8::is_ascii_hexdigit) && rest.as_bytes()[8] == b'-'
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_from_those_of_others() {
        let names = Names::new(VmId::from_bytes([0xab; 16]));
        assert_eq!(names.bitmap(LogNumber(17)), "afterimage-abababab-17");
        assert_eq!(names.bitmap_number("afterimage-abababab-17"), Some(LogNumber(17)));
        for other in [
            "afterimage-abababab-+7",
            "afterimage-abababab-07",
            "afterimage-abababab-",
            "afterimage-abababac-7",
            "x",
        ] {
            assert_eq!(names.bitmap_number(other), None, "{other}");
        }
        assert!(names.is_ours(&names.filter(3)) && is_any_ours(&names.filter(3)));
        assert!(!names.is_ours("afterimage-ababababcd") && !is_any_ours("afterimage-disk"));
        assert!(names.overlay(999).len() <= 31, "QEMU cuts node names at 31 bytes");
    }
}
