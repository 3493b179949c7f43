//! The guest's console: every line it has said, and when it came.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use rig::{Result, Trouble, doing};

use crate::ledger::Acked;

/// What a script of ours says when it gives up.
const FAILED: &str = "failed: ";
/// Lines at the end that an error shows.
const TAIL: usize = 15;

/// A line of the console.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// When it was read here: no earlier than it was said.
    pub at: SystemTime,
    /// What it says.
    pub text: String,
}

/// A guest's console. Clones share it; it stays readable when the guest is gone.
#[derive(Debug, Clone)]
pub struct Console(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    said: Mutex<Said>,
    grown: Condvar,
}

#[derive(Debug, Default)]
struct Said {
    lines: Vec<Line>,
    ended: bool,
}

impl Console {
    /// The console of a guest that others have started, at its socket. What it said before is not known.
    pub fn at(socket: &Path, copy: File) -> Result<Self> {
        let stream = UnixStream::connect(socket).map_err(doing(socket.display()))?;
        Ok(Self::of(stream, copy))
    }

    /// Reads a pipe to its end, and copies it to a file.
    pub(crate) fn of(pipe: impl Read + Send + 'static, mut copy: File) -> Self {
        let shared = Arc::new(Shared::default());
        let reading = shared.clone();
        std::thread::spawn(move || {
            let mut pipe = BufReader::new(pipe);
            let mut bytes = Vec::new();
            while matches!(pipe.read_until(b'\n', &mut bytes), Ok(1..)) {
                let at = SystemTime::now();
                let _ = copy.write_all(&bytes);
                let text = String::from_utf8_lossy(&bytes).trim_end().to_owned();
                bytes.clear();
                reading.lock().lines.push(Line { at, text });
                reading.grown.notify_all();
            }
            reading.lock().ended = true;
            reading.grown.notify_all();
        });
        Self(shared)
    }

    /// Waits for a line with this text, also one of long ago; an error if the guest gives up or ends first.
    pub fn wait_for(&self, text: &str, limit: Duration) -> Result<Line> {
        let deadline = Instant::now() + limit;
        let mut said = self.0.lock();
        let mut seen = 0;
        loop {
            for line in &said.lines[seen..] {
                if line.text.contains(text) {
                    return Ok(line.clone());
                }
                if line.text.starts_with(FAILED) {
                    return Err(in_vain(&said, text, &format!("it {}", line.text)));
                }
            }
            seen = said.lines.len();
            let left = deadline.saturating_duration_since(Instant::now());
            if said.ended {
                return Err(in_vain(&said, text, "it has ended"));
            }
            if left.is_zero() {
                return Err(in_vain(&said, text, &format!("{limit:?} are over")));
            }
            said = self.0.grown.wait_timeout(said, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// All lines so far.
    #[must_use]
    pub fn lines(&self) -> Vec<Line> {
        self.0.lock().lines.clone()
    }

    /// What the databases had acknowledged by a moment, as far as it had come here by then.
    #[must_use]
    pub fn acked_by(&self, moment: SystemTime) -> Acked {
        let said = self.0.lock();
        Acked::of(said.lines.iter().filter(|line| line.at < moment).map(|line| line.text.as_str()))
    }

    /// The same by now.
    #[must_use]
    pub fn acked(&self) -> Acked {
        Acked::of(self.0.lock().lines.iter().map(|line| line.text.as_str()))
    }

    /// The script's word that it gave up, if it did.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        self.0.lock().lines.iter().find(|line| line.text.starts_with(FAILED)).map(|line| line.text.clone())
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Said> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn in_vain(said: &Said, text: &str, why: &str) -> Trouble {
    let tail = &said.lines[said.lines.len().saturating_sub(TAIL)..];
    let tail: Vec<&str> = tail.iter().map(|line| line.text.as_str()).collect();
    Trouble(format!(
        "waited in vain for the guest to say {text:?}: {why}; its console ends:\n{}",
        tail.join("\n")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_kept_with_their_time_and_waiting_ends_with_the_guest() {
        let (pipe, mut guest) = std::io::pipe().unwrap();
        let console = Console::of(pipe, tempfile::tempfile().unwrap());
        let limit = Duration::from_secs(10);
        let before = SystemTime::now();
        guest.write_all(b"running\r\nack pg 1\r\nack pg 2\r\n").unwrap();
        let line = console.wait_for("ack pg 2", limit).unwrap();
        assert!(line.at >= before && line.text == "ack pg 2");
        assert_eq!(console.acked_by(before), Acked::default());
        assert_eq!(console.acked_by(SystemTime::now()), console.acked());
        assert_eq!(console.acked().of_ledger("pg"), 2);
        let said = console.wait_for("ack pg 3", Duration::ZERO).unwrap_err().0;
        assert!(said.contains("ack pg 2"), "an error shows the console's end: {said}");
        guest.write_all(b"failed: mounting XFS\r\n").unwrap();
        let said = console.wait_for("ack pg 3", limit).unwrap_err().0;
        assert!(said.contains("mounting XFS"), "{said}");
        drop(guest);
        assert!(console.wait_for("ack pg 3", limit).is_err());
        assert_eq!(console.failure().unwrap(), "failed: mounting XFS");
    }
}
