//! A client of QEMU's monitor protocol, QMP.
//!
//! One connection, several commands in flight: a task writes, a task reads and hands each answer to the one
//! who asked. A caller that gives up (a timeout, a cancelled future) never leaves half a command behind,
//! and its late answer is dropped. Once the connection is gone it stays gone: make a new client.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use tokio::sync::broadcast;
use tokio::time::{Instant, sleep, timeout_at};

use crate::dialogue::{Dialogue, Tasks};
use crate::error::{Error, ErrorClass};
use crate::lines::{Lines, tidy};

/// How long a command may take unless something else is said: creating and deleting can wait for a slow disk.
const COMMAND_TIME: Duration = Duration::from_secs(30);
/// Events kept for a listener that is slow; one that missed some asks QEMU instead.
const EVENTS_KEPT: usize = 256;
/// Lines before the greeting that may be meant for a client before us.
const STRAYS_MAX: usize = 1000;

/// A command and its arguments.
#[derive(Debug, Clone)]
pub struct Command {
    name: &'static str,
    arguments: Value,
}

impl Command {
    /// A command; `arguments` is a JSON object, or null for none.
    #[must_use]
    pub fn new(name: &'static str, arguments: Value) -> Self {
        Self { name, arguments }
    }

    /// A command without arguments.
    #[must_use]
    pub fn bare(name: &'static str) -> Self {
        Self::new(name, Value::Null)
    }

    /// The command with what it is about, for messages.
    fn shown(&self) -> String {
        let about =
            ["id", "node-name", "node", "job-id"].iter().find_map(|key| self.arguments[*key].as_str());
        about.map_or_else(|| self.name.to_owned(), |about| format!("{} ({about})", self.name))
    }

    fn line(&self, id: u32) -> Vec<u8> {
        let mut message = json!({ "execute": self.name, "id": id });
        if !self.arguments.is_null() {
            message["arguments"] = self.arguments.clone();
        }
        let mut line = message.to_string().into_bytes();
        line.push(b'\n');
        line
    }
}

/// Something that QEMU tells without being asked.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Event {
    /// Its name, as in QEMU's documentation.
    #[serde(rename = "event")]
    pub name: String,
    /// What it says.
    #[serde(default)]
    pub data: Value,
}

/// QEMU's version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct Version {
    /// Major.
    pub major: u32,
    /// Minor.
    pub minor: u32,
    /// Micro.
    pub micro: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// A connection to QEMU's monitor. Clones share it.
#[derive(Clone)]
pub struct Qmp {
    shared: Arc<Shared>,
    /// The last clone to go ends the connection.
    tasks: Arc<Tasks>,
}

struct Shared {
    socket: PathBuf,
    version: Version,
    dialogue: Dialogue<Answer>,
    events: broadcast::Sender<Event>,
}

type Answer = Result<Value, (ErrorClass, String)>;

#[derive(Deserialize)]
struct Greeting {
    #[serde(rename = "QMP")]
    qmp: GreetingVersion,
}

#[derive(Deserialize)]
struct GreetingVersion {
    version: VersionInfo,
}

#[derive(Deserialize)]
struct VersionInfo {
    qemu: Version,
}

#[derive(Deserialize)]
struct Message {
    id: Option<u32>,
    #[serde(rename = "return")]
    result: Option<Value>,
    error: Option<Refusal>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
}

#[derive(Deserialize)]
struct Refusal {
    class: String,
    desc: String,
}

impl Qmp {
    /// Connects, and waits for the greeting for at most `limit`: a QMP socket serves one client at a time.
    pub async fn connect(socket: &Path, limit: Duration) -> Result<Self, Error> {
        let deadline = Instant::now() + limit;
        let busy = || Error::Busy { socket: socket.to_owned(), waited: limit };
        let stream = timeout_at(deadline, open(socket)).await.map_err(|_| busy())??;
        let (read, write) = stream.into_split();
        let mut lines = Lines::new(read);
        let greeted = timeout_at(deadline, greeting(socket, &mut lines)).await;
        Self::agree(socket, greeted.map_err(|_| busy())??, lines, write).await
    }

    /// The same over a stream that is connected already; waits for the greeting as long as it takes. `socket` is
    /// what messages call it.
    pub async fn over(
        socket: &Path,
        read: impl AsyncRead + Send + Unpin + 'static,
        write: impl AsyncWrite + Send + Unpin + 'static,
    ) -> Result<Self, Error> {
        let mut lines = Lines::new(read);
        let version = greeting(socket, &mut lines).await?;
        Self::agree(socket, version, lines, write).await
    }

    async fn agree(
        socket: &Path,
        version: Version,
        lines: Lines<impl AsyncRead + Send + Unpin + 'static>,
        write: impl AsyncWrite + Send + Unpin + 'static,
    ) -> Result<Self, Error> {
        let qmp = Self::start(socket, version, lines, write);
        qmp.run(Command::bare("qmp_capabilities")).await?;
        Ok(qmp)
    }

    fn start<R, W>(socket: &Path, version: Version, lines: Lines<R>, write: W) -> Self
    where
        R: AsyncRead + Send + Unpin + 'static,
        W: AsyncWrite + Send + Unpin + 'static,
    {
        let (dialogue, queued) = Dialogue::new();
        let events = broadcast::Sender::new(EVENTS_KEPT);
        let shared = Arc::new(Shared { socket: socket.to_owned(), version, dialogue, events });
        let writing = shared.clone();
        let tasks = vec![
            tokio::spawn(read_all(lines, shared.clone())).abort_handle(),
            tokio::spawn(async move { writing.dialogue.write_all(queued, write).await }).abort_handle(),
        ];
        Self { shared, tasks: Arc::new(Tasks(tasks)) }
    }

    /// Has the connection count as gone, for the reason given, once `end` is there. For whoever has just made it.
    pub(crate) fn close_after(&mut self, end: impl Future<Output = String> + Send + 'static) {
        let shared = self.shared.clone();
        let watching = tokio::spawn(async move { shared.dialogue.close(end.await) }).abort_handle();
        match Arc::get_mut(&mut self.tasks) {
            Some(tasks) => tasks.0.push(watching),
            None => watching.abort(),
        }
    }

    /// QEMU's version, from the greeting.
    #[must_use]
    pub fn version(&self) -> Version {
        self.shared.version
    }

    /// Whether the connection still stands, as far as is known.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.shared.dialogue.is_open()
    }

    /// Waits until the connection is gone and gives the error that says so.
    pub async fn closed(&self) -> Error {
        self.shared.dialogue.closed().await;
        self.gone()
    }

    /// Listens to events from now on.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.shared.events.subscribe()
    }

    /// Runs a command.
    pub async fn run(&self, command: Command) -> Result<Value, Error> {
        self.run_within(command, COMMAND_TIME).await
    }

    /// Runs a command and reads its answer.
    pub async fn ask<T: DeserializeOwned>(&self, command: Command) -> Result<T, Error> {
        let name = command.name;
        let answer = self.run(command).await?;
        serde_json::from_value(answer)
            .map_err(|error| Error::Answer { command: name.to_owned(), why: error.to_string() })
    }

    /// Runs a command that may take at most `limit`. After a timeout QEMU may still carry it out.
    pub async fn run_within(&self, command: Command, limit: Duration) -> Result<Value, Error> {
        self.send(vec![command], limit).await.pop().expect("one answer for one command")
    }

    /// Runs commands one after the other without waiting between them; each has its own outcome.
    pub async fn run_each(&self, commands: Vec<Command>) -> Vec<Result<Value, Error>> {
        self.send(commands, COMMAND_TIME).await
    }

    /// The same; gives the answers if all succeeded, else the first error. All of them are carried out.
    pub async fn run_all(&self, commands: Vec<Command>) -> Result<Vec<Value>, Error> {
        self.run_each(commands).await.into_iter().collect()
    }

    async fn send(&self, commands: Vec<Command>, limit: Duration) -> Vec<Result<Value, Error>> {
        let deadline = Instant::now() + limit;
        let mut lines = Vec::new();
        let mut asked = Vec::with_capacity(commands.len());
        for command in &commands {
            let question = self.shared.dialogue.ask();
            lines.extend(command.line(question.number));
            asked.push((command.shown(), question));
        }
        self.shared.dialogue.send(lines, deadline).await;
        let mut answers = Vec::with_capacity(asked.len());
        for (command, mut question) in asked {
            answers.push(match timeout_at(deadline, &mut question.answer).await {
                Ok(Ok(Ok(value))) => Ok(value),
                Ok(Ok(Err((class, desc)))) => Err(Error::Refused { command, class, desc }),
                Ok(Err(_)) => Err(self.gone()),
                Err(_) => Err(Error::Timeout { command, after: limit }),
            });
        }
        answers
    }

    fn gone(&self) -> Error {
        Error::Gone { socket: self.shared.socket.clone(), why: self.shared.dialogue.why_gone() }
    }
}

impl fmt::Debug for Qmp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Qmp").field("socket", &self.shared.socket).finish_non_exhaustive()
    }
}

impl Shared {
    fn dispatch(&self, line: &[u8]) -> Result<(), String> {
        let message: Message = serde_json::from_slice(line)
            .map_err(|error| format!("it sent a line that is not QMP ({error})"))?;
        if let Some(name) = message.event {
            let _ = self.events.send(Event { name, data: message.data }); // nobody listens: fine
            return Ok(());
        }
        let answer = match (message.result, message.error) {
            (_, Some(refusal)) => Err((refusal.class.as_str().into(), tidy(&refusal.desc))),
            (Some(result), None) => Ok(result),
            (None, None) => return Err("it sent a message that is neither an answer nor an event".into()),
        };
        let Some(id) = message.id else {
            return Err(tidy(&format!("it did not understand what we sent: {answer:?}")));
        };
        self.dialogue.answer(id, answer);
        Ok(())
    }
}

/// What QEMU says first. Not to us may be what comes before it: the answer to a client that has just gone, or an event
/// that its command brought about, goes to whoever is connected when it is ready.
async fn greeting(socket: &Path, lines: &mut Lines<impl AsyncRead + Unpin>) -> Result<Version, Error> {
    let gone = |why: String| Error::Gone { socket: socket.to_owned(), why };
    let mut strays = 0;
    loop {
        let line = lines.next().await.map_err(|error| gone(error.to_string()))?;
        let line = line.ok_or_else(|| gone("it was closed before the greeting".into()))?;
        match serde_json::from_slice::<Greeting>(&line) {
            Ok(greeting) => return Ok(greeting.qmp.version.qemu),
            Err(_) if strays < STRAYS_MAX && is_for_another(&line) => strays += 1,
            Err(error) => {
                let command = format!("our connection to {}", socket.display());
                return Err(Error::Answer { command, why: format!("this is not a QMP greeting ({error})") });
            }
        }
    }
}

fn is_for_another(line: &[u8]) -> bool {
    serde_json::from_slice::<Message>(line)
        .is_ok_and(|message| message.event.is_some() || message.result.is_some() || message.error.is_some())
}

/// Opens the socket; while its queue of connections is full, the kernel says "try again".
async fn open(socket: &Path) -> Result<UnixStream, Error> {
    loop {
        match UnixStream::connect(socket).await {
            Ok(stream) => return Ok(stream),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                sleep(Duration::from_millis(50)).await;
            }
            Err(source) => return Err(Error::Connect { socket: socket.to_owned(), source }),
        }
    }
}

async fn read_all(mut lines: Lines<impl AsyncRead + Unpin>, shared: Arc<Shared>) {
    let why = loop {
        match lines.next().await {
            Ok(Some(line)) if line.is_empty() => {}
            Ok(Some(line)) => {
                if let Err(why) = shared.dispatch(&line) {
                    break why;
                }
            }
            Ok(None) => break "it was closed by QEMU, which has ended or is ending".into(),
            Err(error) => break format!("it cannot be read ({error})"),
        }
    };
    shared.dialogue.close(why);
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    use tokio::net::UnixListener;
    use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

    use super::*;

    const GREETING: &str = "{\"QMP\":{\"version\":{\"qemu\":{\"micro\":1,\"minor\":2,\"major\":9},\"package\":\"\"},\"capabilities\":[]}}\n";

    /// A server that greets, agrees to the capabilities, and then does what the test says.
    async fn server<F, Fut>(then: F) -> (tempfile::TempDir, PathBuf)
    where
        F: FnOnce(BufReader<OwnedReadHalf>, OwnedWriteHalf) -> Fut + Send + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        tokio::spawn(async move {
            let (read, mut write) = listener.accept().await.unwrap().0.into_split();
            let mut read = BufReader::new(read);
            write.write_all(GREETING.as_bytes()).await.unwrap();
            let line = next(&mut read).await;
            write.write_all(json!({"return": {}, "id": line["id"]}).to_string().as_bytes()).await.unwrap();
            write.write_all(b"\n").await.unwrap();
            then(read, write).await;
        });
        (dir, path)
    }

    async fn next(read: &mut BufReader<OwnedReadHalf>) -> Value {
        let mut line = String::new();
        read.read_line(&mut line).await.unwrap();
        serde_json::from_str(&line).unwrap()
    }

    const LIMIT: Duration = Duration::from_secs(10);

    #[tokio::test]
    async fn answers_find_the_one_who_asked_in_any_order() {
        let (_dir, path) = server(|mut read, mut write| async move {
            let (first, second) = (next(&mut read).await, next(&mut read).await);
            let answers = format!(
                "{}\n{}\n{}\n",
                json!({"event": "STOP", "data": {"x": 1}, "timestamp": {}}),
                json!({"error": {"class": "DeviceNotFound", "desc": "no such"}, "id": second["id"]}),
                json!({"return": first["execute"], "id": first["id"]}),
            );
            write.write_all(answers.as_bytes()).await.unwrap();
            next(&mut read).await;
        })
        .await;
        let qmp = Qmp::connect(&path, LIMIT).await.unwrap();
        assert_eq!(qmp.version(), Version { major: 9, minor: 2, micro: 1 });
        let mut events = qmp.events();
        let (first, second) = tokio::join!(
            qmp.run(Command::bare("query-a")),
            qmp.run(Command::new("query-b", json!({"id": "x"})))
        );
        assert_eq!(first.unwrap(), "query-a");
        let Err(Error::Refused { command, class, desc }) = second else { panic!("{second:?}") };
        assert_eq!(
            (command.as_str(), class, desc.as_str()),
            ("query-b (x)", ErrorClass::DeviceNotFound, "no such")
        );
        assert_eq!(events.recv().await.unwrap(), Event { name: "STOP".into(), data: json!({"x": 1}) });
    }

    #[tokio::test]
    async fn a_dead_qemu_fails_every_command_at_once_and_for_ever() {
        let (_dir, path) = server(|mut read, _write| async move { drop(next(&mut read).await) }).await;
        let qmp = Qmp::connect(&path, LIMIT).await.unwrap();
        for _ in 0..2 {
            assert!(qmp.run(Command::bare("query-a")).await.unwrap_err().is_gone());
        }
        assert!(!qmp.is_alive() && qmp.closed().await.is_gone());
    }

    #[tokio::test]
    async fn a_command_without_answer_times_out_and_its_late_answer_is_dropped() {
        let (_dir, path) = server(|mut read, mut write| async move {
            let (late, prompt) = (next(&mut read).await, next(&mut read).await);
            let answers = format!(
                "{}\n{}\n",
                json!({"return": "late", "id": late["id"]}),
                json!({"return": "prompt", "id": prompt["id"]})
            );
            write.write_all(answers.as_bytes()).await.unwrap();
            next(&mut read).await;
        })
        .await;
        let qmp = Qmp::connect(&path, LIMIT).await.unwrap();
        let late = qmp.run_within(Command::bare("query-a"), Duration::ZERO).await;
        assert!(matches!(late, Err(Error::Timeout { .. })), "{late:?}");
        assert_eq!(qmp.run(Command::bare("query-b")).await.unwrap(), "prompt");
        assert!(qmp.shared.dialogue.waiting().is_empty());
    }

    #[tokio::test]
    async fn an_endless_line_ends_the_connection_in_bounded_memory() {
        let (_dir, path) = server(|_read, mut write| async move {
            let chunk = vec![b'x'; 1 << 20];
            while write.write_all(&chunk).await.is_ok() {}
        })
        .await;
        let qmp = Qmp::connect(&path, LIMIT).await.unwrap();
        assert!(qmp.closed().await.to_string().contains("longer than"), "{}", qmp.closed().await);
    }

    #[tokio::test]
    async fn a_socket_in_use_says_that_it_serves_one_client() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let _listener = UnixListener::bind(&path).unwrap();
        let error = Qmp::connect(&path, Duration::from_millis(20)).await.unwrap_err();
        assert!(matches!(&error, Error::Busy { .. }) && error.to_string().contains("one client"), "{error}");
        let error = Qmp::connect(&dir.path().join("none"), LIMIT).await.unwrap_err();
        assert!(matches!(error, Error::Connect { .. }) && error.is_gone());
    }

    #[tokio::test]
    async fn what_was_meant_for_the_client_before_us_is_no_greeting_and_no_harm() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let stray = |lines: usize| {
            let pair =
                format!("{}\n{}\n", json!({"event": "STOP", "data": {}}), json!({"return": {}, "id": 8}));
            pair.repeat(lines / 2)
        };
        tokio::spawn(async move {
            let (read, mut write) = listener.accept().await.unwrap().0.into_split();
            write.write_all((stray(STRAYS_MAX) + GREETING).as_bytes()).await.unwrap();
            let id = next(&mut BufReader::new(read)).await["id"].clone();
            write.write_all(format!("{}\n", json!({"return": {}, "id": id})).as_bytes()).await.unwrap();
            let mut second = listener.accept().await.unwrap().0;
            second.write_all((stray(STRAYS_MAX + 2) + GREETING).as_bytes()).await.unwrap();
        });
        let qmp = Qmp::connect(&path, LIMIT).await.unwrap();
        assert_eq!(qmp.version(), Version { major: 9, minor: 2, micro: 1 });
        let error = Qmp::connect(&path, LIMIT).await.unwrap_err();
        assert!(error.to_string().contains("not a QMP greeting"), "{error}");
    }

    #[tokio::test]
    async fn something_that_is_not_qmp_is_told_so() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"SSH-2.0-x\r\n").await.unwrap();
        });
        let error = Qmp::connect(&path, LIMIT).await.unwrap_err();
        assert!(error.to_string().contains("not a QMP greeting"), "{error}");
    }
}
