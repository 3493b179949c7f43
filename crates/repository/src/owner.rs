//! Who wrote a lock or a half written file, and whether that process is still there.
//!
//! A host's name is not enough: containers are often called alike, and each counts its processes from 1. So a
//! machine is its own id, its name and the space in which its processes are numbered; a life of a process is the
//! machine's boot and the moment at which the process was started.

use std::fs;
use std::sync::LazyLock;

use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::id::Id;

/// With its number: a process on a machine, once and never again. Two that are started together have the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Owner {
    machine: String,
    boot: String,
    /// In ticks since that boot.
    started: u64,
}

impl Owner {
    /// This process.
    pub(crate) fn ours() -> Self {
        let pid = std::process::id().cast_signed();
        Self {
            machine: machine().to_owned(),
            boot: boot().to_owned(),
            started: started(pid).unwrap_or_default(),
        }
    }

    /// Whether this is certainly over; of other machines nobody here can tell.
    pub(crate) fn is_dead(&self, pid: i32) -> bool {
        self.machine == machine() && (self.boot != boot() || started(pid) != Some(self.started))
    }
}

/// This machine, for names of files: eight hexadecimal digits.
pub(crate) fn machine() -> &'static str {
    static MACHINE: LazyLock<String> = LazyLock::new(|| {
        let id = fs::read_to_string("/etc/machine-id").unwrap_or_default();
        // The machine's own processes are always numbered in a space of the same name, over all boots.
        let space = fs::read_link("/proc/self/ns/pid").unwrap_or_default();
        let all = format!("{}\n{}\n{}", id.trim(), hostname(), space.display());
        hex::encode(&Id::of(all.as_bytes()).0[..4])
    });
    &MACHINE
}

pub(crate) fn hostname() -> String {
    nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Whether a process of this number is there.
pub(crate) fn is_alive(pid: i32) -> bool {
    pid > 0 && kill(Pid::from_raw(pid), None) != Err(Errno::ESRCH)
}

fn boot() -> &'static str {
    static BOOT: LazyLock<String> = LazyLock::new(|| {
        fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
    });
    &BOOT
}

/// When a process was started, if it is there.
fn started(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is a name in parentheses, with anything in it; this is the twenty-second.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_process_of_this_machine_that_is_gone_is_dead() {
        let (ours, pid) = (Owner::ours(), std::process::id().cast_signed());
        assert!(ours.started > 0 && !ours.is_dead(pid));
        assert!(
            Owner { started: ours.started - 1, ..ours.clone() }.is_dead(pid),
            "its number is another's now"
        );
        assert!(Owner { boot: "before".into(), ..ours.clone() }.is_dead(pid));
        assert!(ours.is_dead(i32::MAX - 1));
        assert!(!Owner { machine: "other".into(), ..ours }.is_dead(i32::MAX - 1), "nobody here can tell");
    }
}
