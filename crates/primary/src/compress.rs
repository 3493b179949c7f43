//! Where records are compressed.

use log::{EncodedRecord, RawRecord};
use tokio::task::JoinHandle;

use crate::error::{Failure, FailureCode};

/// Where records are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compress {
    /// On tokio's blocking threads, several at a time: what a site does.
    #[default]
    Workers,
    /// At once, by the task that reads: no thread but the caller's, for a run that must be the same each time.
    Inline,
}

impl Compress {
    /// Starts to compress a record.
    pub(crate) fn start(self, record: RawRecord, level: i32) -> Compression {
        match self {
            Self::Workers => Compression::Running(tokio::task::spawn_blocking(move || record.encode(level))),
            Self::Inline => Compression::Done(record.encode(level)),
        }
    }
}

/// A record that is compressed, or will be.
pub(crate) enum Compression {
    Running(JoinHandle<EncodedRecord>),
    Done(EncodedRecord),
}

impl Compression {
    pub async fn finish(self) -> Result<EncodedRecord, Failure> {
        match self {
            Self::Running(task) => task.await.map_err(|error| {
                Failure::transient(FailureCode::Stopped, format!("a compressor stopped: {error}"))
            }),
            Self::Done(record) => Ok(record),
        }
    }
}
