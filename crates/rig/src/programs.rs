//! Programs and processes.

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::{Result, Trouble, doing};

/// An error with the line that installs `program`, if it is not there.
pub fn need(program: &str, package: &str) -> Result<()> {
    need_from(program, &format!("apt-get install {package}"))
}

/// The same for a program of crates.io, which is called as its crate is.
pub fn need_crate(program: &str) -> Result<()> {
    need_from(program, &format!("cargo install --locked {program}"))
}

fn need_from(program: &str, install: &str) -> Result<()> {
    let found = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    found.map(drop).map_err(|_| Trouble(format!("{program} is needed: {install}")))
}

/// Runs a program to its end; what it printed, or an error with what it said.
pub fn tool(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().map_err(doing(format_args!("{command:?}")))?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(said);
    }
    let error = String::from_utf8_lossy(&output.stderr);
    Err(Trouble(format!("{command:?} ended with {}: {said}{error}", output.status)))
}

/// The `afterimage` that was built with the running program, or is that program.
pub fn this_program() -> Result<PathBuf> {
    let running = std::env::current_exe().map_err(doing("finding the running program"))?;
    if running.file_name().is_some_and(|name| name == "afterimage") {
        return Ok(running);
    }
    program_beside("afterimage")
}

/// A program of the workspace, built beside the running one.
pub(crate) fn program_beside(name: &str) -> Result<PathBuf> {
    let running = std::env::current_exe().map_err(doing("finding the running program"))?;
    // Tests are in target/debug/deps, other programs in target/debug.
    let built =
        running.ancestors().skip(1).take(2).map(|folder| folder.join(name)).find(|path| path.exists());
    built.ok_or_else(|| Trouble(format!("{name} is not built: cargo build --workspace --bins")))
}

/// Waits until `ready` gives something.
pub fn wait_for<T>(what: &str, limit: Duration, mut ready: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let started = Instant::now();
    loop {
        if let Some(value) = ready()? {
            return Ok(value);
        }
        if started.elapsed() > limit {
            return Err(Trouble(format!("waited {limit:?} in vain for {what}")));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A process that ends with its owner.
pub struct Process(Child);

impl Process {
    /// Starts a command.
    pub fn start(command: &mut Command) -> Result<Self> {
        command.stdin(Stdio::null()).spawn().map(Self).map_err(doing(format_args!("{command:?}")))
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// Whether it has ended by itself.
    pub fn has_ended(&mut self) -> bool {
        matches!(self.0.try_wait(), Ok(Some(_)))
    }

    /// The signal that it died of, if it has died of one.
    pub fn died_of(&mut self) -> Option<i32> {
        self.0.try_wait().ok().flatten().and_then(|status| status.signal())
    }

    /// SIGKILL, at once, and waits until it is gone.
    pub fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }

    /// SIGTERM, and waits until it has ended.
    pub fn terminate(&mut self) {
        let _ = Command::new("kill").arg(self.0.id().to_string()).status();
        let _ = self.0.wait();
    }

    /// Lets it live on without its owner.
    pub fn leave(self) {
        std::mem::forget(self);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}
