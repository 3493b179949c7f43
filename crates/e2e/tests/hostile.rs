//! Peers and people that mean harm, against real sites: what was tried is in `docs/security.md`.

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{LONG, MIB, Paused, VM, World, client, forged_offer, path};
use log::{Batcher, DiskInfo, Encoder, Footer, Header};
use model::{Consistency, LogClass, LogId, LogNumber, Phase, Progress, Purpose, Timestamp, VmId};
use rig::{Site, wait_for};
use serde_json::Value;
use wire::{Client, Uploader};

const QUICK: Duration = Duration::from_millis(2);

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// What an attacker makes up.
struct Made {
    vm: VmId,
    number: u64,
    id: LogId,
    predecessor: LogId,
    purpose: Purpose,
    disk_bytes: u64,
    seed: u64,
    data_bytes: usize,
    zeros: Option<(u64, u64)>,
}

impl Made {
    fn log(&self) -> Vec<u8> {
        let disks = vec![DiskInfo { name: "system".parse().unwrap(), size_bytes: self.disk_bytes }];
        let header = Header {
            vm: self.vm,
            id: self.id,
            number: LogNumber(self.number),
            predecessor: self.predecessor,
            moment: Timestamp(i64::MAX),
            purpose: self.purpose,
            disks,
        };
        let mut encoder = Encoder::new(Vec::new(), &header).unwrap();
        let mut batcher = Batcher::new(0);
        let mut records = batcher.data(0, &rig::noise(self.seed, self.data_bytes as u64));
        if let Some((offset, len)) = self.zeros {
            records.extend(batcher.zero(offset, len));
        }
        records.extend(batcher.finish());
        for record in records {
            encoder.record(record.encode(1)).unwrap();
        }
        let class = LogClass::Point(Consistency::Crash);
        encoder.finish(Footer { class, progress: Progress::default() }).unwrap().1
    }

    /// Sends it (or other bytes in its name); the refusal's code if it is refused.
    fn send(&self, client: &Arc<Client>, bytes: Vec<u8>) -> Result<(), String> {
        let sent = block_on(async {
            let patience = Duration::from_secs(2);
            let mut upload =
                Uploader::new(client.clone(), self.vm, LogNumber(self.number), self.id, patience, None);
            upload.write(bytes.into()).await?;
            upload.finish().await
        });
        sent.map(drop).map_err(|error| match error.refused() {
            Some(refused) => refused.code.clone(),
            None => error.to_string(),
        })
    }
}

fn offer(client: &Client, vm: VmId, name: &str, disk_bytes: u64) -> Result<(), String> {
    block_on(client.offer(&forged_offer(vm, name, disk_bytes))).map(drop).map_err(|error| error.to_string())
}

fn is_noted(site: &Site, kind: &str) -> bool {
    let events = site.ok(&["events", "--count", "500"]).unwrap();
    events["events"].as_array().unwrap().iter().any(|event| event["kind"] == kind)
}

#[test]
fn what_was_sent_before_and_what_is_anothers_changes_nothing() {
    let mut world = World::new(71);
    world.write(1, QUICK);
    let Paused { vm, newest, last, before } = world.paused();
    let backup = world.head.ok(&["backup", VM]).unwrap();
    let state = world.state(&world.restore(backup["backup"].as_str().unwrap()));

    let made = |number, id, predecessor| Made {
        vm,
        number,
        id,
        predecessor,
        purpose: Purpose::Changes,
        disk_bytes: common::DISKS[0].1,
        seed: 666,
        data_bytes: 64 << 10,
        zeros: None,
    };
    let ours = client(&world.branch);
    // The newest log again, with other bytes: it is there, and what is there stays.
    let replayed = made(newest, last, LogId::from_bytes([1; 16]));
    assert_eq!(replayed.send(&ours, replayed.log()), Ok(()), "a log that is durable is said to be");
    // An older number, the newest number with another id, one far ahead.
    for (number, id) in [(1, [9; 16]), (newest, [9; 16]), (newest + 5, [9; 16])] {
        let replayed = made(number, LogId::from_bytes(id), last);
        assert_eq!(replayed.send(&ours, replayed.log()), Err("wrong-number".into()));
    }

    // Another peer, with a certificate that is as good: the VM is not its own.
    let mut other = Site::init(world.dir.path(), "other").unwrap();
    other.serve().unwrap();
    world.head.invite(&other).unwrap();
    let theirs = client(&other);
    let next = made(newest + 1, LogId::from_bytes([8; 16]), last);
    assert_eq!(next.send(&theirs, next.log()), Err("forbidden".into()));
    assert!(offer(&theirs, vm, VM, MIB).unwrap_err().contains("belongs to another peer"));
    assert!(offer(&theirs, VmId::from_bytes([8; 16]), VM, MIB).unwrap_err().contains("taken"));
    assert!(block_on(theirs.withdraw(vm)).is_err());

    // Rights that are narrowed are narrowed for what is here already, too.
    world.head.ok(&["peer", "remove", "branch"]).unwrap();
    let invite = world.head.ok(&["peer", "invite", "branch", "--vms", "db-*"]).unwrap();
    world.branch.ok(&["peer", "accept", invite["invite"].as_str().unwrap()]).unwrap();
    let next = made(newest + 1, LogId::from_bytes([7; 16]), last);
    assert_eq!(next.send(&client(&world.branch), next.log()), Err("not-authorized".into()));

    assert_eq!(world.head.vm(VM).unwrap()["received"], before["received"]);
    let backup = world.head.ok(&["backup", VM]).unwrap();
    assert_eq!(world.state(&world.restore(backup["backup"].as_str().unwrap())), state, "no byte has changed");
    for kind in ["wrong-number", "forbidden", "not-authorized"] {
        assert!(is_noted(&world.head, kind), "{kind}");
    }
}

fn resident_bytes(site: &Site) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", site.pid().unwrap())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

#[test]
fn a_peer_that_would_fill_the_disk_or_the_memory_harms_nobody_else() {
    let mut world = World::new(72);
    world.head.ok(&["peer", "remove", "branch"]).unwrap();
    let invite = world.head.ok(&["peer", "invite", "branch", "--quota", "24M"]).unwrap();
    world.branch.ok(&["peer", "accept", invite["invite"].as_str().unwrap()]).unwrap();
    let mut other = Site::init(world.dir.path(), "other").unwrap();
    other.serve().unwrap();
    world.head.invite(&other).unwrap();

    // A quota stops a peer, and no other.
    world.write(1, QUICK);
    world.burst(64, 1);
    world.protect("1s", &[]);
    let refused = world.branch.wait_vm(VM, "the quota", LONG, |vm| !vm["error"].is_null()).unwrap();
    assert!(refused["error"]["message"].as_str().unwrap().contains("24 MiB"), "{refused}");
    assert!(is_noted(&world.head, "quota"));
    let theirs = client(&other);
    let vm = VmId::from_bytes([5; 16]);
    let first = Made {
        vm,
        number: 1,
        id: LogId::from_bytes([1; 16]),
        predecessor: LogId::NONE,
        purpose: Purpose::Initial,
        disk_bytes: 1 << 40,
        seed: 1,
        data_bytes: 1 << 20,
        zeros: Some((MIB, (1 << 40) - MIB)),
    };
    // 8 EiB are no disk; 1 TiB of zeros is one, and costs next to nothing.
    assert!(offer(&theirs, vm, "huge", 1 << 63).unwrap_err().contains("TiB"));
    offer(&theirs, vm, "huge", first.disk_bytes).unwrap();
    assert_eq!(first.send(&theirs, first.log()), Ok(()));
    let second = Made {
        number: 2,
        id: LogId::from_bytes([2; 16]),
        predecessor: first.id,
        purpose: Purpose::Changes,
        seed: 2,
        ..first
    };
    assert_eq!(second.send(&theirs, second.log()), Ok(()));
    // A file system whose files cannot be so large refuses, and the status says so; the site goes on in any case.
    let is_settled = |vm: &Value| vm["applied"].as_u64() >= Some(1) || vm.to_string().contains("too large");
    world.head.wait_vm("huge", "to be applied", LONG, is_settled).unwrap();
    let peak = resident_bytes(&world.head);
    assert!(peak < 500 << 20, "{} MiB", peak >> 20);
    assert!(!world.head.ok(&["points", "huge"]).unwrap()["points"].as_array().unwrap().is_empty());

    // With room again the first peer goes on where it was.
    world.head.ok(&["peer", "remove", "branch"]).unwrap();
    world.head.invite(&world.branch).unwrap();
    world.branch.ok(&["resume", VM]).unwrap();
    world.replicating();
}

#[test]
fn thousands_of_idle_connections_do_not_keep_a_cycle_out() {
    let mut world = World::new(73);
    world.write(1, QUICK);
    world.protect("1s", &[]);
    world.replicating();
    let mut limit = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap();
    limit.0 = limit.1.min(8192);
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, limit.0, limit.1).unwrap();
    let address = world.head.address().parse().unwrap();
    let mut idle = Vec::new();
    for place in 0..3000 {
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(10)).unwrap();
        if place % 3 == 0 {
            // Half a TLS record, half a request in the clear.
            let _ = stream.write_all(if place % 2 == 0 { &[0x16, 3, 1, 2, 0, 1] } else { b"GET / HT" });
        }
        idle.push(stream);
    }
    let started = Instant::now();
    world.branch.ok(&["sync", VM]).unwrap();
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
    world.branch.ok(&["sync", VM]).unwrap();
    let vm = world.branch.vm(VM).unwrap();
    assert!(vm["error"].is_null() && vm["state"] == "replicating", "{vm}");
    // Whoever was too many has been hung up on.
    let open = idle.iter().filter(|stream| {
        stream.set_nonblocking(true).unwrap();
        let mut said: &TcpStream = stream;
        matches!(said.read(&mut [0; 64]), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
    });
    assert!(open.count() <= 512);
}

/// A command straight to the control socket, past the command line's own checks.
fn control(site: &Site, request: &Value) -> (u16, Value) {
    let mut stream = UnixStream::connect(site.dir().join("control.sock")).unwrap();
    let body = request.to_string();
    write!(
        stream,
        "POST /v1/command HTTP/1.1\r\nHost: site\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    let json = answer.find("{\"error\"").map(|at| &answer[at..]).and_then(|text| text.lines().next());
    (status, json.and_then(|text| serde_json::from_str(text).ok()).unwrap_or(Value::Null))
}

fn files_below(dir: &Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files_below(&path));
        }
        found.push(path);
    }
    found
}

#[test]
fn names_with_tricks_go_nowhere_and_secrets_are_for_their_owner() {
    let dir = tempfile::Builder::new().prefix("ai").tempdir().unwrap();
    // A folder that was there before, open to all: init makes it the site's own.
    let open = dir.path().join("head");
    std::fs::create_dir(&open).unwrap();
    std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut head = Site::init(dir.path(), "head").unwrap();
    head.serve().unwrap();
    let mode = |path: &Path| std::fs::symlink_metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&open), 0o700);
    // What `serve` says was written by this test.
    for file in files_below(&open).into_iter().filter(|file| !file.ends_with("serve.log")) {
        assert_eq!(mode(&file) & 0o077, 0, "{} can be read by others", file.display());
    }
    for secret in ["identity.key", "repository.password", "control.sock", "catalog.sqlite", "run/nbd.sock"] {
        assert_eq!(mode(&open.join(secret)), 0o600, "{secret}");
    }

    let outside = dir.path().join("outside");
    std::fs::write(&outside, "mine").unwrap();
    for trick in [
        "../outside",
        "../../etc/passwd",
        "/etc/passwd",
        "..",
        ".",
        "a/b",
        "a\\..\\b",
        "-rf",
        "a\nb",
        "\u{1b}[2J",
    ] {
        for arguments in [
            &["points", "--", trick][..],
            &["protect", "--qmp", "/nonexistent", "--to", "x", "--", trick],
            &["peer", "invite", "--", trick],
            &["peer", "remove", "--", trick],
            &["hold", "--", trick],
            &["release", "--", trick],
            &["unexport", "--", trick],
            &["unprotect", "--", trick],
            &["export", "--backup", trick],
            &["export", "web", "--point", trick],
            &["failover", "unplanned", "--", trick],
            &["backups", "--repository", trick],
            &["backup", "web", "--no-retry", "--repository", trick],
        ] {
            let output = head.run(arguments).unwrap();
            assert_ne!(output.status, 0, "{arguments:?}: {output:?}");
            assert!(
                output.code().is_some() && !output.stderr.contains('\u{1b}'),
                "{arguments:?}: {output:?}"
            );
        }
        for request in [
            serde_json::json!({"command": "points", "vm": trick}),
            serde_json::json!({"command": "migrate", "vm": trick, "storage": "/nonexistent"}),
            serde_json::json!({"command": "peer-invite", "name": trick, "vms": "*"}),
            serde_json::json!({"command": "backup", "vm": "web", "point": trick, "consistency": null, "view": "pinned", "repository": trick, "no_retry": true}),
            serde_json::json!({"command": "release", "hold": trick}),
            serde_json::json!({"command": "unexport", "export": trick}),
            serde_json::json!({"command": "export", "what": {"backup": {"backup": trick, "repository": trick}}, "writable": true}),
        ] {
            let (status, error) = control(&head, &request);
            assert!(status == 422 || !error.is_null(), "{request}: {status} {error}");
        }
        let site = Site::init(&dir.path().join("new"), trick);
        assert!(site.is_err(), "a site named {trick:?}");
    }
    for command in [&["restore", "web", "--to", "/nonexistent/x"][..], &["verify"], &["export"]] {
        let output = head.run(&[command, &["--backup", "../../../outside"]].concat()).unwrap();
        assert_eq!(output.code(), Some("no-such-backup"), "{output:?}");
    }
    assert_eq!(std::fs::read_to_string(&outside).unwrap(), "mine");
    assert!(head.is_running());
}

/// What people see of a peer's words cannot control their terminal, whatever the peer wrote.
#[test]
fn a_peers_words_are_only_words() {
    let dir = tempfile::Builder::new().prefix("ai").tempdir().unwrap();
    let [mut head, mut other] = ["head", "other"].map(|name| Site::init(dir.path(), name).unwrap());
    head.serve().unwrap();
    other.serve().unwrap();
    head.invite(&other).unwrap();
    let theirs = client(&other);
    let vm = VmId::from_bytes([5; 16]);
    offer(&theirs, vm, "web", MIB).unwrap();
    let report = wire::Report {
        phase: Phase::ResyncRequired { why: model::ResyncReason::ChainBroken("\u{1b}]0;x\u{7}".into()) },
        error: Some("\u{1b}[2J\u{9b}31mlook".into()),
        paused: false,
        moment: None,
    };
    block_on(theirs.report(vm, &report)).unwrap();
    for command in [&["status"][..], &["status", "web"], &["events"]] {
        let shown = std::process::Command::new(rig::this_program().unwrap())
            .args(["--dir", path(head.dir())])
            .args(command)
            .output()
            .unwrap();
        let text = String::from_utf8(shown.stdout).unwrap();
        assert!(shown.status.success());
        assert!(text.chars().all(|c| !c.is_control() || c == '\n'), "{text:?}");
    }
    let seen = wait_for("the report", LONG, || {
        Ok(Some(head.vm("web")?.to_string()).filter(|status| status.contains("look")))
    });
    assert!(!seen.unwrap().contains("\\u001b"));
}
