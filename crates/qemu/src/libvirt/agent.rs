//! The guest's agent through libvirt: speaks the agent's protocol on one side and passes each command on.
//!
//! Libvirt makes sure itself that an answer belongs to its question, and is told how long it may wait: a little less
//! than whoever waits for us, so that a command that comes late does not block the thaw behind it.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncWriteExt, DuplexStream, duplex, split};

use crate::libvirt::domain::Domain;
use crate::libvirt::error::Error;
use crate::lines::{Lines, tidy};

/// The longest line that passes, in bytes.
const LINE_BYTES_MAX: usize = 64 << 10;
/// How long the agent may take to show that it is there.
const PING_TIME: Duration = Duration::from_secs(5);

impl Domain {
    /// A stream to the guest's agent, which has just answered.
    pub(crate) async fn agent(&self) -> Result<DuplexStream, Error> {
        self.agent_command(r#"{"execute":"guest-ping"}"#, PING_TIME).await?;
        let (ours, theirs) = duplex(LINE_BYTES_MAX);
        tokio::spawn(pass(self.clone(), theirs));
        Ok(ours)
    }
}

async fn pass(domain: Domain, stream: DuplexStream) {
    let (read, mut write) = split(stream);
    let mut lines = Lines::with_max(read, LINE_BYTES_MAX);
    while let Ok(Some(line)) = lines.next().await {
        let answer = answer(&domain, &line).await;
        if write.write_all(&answer).await.is_err() {
            return;
        }
    }
}

async fn answer(domain: &Domain, line: &[u8]) -> Vec<u8> {
    let start = line.iter().position(|&byte| byte == b'{').unwrap_or(line.len());
    let command: Value = serde_json::from_slice(&line[start..]).unwrap_or_default();
    let name = command["execute"].as_str().unwrap_or_default();
    if name == "guest-sync-delimited" {
        let synced = json!({"return": command["arguments"]["id"]});
        return [&[0xff], format!("{synced}\n").as_bytes()].concat();
    }
    let said = match domain.agent_command(&command.to_string(), limit(name)).await {
        // Without what is no JSON, and in one line.
        Ok(said) => {
            serde_json::from_str(&said).unwrap_or_else(|_| refused("libvirt gave an answer that is not JSON"))
        }
        Err(error) => refused(&error.to_string()),
    };
    format!("{said}\n").into_bytes()
}

fn refused(why: &str) -> Value {
    json!({"error": {"class": "GenericError", "desc": tidy(why)}})
}

fn limit(command: &str) -> Duration {
    Duration::from_secs(match command {
        "guest-fsfreeze-freeze" => 55,
        "guest-fsfreeze-thaw" => 8,
        _ => 4,
    })
}
