//! Lines of JSON from a peer that may be broken, in bounded memory.

use std::io;

use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};

/// The longest line that is taken, in bytes. QEMU's whole schema is a quarter of a mebibyte.
pub(crate) const LINE_BYTES_MAX: usize = 16 << 20;

/// The start of a text that a guest or a QEMU wrote, without what would control a terminal.
pub(crate) fn tidy(text: &str) -> String {
    const CHARS_MAX: usize = 500;
    text.chars().take(CHARS_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[derive(Debug)]
pub(crate) struct Lines<R> {
    reader: BufReader<R>,
    line: Vec<u8>,
    max: usize,
}

impl<R: AsyncRead + Unpin> Lines<R> {
    pub fn new(reader: R) -> Self {
        Self::with_max(reader, LINE_BYTES_MAX)
    }

    pub fn with_max(reader: R, max: usize) -> Self {
        Self { reader: BufReader::new(reader), line: Vec::new(), max }
    }

    /// The next line without its end, or `None` after the last. Safe to cancel: a part that was read is kept.
    pub async fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            let chunk = self.reader.fill_buf().await?;
            if chunk.is_empty() {
                return if self.line.is_empty() {
                    Ok(None)
                } else {
                    Err(io::ErrorKind::UnexpectedEof.into())
                };
            }
            let end = chunk.iter().position(|&byte| byte == b'\n');
            let taken = end.map_or(chunk.len(), |end| end + 1);
            if self.line.len() + taken > self.max {
                let message = format!("a line is longer than {} bytes", self.max);
                return Err(io::Error::new(io::ErrorKind::InvalidData, message));
            }
            self.line.extend_from_slice(&chunk[..taken]);
            self.reader.consume(taken);
            if end.is_some() {
                let mut line = std::mem::take(&mut self.line);
                while line.last().is_some_and(|byte| matches!(byte, b'\n' | b'\r')) {
                    line.pop();
                }
                return Ok(Some(line));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_line_is_bounded_and_a_cut_one_is_an_error() {
        let mut lines = Lines::with_max(&b"one\r\n\ntwo\nxxxxxxxxxxxx\n"[..], 8);
        assert_eq!(lines.next().await.unwrap().unwrap(), b"one");
        assert_eq!(lines.next().await.unwrap().unwrap(), b"");
        assert_eq!(lines.next().await.unwrap().unwrap(), b"two");
        assert_eq!(lines.next().await.unwrap_err().kind(), io::ErrorKind::InvalidData);
        let mut cut = Lines::with_max(&b"half"[..], 8);
        assert_eq!(cut.next().await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert!(Lines::new(&b""[..]).next().await.unwrap().is_none());
    }
}
