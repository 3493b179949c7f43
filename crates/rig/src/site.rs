//! A site: the real program in a folder of its own.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use serde_json::Value;

use crate::programs::{Process, this_program, wait_for};
use crate::{Result, Trouble, doing};

/// A site in a folder, running or not.
pub struct Site {
    name: String,
    dir: PathBuf,
    address: String,
    log: PathBuf,
    process: Option<Process>,
}

/// What a command came to.
#[derive(Debug, Clone)]
pub struct Output {
    /// Its exit status.
    pub status: i32,
    /// The JSON document on its standard output.
    pub json: Value,
    /// What it said on standard error.
    pub stderr: String,
}

impl Output {
    /// The code of the error, if it is one.
    #[must_use]
    pub fn code(&self) -> Option<&str> {
        self.json["error"]["code"].as_str()
    }

    /// The gate's condition, if it refused.
    #[must_use]
    pub fn condition(&self) -> Option<&str> {
        self.json["error"]["condition"].as_str()
    }
}

/// Ports that outgoing connections are not given: a site that is down for a while finds its own free again.
const PORTS: std::ops::Range<u16> = 10_000..32_000;

/// The port that is tried next. Whoever gets one listens on it only later: nobody else is given it in between.
static NEXT: AtomicUsize = AtomicUsize::new(0);

/// An address of this machine that nobody listens on; who starts to listen soon gets it.
pub fn free_address() -> Result<String> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    // Other processes begin elsewhere.
    let first = (u64::from(now.subsec_nanos()) / 1000 + u64::from(std::process::id()) * 7919) as usize;
    let _ = NEXT.compare_exchange(0, first, Ordering::SeqCst, Ordering::SeqCst);
    for _ in 0..1000 {
        let place = NEXT.fetch_add(1, Ordering::SeqCst) % PORTS.len();
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, PORTS.start + place as u16));
        if TcpListener::bind(address).is_ok() {
            return Ok(address.to_string());
        }
    }
    Err(Trouble("no port is free on this machine".into()))
}

impl Site {
    /// Makes a site in `dir/name` on a free port of this machine.
    pub fn init(dir: &Path, name: &str) -> Result<Self> {
        let site = Self::at(dir, name)?;
        site.ok(&["init", "--name", name, "--listen", &site.address])?;
        Ok(site)
    }

    /// The site that is to be made in `dir/name`.
    pub fn at(dir: &Path, name: &str) -> Result<Self> {
        let dir = dir.join(name);
        let log = dir.join("serve.log");
        Ok(Self { name: name.into(), dir, address: free_address()?, log, process: None })
    }

    /// Writes what `serve` says to another file than one in its folder.
    pub fn keep_log_at(&mut self, path: PathBuf) {
        self.log = path;
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its address.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Changes its config: each `(old, new)` must be found.
    pub fn configure(&self, changes: &[(&str, &str)]) -> Result<()> {
        let path = self.dir.join("config.toml");
        let mut text = std::fs::read_to_string(&path).map_err(doing(path.display()))?;
        for (old, new) in changes {
            if !text.contains(old) {
                return Err(Trouble(format!("the config of {} has no {old:?}:\n{text}", self.name)));
            }
            text = text.replacen(old, new, 1);
        }
        std::fs::write(&path, text).map_err(doing(path.display()))
    }

    /// Starts `serve` and waits until it answers.
    pub fn serve(&mut self) -> Result<()> {
        self.serve_with(&[])
    }

    /// The same with environment variables.
    pub fn serve_with(&mut self, variables: &[(&str, &str)]) -> Result<()> {
        self.start(variables)?;
        let ready = wait_for(&format!("site {}", self.name), Duration::from_secs(60), || {
            if !self.is_running() {
                return Err(Trouble(format!("site {} ended: {}", self.name, self.log())));
            }
            Ok((self.run(&["status"])?.status == 0).then_some(()))
        });
        if ready.is_err() && self.died_of().is_none() {
            self.kill();
        }
        ready
    }

    /// Starts `serve` and does not wait.
    pub fn start(&mut self, variables: &[(&str, &str)]) -> Result<()> {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.log)
            .map_err(doing(self.log.display()))?;
        let mut command = Command::new(this_program()?);
        command.arg("--dir").arg(&self.dir).arg("serve").stdout(Stdio::null()).stderr(log);
        command.envs(variables.iter().copied());
        self.process = Some(Process::start(&mut command)?);
        Ok(())
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// SIGTERM, and waits for its end.
    pub fn stop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.terminate();
        }
    }

    /// Lets it live on without its owner.
    pub fn leave(mut self) {
        if let Some(process) = self.process.take() {
            process.leave();
        }
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Process::id)
    }

    /// Whether the process is there.
    pub fn is_running(&mut self) -> bool {
        self.process.as_mut().is_some_and(|process| !process.has_ended())
    }

    /// The signal that its process died of, if it has died of one.
    pub fn died_of(&mut self) -> Option<i32> {
        self.process.as_mut().and_then(Process::died_of)
    }

    /// What `serve` has said.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The command line of a site's command.
    pub fn command(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = Command::new(this_program()?);
        command.arg("--dir").arg(&self.dir).arg("--json").args(arguments).stdin(Stdio::null());
        Ok(command)
    }

    /// Runs a command with `--json`.
    pub fn run(&self, arguments: &[&str]) -> Result<Output> {
        let output = self.command(arguments)?.output().map_err(doing("starting afterimage"))?;
        let stdout = String::from_utf8_lossy(&output.stdout);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        let json = match stdout.trim() {
            "" => Value::Null,
            text => serde_json::from_str(text).map_err(|error| {
                Trouble(format!("{arguments:?} printed no JSON ({error}): {stdout}\n{stderr}"))
            })?,
        };
        Ok(Output { status: output.status.code().unwrap_or(-1), json, stderr })
    }

    /// Runs a command that must succeed, and gives its JSON.
    pub fn ok(&self, arguments: &[&str]) -> Result<Value> {
        let output = self.run(arguments)?;
        if output.status == 0 {
            return Ok(output.json);
        }
        let Output { status, json, stderr } = output;
        let (name, log) = (&self.name, self.log());
        let tail: Vec<&str> = log.lines().rev().take(20).collect();
        let tail = tail.into_iter().rev().collect::<Vec<_>>().join("\n");
        Err(Trouble(format!(
            "site {name}: {arguments:?} ended with {status}: {json}\n{stderr}\nits log ends:\n{tail}"
        )))
    }

    /// Makes `self` and `other` peers: `self` invites, `other` accepts.
    pub fn invite(&self, other: &Self) -> Result<()> {
        let answer = self.ok(&["peer", "invite", &other.name])?;
        let invite = answer["invite"].as_str().ok_or_else(|| Trouble(format!("no invite: {answer}")))?;
        other.ok(&["peer", "accept", invite]).map(drop)
    }

    /// The status of one VM.
    pub fn vm(&self, name: &str) -> Result<Value> {
        Ok(self.ok(&["status", name])?["vms"][0].clone())
    }

    /// Waits until the status of a VM fits; gives it.
    pub fn wait_vm(
        &self,
        name: &str,
        what: &str,
        limit: Duration,
        fits: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let mut last = Value::Null;
        let found = wait_for(&format!("VM {name} at {}: {what}", self.name), limit, || {
            last = self.run(&["status", name])?.json["vms"][0].clone();
            Ok(fits(&last).then(|| last.clone()))
        });
        found.map_err(|trouble| Trouble(format!("{trouble}; its status: {last}\n{}", self.log())))
    }
}
