//! A connection to an SFTP server through the program `ssh`: requests and answers by their numbers, from many
//! threads at once.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use super::{Trouble, TroubleKind};
use crate::location::{Access, Host};

/// The version of the protocol that OpenSSH speaks.
const VERSION: u32 = 3;
/// No packet is longer: a list of names, or the bytes of one read.
const PACKET_BYTES_MAX: u32 = 1 << 20;

/// An answer: its type and what follows its number.
pub(crate) struct Reply {
    pub(crate) kind: u8,
    pub(crate) body: Vec<u8>,
}

/// Who waits for which answer; none once the connection is gone.
type Waiting = Arc<Mutex<Option<HashMap<u32, Sender<Reply>>>>>;

/// A running `ssh`.
pub(crate) struct Connection {
    child: Mutex<Child>,
    to_server: Mutex<ChildStdin>,
    waiting: Waiting,
    next: AtomicU32,
    timeout: Duration,
    /// What `ssh` said last.
    said: Arc<Mutex<String>>,
    /// What the server can do beyond the protocol.
    pub(crate) extensions: Vec<String>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Connection {
    /// Starts `ssh` and greets the server.
    pub(crate) fn open(host: &Host, access: &Access) -> Result<Self, Trouble> {
        let mut child = command(host, access).spawn().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Trouble::other(
                "the program 'ssh' is missing; install it with 'apt-get install openssh-client'",
            ),
            _ => Trouble::other(format!("'ssh' cannot be started: {error}")),
        })?;
        let (Some(to_server), Some(from_server), Some(errors)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            return Err(Trouble::other("'ssh' was started without its pipes"));
        };
        let said = Arc::new(Mutex::new(String::new()));
        let listening = thread::spawn({
            let said = said.clone();
            move || {
                for line in BufReader::new(errors).lines().map_while(Result::ok) {
                    *locked(&said) = line.trim().to_owned();
                }
            }
        });
        let waiting: Waiting = Arc::new(Mutex::new(Some(HashMap::new())));
        let mut connection = Self {
            child: Mutex::new(child),
            to_server: Mutex::new(to_server),
            waiting: waiting.clone(),
            next: AtomicU32::new(1),
            timeout: access.timeout,
            said,
            extensions: Vec::new(),
        };
        let (greeted, greeting) = channel();
        thread::spawn(move || {
            let _ = read_replies(BufReader::with_capacity(256 << 10, from_server), &greeted, &waiting);
            // What `ssh` says of its end is heard before anybody is told of it.
            let _ = listening.join();
            *locked(&waiting) = None;
        });
        let sent = connection.write_packet(&[&[1], &VERSION.to_be_bytes()[..]].concat());
        let version = greeting.recv_timeout(connection.timeout);
        let gone = |connection: &Self| {
            let deadline = std::time::Instant::now() + Duration::from_secs(5);
            while locked(&connection.waiting).is_some() && std::time::Instant::now() < deadline {
                thread::sleep(Duration::from_millis(10));
            }
            connection.lost()
        };
        match (sent, version) {
            (Ok(()), Ok(greeting)) => {
                connection.extensions = extensions_of(&greeting);
                Ok(connection)
            }
            (_, Err(RecvTimeoutError::Timeout)) => Err(Trouble::unavailable("the server does not greet")),
            _ => Err(gone(&connection)),
        }
    }

    /// Whether it can still be used.
    pub(crate) fn is_alive(&self) -> bool {
        locked(&self.waiting).is_some()
    }

    /// Sends a request; its answer comes to the receiver.
    pub(crate) fn send(&self, kind: u8, body: &[&[u8]]) -> Result<Receiver<Reply>, Trouble> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = channel();
        match locked(&self.waiting).as_mut() {
            Some(waiting) => waiting.insert(number, sender),
            None => return Err(self.lost()),
        };
        let mut packet = vec![kind];
        packet.extend_from_slice(&number.to_be_bytes());
        body.iter().for_each(|part| packet.extend_from_slice(part));
        self.write_packet(&packet).map_err(|_| self.lost())?;
        Ok(receiver)
    }

    /// Waits for an answer.
    pub(crate) fn wait(&self, receiver: &Receiver<Reply>) -> Result<Reply, Trouble> {
        receiver.recv_timeout(self.timeout).map_err(|error| match error {
            RecvTimeoutError::Timeout => {
                self.end();
                Trouble::unavailable("the server does not answer in time")
            }
            RecvTimeoutError::Disconnected => self.lost(),
        })
    }

    fn write_packet(&self, packet: &[u8]) -> io::Result<()> {
        let len = u32::try_from(packet.len()).map_err(io::Error::other)?;
        let mut to_server = locked(&self.to_server);
        to_server.write_all(&[&len.to_be_bytes()[..], packet].concat())?;
        to_server.flush()
    }

    /// Why the connection is gone, as `ssh` says it.
    fn lost(&self) -> Trouble {
        let said = locked(&self.said).clone();
        let denied =
            ["Permission denied", "Host key verification failed", "No matching host key", "Too many auth"];
        if denied.iter().any(|words| said.contains(words)) {
            return Trouble::new(TroubleKind::Denied, format!("ssh says: {said}"));
        }
        Trouble::unavailable(match said.as_str() {
            "" => "the connection to the server was lost".to_owned(),
            said => format!("the connection to the server was lost; ssh says: {said}"),
        })
    }

    fn end(&self) {
        let mut child = locked(&self.child);
        let _ = child.kill();
        let _ = child.wait();
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.end();
    }
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Connection")
    }
}

fn command(host: &Host, access: &Access) -> Command {
    let mut ssh = Command::new("ssh");
    // It must never ask: nobody is there to answer. A line that is dead is noticed within a minute.
    ssh.args([
        "-oBatchMode=yes",
        "-oServerAliveInterval=15",
        "-oServerAliveCountMax=4",
        "-oClearAllForwardings=yes",
    ]);
    ssh.arg(format!("-oConnectTimeout={}", access.timeout.as_secs().clamp(1, 10)));
    if let Some(port) = host.port {
        ssh.args(["-p", &port.to_string()]);
    }
    ssh.args(&access.ssh_options).args(["-s", "--", &host.name, "sftp"]);
    ssh.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // The terminal's signals are for us; we end it.
    std::os::unix::process::CommandExt::process_group(&mut ssh, 0);
    ssh
}

/// Gives each answer to who waits for it, until the connection ends.
fn read_replies(mut from_server: impl Read, greeted: &Sender<Vec<u8>>, waiting: &Waiting) -> io::Result<()> {
    let mut first = true;
    loop {
        let mut head = [0; 5];
        from_server.read_exact(&mut head)?;
        let len = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
        if !(1..=PACKET_BYTES_MAX).contains(&len) {
            return Err(io::Error::other("a packet of a length that none has"));
        }
        let mut body = vec![0; len as usize - 1];
        from_server.read_exact(&mut body)?;
        if std::mem::take(&mut first) {
            let _ = greeted.send(body);
            continue;
        }
        let Some((number, rest)) = body.split_first_chunk::<4>() else {
            return Err(io::Error::other("a packet without a number"));
        };
        let waiter =
            locked(waiting).as_mut().and_then(|waiting| waiting.remove(&u32::from_be_bytes(*number)));
        if let Some(waiter) = waiter {
            let _ = waiter.send(Reply { kind: head[4], body: rest.to_vec() });
        }
    }
}

/// The names of the extensions that a greeting announces.
fn extensions_of(greeting: &[u8]) -> Vec<String> {
    let mut fields = Fields(greeting.get(4..).unwrap_or_default());
    let mut names = Vec::new();
    while let (Some(name), Some(_)) = (fields.text(), fields.text()) {
        names.push(String::from_utf8_lossy(name).into_owned());
    }
    names
}

/// The fields of a packet, one after another; none where it ends.
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl<'a> Fields<'a> {
    pub(crate) fn u32(&mut self) -> Option<u32> {
        let (bytes, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u32::from_be_bytes(*bytes))
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        let (bytes, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u64::from_be_bytes(*bytes))
    }

    pub(crate) fn text(&mut self) -> Option<&'a [u8]> {
        let len = self.u32()? as usize;
        let (text, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(text)
    }

    /// The size in a file's attributes, if they have one; what follows it is skipped.
    pub(crate) fn size(&mut self) -> Option<u64> {
        let flags = self.u32()?;
        let size = if flags & 1 != 0 { self.u64() } else { None };
        for (flag, bytes) in [(2, 8), (4, 4), (8, 8)] {
            if flags & flag != 0 {
                self.0 = self.0.get(bytes..)?;
            }
        }
        if flags & 0x8000_0000 != 0 {
            for _ in 0..self.u32()? {
                self.text()?;
                self.text()?;
            }
        }
        size
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_end_where_the_packet_ends() {
        let mut fields = Fields(&[0, 0, 0, 2, b'a', b'b', 0, 0, 0, 9, b'c']);
        assert_eq!(fields.text(), Some(&b"ab"[..]));
        assert_eq!(fields.text(), None);
        assert_eq!(Fields(&[0, 0, 0]).u32(), None);
        let mut attributes = vec![0, 0, 0, 0x0d];
        attributes.extend_from_slice(&77_u64.to_be_bytes());
        attributes.extend_from_slice(&[0; 12]);
        attributes.extend_from_slice(b"next");
        let mut fields = Fields(&attributes);
        assert_eq!((fields.size(), fields.0), (Some(77), &b"next"[..]));
        assert_eq!(Fields(&[0, 0, 0, 4, 0, 0, 0, 0]).size(), None);
    }

    #[test]
    fn a_greeting_names_extensions() {
        let mut greeting = vec![0, 0, 0, 3];
        for text in ["fsync@openssh.com", "1", "half"] {
            greeting.extend_from_slice(&u32::try_from(text.len()).unwrap().to_be_bytes());
            greeting.extend_from_slice(text.as_bytes());
        }
        assert_eq!(extensions_of(&greeting), ["fsync@openssh.com"]);
        assert!(extensions_of(&[]).is_empty());
    }
}
