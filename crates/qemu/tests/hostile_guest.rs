//! A guest that means harm: its agent says what it likes. Whatever it says, the work is done in bounded time and
//! memory, the guest is thawed or thawing is tried again, and no guest is called application-consistent for words.
//!
//! The clock is tokio's own and stands still until nothing else can happen: minutes cost nothing.

use std::path::Path;
use std::time::Duration;

use qemu::{AgentError, Freeze, FreezeLimits, GuestAgent};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, DuplexStream};
use tokio::net::UnixListener;
use tokio::time::Instant;

const LIMITS: FreezeLimits = FreezeLimits { freeze: Duration::from_secs(60), hold: Duration::from_secs(10) };

/// What the guest says to a question, given its name and its id.
type Says = fn(&str, &Value) -> Vec<u8>;

fn truly(command: &str, id: &Value) -> Vec<u8> {
    match command {
        "guest-sync-delimited" => [&[0xff], format!("{}\n", json!({ "return": id })).as_bytes()].concat(),
        _ => b"{\"return\": 1}\n".to_vec(),
    }
}

fn nothing(_: &str, _: &Value) -> Vec<u8> {
    Vec::new()
}

/// A guest that answers every question in its way; gives the questions that it got.
async fn play(stream: DuplexStream, says: Says) -> Vec<String> {
    let mut stream = BufReader::new(stream);
    let mut asked = Vec::new();
    let mut line = Vec::new();
    while stream.read_until(b'\n', &mut line).await.is_ok_and(|bytes| bytes > 0) {
        let start = line.iter().position(|&byte| byte == b'{').unwrap_or(0);
        let question: Value = serde_json::from_slice(&line[start..]).unwrap();
        let command = question["execute"].as_str().unwrap().to_owned();
        let answer = says(&command, &question["arguments"]["id"]);
        asked.push(command);
        line.clear();
        if stream.write_all(&answer).await.is_err() {
            break;
        }
    }
    asked
}

/// Freezes such a guest for some work; what came of it, how long it took, and what was asked.
async fn freeze(says: Says, socket: &Path) -> (Result<Freeze, AgentError>, Duration, Vec<String>) {
    let (ours, theirs) = tokio::io::duplex(64 << 10);
    let guest = tokio::spawn(play(theirs, says));
    let (read, write) = tokio::io::split(ours);
    let started = Instant::now();
    let outcome = match GuestAgent::over(socket, read, write).await {
        Ok(agent) => {
            let (done, freeze) = agent.freeze_for(LIMITS, async { 7 }).await;
            assert_eq!(done, 7, "the work is done in any case");
            Ok(freeze)
        }
        Err(error) => Err(error),
    };
    let took = started.elapsed();
    (outcome, took, guest.await.unwrap())
}

const NOWHERE: &str = "/nonexistent/agent.sock";

#[tokio::test(start_paused = true)]
async fn an_honest_guest_is_frozen_and_thawed() {
    let (outcome, _, asked) = freeze(truly, Path::new(NOWHERE)).await;
    assert!(matches!(outcome, Ok(Ok(_))), "{outcome:?}");
    assert_eq!(asked, ["guest-sync-delimited", "guest-fsfreeze-freeze", "guest-fsfreeze-thaw"]);
}

#[tokio::test(start_paused = true)]
async fn silence_costs_a_bounded_while() {
    let (outcome, took, _) = freeze(nothing, Path::new(NOWHERE)).await;
    assert!(matches!(outcome, Err(AgentError::NoAnswer { .. })), "{outcome:?}");
    assert!(took <= Duration::from_secs(6), "{took:?}");

    // Answers the first question and then nothing: the freeze may have happened, so a thaw was tried.
    let says: Says =
        |command, id| if command == "guest-sync-delimited" { truly(command, id) } else { Vec::new() };
    let (outcome, took, asked) = freeze(says, Path::new(NOWHERE)).await;
    assert!(matches!(outcome, Ok(Err(AgentError::NoAnswer { .. }))), "{outcome:?}");
    assert!(asked.contains(&"guest-fsfreeze-thaw".to_owned()), "{asked:?}");
    assert!(took <= LIMITS.freeze + Duration::from_secs(20), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn an_endless_line_is_cut_off() {
    for command in ["guest-sync-delimited", "guest-fsfreeze-freeze"] {
        let says: Says = match command {
            "guest-sync-delimited" => |_, _| vec![b'x'; 1 << 20],
            _ => |command, id| match command {
                "guest-sync-delimited" => truly(command, id),
                _ => vec![b'7'; 1 << 20],
            },
        };
        let (outcome, took, _) = freeze(says, Path::new(NOWHERE)).await;
        let error = outcome.and_then(|freeze| freeze).expect_err("it is no freeze");
        assert!(error.to_string().contains("longer than"), "{error}");
        assert!(took < Duration::from_secs(20), "{took:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_no_answer_is_no_freeze() {
    let wrong: [Says; 7] = [
        |_, _| b"no JSON\n".to_vec(),
        |_, _| b"[]\n".to_vec(),
        |_, _| b"{\"return\": \"frozen\"}\n".to_vec(),
        |_, _| b"{\"return\": -1}\n".to_vec(),
        |_, _| b"{\"return\": 1e300}\n".to_vec(),
        |_, _| format!("{}1{}\n", "[".repeat(10_000), "]".repeat(10_000)).into_bytes(),
        |_, _| b"{\"error\": {\"class\": 5}}\n".to_vec(),
    ];
    for says in wrong {
        let (ours, theirs) = tokio::io::duplex(64 << 10);
        let guest = tokio::spawn(async move {
            let mut first = true;
            // The first question is answered truly, so that the answers after it count.
            let mut stream = BufReader::new(theirs);
            let mut line = Vec::new();
            let mut thaws = 0;
            while stream.read_until(b'\n', &mut line).await.is_ok_and(|bytes| bytes > 0) {
                let start = line.iter().position(|&byte| byte == b'{').unwrap_or(0);
                let question: Value = serde_json::from_slice(&line[start..]).unwrap();
                let command = question["execute"].as_str().unwrap();
                thaws += usize::from(command == "guest-fsfreeze-thaw");
                let honest = first || command == "guest-sync-delimited";
                first = false;
                let id = &question["arguments"]["id"];
                let answer = if honest { truly(command, id) } else { says(command, id) };
                line.clear();
                if stream.write_all(&answer).await.is_err() {
                    break;
                }
            }
            thaws
        });
        let (read, write) = tokio::io::split(ours);
        let agent = GuestAgent::over(Path::new(NOWHERE), read, write).await.unwrap();
        let (done, freeze) = agent.freeze_for(LIMITS, async { 7 }).await;
        assert_eq!(done, 7);
        let error = freeze.expect_err("it is no freeze");
        assert!(error.to_string().len() < 1000 && !error.to_string().contains('\u{1b}'), "{error}");
        assert!(guest.await.unwrap() > 0, "a thaw was asked for");
    }
}

/// An answer to an earlier question, said again, does not count as one to this.
#[tokio::test(start_paused = true)]
async fn an_old_answer_said_again_is_not_taken() {
    let says: Says = |command, id| match command {
        // Somebody else's id, without the mark, with the mark in the wrong place; never the true one.
        "guest-sync-delimited" => {
            let id = id.as_u64().unwrap();
            let lines = [
                format!("{}\n", json!({ "return": id })).into_bytes(),
                [&[0xff], format!("{}\n", json!({ "return": id.wrapping_sub(1) })).as_bytes()].concat(),
                [format!("{}", json!({ "return": id })).as_bytes(), &[0xff, b'\n']].concat(),
            ];
            lines.concat()
        }
        _ => b"{\"return\": 1}\n".to_vec(),
    };
    let (outcome, took, asked) = freeze(says, Path::new(NOWHERE)).await;
    assert!(matches!(outcome, Err(AgentError::NoAnswer { .. })), "{outcome:?}");
    assert!(took <= Duration::from_secs(6) && asked.len() == 1, "{took:?}: nothing else was asked");
}

/// A guest that takes the freeze and breaks the connection: thawing goes on over connections of its own.
#[tokio::test(start_paused = true)]
async fn a_guest_that_hangs_up_frozen_is_thawed_over_another_connection() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("agent");
    let listener = UnixListener::bind(&socket).unwrap();
    let (ours, theirs) = tokio::io::duplex(64 << 10);
    tokio::spawn(async move {
        let mut stream = BufReader::new(theirs);
        let mut line = Vec::new();
        for says in [truly as Says, nothing as Says] {
            line.clear();
            stream.read_until(b'\n', &mut line).await.unwrap();
            let start = line.iter().position(|&byte| byte == b'{').unwrap_or(0);
            let question: Value = serde_json::from_slice(&line[start..]).unwrap();
            let answer = says(question["execute"].as_str().unwrap(), &question["arguments"]["id"]);
            stream.write_all(&answer).await.unwrap();
        }
    });
    let (read, write) = tokio::io::split(ours);
    let agent = GuestAgent::over(&socket, read, write).await.unwrap();
    let (done, freeze) = agent.freeze_for(LIMITS, async { 7 }).await;
    assert!(done == 7 && freeze.is_err());
    let (read, mut write) = listener.accept().await.unwrap().0.into_split();
    let mut read = BufReader::new(read);
    let mut line = Vec::new();
    loop {
        line.clear();
        assert!(read.read_until(b'\n', &mut line).await.unwrap() > 0, "it hung up before it had thawed");
        let start = line.iter().position(|&byte| byte == b'{').unwrap_or(0);
        let question: Value = serde_json::from_slice(&line[start..]).unwrap();
        let command = question["execute"].as_str().unwrap();
        write.write_all(&truly(command, &question["arguments"]["id"])).await.unwrap();
        if command == "guest-fsfreeze-thaw" {
            break;
        }
    }
}
