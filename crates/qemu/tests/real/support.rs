//! Real processes, a minimal NBD client, and a man in the middle for QMP.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use model::{LogNumber, VmId};
use qemu::{Capture, CaptureRequest, CapturedDisk, Disk, Monitor, NbdAccess, Qmp, Vm, VmAddress};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

pub const MIB: u64 = 1 << 20;
pub const DISK_BYTES: u64 = 8 * MIB;
pub const ID: VmId = VmId::from_bytes([0xab; 16]);
pub const PREFIX: &str = "afterimage-abababab";

/// A QEMU process with its directory; killed when dropped.
pub struct Process {
    pub dir: TempDir,
    child: Child,
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        // Only then: of each connection that a test cuts it has something to say.
        if std::thread::panicking() {
            eprintln!("{}", std::fs::read_to_string(self.path("stderr")).unwrap_or_default());
        }
    }
}

impl Process {
    /// Starts `program` in `dir`; `args` may say `DIR` for it. It must serve QMP at `DIR/qmp`.
    pub async fn start_in(dir: TempDir, program: &str, package: &str, args: &[&str]) -> Self {
        let path = dir.path().to_str().unwrap();
        let stderr = std::fs::File::create(dir.path().join("stderr")).unwrap();
        let child = Command::new(program)
            .args(args.iter().map(|arg| arg.replace("DIR", path)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .unwrap_or_else(|error| panic!("needs {program}: apt-get install {package} ({error})"));
        let process = Self { dir, child };
        while !process.path("qmp").exists() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        process
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    pub fn address(&self) -> VmAddress {
        let monitor = Monitor::Socket(self.path("qmp"));
        VmAddress { id: ID, monitor, nbd: NbdAccess::Existing(self.path("nbd")) }
    }

    pub async fn vm(&self) -> Vm {
        connect(self.address()).await
    }

    pub fn request(&self, disks: &[Disk], base: Option<u64>, next: u64) -> CaptureRequest {
        std::fs::create_dir_all(self.path("scratch")).unwrap();
        CaptureRequest {
            disks: disks.to_vec(),
            fresh: Vec::new(),
            base: base.map(LogNumber),
            next: LogNumber(next),
            again: false,
            scratch_dir: self.path("scratch"),
            scratch_limit_bytes: 64 * MIB,
            seat: None,
        }
    }

    /// The writable export of a disk, as the guest's way to it.
    pub fn guest(&self, disk: &str) -> Nbd {
        let socket = self.path("nbd");
        while UnixStream::connect(&socket).is_err() {
            std::thread::yield_now(); // it is about to listen
        }
        Nbd::connect(&socket, disk)
    }

    pub fn scratch_files(&self) -> usize {
        self.path("scratch").read_dir().map_or(0, Iterator::count)
    }
}

pub async fn connect(address: VmAddress) -> Vm {
    try_connect(address).await.unwrap()
}

/// The listener may bind before it listens: a refused connection is tried again.
pub async fn try_connect(address: VmAddress) -> Result<Vm, qemu::Error> {
    loop {
        match Vm::connect(address.clone()).await {
            Err(qemu::Error::Connect { source, .. })
                if source.kind() == std::io::ErrorKind::ConnectionRefused =>
            {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            outcome => return outcome,
        }
    }
}

pub fn raw_file(path: &Path) {
    std::fs::File::create(path).unwrap().set_len(DISK_BYTES).unwrap();
}

pub fn qcow2_file(path: &Path) {
    let size = DISK_BYTES.to_string();
    let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(path).arg(size).status();
    assert!(made.expect("needs qemu-img: apt-get install qemu-utils").success());
}

/// A storage daemon with a raw disk `a` and a qcow2 disk `b`, both exported writable at `DIR/nbd`.
pub async fn daemon(more: &[&str]) -> Process {
    let dir = tempfile::tempdir().unwrap();
    raw_file(&dir.path().join("a.raw"));
    qcow2_file(&dir.path().join("b.qcow2"));
    let mut args = vec![
        "--chardev",
        "socket,id=qmp,path=DIR/qmp,server=on,wait=off",
        "--monitor",
        "chardev=qmp",
        "--blockdev",
        "driver=file,node-name=a-file,filename=DIR/a.raw",
        "--blockdev",
        "driver=raw,node-name=a,file=a-file",
        "--blockdev",
        "driver=qcow2,node-name=b,file.driver=file,file.filename=DIR/b.qcow2",
        "--nbd-server",
        "addr.type=unix,addr.path=DIR/nbd,max-connections=100",
    ];
    args.extend(more);
    if more.is_empty() {
        args.extend(["--export", "nbd,id=guest-a,node-name=a,name=a,writable=on"]);
        args.extend(["--export", "nbd,id=guest-b,node-name=b,name=b,writable=on"]);
    }
    Process::start_in(dir, "qemu-storage-daemon", "qemu-utils", &args).await
}

/// What there is of ours in QEMU beside bitmaps.
pub async fn leftovers(qmp: &Qmp) -> Vec<String> {
    let mut found = Vec::new();
    for (query, key) in
        [("query-block-exports", "id"), ("query-jobs", "id"), ("query-named-block-nodes", "node-name")]
    {
        let answer = qmp.run(qemu::Command::bare(query)).await.unwrap();
        let names = answer.as_array().unwrap().iter().filter_map(|item| item[key].as_str());
        found.extend(names.filter(|name| name.starts_with(PREFIX)).map(str::to_owned));
    }
    found
}

/// The names of our bitmaps on a node, sorted.
pub async fn bitmaps(qmp: &Qmp, node: &str) -> Vec<String> {
    let answer = qmp.run(qemu::Command::bare("query-named-block-nodes")).await.unwrap();
    let node = answer.as_array().unwrap().iter().find(|found| found["node-name"] == node).unwrap();
    let bitmaps = node["dirty-bitmaps"].as_array().cloned().unwrap_or_default();
    let mut names: Vec<_> =
        bitmaps.iter().filter_map(|bitmap| bitmap["name"].as_str().map(str::to_owned)).collect();
    names.sort();
    names
}

/// The ranges that a captured disk's bitmap marks.
pub fn dirty(disk: &CapturedDisk) -> Vec<std::ops::Range<usize>> {
    let context = disk.bitmap_context.as_ref().unwrap();
    let uri = format!("nbd+unix:///{}?socket={}", disk.export, disk.nbd_socket.display());
    let output = Command::new("nbdinfo").args(["--json", &format!("--map={context}"), &uri]).output();
    let output = output.expect("needs nbdinfo: apt-get install libnbd-bin");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let map: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    let number = |value: &Value| usize::try_from(value.as_u64().unwrap()).unwrap();
    let range = |entry: &Value| number(&entry["offset"])..number(&entry["offset"]) + number(&entry["length"]);
    map.iter().filter(|entry| number(&entry["type"]) & 1 == 1).map(range).collect()
}

/// The whole disk as it was at the moment.
pub fn image(disk: &CapturedDisk) -> Vec<u8> {
    let mut nbd = Nbd::connect(&disk.nbd_socket, &disk.export);
    assert_eq!(nbd.size_bytes, disk.size_bytes);
    (0..disk.size_bytes / MIB).flat_map(|i| nbd.read(i * MIB, MIB as usize)).collect()
}

/// What a replica does with a capture: takes over what the bitmap marks, or everything without one.
pub fn replicate(replica: &mut [Vec<u8>], capture: &Capture) {
    for (copy, disk) in replica.iter_mut().zip(&capture.disks) {
        let image = image(disk);
        match &disk.bitmap_context {
            None => *copy = image,
            Some(_) => {
                dirty(disk).into_iter().for_each(|range| copy[range.clone()].copy_from_slice(&image[range]))
            }
        }
    }
}

/// Whether the replica is what the capture shows.
pub fn assert_same(replica: &[Vec<u8>], capture: &Capture) {
    for (copy, disk) in replica.iter().zip(&capture.disks) {
        let differs = copy.iter().zip(image(disk)).position(|(&ours, theirs)| ours != theirs);
        assert_eq!(differs, None, "disk {} differs at that byte", disk.name);
    }
}

/// As much NBD as a test needs.
pub struct Nbd {
    stream: UnixStream,
    pub size_bytes: u64,
}

impl Nbd {
    pub fn connect(socket: &Path, export: &str) -> Self {
        let mut stream = UnixStream::connect(socket).unwrap();
        let mut hello = [0; 18];
        stream.read_exact(&mut hello).unwrap();
        assert_eq!(&hello[..16], b"NBDMAGICIHAVEOPT");
        let mut ask = 3_u32.to_be_bytes().to_vec();
        ask.extend(b"IHAVEOPT");
        ask.extend(1_u32.to_be_bytes());
        ask.extend(u32::try_from(export.len()).unwrap().to_be_bytes());
        ask.extend(export.as_bytes());
        stream.write_all(&ask).unwrap();
        let mut answer = [0; 10];
        stream.read_exact(&mut answer).unwrap_or_else(|error| panic!("no export {export}: {error}"));
        Self { stream, size_bytes: u64::from_be_bytes(answer[..8].try_into().unwrap()) }
    }

    pub fn read(&mut self, offset: u64, len: usize) -> Vec<u8> {
        self.try_read(offset, len).unwrap()
    }

    pub fn try_read(&mut self, offset: u64, len: usize) -> Result<Vec<u8>, u32> {
        let error = self.ask(0, offset, len, &[]).expect("QEMU is there");
        let mut data = vec![0; if error == 0 { len } else { 0 }];
        self.stream.read_exact(&mut data).unwrap();
        if error == 0 { Ok(data) } else { Err(error) }
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) {
        assert_eq!(self.ask(1, offset, data.len(), data).unwrap(), 0);
    }

    /// Fills a 4 KiB block.
    pub fn fill(&mut self, block: u64, byte: u8) {
        self.write(block * 4096, &[byte; 4096]);
    }

    fn ask(&mut self, kind: u16, offset: u64, len: usize, data: &[u8]) -> std::io::Result<u32> {
        let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
        request.extend(0_u16.to_be_bytes());
        request.extend(kind.to_be_bytes());
        request.extend(7_u64.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(u32::try_from(len).unwrap().to_be_bytes());
        request.extend(data);
        self.stream.write_all(&request)?;
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply)?;
        Ok(u32::from_be_bytes(reply[4..8].try_into().unwrap()))
    }
}

/// What the man in the middle does to one command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// QEMU is not asked; it seems to refuse.
    Refuse,
    /// The connection ends before QEMU hears of it: we were killed before it.
    CutBefore,
    /// The connection ends when QEMU has carried it out: we were killed after it.
    CutAfter,
}

#[derive(Default)]
struct Plan {
    seen: usize,
    fault: Option<(usize, Fault)>,
    done: Vec<String>,
}

/// Stands between us and QEMU's monitor, and counts commands.
#[derive(Clone, Default)]
pub struct Proxy {
    plan: Arc<Mutex<Plan>>,
}

impl Proxy {
    /// Listens at `DIR/proxy` for one client.
    pub fn start(process: &Process) -> Self {
        let proxy = Self::default();
        let path = process.path("proxy");
        let _ = std::fs::remove_file(&path);
        let listener = tokio::net::UnixListener::bind(path).unwrap();
        let (plan, qmp) = (proxy.plan.clone(), process.path("qmp"));
        tokio::spawn(async move {
            let client = listener.accept().await.unwrap().0.into_split();
            let qemu = tokio::net::UnixStream::connect(qmp).await.unwrap().into_split();
            forward(client, qemu, plan).await;
        });
        proxy
    }

    /// From now on: the `nth` command (from 0) meets this fault.
    pub fn arm(&self, nth: usize, fault: Fault) {
        *self.plan.lock().unwrap() = Plan { seen: 0, fault: Some((nth, fault)), done: vec![] };
    }

    pub fn disarm(&self) {
        self.plan.lock().unwrap().fault = None;
    }

    /// Whether the fault has happened, and to which command.
    pub fn struck(&self) -> Option<String> {
        let plan = self.plan.lock().unwrap();
        plan.fault.and_then(|(nth, _)| plan.done.get(nth).cloned())
    }
}

async fn forward(
    client: (OwnedReadHalf, OwnedWriteHalf),
    qemu: (OwnedReadHalf, OwnedWriteHalf),
    plan: Arc<Mutex<Plan>>,
) {
    let (mut commands, mut answers) = (BufReader::new(client.0).lines(), BufReader::new(qemu.0).lines());
    let (mut to_client, mut to_qemu) = (client.1, qemu.1);
    let mut cut_at: Option<Value> = None;
    loop {
        tokio::select! {
            line = commands.next_line() => {
                let Ok(Some(line)) = line else { return };
                let command: Value = serde_json::from_str(&line).unwrap();
                match strike(&plan, &command) {
                    Some(Fault::Refuse) => {
                        let error = json!({"class": "GenericError", "desc": "refused by the test"});
                        let answer = format!("{}\n", json!({"error": error, "id": command["id"]}));
                        to_client.write_all(answer.as_bytes()).await.unwrap();
                        continue;
                    }
                    Some(Fault::CutBefore) => return,
                    Some(Fault::CutAfter) => cut_at = Some(command["id"].clone()),
                    None => {}
                }
                if to_qemu.write_all(format!("{line}\n").as_bytes()).await.is_err() { return }
            }
            line = answers.next_line() => {
                let Ok(Some(line)) = line else { return };
                let answer: Value = serde_json::from_str(&line).unwrap();
                if cut_at.is_some() && cut_at.as_ref() == answer.get("id") { return }
                if to_client.write_all(format!("{line}\n").as_bytes()).await.is_err() { return }
            }
        }
    }
}

fn strike(plan: &Mutex<Plan>, command: &Value) -> Option<Fault> {
    let mut plan = plan.lock().unwrap();
    let nth = plan.seen;
    plan.seen += 1;
    plan.done.push(command["execute"].as_str().unwrap_or_default().to_owned());
    plan.fault.filter(|(at, _)| *at == nth).map(|(_, fault)| fault)
}
