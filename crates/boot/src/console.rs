//! The serial console of a guest: what it says is searched as it comes, and its beginning is kept.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use qemu::{Command, Qmp};
use serde_json::json;

use crate::command::CONSOLE;

/// The most that is kept in the file, in bytes.
const KEPT_BYTES_MAX: usize = 4 << 20;
/// The most that is asked for at once, in bytes.
const READ_BYTES: u32 = 64 << 10;
/// The longest line whose end is still found together with its beginning, in bytes.
const TAIL_BYTES: usize = 64 << 10;

pub(crate) struct Console {
    log: File,
    kept: usize,
    /// What was said last.
    tail: String,
}

impl Console {
    pub fn new(log: &Path) -> std::io::Result<Self> {
        Ok(Self { log: File::create(log)?, kept: 0, tail: String::new() })
    }

    /// Reads what QEMU has of it.
    pub async fn read(&mut self, qmp: &Qmp) {
        loop {
            let arguments = json!({"device": CONSOLE, "size": READ_BYTES, "format": "utf8"});
            let Ok(said) = qmp.run(Command::new("ringbuf-read", arguments)).await else { return };
            match said.as_str() {
                None | Some("") => return,
                Some(said) => self.add(said),
            }
        }
    }

    fn add(&mut self, said: &str) {
        let room = said.floor_char_boundary(said.len().min(KEPT_BYTES_MAX - self.kept));
        // A full disk must not make a guest that lives look dead.
        if self.log.write_all(&said.as_bytes()[..room]).is_ok() {
            self.kept += room;
        }
        self.tail.push_str(said);
        let cut = self.tail.ceil_char_boundary(self.tail.len().saturating_sub(TAIL_BYTES + said.len()));
        self.tail.drain(..cut);
    }

    /// Whether a text is among what was said last.
    pub fn shows(&self, text: &str) -> bool {
        self.tail.contains(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_found_where_it_comes_in_pieces_and_what_is_kept_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("console.log");
        let mut console = Console::new(&log).unwrap();
        console.add("booting\nlog");
        assert!(!console.shows("login:"));
        console.add("in: ");
        assert!(console.shows("login:"));
        let noise = "\u{fffd}".repeat(100_000);
        for _ in 0..20 {
            console.add(&noise);
        }
        assert!(console.tail.len() <= TAIL_BYTES + noise.len());
        assert!(!console.shows("login:"));
        let kept = std::fs::read_to_string(&log).unwrap();
        assert!(kept.starts_with("booting\nlogin: ") && kept.len() <= KEPT_BYTES_MAX);
    }
}
