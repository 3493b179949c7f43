//! A guest that a site has started, and that goes on without it.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use guest::{Console, MAC};
use serde_json::{Value, json};

/// A guest that the head office's site has started.
pub struct Moved {
    pub console: Console,
    agent: PathBuf,
    socket: String,
    process: u64,
}

impl Moved {
    pub fn of(machine: &Value, dir: &Path) -> Self {
        let copy = File::create(dir.join("moved-console.log")).unwrap();
        let socket = machine["console"].as_str().unwrap().to_owned();
        Self {
            console: Console::at(Path::new(&socket), copy).unwrap(),
            agent: machine["guest_agent"].as_str().unwrap().into(),
            process: machine["process"].as_u64().unwrap(),
            socket,
        }
    }

    pub fn runs(&self) -> bool {
        let told = std::fs::read_to_string(format!("/proc/{}/cmdline", self.process)).unwrap_or_default();
        told.contains(&self.socket)
    }

    /// What the guest says of its network card.
    pub fn addresses(&self) -> String {
        let mut stream = UnixStream::connect(&self.agent).unwrap();
        writeln!(stream, "{}", json!({"execute": "guest-network-get-interfaces"})).unwrap();
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        let told: Value = serde_json::from_str(&line).unwrap();
        let cards = told["return"].as_array().unwrap_or_else(|| panic!("{line}"));
        cards
            .iter()
            .find(|card| card["hardware-address"] == MAC)
            .unwrap_or_else(|| panic!("{line}"))
            .to_string()
    }
}

/// A site leaves what it has started running, and a test must not.
impl Drop for Moved {
    fn drop(&mut self) {
        if self.runs() {
            let process = i32::try_from(self.process).unwrap();
            let _ = nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(process),
                nix::sys::signal::Signal::SIGKILL,
            );
        }
    }
}
