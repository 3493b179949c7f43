//! What happened that a person may ask about later: refused peers, failed cycles, backups given up.

use catalog::{Catalog, params};
use model::Timestamp;
use serde::{Deserialize, Serialize};

use crate::clock::now;
use crate::failure::Failure;

const TABLES: &[&str] = &["
    CREATE TABLE events (
        id      INTEGER PRIMARY KEY,
        at      INTEGER NOT NULL,       -- microseconds since 1970
        kind    TEXT NOT NULL,
        vm      TEXT,                   -- its name or id, as it was given
        peer    TEXT,
        message TEXT NOT NULL
    ) STRICT;
"];

/// Events kept; a peer that floods us with bad requests must not fill the disk.
const EVENTS_MAX: i64 = 10_000;

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// When.
    pub at: Timestamp,
    /// What kind of thing, a stable code.
    pub kind: String,
    /// The VM it was about.
    pub vm: Option<String>,
    /// The peer, or the address, it came from.
    pub peer: Option<String>,
    /// One sentence.
    pub message: String,
}

impl Event {
    /// An event of this moment.
    pub fn new(kind: &str, message: impl Into<String>) -> Self {
        Self { at: now(), kind: kind.to_owned(), vm: None, peer: None, message: message.into() }
    }

    /// About this VM.
    #[must_use]
    pub fn vm(self, vm: impl ToString) -> Self {
        Self { vm: Some(vm.to_string()), ..self }
    }

    /// From this peer.
    #[must_use]
    pub fn peer(self, peer: impl ToString) -> Self {
        Self { peer: Some(peer.to_string()), ..self }
    }
}

/// The list of events.
#[derive(Clone)]
pub struct Events {
    catalog: Catalog,
}

impl Events {
    /// Opens it.
    pub fn open(catalog: Catalog) -> Result<Self, Failure> {
        catalog.migrate("events", TABLES)?;
        Ok(Self { catalog })
    }

    /// Writes one down, and into the log.
    pub async fn note(&self, event: Event) {
        let Event { at, kind, vm, peer, message } = event;
        tracing::warn!(%kind, vm = vm.as_deref(), peer = peer.as_deref(), "{message}");
        let written = self.catalog.change(move |tx| {
            tx.prepare_cached(
                "INSERT INTO events (at, kind, vm, peer, message) VALUES (?1, ?2, ?3, ?4, ?5)",
            )?
            .execute(params![at.0, kind, vm, peer, message])?;
            tx.prepare_cached("DELETE FROM events WHERE id <= ?1")?
                .execute([tx.last_insert_rowid() - EVENTS_MAX])
        });
        if let Err(error) = written.await {
            tracing::error!(%error, "an event could not be written down");
        }
    }

    /// The newest ones, newest first.
    pub fn newest(&self, count: u32) -> Result<Vec<Event>, Failure> {
        let read = self.catalog.read(|c| {
            c.prepare_cached("SELECT at, kind, vm, peer, message FROM events ORDER BY id DESC LIMIT ?1")?
                .query_map([count], |row| {
                    Ok(Event {
                        at: Timestamp(row.get(0)?),
                        kind: row.get(1)?,
                        vm: row.get(2)?,
                        peer: row.get(3)?,
                        message: row.get(4)?,
                    })
                })?
                .collect()
        });
        Ok(read?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_newest_come_first_and_old_ones_go() {
        let dir = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(dir.path().join("catalog.sqlite")).unwrap();
        let events = Events::open(catalog.clone()).unwrap();
        events.note(Event::new("peer-refused", "no certificate").peer("127.0.0.1:5")).await;
        catalog
            .change(|tx| tx.prepare_cached("UPDATE events SET id = id + 20000")?.execute([]))
            .await
            .unwrap();
        events.note(Event::new("log-refused", "wrong number").vm("web")).await;
        let kinds: Vec<_> = events.newest(10).unwrap().into_iter().map(|event| event.kind).collect();
        assert_eq!(kinds, ["log-refused", "peer-refused"]);
        catalog
            .change(|tx| {
                tx.prepare_cached("UPDATE events SET id = id - 20000 WHERE kind = 'peer-refused'")?
                    .execute([])
            })
            .await
            .unwrap();
        events.note(Event::new("log-refused", "wrong predecessor").vm("web")).await;
        assert_eq!(events.newest(10).unwrap().len(), 2);
    }
}
