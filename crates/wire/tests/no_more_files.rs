//! A server that has no file descriptor left for a connection takes it later. Alone in its process, whose
//! limit it lowers.

mod common;

use std::fs::File;
use std::time::Duration;

use common::memory::site;
use common::{Running, SOON};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::net::TcpSocket;

#[tokio::test]
async fn accepting_goes_on_when_there_are_files_again() {
    let server = Running::start(site()).await;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, 128, hard).unwrap();
    let socket = TcpSocket::new_v4().unwrap(); // ours, made while it can be
    let mut files = Vec::new();
    while let Ok(file) = File::open("/dev/null") {
        files.push(file);
    }
    let tcp = socket.connect(server.address.parse().unwrap()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await; // the server fails to accept it
    drop(files);
    // The server hangs up on what is no TLS: so it has accepted.
    tcp.try_write(b"is anybody there?\r\n\r\n").unwrap();
    let answered = tokio::time::timeout(SOON, tcp.readable()).await;
    answered.expect("the server took the connection").unwrap();
}
