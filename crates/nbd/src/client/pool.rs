//! Several connections to one export, for reading it faster than one can.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;

use super::Client;
use crate::codec::StatusExtent;
use crate::error::Result;

/// Connections to one export, all alike. Each request goes to the one with the fewest in flight.
///
/// It only reads: what is read must not change meanwhile, as with a moment fixed for a cycle, or the
/// connections are to be [`Client::is_multi_conn`]. Writers use one [`Client`].
#[derive(Debug, Clone)]
pub struct Pool {
    clients: Arc<[Client]>,
    turn: Arc<AtomicUsize>,
}

impl Pool {
    /// Opens `connections` (at least one) connections to an export of the server on a unix socket.
    pub async fn connect(
        path: impl AsRef<Path>,
        export: &str,
        contexts: &[&str],
        connections: usize,
    ) -> Result<Self> {
        let path = path.as_ref();
        let opening = (0..connections.max(1)).map(|_| Client::connect(path, export, contexts));
        let clients = futures::future::try_join_all(opening).await?;
        Ok(Self { clients: clients.into(), turn: Arc::default() })
    }

    /// The connection with the fewest requests in flight; in turn among equals.
    #[must_use]
    pub fn client(&self) -> &Client {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let count = self.clients.len();
        let in_turn = (0..count).map(|place| &self.clients[(turn + place) % count]);
        in_turn.min_by_key(|client| client.in_flight()).expect("a pool has at least one connection")
    }

    /// The export's size.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.clients[0].size_bytes()
    }

    /// The metadata contexts that the server has, of those asked for.
    #[must_use]
    pub fn contexts(&self) -> &[String] {
        self.clients[0].contexts()
    }

    /// See [`Client::read`].
    pub async fn read(&self, offset: u64, len: u64) -> Result<Bytes> {
        self.client().read(offset, len).await
    }

    /// See [`Client::read_into`].
    pub async fn read_into(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.client().read_into(offset, buffer).await
    }

    /// See [`Client::block_status`].
    pub async fn block_status(&self, offset: u64, len: u64) -> Result<Vec<Vec<StatusExtent>>> {
        self.client().block_status(offset, len).await
    }
}

impl AsRef<Client> for Pool {
    fn as_ref(&self) -> &Client {
        self.client()
    }
}
