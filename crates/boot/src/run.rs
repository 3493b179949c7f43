//! A boot from its start to its evidence.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use qemu::{GuestAgent, Qmp};
use serde_json::json;
use tokio::net::TcpStream;
use tokio::process::Child;
use tokio::time::{Instant, sleep, timeout};

use crate::accelerator::escaped;
use crate::command::{Files, Order, command};
use crate::console::Console;
use crate::error::Error;
use crate::sign::SignOfLife;

/// How long QEMU may take to open its monitor.
const MONITOR: Duration = Duration::from_secs(30);
/// How often it is looked whether it has.
const STARTING: Duration = Duration::from_millis(20);
/// How often a sign is looked for.
const LOOK: Duration = Duration::from_millis(200);

/// What a boot came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Evidence {
    /// From QEMU's start to the sign of life; none if it did not show one.
    pub alive_after: Option<Duration>,
    /// Why there is none, for a person.
    pub why_not: Option<String>,
    /// The screen at the end, a PNG file.
    pub screenshot: Option<PathBuf>,
    /// All that was said on the serial console.
    pub console: PathBuf,
}

/// A QEMU that runs. It is killed with its owner.
pub struct Instance {
    child: Child,
    qmp: Qmp,
    console: Console,
    started: Instant,
    port: Option<u16>,
    dir: PathBuf,
}

/// Boots, waits for the sign of life, takes a picture, and ends the VM.
pub async fn boot(order: &Order) -> Result<Evidence, Error> {
    let mut instance = Instance::start(order).await?;
    let outcome = instance.wait_for_life(&order.sign, order.within).await;
    let screenshot = instance.screenshot().await;
    instance.end().await;
    let files = Files(&order.dir);
    Ok(Evidence {
        alive_after: outcome.as_ref().ok().copied(),
        why_not: outcome.err(),
        screenshot,
        console: files.console(),
    })
}

impl Instance {
    /// Starts QEMU, and waits until its monitor answers.
    pub async fn start(order: &Order) -> Result<Self, Error> {
        let files = Files(&order.dir);
        std::fs::create_dir_all(&order.dir).map_err(Error::io("make the folder", &order.dir))?;
        let port = match order.sign {
            SignOfLife::Tcp(_) => Some(free_port().map_err(Error::io("find a free port for", &order.dir))?),
            _ => None,
        };
        let mut command = command(order, port)?;
        let errors = File::create(files.errors()).map_err(Error::io("make", files.errors()))?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors).kill_on_drop(true);
        let started = Instant::now();
        let mut child =
            command.spawn().map_err(|source| Error::Program { program: order.program.clone(), source })?;
        let qmp = monitor_of(&mut child, &files.qmp(), &files.errors(), MONITOR).await?;
        let console = Console::new(&files.console()).map_err(Error::io("make", files.console()))?;
        Ok(Self { child, qmp, console, started, port, dir: order.dir.clone() })
    }

    /// Waits for the sign of life; how long it took since the start, or why there was none.
    pub async fn wait_for_life(&mut self, sign: &SignOfLife, within: Duration) -> Result<Duration, String> {
        let mut resets = self.qmp.events();
        while self.started.elapsed() < within {
            if let Ok(Some(status)) = self.child.try_wait() {
                return Err(format!("the VM ended before it showed {sign} ({status})"));
            }
            while let Ok(event) = resets.try_recv() {
                // A guest that boots may reset once (firmware, first boot); one that runs may not.
                if event.name == "GUEST_PANICKED"
                    || (event.name == "RESET" && matches!(sign, SignOfLife::Runs(_)))
                {
                    return Err(format!("the guest did not run through: QEMU told of {}", event.name));
                }
            }
            if let Some(why) = self.stands_still().await {
                return Err(format!("the VM stands still: QEMU says {why}"));
            }
            if self.shows(sign).await {
                return Ok(self.started.elapsed());
            }
            sleep(LOOK).await;
        }
        Err(format!("it did not show {sign} within {} s", within.as_secs()))
    }

    /// Why QEMU has stopped the VM, if it has: a processor that cannot go on (`internal-error`: KVM within a VM does
    /// that), a disk that cannot be read.
    async fn stands_still(&self) -> Option<String> {
        let status = self.qmp.run(qemu::Command::bare("query-status")).await.ok()?;
        let status = status["status"].as_str().unwrap_or_default();
        (!["running", "prelaunch"].contains(&status)).then(|| status.to_owned())
    }

    async fn shows(&mut self, sign: &SignOfLife) -> bool {
        self.console.read(&self.qmp).await;
        match (sign, self.port) {
            (SignOfLife::Runs(time), _) => self.started.elapsed() >= *time,
            (SignOfLife::Agent, _) => GuestAgent::connect(&Files(&self.dir).agent()).await.is_ok(),
            (SignOfLife::Console(text), _) => self.console.shows(text),
            (SignOfLife::Tcp(_), Some(port)) => answers(port).await,
            (SignOfLife::Tcp(_), None) => false,
        }
    }

    /// Whether QEMU still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// The VNC socket, where there is one.
    #[must_use]
    pub fn vnc(&self) -> Option<PathBuf> {
        Some(Files(&self.dir).vnc()).filter(|socket| socket.exists())
    }

    /// The screen as a PNG file in its folder, if it has one.
    pub async fn screenshot(&self) -> Option<PathBuf> {
        let path = Files(&self.dir).screen();
        let command = qemu::Command::new("screendump", json!({"filename": path, "format": "png"}));
        match self.qmp.run(command).await {
            Ok(_) => Some(path),
            Err(error) => {
                tracing::debug!(%error, "no screenshot");
                None
            }
        }
    }

    /// Pulls the plug.
    pub async fn end(mut self) {
        let _ = self.child.kill().await;
        let files = Files(&self.dir);
        for socket in [files.qmp(), files.agent(), files.vnc(), files.pid()] {
            let _ = std::fs::remove_file(socket);
        }
    }
}

/// Waits until a QEMU that was just started answers at its monitor. If it ends before, what it `said` is the reason.
pub(crate) async fn monitor_of(
    child: &mut Child,
    monitor: &Path,
    said: &Path,
    patience: Duration,
) -> Result<Qmp, Error> {
    let started = Instant::now();
    let ended = |why: String| {
        let said = std::fs::read_to_string(said).unwrap_or_default();
        Error::Ended { said: format!("{} ({why})", said.trim()) }
    };
    loop {
        // Its socket is there a moment before QEMU listens on it.
        let error = match monitor.exists() {
            true => match Qmp::connect(monitor, patience).await {
                Ok(qmp) => return Ok(qmp),
                Err(error) => Some(error),
            },
            false => None,
        };
        // A QEMU that ends closes its monitor first; what it said is the better reason.
        if let Ok(Ok(status)) = timeout(STARTING, child.wait()).await {
            return Err(ended(status.to_string()));
        }
        if started.elapsed() > patience {
            let why = format!("its monitor did not open within {} s", patience.as_secs());
            return Err(error.map_or_else(|| ended(why), Into::into));
        }
    }
}

/// Ends a QEMU whose owner was killed before it could.
pub fn end_leftover(dir: &Path) {
    if let Some(pid) = process(dir, &Files(dir).qmp()) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

/// The process that a folder names, if that is one which was started with this monitor: a number is given again.
pub(crate) fn process(dir: &Path, monitor: &Path) -> Option<i32> {
    let pid: i32 = std::fs::read_to_string(Files(dir).pid()).ok()?.trim().parse().ok()?;
    let command = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let monitor = format!("unix:{},", escaped(monitor));
    command.split(|&byte| byte == 0).any(|word| word.starts_with(monitor.as_bytes())).then_some(pid)
}

/// Something in the guest takes the connection: QEMU itself takes it for a port that nobody listens on, and closes it.
async fn answers(port: u16) -> bool {
    let Ok(Ok(stream)) = timeout(LOOK, TcpStream::connect(("127.0.0.1", port))).await else { return false };
    match timeout(Duration::from_secs(1), stream.readable()).await {
        // Nothing to read and not closed: somebody waits for us to speak.
        Err(_) => true,
        Ok(_) => matches!(stream.try_read(&mut [0; 1]), Ok(1)),
    }
}

/// A port that nobody listens on just now.
fn free_port() -> std::io::Result<u16> {
    Ok(std::net::TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}
