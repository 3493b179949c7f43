//! QEMU's monitor and the guest's agent.

use std::path::Path;

use model::{LogNumber, VmId};
use qemu::{Command, FreezeLimits, GuestAgent, Qmp, Vm};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, DuplexStream};

use crate::stream::{Cut, Script, block_on};

/// The bytes are all that QEMU says: greeting, answers (ids count from 1), events.
pub(crate) fn qmp(data: &[u8]) {
    block_on(async {
        let (read, write) = tokio::io::split(Script::new(data, Cut::Lines));
        let Ok(qmp) = Qmp::over(Path::new("qmp.sock"), read, write).await else { return };
        let mut events = qmp.events();
        let _ = qmp.run(Command::bare("query-jobs")).await;
        let vm = Vm::over(qmp, VmId::from_bytes([1; 16]), "nbd.sock".into());
        let disks = vm.disks().await.unwrap_or_default();
        for disk in &disks {
            // Whatever QEMU calls it, what we call it is a name.
            assert_eq!(disk.name.as_str().parse::<model::DiskName>().as_ref(), Ok(&disk.name));
        }
        let nodes: Vec<String> = disks.iter().map(|disk| disk.node.clone()).collect();
        let _ = vm.resolve(&nodes).await;
        let _ = vm.inspect(&disks, LogNumber(1)).await;
        let _ = vm.pending_bytes(&disks, LogNumber(1)).await;
        while events.try_recv().is_ok() {}
    });
}

/// Each line is what the guest answers to one question; `@` stands for the id that the question has.
pub(crate) fn agent(data: &[u8]) {
    // A runtime of its own: a thaw that failed goes on for a minute, and ends with it. Its clock jumps to whatever is
    // waited for: a guest that does not answer costs no time.
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().start_paused(true).build().expect("a runtime");
    runtime.block_on(async {
        let (ours, theirs) = tokio::io::duplex(4096);
        let guest = tokio::spawn(guest(theirs, data.to_vec()));
        let (read, write) = tokio::io::split(ours);
        if let Ok(agent) = GuestAgent::over(Path::new("/nonexistent/agent.sock"), read, write).await {
            let (done, _frozen) = agent.freeze_for(FreezeLimits::default(), async { 7 }).await;
            assert_eq!(done, 7, "the work is done whatever the guest says");
        }
        guest.abort();
    });
}

/// Says one line for each that it hears, and hangs up when it has said all.
async fn guest(stream: DuplexStream, bytes: Vec<u8>) {
    let mut stream = BufReader::new(stream);
    let mut question = Vec::new();
    for line in bytes.split_inclusive(|&byte| byte == b'\n') {
        question.clear();
        if stream.read_until(b'\n', &mut question).await.is_err() {
            return;
        }
        let asked =
            question.iter().position(|&byte| byte == b'{').map_or(&[][..], |start| &question[start..]);
        let asked: serde_json::Value = serde_json::from_slice(asked).unwrap_or_default();
        let id = asked["arguments"]["id"].to_string();
        for part in line.split_inclusive(|&byte| byte == b'@') {
            let said = match part.strip_suffix(b"@") {
                Some(before) => [before, id.as_bytes()].concat(),
                None => part.to_vec(),
            };
            if stream.write_all(&said).await.is_err() {
                return;
            }
        }
    }
}
