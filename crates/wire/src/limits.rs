//! What a server grants before it knows anything of whom it serves. Every wait has a limit.

use std::time::Duration;

/// The most bytes of a log in one request: what is in memory for each upload, and what a broken link costs.
pub const SEGMENT_BYTES: usize = 4 << 20;
/// The longest JSON body, in either direction.
pub const JSON_BYTES_MAX: usize = 1 << 20;
/// The most digests in one answer: 1 MiB of them speak for 4 GiB of disk in blocks of 64 KiB.
pub const DIGESTS_MAX: u64 = 1 << 16;
/// Connections at once.
pub const CONNECTIONS_MAX: usize = 512;
/// Segments that are in memory at once, over all connections.
pub const SEGMENTS_MAX: usize = 32;
/// Digests that are computed at once, over all connections: each may read gigabytes.
const DIGESTS_AT_ONCE: usize = 4;
/// Invites' secrets that may be wrong in a minute, from one network.
const WRONG_SECRETS_MAX: u32 = 10;
/// Refusals that are written down in a minute, for one network or peer.
const NOTES_MAX: u32 = 30;

/// The limits of a server. The defaults are for the world; tests have less patience.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Connections at once; for one more, somebody who holds more than others loses one.
    pub connections: usize,
    /// How long a TLS handshake may take.
    pub handshake: Duration,
    /// How long a connection may be idle, and how long a request's head may take.
    pub head: Duration,
    /// How long a body may pause.
    pub body_idle: Duration,
    /// How long a JSON body may take.
    pub json_body: Duration,
    /// How long the body of a segment may take: a peer slower than 7 kB/s is no use.
    pub segment_body: Duration,
    /// Segments in memory at once.
    pub segments: usize,
    /// Requests for digests at once.
    pub digests: usize,
    /// How long a segment, or a request for digests, waits for its turn before it is refused for now.
    pub segment_turn: Duration,
    /// Wrong secrets in a minute from one network, before it is not listened to for the rest of it.
    pub wrong_secrets: u32,
    /// Refusals in a minute that come to [`crate::Endpoint::note`], of one network or one peer.
    pub notes: u32,
    /// How long requests may go on when the server is to end.
    pub shutdown: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: CONNECTIONS_MAX,
            handshake: Duration::from_secs(10),
            head: Duration::from_secs(60),
            body_idle: Duration::from_secs(30),
            json_body: Duration::from_secs(30),
            segment_body: Duration::from_secs(600),
            segments: SEGMENTS_MAX,
            digests: DIGESTS_AT_ONCE,
            segment_turn: Duration::from_secs(5),
            wrong_secrets: WRONG_SECRETS_MAX,
            notes: NOTES_MAX,
            shutdown: Duration::from_secs(10),
        }
    }
}
