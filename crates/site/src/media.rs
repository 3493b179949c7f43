//! Initial replications by media, as a person sees them: at the primary's site while they are written and carried, at the
//! replica's while they are awaited and imported.

use std::path::PathBuf;

use model::{LogNumber, MediaId, Timestamp};
use serde::Serialize;
use serde_json::{Value, json};

use crate::clock::serialize_optional_moment;
use crate::commands::Site;
use crate::control::Reporter;
use crate::events::Event;
use crate::failure::{Code, Failure};

/// A set of media.
#[derive(Debug, Clone, Serialize)]
pub struct MediaView {
    /// Its id.
    pub set: MediaId,
    /// The folder that it is written to (primary).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dir: Option<String>,
    /// How many logs are written; at the replica, how many the set has, once that is known.
    pub logs: Option<u64>,
    /// How many of them are imported (replica).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub imported: Option<u64>,
    /// The bytes of its files, once all are written (primary).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// When all was written (primary).
    #[serde(serialize_with = "serialize_optional_moment", skip_serializing_if = "Option::is_none")]
    pub written_at: Option<Timestamp>,
    /// One sentence for a person: what it waits for.
    pub message: String,
}

impl MediaView {
    /// What is written at the primary's site, if something is.
    pub(crate) fn of_primary(status: &primary::VmStatus) -> Option<Self> {
        let media = status.passes.media.as_ref()?;
        let (dir, peer, LogNumber(logs)) = (media.dir.display(), &status.settings.peer, status.acked);
        let message = match media.written {
            None => format!("its initial replication is being written to {dir}"),
            Some(_) => format!(
                "its initial replication is written to {dir}: bring what is in there to {peer} and run 'afterimage replica import DIR'; from then on only what has changed since is sent"
            ),
        };
        Some(Self {
            set: media.set,
            dir: Some(dir.to_string()),
            logs: Some(logs),
            imported: None,
            bytes: media.written.map(|written| written.bytes),
            written_at: media.written.map(|written| written.at),
            message,
        })
    }

    /// What is awaited at the replica's site, if something is.
    pub(crate) fn of_replica(status: &replica::ReplicaStatus) -> Option<Self> {
        let media = status.media.as_ref()?;
        let (primary, imported) = (&status.primary_name, status.head.number.0);
        let message = match media.logs {
            _ if media.importing => "its media are being imported".to_owned(),
            Some(LogNumber(logs)) if imported >= logs => {
                format!("its media are imported; {primary} goes on as soon as it hears of that")
            }
            Some(_) if imported > 0 => {
                "a part of its media is imported: 'afterimage replica import DIR' goes on where it stopped"
                    .to_owned()
            }
            Some(_) => "it waits for its media: 'afterimage replica import DIR' reads them here".to_owned(),
            None => format!("it waits for media that are being written at {primary}"),
        };
        Some(Self {
            set: media.set,
            dir: None,
            logs: media.logs.map(|logs| logs.0),
            imported: Some(imported),
            bytes: None,
            written_at: None,
            message,
        })
    }
}

impl Site {
    /// Imports the media in a folder.
    pub(crate) async fn import_media(&self, dir: PathBuf, reporter: &Reporter) -> Result<Value, Failure> {
        if !dir.is_dir() {
            let error = std::io::Error::from(std::io::ErrorKind::NotADirectory);
            return Err(Failure::io("read", &dir, &error));
        }
        self.check_not_the_writer(&dir)?;
        let told = reporter.clone();
        let tell = move |name: &model::VmName, done: u64, total: u64| {
            told.progress(format!("importing {name}"), done, total);
        };
        let done = self.store.run(move |store| store.import_media(&dir, tell)).await?;
        let what = format!("its initial replication was imported from media: {} logs", done.logs);
        self.events.note(Event::new("media-imported", what).vm(&done.name)).await;
        Ok(json!({
            "vm": done.name, "logs": done.logs, "here_before": done.here_before, "bytes": done.bytes,
        }))
    }

    /// The site that writes a set cannot be the one that it is for.
    fn check_not_the_writer(&self, dir: &std::path::Path) -> Result<(), Failure> {
        let card = std::fs::read(dir.join(media::CARD_FILE)).ok();
        let Some(card) = card.and_then(|card| media::Card::decode(&card).ok()) else { return Ok(()) };
        let Some(ours) = self.primary.status().into_iter().find(|status| status.vm == card.vm) else {
            return Ok(());
        };
        let message = format!(
            "the media in {} are of {}, which runs here; they are for {}: import them there",
            dir.display(),
            ours.name,
            ours.settings.peer
        );
        Err(Failure::new(Code::Unfit, message))
    }
}
