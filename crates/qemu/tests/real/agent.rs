//! The guest agent, played by a task: a real guest takes a minute to boot.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use model::MomentId;
use qemu::{AgentAddress, AgentError, FreezeLimits, GuestAgent, Meeting, thaw_if_frozen};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

use crate::support::{daemon, leftovers};

/// How the guest behaves.
#[derive(Debug, Default)]
struct Guest {
    frozen: bool,
    file_systems: u64,
    refuses: bool,
    /// Wakes up by itself at once, as Windows does after ten seconds.
    wakes: bool,
    /// Takes the freeze and never answers it.
    hangs: bool,
    log: Vec<String>,
    /// What became of it and of others, in the order in which it did.
    story: Arc<Mutex<Vec<&'static str>>>,
}

type Shared = Arc<Mutex<Guest>>;

fn guest(dir: &Path, guest: Guest) -> (PathBuf, Shared) {
    let path = dir.join("agent");
    let listener = UnixListener::bind(&path).unwrap();
    let guest = Arc::new(Mutex::new(guest));
    let shared = guest.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(stream, shared.clone()));
        }
    });
    (path, guest)
}

async fn serve(stream: UnixStream, guest: Shared) {
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(read);
    // What an earlier client did not wait for.
    write.write_all(b"{\"return\": 99}\n").await.unwrap();
    let mut line = Vec::new();
    while read.read_until(b'\n', &mut line).await.unwrap_or(0) > 0 {
        let text = line.rsplit(|&byte| byte == 0xff).next().unwrap();
        let command: Value = serde_json::from_slice(text).unwrap();
        let answer = answer(&command, &mut guest.lock().unwrap());
        if let Some(mut answer) = answer {
            answer.push(b'\n');
            if write.write_all(&answer).await.is_err() {
                return;
            }
        }
        line.clear();
    }
}

fn answer(command: &Value, guest: &mut Guest) -> Option<Vec<u8>> {
    let name = command["execute"].as_str().unwrap();
    guest.log.push(name.to_owned());
    let value = match name {
        "guest-sync-delimited" => {
            let mut answer = vec![0xff];
            answer.extend(json!({"return": command["arguments"]["id"]}).to_string().bytes());
            return Some(answer);
        }
        "guest-fsfreeze-freeze" if guest.refuses => {
            let error = json!({"class": "GenericError", "desc": "fs busy"});
            return Some(json!({ "error": error }).to_string().into_bytes());
        }
        "guest-fsfreeze-freeze" => {
            guest.frozen = guest.file_systems > 0 && !guest.wakes;
            guest.story.lock().unwrap().push("frozen");
            if guest.hangs {
                return None;
            }
            json!(guest.file_systems)
        }
        "guest-fsfreeze-thaw" => {
            if guest.frozen {
                guest.story.lock().unwrap().push("thawed");
            }
            json!(if std::mem::take(&mut guest.frozen) { guest.file_systems } else { 0 })
        }
        "guest-fsfreeze-status" => json!(if guest.frozen { "frozen" } else { "thawed" }),
        other => panic!("{other}"),
    };
    Some(json!({ "return": value }).to_string().into_bytes())
}

fn is_frozen(guest: &Shared) -> bool {
    guest.lock().unwrap().frozen
}

#[tokio::test]
async fn work_is_done_while_the_guest_is_frozen() {
    let dir = tempfile::tempdir().unwrap();
    let (socket, state) = guest(dir.path(), Guest { file_systems: 2, ..Guest::default() });
    let agent = GuestAgent::connect(&socket).await.unwrap();
    let (frozen, held) = agent.freeze_for(FreezeLimits::default(), async { is_frozen(&state) }).await;
    assert!(frozen && held.is_ok() && !is_frozen(&state), "{held:?}");
}

#[tokio::test]
async fn work_is_done_all_the_same_when_the_guest_cannot_be_frozen() {
    for (behaviour, says) in [
        (Guest { refuses: true, file_systems: 1, ..Guest::default() }, "fs busy"),
        (Guest { file_systems: 0, ..Guest::default() }, "no file system"),
        (Guest { file_systems: 1, wakes: true, ..Guest::default() }, "by itself"),
        (
            Guest { file_systems: 1, hangs: true, ..Guest::default() },
            "has not answered guest-fsfreeze-freeze",
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (socket, state) = guest(dir.path(), behaviour);
        let agent = GuestAgent::connect(&socket).await.unwrap();
        let limits = FreezeLimits { freeze: Duration::from_millis(200), ..FreezeLimits::default() };
        let (done, held) = agent.freeze_for(limits, async { 7 }).await;
        let error = held.unwrap_err().to_string();
        assert!(done == 7 && error.contains(says), "{error}");
        assert!(!is_frozen(&state));
    }
}

#[tokio::test]
async fn a_guest_is_not_held_longer_than_the_limit() {
    let dir = tempfile::tempdir().unwrap();
    let (socket, state) = guest(dir.path(), Guest { file_systems: 1, ..Guest::default() });
    let agent = GuestAgent::connect(&socket).await.unwrap();
    let limits = FreezeLimits { hold: Duration::from_millis(30), ..FreezeLimits::default() };
    let work = async {
        while is_frozen(&state) {
            tokio::task::yield_now().await;
        }
        "done after the thaw"
    };
    let (done, held) = agent.freeze_for(limits, work).await;
    assert!(matches!(held, Err(AgentError::HeldTooLong(_))) && done == "done after the thaw", "{held:?}");
}

#[tokio::test]
async fn a_cancelled_freeze_still_thaws() {
    let dir = tempfile::tempdir().unwrap();
    let (socket, state) = guest(dir.path(), Guest { file_systems: 1, ..Guest::default() });
    let agent = GuestAgent::connect(&socket).await.unwrap();
    let freeze = agent.freeze_for(FreezeLimits::default(), std::future::pending::<()>());
    let frozen = async {
        while !is_frozen(&state) {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! { _ = freeze => unreachable!("it never ends"), () = frozen => {} }
    while is_frozen(&state) {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_guest_left_frozen_is_thawed() {
    let dir = tempfile::tempdir().unwrap();
    let (socket, state) = guest(dir.path(), Guest { file_systems: 1, frozen: true, ..Guest::default() });
    assert!(thaw_if_frozen(&socket).await.unwrap());
    assert!(!is_frozen(&state) && !thaw_if_frozen(&socket).await.unwrap());
    let error = thaw_if_frozen(&dir.path().join("none")).await.unwrap_err();
    assert!(matches!(error, AgentError::Connect { .. }));
}

#[tokio::test]
async fn a_moment_is_fixed_inside_the_freeze_or_without_it() {
    let process = daemon(&[]).await;
    let vm = process.vm().await;
    let disks = vm.disks().await.unwrap();
    let (socket, state) = guest(process.dir.path(), Guest { file_systems: 1, ..Guest::default() });
    let agent = AgentAddress::Socket(socket);
    let (capture, frozen) = vm.begin_capture_frozen(process.request(&disks, None, 1), &agent).await.unwrap();
    assert!(frozen.is_ok() && !is_frozen(&state));
    assert!(capture.timings.frozen.unwrap() >= capture.timings.transaction);
    eprintln!("{:?}", capture.timings);
    vm.end_reading(capture).await.unwrap();

    state.lock().unwrap().refuses = true;
    let (capture, frozen) =
        vm.begin_capture_frozen(process.request(&disks, Some(1), 2), &agent).await.unwrap();
    assert!(matches!(frozen, Err(AgentError::Refused { .. })) && capture.timings.frozen.is_none());
    vm.end_reading(capture).await.unwrap();

    // The transaction fails while the guest is frozen.
    *state.lock().unwrap() = Guest { file_systems: 1, ..Guest::default() };
    let mut wrong = process.request(&disks, Some(2), 3);
    wrong.disks[1].block_node = "none".into();
    assert!(vm.begin_capture_frozen(wrong, &agent).await.is_err());
    assert!(!is_frozen(&state) && leftovers(vm.qmp()).await.is_empty());
    let mut resized = process.request(&disks, None, 3);
    resized.disks[1].size_bytes += 1 << 20;
    assert!(vm.begin_capture_frozen(resized, &agent).await.is_err());
    assert!(!is_frozen(&state) && leftovers(vm.qmp()).await.is_empty());
    assert!(state.lock().unwrap().log.contains(&"guest-fsfreeze-thaw".to_owned()));
}

#[tokio::test]
async fn all_guests_of_a_moment_are_frozen_before_the_first_is_fixed_and_thawed_after_the_last() {
    let story = Arc::<Mutex<Vec<&'static str>>>::default();
    let (db, web) = (daemon(&[]).await, daemon(&[]).await);
    let agent = |dir: &Path| {
        let (socket, _) = guest(dir, Guest { file_systems: 1, story: story.clone(), ..Guest::default() });
        AgentAddress::Socket(socket)
    };
    let agents = [agent(db.dir.path()), agent(web.dir.path())];
    let (vms, names) = ([db.vm().await, web.vm().await], ["db".parse().unwrap(), "web".parse().unwrap()]);
    let disks = [vms[0].disks().await.unwrap(), vms[1].disks().await.unwrap()];
    let meet = |id: u8| {
        let (id, group) = (MomentId::from_bytes([id; 16]), "shop".parse().unwrap());
        Meeting::open(id, group, names.to_vec(), Vec::new(), true)
    };

    let (meeting, seats) = meet(1);
    let mut requests = [db.request(&disks[0], None, 1), web.request(&disks[1], None, 1)];
    for (request, seat) in requests.iter_mut().zip(seats) {
        request.seat = Some(seat);
    }
    let [one, other] = requests;
    let (one, other, seen) = tokio::join!(
        vms[0].begin_capture_frozen(one, &agents[0]),
        vms[1].begin_capture_frozen(other, &agents[1]),
        meeting.outcome(),
    );
    let ((one, one_frozen), (other, other_frozen)) = (one.unwrap(), other.unwrap());
    assert!(one_frozen.is_ok() && other_frozen.is_ok());
    assert_eq!(*story.lock().unwrap(), ["frozen", "frozen", "thawed", "thawed"]);
    assert_eq!((one.shared.as_ref(), other.shared.as_ref()), (Some(&seen), Some(&seen)));
    assert!(seen.is_whole() && seen.members == names, "{seen:?}");
    println!("{seen:?}");
    vms[0].end_reading(one).await.unwrap();
    vms[1].end_reading(other).await.unwrap();

    // One whose transaction is refused leaves, and the other has its moment without it.
    let (_, seats) = meet(2);
    let mut requests = [db.request(&disks[0], Some(1), 2), web.request(&disks[1], Some(1), 2)];
    for (request, seat) in requests.iter_mut().zip(seats) {
        request.seat = Some(seat);
    }
    requests[1].disks[1].block_node = "none".into();
    let [one, other] = requests;
    let (one, other) = tokio::join!(
        vms[0].begin_capture_frozen(one, &agents[0]),
        vms[1].begin_capture_frozen(other, &agents[1]),
    );
    let (one, frozen) = one.unwrap();
    assert!(other.is_err() && frozen.is_ok());
    let shared = one.shared.clone().unwrap();
    assert_eq!((&shared.members[..], &shared.missing[0].vm), (&names[..1], &names[1]));
    vms[0].end_reading(one).await.unwrap();
}
