//! The line between two sites: a proxy that counts what crosses it and can be cut.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::{Result, doing};

/// A line to a site. Everything on it goes through [`Line::address`].
pub struct Line {
    address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    to: String,
    whole: AtomicBool,
    ended: AtomicBool,
    bytes: AtomicU64,
    open: Mutex<Vec<TcpStream>>,
}

impl Line {
    /// A line to the site that listens, or will, on `to`.
    pub fn to(to: &str) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").map_err(doing("opening a line"))?;
        let address = listener.local_addr().map_err(doing("opening a line"))?;
        let shared = Arc::new(Shared {
            to: to.to_owned(),
            whole: AtomicBool::new(true),
            ended: AtomicBool::new(false),
            bytes: AtomicU64::new(0),
            open: Mutex::default(),
        });
        let accepting = shared.clone();
        std::thread::spawn(move || {
            for near in listener.incoming().flatten() {
                if accepting.ended.load(Ordering::SeqCst) {
                    return;
                }
                accepting.clone().join(near);
            }
        });
        Ok(Self { address, shared })
    }

    /// Where to reach the site over this line.
    #[must_use]
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// Bytes that have crossed it, both ways together.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.shared.bytes.load(Ordering::SeqCst)
    }

    /// Cuts it: every connection breaks, and no new one comes about.
    pub fn cut(&self) {
        self.shared.whole.store(false, Ordering::SeqCst);
        self.shared.break_all();
    }

    /// Mends it.
    pub fn mend(&self) {
        self.shared.whole.store(true, Ordering::SeqCst);
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        self.cut();
        // Wakes the thread that accepts, so that it sees the end.
        let _ = TcpStream::connect_timeout(&self.address, Duration::from_secs(1));
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<TcpStream>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn break_all(&self) {
        for stream in self.lock().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Joins a caller with the site; without a whole line the caller is hung up on.
    fn join(self: Arc<Self>, near: TcpStream) {
        let far = TcpStream::connect(&self.to).and_then(|far| far.set_nodelay(true).map(|()| far));
        let (Ok(far), Ok(())) = (far, near.set_nodelay(true)) else { return };
        let clones = (near.try_clone(), far.try_clone(), near.try_clone(), far.try_clone());
        let (Ok(near_read), Ok(far_read), Ok(near_kept), Ok(far_kept)) = clones else { return };
        self.lock().extend([near_kept, far_kept]);
        if !self.whole.load(Ordering::SeqCst) {
            return self.break_all();
        }
        for (from, to) in [(near_read, far), (far_read, near)] {
            let shared = self.clone();
            std::thread::spawn(move || shared.carry(from, to));
        }
    }

    fn carry(&self, mut from: TcpStream, mut to: TcpStream) {
        let mut buffer = vec![0; 256 * 1024];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            // Counted first: whoever has read the bytes finds them in the count.
            self.bytes.fetch_add(count as u64, Ordering::SeqCst);
            if to.write_all(&buffer[..count]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Both);
        let _ = from.shutdown(Shutdown::Both);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_counts_and_can_be_cut_and_mended() {
        let site = TcpListener::bind("127.0.0.1:0").unwrap();
        let line = Line::to(&site.local_addr().unwrap().to_string()).unwrap();
        let talk = || -> std::io::Result<u8> {
            let mut near = TcpStream::connect(line.address())?;
            near.set_read_timeout(Some(Duration::from_secs(5)))?;
            let (mut far, _) = site.accept()?;
            near.write_all(b"ab")?;
            let mut two = [0; 2];
            far.read_exact(&mut two)?;
            Ok(two[1])
        };
        assert_eq!(talk().unwrap(), b'b');
        assert_eq!(line.bytes(), 2);
        line.cut();
        let mut hung_up = TcpStream::connect(line.address()).unwrap();
        assert_eq!(hung_up.read(&mut [0]).unwrap_or(0), 0);
        line.mend();
        // The cut connection may still be waiting at the site.
        site.set_nonblocking(true).unwrap();
        while site.accept().is_ok() {}
        site.set_nonblocking(false).unwrap();
        assert_eq!(talk().unwrap(), b'b');
    }
}
