//! The guest agent: asks the guest to bring its file systems to rest, and to wake them again.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, timeout};

use crate::libvirt::{self, Domain, DomainAddress};
use crate::lines::{Lines, tidy};

/// The longest answer that is taken from a guest, in bytes. A guest is not trusted with our memory.
const LINE_BYTES_MAX: usize = 64 << 10;
/// How long the agent may take to answer at all.
const SYNC_TIME: Duration = Duration::from_secs(5);
/// How long a question about the state may take.
const STATUS_TIME: Duration = Duration::from_secs(5);
/// How often it is looked whether a command in the guest has ended.
const LOOK: Duration = Duration::from_millis(100);
/// How long one attempt to thaw may take.
const THAW_TIME: Duration = Duration::from_secs(10);
/// What the agent drops everything before, and begins its answer with.
const DELIMITER: u8 = 0xff;

/// Where a guest's agent is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgentAddress {
    /// At this socket, which serves one client at a time.
    Socket(PathBuf),
    /// Through libvirt, which has its socket.
    Libvirt(DomainAddress),
}

impl std::fmt::Display for AgentAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Socket(socket) => socket.display().fmt(f),
            Self::Libvirt(domain) => domain.fmt(f),
        }
    }
}

/// Why the guest could not be brought to rest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    /// There is no socket, or nobody listens.
    #[error("cannot connect to the guest agent's socket {}: {source}", .socket.display())]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Libvirt cannot be reached, or the agent does not answer it.
    #[error("the guest agent cannot be reached through libvirt: {0}")]
    Libvirt(#[from] libvirt::Error),
    /// The agent does not answer.
    #[error("the guest agent has not answered {command} within {} s: is qemu-guest-agent running in the guest, and its socket not in use by another program?", .after.as_secs())]
    NoAnswer {
        /// What it was asked.
        command: &'static str,
        /// How long we waited.
        after: Duration,
    },
    /// The connection to the agent broke.
    #[error("the connection to the guest agent broke at {command}: {why}")]
    Broken {
        /// What it was asked.
        command: &'static str,
        /// How.
        why: String,
    },
    /// The agent refused.
    #[error("the guest agent refused {command}: {desc}")]
    Refused {
        /// What it was asked.
        command: &'static str,
        /// Its words.
        desc: String,
    },
    /// The guest has no file system that can be frozen.
    #[error("the guest has frozen no file system")]
    NothingFrozen,
    /// The guest woke up by itself before the moment was fixed (Windows does after 10 s).
    #[error("the guest had thawed by itself before the moment was fixed")]
    ThawedEarly,
    /// Fixing the moment took longer than a guest may be kept frozen.
    #[error("the moment was not fixed within {} s, so the guest was thawed before", .0.as_secs_f32())]
    HeldTooLong(Duration),
}

/// A connection to a guest's agent.
pub struct GuestAgent {
    address: AgentAddress,
    lines: Lines<Box<dyn AsyncRead + Send + Unpin>>,
    write: Box<dyn AsyncWrite + Send + Unpin>,
    /// An answer may still come that nobody waits for.
    out_of_step: bool,
}

impl std::fmt::Debug for GuestAgent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestAgent").field("address", &self.address).finish_non_exhaustive()
    }
}

impl GuestAgent {
    /// Connects, and makes sure that the agent answers us and not somebody before us.
    pub async fn connect(socket: &Path) -> Result<Self, AgentError> {
        let stream = timeout(SYNC_TIME, UnixStream::connect(socket))
            .await
            .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
            .map_err(|source| AgentError::Connect { socket: socket.to_owned(), source })?;
        let (read, write) = stream.into_split();
        Self::over(socket, read, write).await
    }

    /// The same, wherever the agent is reached.
    pub async fn at(address: &AgentAddress) -> Result<Self, AgentError> {
        match address {
            AgentAddress::Socket(socket) => Self::connect(socket).await,
            AgentAddress::Libvirt(domain) => {
                let stream = Domain::connect(domain).await?.agent().await?;
                let (read, write) = tokio::io::split(stream);
                Self::agree(address.clone(), read, write).await
            }
        }
    }

    /// The same over a stream that is connected already. `socket` is where a thaw that failed is tried again.
    pub async fn over(
        socket: &Path,
        read: impl AsyncRead + Send + Unpin + 'static,
        write: impl AsyncWrite + Send + Unpin + 'static,
    ) -> Result<Self, AgentError> {
        Self::agree(AgentAddress::Socket(socket.to_owned()), read, write).await
    }

    async fn agree(
        address: AgentAddress,
        read: impl AsyncRead + Send + Unpin + 'static,
        write: impl AsyncWrite + Send + Unpin + 'static,
    ) -> Result<Self, AgentError> {
        let lines = Lines::with_max(Box::new(read) as Box<dyn AsyncRead + Send + Unpin>, LINE_BYTES_MAX);
        let mut agent = Self { address, lines, write: Box::new(write), out_of_step: true };
        agent.sync().await?;
        Ok(agent)
    }

    /// Where the agent is reached again.
    #[must_use]
    pub fn address(&self) -> &AgentAddress {
        &self.address
    }

    /// Brings all file systems to rest; gives how many.
    pub async fn freeze(&mut self, limit: Duration) -> Result<u64, AgentError> {
        self.count("guest-fsfreeze-freeze", limit).await
    }

    /// Wakes the file systems; gives how many had been at rest.
    pub async fn thaw(&mut self) -> Result<u64, AgentError> {
        self.count("guest-fsfreeze-thaw", THAW_TIME).await
    }

    /// Whether the file systems are at rest.
    pub async fn is_frozen(&mut self) -> Result<bool, AgentError> {
        Ok(self.call("guest-fsfreeze-status", STATUS_TIME).await? == "frozen")
    }

    /// What kind of system the guest is, as its agent calls it (`debian`, `mswindows`).
    pub async fn system(&mut self) -> Result<String, AgentError> {
        let told = self.call("guest-get-osinfo", STATUS_TIME).await?;
        Ok(tidy(told["id"].as_str().unwrap_or_default()))
    }

    /// The guest's network interfaces: what the guest calls each, and its card's address in lower case.
    pub async fn interfaces(&mut self) -> Result<Vec<(String, String)>, AgentError> {
        let told = self.call("guest-network-get-interfaces", STATUS_TIME).await?;
        let interface = |told: &Value| {
            let mac = told["hardware-address"].as_str()?.to_ascii_lowercase();
            Some((told["name"].as_str()?.to_owned(), mac))
        };
        Ok(told.as_array().into_iter().flatten().filter_map(interface).collect())
    }

    /// Runs a command in the guest, and waits for its end; what it said is the reason where it fails.
    pub async fn execute(&mut self, words: &[String], limit: Duration) -> Result<(), AgentError> {
        const COMMAND: &str = "guest-exec";
        let (program, arguments) = words.split_first().expect("a command has words");
        let what = json!({"path": program, "arg": arguments, "capture-output": true});
        let started = self.call_with(COMMAND, Some(what), STATUS_TIME).await?;
        let begun = Instant::now();
        loop {
            let told = self
                .call_with("guest-exec-status", Some(json!({"pid": started["pid"]})), STATUS_TIME)
                .await?;
            match (told["exited"].as_bool(), told["exitcode"].as_i64()) {
                (Some(true), Some(0)) => return Ok(()),
                (Some(true), code) => {
                    let ended = code.map_or("by a signal".to_owned(), |code| format!("with status {code}"));
                    return Err(AgentError::Refused {
                        command: COMMAND,
                        desc: format!("'{}' ended {ended}{}", words.join(" "), said(&told)),
                    });
                }
                _ if begun.elapsed() > limit => {
                    return Err(AgentError::NoAnswer { command: COMMAND, after: limit });
                }
                _ => sleep(LOOK).await,
            }
        }
    }

    async fn count(&mut self, command: &'static str, limit: Duration) -> Result<u64, AgentError> {
        let answer = self.call(command, limit).await?;
        answer.as_u64().ok_or_else(|| AgentError::Broken {
            command,
            why: format!("{} is not a count", tidy(&answer.to_string())),
        })
    }

    async fn call(&mut self, command: &'static str, limit: Duration) -> Result<Value, AgentError> {
        self.call_with(command, None, limit).await
    }

    async fn call_with(
        &mut self,
        command: &'static str,
        arguments: Option<Value>,
        limit: Duration,
    ) -> Result<Value, AgentError> {
        let mut message = json!({ "execute": command });
        if let Some(arguments) = arguments {
            message["arguments"] = arguments;
        }
        if self.out_of_step {
            self.sync().await?;
        }
        // Until its answer is here, the next one may be this one's.
        self.out_of_step = true;
        let answer = timeout(limit, async {
            self.send(command, message).await?;
            let line = self.line(command).await?;
            serde_json::from_slice::<Value>(&line)
                .map_err(|error| AgentError::Broken { command, why: error.to_string() })
        });
        let answer = answer.await.map_err(|_| AgentError::NoAnswer { command, after: limit })??;
        self.out_of_step = false;
        if let Some(error) = answer.get("error") {
            let desc = tidy(error["desc"].as_str().unwrap_or("it gave no reason"));
            return Err(AgentError::Refused { command, desc });
        }
        Ok(answer["return"].clone())
    }

    async fn sync(&mut self) -> Result<(), AgentError> {
        const COMMAND: &str = "guest-sync-delimited";
        // An id that no client before us has used; a number that JSON carries exactly.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let id = u64::try_from(now.as_nanos()).unwrap_or_default() & ((1 << 52) - 1);
        let synced = timeout(SYNC_TIME, async {
            self.write.write_all(&[DELIMITER]).await.map_err(|error| broken(COMMAND, &error))?;
            self.send(COMMAND, json!({"execute": COMMAND, "arguments": {"id": id}})).await?;
            loop {
                let line = self.line(COMMAND).await?;
                let answer = line.rsplit(|&byte| byte == DELIMITER).next().unwrap_or_default();
                let answer = serde_json::from_slice::<Value>(answer).unwrap_or_default();
                if line.contains(&DELIMITER) && answer["return"] == id {
                    return Ok::<(), AgentError>(());
                }
            }
        });
        synced.await.map_err(|_| AgentError::NoAnswer { command: COMMAND, after: SYNC_TIME })??;
        self.out_of_step = false;
        Ok(())
    }

    async fn send(&mut self, command: &'static str, message: Value) -> Result<(), AgentError> {
        let line = format!("{message}\n");
        self.write.write_all(line.as_bytes()).await.map_err(|error| broken(command, &error))
    }

    async fn line(&mut self, command: &'static str) -> Result<Vec<u8>, AgentError> {
        let line = self.lines.next().await.map_err(|error| broken(command, &error))?;
        line.ok_or_else(|| AgentError::Broken { command, why: "it was closed".into() })
    }
}

/// What a command in a guest wrote, its complaints first.
fn said(told: &Value) -> String {
    let decoded = |key: &str| {
        let bytes = base64::engine::general_purpose::STANDARD.decode(told[key].as_str().unwrap_or_default());
        tidy(String::from_utf8_lossy(&bytes.unwrap_or_default()).trim())
    };
    let said = ["err-data", "out-data"].map(decoded);
    said.iter().find(|said| !said.is_empty()).map(|said| format!(": {said}")).unwrap_or_default()
}

fn broken(command: &'static str, error: &std::io::Error) -> AgentError {
    AgentError::Broken { command, why: error.to_string() }
}

/// Thaws a guest that a run of ours, killed at the worst moment, left frozen. Gives whether it was. To be
/// called for a VM with an agent before anything else is asked of it.
pub async fn thaw_if_frozen(socket: &Path) -> Result<bool, AgentError> {
    let mut agent = GuestAgent::connect(socket).await?;
    let frozen = agent.is_frozen().await?;
    if frozen {
        agent.thaw().await?;
    }
    Ok(frozen)
}
