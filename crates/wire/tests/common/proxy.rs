//! A wire that can be cut.

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Passes connections on to a server, and cuts them: by count of bytes, or when it is told.
pub struct Proxy {
    pub address: String,
    shared: Arc<Shared>,
}

struct Shared {
    target: String,
    /// For each of the next connections, after how many bytes to the server it is cut; then none is.
    cuts: Mutex<VecDeque<usize>>,
    connections: Mutex<usize>,
    generation: watch::Sender<u64>,
}

impl Proxy {
    pub async fn start(target: &str, cuts: impl IntoIterator<Item = usize>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let shared = Arc::new(Shared {
            target: target.to_owned(),
            cuts: Mutex::new(cuts.into_iter().collect()),
            connections: Mutex::new(0),
            generation: watch::Sender::new(0),
        });
        let passing = shared.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(passing.clone().pass(client));
            }
        });
        Self { address, shared }
    }

    /// Something that cuts all connections that there are.
    pub fn knife(&self) -> impl Fn() + Send + Sync + 'static {
        let shared = self.shared.clone();
        move || shared.generation.send_modify(|generation| *generation += 1)
    }

    pub fn connections(&self) -> usize {
        *self.shared.connections.lock().unwrap()
    }

    pub fn cuts_left(&self) -> usize {
        self.shared.cuts.lock().unwrap().len()
    }
}

impl Shared {
    async fn pass(self: Arc<Self>, client: TcpStream) {
        *self.connections.lock().unwrap() += 1;
        let cut = self.cuts.lock().unwrap().pop_front().unwrap_or(usize::MAX);
        let mut generation = self.generation.subscribe();
        let Ok(server) = TcpStream::connect(&self.target).await else { return };
        // Reset, not closed: what is in flight is lost with it.
        for socket in [&client, &server] {
            socket2::SockRef::from(socket).set_linger(Some(std::time::Duration::ZERO)).unwrap();
        }
        let (mut client_reads, mut client_writes) = client.into_split();
        let (mut server_reads, mut server_writes) = server.into_split();
        tokio::select! {
            () = copy(&mut client_reads, &mut server_writes, cut) => {}
            () = copy(&mut server_reads, &mut client_writes, usize::MAX) => {}
            _ = generation.changed() => {}
        }
    }
}

async fn copy(from: &mut (impl AsyncRead + Unpin), to: &mut (impl AsyncWrite + Unpin), mut budget: usize) {
    let mut buffer = vec![0; 16 * 1024];
    while budget > 0 {
        let most = buffer.len().min(budget);
        match from.read(&mut buffer[..most]).await {
            Ok(0) => return,
            Ok(n) if to.write_all(&buffer[..n]).await.is_ok() => budget -= n,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Ok(_) | Err(_) => return,
        }
    }
}
