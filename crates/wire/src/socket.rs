//! What both ends set on a TCP connection.

use std::io;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::io::BufReader;
use tokio::net::TcpStream;

/// rustls asks the system for 4 KiB at a time; this much is read at once instead. The memory is touched
/// only where so much arrives.
const READ_BUFFER_BYTES: usize = 128 * 1024;
/// Encrypted bytes that wait to be written; large, so that one write takes many TLS records.
pub(crate) const TLS_BUFFER_BYTES: usize = 256 * 1024;

/// A peer that does not acknowledge for this long is gone, whether we are sending or waiting.
const SILENCE: Duration = Duration::from_secs(30);
const PROBE_EVERY: Duration = Duration::from_secs(5);
const PROBES: u32 = 4;

/// Sends small messages at once, notices a peer that vanished, and buffers reads.
pub(crate) fn prepare(tcp: TcpStream) -> io::Result<BufReader<TcpStream>> {
    tcp.set_nodelay(true)?;
    let socket = SockRef::from(&tcp);
    let keepalive =
        TcpKeepalive::new().with_time(SILENCE / 2).with_interval(PROBE_EVERY).with_retries(PROBES);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(SILENCE))?;
    Ok(BufReader::with_capacity(READ_BUFFER_BYTES, tcp))
}
