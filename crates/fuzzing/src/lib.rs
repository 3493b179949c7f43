//! Every door through which bytes of strangers come in, as a function of those bytes.
//!
//! `fuzz/` runs these functions under libFuzzer (`make fuzz TARGET=log RUNS=10000000`); the test `corpus` of this
//! crate runs every input that was kept through the same functions on every `make test`.
//!
//! What holds for each target, whatever the bytes:
//! * no panic, no overflow (both are checked for in these builds), no endless loop;
//! * memory stays below the target's bound, counted allocation by allocation ([`memory`]);
//! * what is accepted is consistent: it reads the same however it is cut into pieces, and what is written
//!   out again reads as the same.
//!
//! What it does not do: open a socket, wait for a clock, or keep state from one input to the next.

pub mod memory;
mod seal;
mod seeds;
mod stream;
mod targets;

pub use seeds::write_seeds;

/// One door.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name: that of the binary in `fuzz/` and of the folder in `fuzz/corpus/`.
    pub name: &'static str,
    /// The most memory that one input may take, in bytes.
    pub memory_max: usize,
    run: fn(&[u8]),
}

const MIB: usize = 1 << 20;

/// All of them.
pub const TARGETS: &[Target] = &[
    Target { name: "log", memory_max: 8 * MIB, run: targets::log::log },
    Target { name: "nbd_client", memory_max: 48 * MIB, run: targets::nbd::client },
    Target { name: "nbd_server", memory_max: 48 * MIB, run: targets::nbd::server },
    Target { name: "nbd_codec", memory_max: MIB, run: targets::nbd::codec },
    Target { name: "qmp", memory_max: 4 * MIB, run: targets::qemu::qmp },
    Target { name: "agent", memory_max: 4 * MIB, run: targets::qemu::agent },
    Target { name: "http", memory_max: 8 * MIB, run: targets::http::http },
    Target { name: "invite", memory_max: MIB, run: targets::text::invite },
    Target { name: "config", memory_max: 4 * MIB, run: targets::text::config },
    Target { name: "command", memory_max: 4 * MIB, run: targets::text::command },
    Target { name: "rebuild", memory_max: 16 * MIB, run: targets::rebuild::rebuild },
    Target { name: "backup", memory_max: 8 * MIB, run: targets::backup::backup },
    Target { name: "media", memory_max: 4 * MIB, run: targets::media::media },
];

impl Target {
    /// The target of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<&'static Self> {
        TARGETS.iter().find(|target| target.name == name)
    }

    /// Runs one input.
    ///
    /// # Panics
    /// If the input has found something.
    pub fn run(&self, bytes: &[u8]) {
        memory::within(self.memory_max, || (self.run)(bytes));
    }
}

/// Runs one input of the target of this name.
///
/// # Panics
/// If there is no such target, or the input has found something.
pub fn run(name: &str, bytes: &[u8]) {
    Target::named(name).expect("a target of this name").run(bytes);
}
