//! Libvirt's remote procedure calls over its daemon's unix socket.
//!
//! One connection, several calls in flight: a task writes, a task reads and hands each answer to the one who
//! asked. Once the connection is gone it stays gone.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;
use tokio::sync::broadcast;
use tokio::time::{Instant, timeout_at};

use crate::dialogue::{Dialogue, Tasks};
use crate::libvirt::error::Error;
use crate::libvirt::xdr::{Malformed, Reader, Writer};
use crate::lines::tidy;

/// The part of libvirt that a procedure belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Program {
    /// What every hypervisor has.
    Remote = 0x2000_8086,
    /// What only QEMU has.
    Qemu = 0x2000_8087,
}

/// A procedure: its program, its number there, and what it does, for messages.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Procedure(pub Program, pub u32, pub &'static str);

/// Something that the daemon tells without being asked.
#[derive(Debug, Clone)]
pub(crate) struct Told {
    pub program: u32,
    pub procedure: u32,
    pub payload: Vec<u8>,
}

/// Both programs are of version 1, and always were.
const VERSION: u32 = 1;
const CALL: u32 = 0;
const REPLY: u32 = 1;
const MESSAGE: u32 = 2;
const OK: u32 = 0;
/// The length of a packet's own length and header.
const HEAD_BYTES: usize = 28;
/// The longest packet that libvirt sends, in bytes.
const PACKET_BYTES_MAX: usize = 32 << 20;
/// Events kept for a listener that is slow.
const EVENTS_KEPT: usize = 256;
/// How long the daemon may take to take our connection.
const CONNECT_TIME: Duration = Duration::from_secs(10);

/// A connection to a daemon. Clones share it; the last one to go ends it.
#[derive(Clone)]
pub(crate) struct Rpc {
    shared: Arc<Shared>,
    /// The user that the daemon runs as.
    pub daemon_uid: Option<u32>,
    _tasks: Arc<Tasks>,
}

struct Shared {
    socket: PathBuf,
    dialogue: Dialogue<Answer>,
    told: broadcast::Sender<Told>,
}

/// The results, or the number and the words of an error.
type Answer = Result<Vec<u8>, (i32, String)>;

impl Rpc {
    /// Connects to the first of these sockets that answers.
    pub async fn connect(sockets: &[PathBuf]) -> Result<Self, Error> {
        let mut failed = io::ErrorKind::NotFound.into();
        for socket in sockets {
            let deadline = Instant::now() + CONNECT_TIME;
            let connected = timeout_at(deadline, UnixStream::connect(socket)).await;
            match connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                Ok(stream) => return Ok(Self::start(socket.clone(), stream)),
                // What a daemon that is not the one in use leaves behind says less than a refusal.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => failed = error,
            }
        }
        Err(Error::Connect { tried: sockets.to_vec(), source: failed })
    }

    fn start(socket: PathBuf, stream: UnixStream) -> Self {
        let daemon_uid = stream.peer_cred().ok().map(|daemon| daemon.uid());
        let (read, write) = stream.into_split();
        let (dialogue, queued) = Dialogue::new();
        let shared = Arc::new(Shared { socket, dialogue, told: broadcast::Sender::new(EVENTS_KEPT) });
        let writing = shared.clone();
        let tasks = vec![
            tokio::spawn(read_all(read, shared.clone())).abort_handle(),
            tokio::spawn(async move { writing.dialogue.write_all(queued, write).await }).abort_handle(),
        ];
        Self { shared, daemon_uid, _tasks: Arc::new(Tasks(tasks)) }
    }

    /// The daemon's socket.
    pub fn socket(&self) -> String {
        self.shared.socket.display().to_string()
    }

    /// Listens to what the daemon tells from now on.
    pub fn told(&self) -> broadcast::Receiver<Told> {
        self.shared.told.subscribe()
    }

    /// Waits until the connection is gone, and says why.
    pub async fn closed(&self) -> String {
        self.shared.dialogue.closed().await
    }

    /// Calls a procedure and reads its results. After a timeout it may still be carried out.
    pub async fn call<T>(
        &self,
        procedure: Procedure,
        arguments: Writer,
        limit: Duration,
        read: impl FnOnce(&mut Reader<'_>) -> Result<T, Malformed>,
    ) -> Result<T, Error> {
        let Procedure(_, _, what) = procedure;
        let deadline = Instant::now() + limit;
        let late = || Error::Timeout { socket: self.socket(), what, after: limit };
        let mut question = self.shared.dialogue.ask();
        let packet = packet(procedure, question.number, &arguments.done());
        self.shared.dialogue.send(packet, deadline).await;
        let answer = timeout_at(deadline, &mut question.answer).await.map_err(|_| late())?;
        match answer {
            Ok(Ok(results)) => read(&mut Reader::new(&results))
                .map_err(|Malformed| Error::Answer { what, why: "it ends too early".into() }),
            Ok(Err((code, message))) => Err(Error::Refused { what, code, message }),
            Err(_) => Err(self.gone()),
        }
    }

    fn gone(&self) -> Error {
        Error::Gone { socket: self.socket(), why: self.shared.dialogue.why_gone() }
    }
}

impl fmt::Debug for Rpc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rpc").field("socket", &self.shared.socket).finish_non_exhaustive()
    }
}

impl Shared {
    fn dispatch(&self, packet: &[u8]) -> Result<(), Malformed> {
        let mut reader = Reader::new(packet);
        let (program, _version, procedure) = (reader.number()?, reader.number()?, reader.number()?);
        let (kind, serial, status) = (reader.number()?, reader.number()?, reader.number()?);
        let payload = &packet[HEAD_BYTES - 4..];
        match kind {
            REPLY => {
                let answer = if status == OK { Ok(payload.to_vec()) } else { Err(refusal(&mut reader)?) };
                self.dialogue.answer(serial, answer);
            }
            MESSAGE => {
                let _ = self.told.send(Told { program, procedure, payload: payload.to_vec() });
            }
            _ => {} // streams and files: nothing that we ask for
        }
        Ok(())
    }
}

/// The number and the words of an error; what follows them says nothing to us.
fn refusal(reader: &mut Reader<'_>) -> Result<(i32, String), Malformed> {
    let (code, _domain) = (reader.signed()?, reader.signed()?);
    let message = reader.optional_text()?.unwrap_or_else(|| "it gave no reason".into());
    Ok((code, tidy(&message)))
}

fn packet(Procedure(program, procedure, _): Procedure, serial: u32, payload: &[u8]) -> Vec<u8> {
    let head = [
        u32::try_from(HEAD_BYTES + payload.len()).unwrap_or(u32::MAX),
        program as u32,
        VERSION,
        procedure,
        CALL,
        serial,
        OK,
    ];
    let head = head.into_iter().fold(Writer::default(), Writer::number);
    [&head.done(), payload].concat()
}

async fn read_all(mut read: OwnedReadHalf, shared: Arc<Shared>) {
    let why = loop {
        match next_packet(&mut read).await {
            Ok(packet) => {
                if shared.dispatch(&packet).is_err() {
                    break "it sent a packet that is not in its protocol".to_owned();
                }
            }
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                break "it was closed by the daemon, which has ended or was started again".to_owned();
            }
            Err(error) => break format!("it cannot be read ({error})"),
        }
    };
    shared.dialogue.close(why);
}

/// A packet without its length.
async fn next_packet(read: &mut OwnedReadHalf) -> io::Result<Vec<u8>> {
    let len = read.read_u32().await? as usize;
    if !(HEAD_BYTES..=PACKET_BYTES_MAX).contains(&len) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a packet of {len} bytes")));
    }
    let mut packet = vec![0; len - 4];
    read.read_exact(&mut packet).await?;
    Ok(packet)
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;
    use tokio::net::UnixListener;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);
    const ECHO: Procedure = Procedure(Program::Qemu, 7, "say it again");

    /// A daemon that answers the calls that come with what the test says, last one first.
    async fn daemon(answers: Vec<(u32, Vec<u8>)>) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        let listener = UnixListener::bind(&path).unwrap();
        tokio::spawn(async move {
            let (mut read, mut write) = listener.accept().await.unwrap().0.into_split();
            let mut serials = Vec::new();
            for _ in &answers {
                let call = next_packet(&mut read).await.unwrap();
                let mut reader = Reader::new(&call);
                let head: Vec<u32> = (0..6).map(|_| reader.number().unwrap()).collect();
                assert_eq!(head[..4], [Program::Qemu as u32, 1, 7, CALL]);
                serials.push(head[4]);
            }
            for (serial, (status, payload)) in serials.iter().zip(answers).rev() {
                let len = (HEAD_BYTES + payload.len()) as u32;
                let head = [len, Program::Qemu as u32, 1, 7, REPLY, *serial, status];
                let head = head.into_iter().fold(Writer::default(), Writer::number).done();
                write.write_all(&[head, payload].concat()).await.unwrap();
            }
        });
        (dir, path)
    }

    #[tokio::test]
    async fn answers_find_the_one_who_asked_and_errors_keep_their_words() {
        let refused = Writer::default().signed(55).signed(10).some().text("not\nrunning").signed(2).done();
        let (_dir, path) = daemon(vec![(0, Writer::default().text("one").done()), (1, refused)]).await;
        let rpc = Rpc::connect(&[path.with_file_name("none"), path.clone()]).await.unwrap();
        let ask = || rpc.call(ECHO, Writer::default(), LIMIT, |it| it.text());
        let (first, second) = tokio::join!(ask(), ask());
        assert_eq!(first.unwrap(), "one");
        let error = second.unwrap_err();
        assert_eq!(error.to_string(), "libvirt refused to say it again: not running");
        assert!(error.is_not_running());
        // The daemon hangs up.
        let error = ask().await.unwrap_err();
        assert!(matches!(error, Error::Gone { .. }), "{error}");
        assert!(rpc.closed().await.contains("closed by the daemon"));
        assert!(rpc.shared.dialogue.waiting().is_empty());
    }

    #[tokio::test]
    async fn an_answer_that_is_cut_or_late_is_an_error() {
        let (dir, path) = daemon(vec![(0, vec![0, 0, 0, 9])]).await;
        let rpc = Rpc::connect(&[path]).await.unwrap();
        let cut = rpc.call(ECHO, Writer::default(), LIMIT, |it| it.text()).await;
        assert!(matches!(cut, Err(Error::Answer { .. })), "{cut:?}");
        let path = dir.path().join("silent");
        let _listener = UnixListener::bind(&path).unwrap();
        let rpc = Rpc::connect(&[path]).await.unwrap();
        let late = rpc.call(ECHO, Writer::default(), Duration::from_millis(5), |it| it.text()).await;
        assert!(matches!(late, Err(Error::Timeout { .. })), "{late:?}");
        assert!(rpc.shared.dialogue.waiting().is_empty());
    }

    #[tokio::test]
    async fn a_packet_of_a_length_that_none_has_ends_the_connection() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        let listener = UnixListener::bind(&path).unwrap();
        let rpc = Rpc::connect(std::slice::from_ref(&path)).await.unwrap();
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(&[0xff; 4]).await.unwrap();
        assert!(rpc.closed().await.contains("a packet of 4294967295 bytes"));
        let nobody = Rpc::connect(&[dir.path().join("none")]).await.unwrap_err();
        assert!(nobody.to_string().contains("libvirtd running"), "{nobody}");
    }
}
