//! QEMU's monitor through libvirt: speaks QMP on one side and passes each command on.
//!
//! Commands go one after the other: libvirt carries out what comes at the same time in any order.

use std::path::Path;

use serde_json::{Value, json};
use tokio::io::{AsyncWriteExt, DuplexStream, duplex, split};

use crate::error::Error;
use crate::libvirt::domain::{Domain, MonitorEvents};
use crate::lines::{Lines, tidy};
use crate::qmp::Qmp;

/// How much of an answer may lie between libvirt and us.
const BETWEEN_BYTES: usize = 64 << 10;
/// Told to a listener where events were missed: to him it is a reason to look again.
const EVENTS_MISSED: &str = "AFTERIMAGE_EVENTS_MISSED";

impl Domain {
    /// Its QEMU's monitor. Good until this life of the domain ends.
    pub async fn qmp(&self) -> Result<Qmp, Error> {
        let events = self.monitor_events().await?;
        let version = self.monitor_command(r#"{"execute":"query-version"}"#).await?;
        let version: Value = serde_json::from_str(&version)
            .map_err(|error| Error::Answer { command: "query-version".into(), why: error.to_string() })?;
        let greeting = json!({"QMP": {"version": version["return"], "capabilities": []}});
        let (ours, theirs) = duplex(BETWEEN_BYTES);
        tokio::spawn(pass(self.clone(), events, greeting, theirs));
        let (read, write) = split(ours);
        let mut qmp = Qmp::over(Path::new(&self.address().to_string()), read, write).await?;
        qmp.close_after(self.ended());
        Ok(qmp)
    }
}

/// Passes commands and events until nobody listens.
async fn pass(domain: Domain, mut events: MonitorEvents, greeting: Value, stream: DuplexStream) {
    let (read, mut write) = split(stream);
    let mut lines = Lines::new(read);
    let mut says = greeting;
    loop {
        if write.write_all(format!("{says}\n").as_bytes()).await.is_err() {
            return;
        }
        says = tokio::select! {
            biased;
            line = lines.next() => match line {
                Ok(Some(line)) => answer(&domain, &line).await,
                Ok(None) | Err(_) => return,
            },
            event = events.next() => told(event),
        };
    }
}

fn told(event: Option<(String, Option<String>)>) -> Value {
    let (name, data) = event.unwrap_or_else(|| (EVENTS_MISSED.into(), None));
    let data: Value = data.and_then(|data| serde_json::from_str(&data).ok()).unwrap_or_default();
    json!({"event": name, "data": data})
}

async fn answer(domain: &Domain, line: &[u8]) -> Value {
    let mut command: Value = serde_json::from_slice(line).unwrap_or_default();
    // Libvirt gives commands ids of its own.
    let id = command.as_object_mut().and_then(|command| command.remove("id")).unwrap_or_default();
    if command["execute"] == "qmp_capabilities" {
        return json!({"return": {}, "id": id});
    }
    let refused = |why: String| json!({"error": {"class": "GenericError", "desc": tidy(&why)}, "id": id});
    let said = match domain.monitor_command(&command.to_string()).await {
        Ok(said) => said,
        Err(error) => return refused(error.to_string()),
    };
    match serde_json::from_str::<Value>(&said) {
        Ok(mut said) if said.is_object() => {
            said["id"] = id;
            said
        }
        _ => refused("libvirt gave an answer that is not QMP".into()),
    }
}
