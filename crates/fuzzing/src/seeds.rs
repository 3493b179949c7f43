//! The inputs that a fuzzer starts with: golden files, and what the two sides really say to each other.

use std::fs;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use media::{Card, End, MediaKey};
use model::{Head, LogId, LogNumber, MediaId, Phase, VmId};
use nbd::{BASE_ALLOCATION, Client};
use serde_json::json;
use site::{BackupRequest, Exported, Request};
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};

use crate::targets::nbd::exports;

/// Writes them to `corpus/<target>/seed-*`.
pub fn write_seeds(corpus: &Path) -> io::Result<()> {
    let put = |target: &str, name: &str, bytes: &[u8]| {
        let folder = corpus.join(target);
        fs::create_dir_all(&folder)?;
        fs::write(folder.join(format!("seed-{name}")), bytes)
    };
    logs(&put)?;
    nbd(&put)?;
    qemu(&put)?;
    http(&put)?;
    media(&put)?;
    texts(&put)?;
    replica(&put)?;
    for (name, [manifest, tree, lengths]) in repository::fuzzing::samples() {
        let cut = |part: &[u8]| u16::try_from(part.len()).unwrap_or(u16::MAX).to_le_bytes();
        let head = [cut(&manifest), cut(&tree)].concat();
        put("backup", name, &[head, manifest, tree, lengths].concat())?;
    }
    Ok(())
}

type Put<'a> = &'a dyn Fn(&str, &str, &[u8]) -> io::Result<()>;

fn golden_logs() -> io::Result<Vec<(String, Vec<u8>)>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../log/tests/golden");
    let mut logs = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        logs.push((name, fs::read(path)?));
    }
    logs.sort();
    Ok(logs)
}

fn logs(put: Put<'_>) -> io::Result<()> {
    for (name, log) in golden_logs()? {
        for mode in [0, 1 << 2, 2 << 2] {
            put("log", &format!("{name}-{mode}"), &[&[mode], &log[..]].concat())?;
        }
    }
    Ok(())
}

/// A stream that writes down what goes over it.
struct Recorder {
    stream: DuplexStream,
    heard: Tape,
    said: Tape,
}

impl AsyncRead for Recorder {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&buf.filled()[before..]);
        read
    }
}

impl AsyncWrite for Recorder {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let wrote = Pin::new(&mut self.stream).poll_write(cx, buf);
        if let Poll::Ready(Ok(bytes)) = wrote {
            self.said.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&buf[..bytes]);
        }
        wrote
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// What went one way.
type Tape = Arc<Mutex<Vec<u8>>>;

/// What our client and our server say to each other about an export.
fn dialogue(export: &'static str) -> io::Result<(Vec<u8>, Vec<u8>)> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let (heard, said): (Tape, Tape) = Default::default();
    let recorded = (heard.clone(), said.clone());
    runtime.block_on(async move {
        let (ours, theirs) = tokio::io::duplex(1 << 20);
        let serving = tokio::spawn(async move { exports().serve_stream(theirs).await });
        let recorder = Recorder { stream: ours, heard, said };
        let client =
            Client::from_stream(recorder, export, &[BASE_ALLOCATION]).await.map_err(io::Error::other)?;
        let _ = client.block_status(0, 4096).await;
        let _ = client.read(0, 512).await;
        let _ = client.write(0, &[7; 64]).await;
        let _ = client.write_zeroes(0, 4096).await;
        let _ = client.trim(0, 4096).await;
        let _ = client.flush().await;
        drop(client);
        serving.await.map_err(io::Error::other)
    })?;
    let taken = |tape: Tape| tape.lock().unwrap_or_else(PoisonError::into_inner).clone();
    Ok((taken(recorded.0), taken(recorded.1)))
}

fn nbd(put: Put<'_>) -> io::Result<()> {
    for (name, export) in [("disk", "disk"), ("sink", ""), ("unknown", "nothing")] {
        let Ok((heard, said)) = dialogue(export) else { continue };
        for mode in [0, 3, 4, 8, 16] {
            put("nbd_client", &format!("{name}-{mode}"), &[&[mode], &heard[..]].concat())?;
        }
        for mode in [0, 1, 3] {
            put("nbd_server", &format!("{name}-{mode}"), &[&[mode], &said[..]].concat())?;
        }
        let parts = [heard, said].concat();
        for which in 0..13_u8 {
            let at = usize::from(which) * 20 % parts.len().max(1);
            let part = &parts[at..parts.len().min(at + 64)];
            put("nbd_codec", &format!("{name}-{which}"), &[&[which], part].concat())?;
        }
    }
    Ok(())
}

fn qemu(put: Put<'_>) -> io::Result<()> {
    let greeting = json!({"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}});
    let bitmap = json!({"name": "afterimage-01010101-b1", "count": 65536, "granularity": 4096, "recording": true, "busy": false, "persistent": false});
    let node = |name: &str, drv: &str| json!({"node-name": name, "drv": drv, "ro": false, "file": "/x", "image": {"virtual-size": 1 << 20}, "dirty-bitmaps": [bitmap]});
    let nodes = json!([node("disk0", "raw"), node("fmt", "qcow2"), node("limit", "throttle")]);
    let edges = json!({"nodes": [{"id": 1, "name": "disk0", "type": "block-driver"}, {"id": 2, "name": "limit", "type": "block-driver"}, {"id": 3, "name": "e", "type": "block-export"}],
        "edges": [{"parent": 2, "child": 1, "name": "file", "perm": ["write"], "shared-perm": []}, {"parent": 3, "child": 2, "name": "root", "perm": ["write"], "shared-perm": []}]});
    let devices = json!([{"device": "virtio0", "qdev": "/machine/peripheral/d0/virtio-backend", "removable": false, "locked": false, "type": "unknown", "inserted": {"node-name": "limit", "ro": false}}]);
    let exports = json!([{"id": "e", "node-name": "limit", "type": "nbd", "shutting-down": false}]);
    for (name, devices) in [("daemon", json!([])), ("guest", devices)] {
        let mut lines =
            vec![greeting.clone(), json!({"return": {}, "id": 1}), json!({"return": [], "id": 2})];
        for round in 0..4 {
            let id = 3 + 4 * round;
            lines.push(json!({"event": "BLOCK_JOB_COMPLETED", "data": {"device": "x"}, "timestamp": {"seconds": 1, "microseconds": 2}}));
            for (place, answer) in [&devices, &exports, &edges, &nodes].into_iter().enumerate() {
                lines.push(json!({"return": answer, "id": id + place}));
            }
        }
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        put("qmp", name, text.as_bytes())?;
    }
    let refusal = json!({"error": {"class": "CommandNotFound", "desc": "no"}, "id": 1});
    put("qmp", "refused", format!("{greeting}\n{refusal}\n").as_bytes())?;
    let sync = b"\xff{\"return\": @}\n";
    put("agent", "freezes", &[&sync[..], b"{\"return\": 2}\n{\"return\": 2}\n"].concat())?;
    put(
        "agent",
        "refuses",
        &[&sync[..], b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}}\n{\"return\": 0}\n"]
            .concat(),
    )?;
    put(
        "agent",
        "late",
        &[b"{\"return\": {}}", &sync[..], b"{\"return\": \"x\"}\n", &sync[..], b"{\"return\": 1}\n"].concat(),
    )?;
    Ok(())
}

fn http(put: Put<'_>) -> io::Result<()> {
    let vm = VmId::from_bytes([1; 16]);
    let offer = json!({"vm": vm, "vm_name": "web", "disks": [{"name": "vda", "size_bytes": 1 << 30}], "interval_s": 30, "points": 4, "primary_name": "branch", "definition": {"machine": "q35"}, "phase": Phase::Replicating, "error": null, "paused": false});
    let report = json!({"phase": Phase::Replicating, "error": "no", "paused": false});
    let digests = json!({"disk": "vda", "offset": 0, "len": 1 << 20, "block_bytes": 65536});
    let introduction =
        json!({"secret": "A".repeat(43), "name": "branch", "address": "branch.example.org:8443"});
    let bodies = [introduction, offer, json!(null), report, digests, json!(null), json!("log"), json!("x")];
    for (which, body) in bodies.into_iter().enumerate() {
        for parts in [0_u8, 8, 15, 16, 32] {
            let head = [u8::try_from(which).unwrap_or(0), parts];
            put("http", &format!("{which}-{parts}"), &[&head[..], body.to_string().as_bytes()].concat())?;
        }
    }
    let moment = json!({"phase": Phase::Replicating, "error": null, "paused": false, "moment": {"number": 7, "id": LogId::from_bytes([2; 16]),
        "moment": {"id": model::MomentId::from_bytes([9; 16]), "group": "shop", "at": 1_700_000_000_000_000_i64, "skew_us": 7000, "members": ["web", "db"], "missing": []}}});
    put("http", "moment", &[b"\x03\x00", moment.to_string().as_bytes()].concat())?;
    put("http", "take-over", &[b"\x00\x80", json!({"vm_name": "web"}).to_string().as_bytes()].concat())?;
    put("http", "query", b"\x06\x08offset=18446744073709551615&last=false")?;
    let [now, next] = ["now", "next"].map(|name| {
        let dir = tempfile::tempdir()?;
        wire::Identity::create(dir.path(), name).map_err(io::Error::other)
    });
    let announced = wire::NextKey::of(&next?, now?.shown().key).map_err(io::Error::other)?;
    let announced = serde_json::to_vec(&announced).map_err(io::Error::other)?;
    put("http", "next-key", &[b"\x00\x40", &announced[..]].concat())
}

/// A card, files of a set, and what the other ways of the target begin with.
fn media(put: Put<'_>) -> io::Result<()> {
    let (set, vm) = (MediaId::from_bytes([6; 16]), VmId::from_bytes([1; 16]));
    let key = MediaKey::from_bytes([5; 32]);
    put("media", "card", &[b"\x00", &Card { set, vm }.encode()[..]].concat())?;
    let head = Head { number: LogNumber(2), id: LogId::from_bytes([3; 16]) };
    let end = End { head, files: vec![4096, 90] };
    let file = end.encode(&key, set, vm, LogId::from_bytes([2; 16])).map_err(io::Error::other)?;
    put("media", "found", &[b"\x04", &file[..]].concat())?;
    put("media", "changed", b"\x08\x50\x00\x01plain")?;
    put("media", "cut", b"\x09\x50\x00\x00plain")?;
    let sizes: Vec<u8> = end.files.iter().flat_map(|bytes| bytes.to_le_bytes()).collect();
    put("media", "end", &[b"\x0c\x02\x00", &head.id.as_bytes()[..], &sizes].concat())
}

fn texts(put: Put<'_>) -> io::Result<()> {
    let line = "afterimage1.q6urq6urq6urq6urq6urq6urq6urq6urq6urq6urq6vNzc3Nzc3Nzc3Nzc3Nzc3Nzc3Nzc3Nzc3Nzc3Nzc3NzQAGCiQYHkAAE2RyLmV4YW1wbGUub3JnOjg0NDN-6WfV";
    put("invite", "good", line.as_bytes())?;
    put("invite", "cut", &line.as_bytes()[..60])?;
    put("invite", "version", b"afterimage2.AAAA")?;
    let fixed = [
        &[0xab; 32][..],
        &[0xcd; 32],
        &1_700_000_000_000_000_i64.to_be_bytes(),
        &[19],
        b"dr.example.org:8443",
    ];
    put("invite", "bytes", &fixed.concat())?;
    put(
        "config",
        "all",
        site::Config::template("branch", "127.0.0.1:7443".parse().expect("an address")).as_bytes(),
    )?;
    put("config", "bare", b"name = \"x\"\nlisten = \"[::]:1\"\n")?;
    let vm: model::VmName = "web".parse().map_err(io::Error::other)?;
    let backup = BackupRequest {
        vm: vm.clone(),
        point: Some(LogId::from_bytes([2; 16]).into()),
        consistency: None,
        view: model::gate::Access::Pinned,
        repository: "local".into(),
        no_retry: true,
        pause: false,
    };
    let exported = Exported::Point { vm: vm.clone(), point: None };
    let requests = [
        Request::PeerList,
        Request::PeerAccept { invite: line.into(), change: site::EntryChange::default(), replace: false },
        Request::Status { vm: Some(vm.clone()) },
        Request::Backup(backup),
        Request::Export(site::Export { what: exported, writable: true }),
        Request::Migrate { vm, storage: "/x".into() },
    ];
    for (place, request) in requests.iter().enumerate() {
        put("command", &place.to_string(), &serde_json::to_vec(request).map_err(io::Error::other)?)?;
    }
    Ok(())
}

/// A replica with an initial log and one of changes, as its folder has it.
fn replica(put: Put<'_>) -> io::Result<()> {
    let vm = VmId::from_bytes([0x11; 16]);
    let disks = json!([{"name": "vda", "size_bytes": 1 << 20}, {"name": "vdb", "size_bytes": 8192}]);
    let description = |applied: u64,
                       base: serde_json::Value,
                       point: serde_json::Value,
                       applying: serde_json::Value| {
        json!({"vm": vm, "name": "web", "peer": "branch", "primary_name": "branch", "interval_s": 30, "points": 4,
            "disks": disks, "base": {"applied": applied, "id": LogId::from_bytes([0x33; 16]), "disks": base},
            "base_point": point, "applying": applying})
    };
    let point = json!({"id": LogId::from_bytes([0x33; 16]), "number": 6, "taken_at": 1_700_000_000_000_000_i64, "consistency": "crash"});
    let cases = [
        ("fresh", description(0, json!([]), json!(null), json!(null))),
        ("point", description(6, disks.clone(), point.clone(), json!(null))),
        ("applying", description(6, disks.clone(), point, json!(7))),
        ("last", description(u64::MAX, disks.clone(), json!(null), json!(LogNumber(u64::MAX)))),
    ];
    let logs = golden_logs()?;
    for (name, description) in cases {
        let text = description.to_string();
        let cut = u16::try_from(text.len()).unwrap_or(u16::MAX).to_le_bytes();
        let mut input = [&cut[..], text.as_bytes()].concat();
        for wanted in ["point", "zstd", "partial"] {
            let Some((_, log)) = logs.iter().find(|(name, _)| name == wanted) else { continue };
            input.push(4);
            input.extend(u16::try_from(log.len()).unwrap_or(u16::MAX).to_le_bytes());
            input.extend_from_slice(log);
        }
        put("rebuild", name, &input)?;
    }
    Ok(())
}
