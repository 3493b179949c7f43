//! Checks a log while it arrives.
//!
//! ```text
//! Header ─▶ Disks ─▶ Next ─▶ RecordHead ─▶ Extents ─▶ Payload ─┐
//!                     ▲  └─▶ IndexHead ─▶ Index ─▶ Footer ─▶ Seal ─▶ Done
//!                     └────────────────────────────────────────┘
//! ```

use std::io::{self, Read};
use std::mem;

use crate::building::Building;
use crate::encode::Summary;
use crate::error::{Error, ErrorKind, Result};
use crate::layout::{
    FOOTER_BYTES, FooterPart, HEADER_BYTES, INDEX_HEAD_BYTES, INDEX_TAG, IndexHead, RECORD_HEAD_BYTES,
    RecordCrc, RecordHead, SEAL_BYTES, TAG_BYTES, decode_extents, decode_header, decode_seal, header_bytes,
    header_disks, short_header,
};
use crate::record::decompress;
use crate::types::{DiskInfo, Encoding, Footer, Header, Index};
use crate::units::IndexCheck;

/// [`verify`] reads this many bytes at once.
const READ_BYTES: usize = 1 << 20;

/// A log that was found to be whole and right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// Its header.
    pub header: Header,
    /// Its footer.
    pub footer: Footer,
    /// What it holds and where.
    pub index: Index,
    /// It in figures.
    pub summary: Summary,
}

/// Checks a log that is fed to it in pieces of any size: every CRC, the BLAKE3 over the whole, and that the
/// index says what the records say.
///
/// It keeps the index and at most one record's extents, never a payload, and looks at each byte twice (CRC32C,
/// BLAKE3). It does not decompress: with the checksums right, the payloads are what the encoder wrote. The
/// function [`verify`] does.
#[derive(Debug)]
pub struct Verifier {
    state: State,
    /// What has arrived of the part that `state` waits for.
    part: Vec<u8>,
    /// Where that part starts.
    position: u64,
    bytes: u64,
    hasher: blake3::Hasher,
    header: Option<Header>,
    building: Building,
    failed: Option<Error>,
    /// The compressed payload that has arrived so far, if payloads are to be decompressed.
    payload: Option<Vec<u8>>,
    scratch: Vec<u8>,
}

#[derive(Debug)]
enum State {
    Header,
    Disks {
        disks: usize,
    },
    /// What kind of part follows.
    Next,
    RecordHead,
    Extents {
        head: RecordHead,
        crc: RecordCrc,
    },
    Payload {
        head: RecordHead,
        crc: RecordCrc,
        left: usize,
    },
    IndexHead,
    Index(IndexCheck),
    Footer,
    Seal {
        footer: [u8; FOOTER_BYTES],
        hash: [u8; 32],
    },
    Done {
        footer: FooterPart,
        hash: [u8; 32],
    },
}

impl Default for Verifier {
    fn default() -> Self {
        Self::new()
    }
}

impl Verifier {
    /// A verifier at the start of a log.
    #[must_use]
    pub fn new() -> Self {
        Self {
            state: State::Header,
            part: Vec::new(),
            position: 0,
            bytes: 0,
            hasher: blake3::Hasher::new(),
            header: None,
            building: Building::new(0),
            failed: None,
            payload: None,
            scratch: Vec::new(),
        }
    }

    /// Takes the log's next bytes. Once it has failed it gives the same error again.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<()> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        self.bytes += bytes.len() as u64;
        self.walk(bytes).map_err(|kind| {
            let error = kind.at(self.position);
            self.failed = Some(error.clone());
            error
        })
    }

    /// The header, once it has arrived.
    #[must_use]
    pub const fn header(&self) -> Option<&Header> {
        self.header.as_ref()
    }

    /// How many bytes it was fed.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What the log is, if it has arrived to its end.
    pub fn finish(self) -> Result<Verified> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        match (self.state, self.header) {
            (State::Done { footer, hash }, Some(header)) => {
                let mut index = self.building.index;
                index.records.shrink_to_fit();
                index.extents.shrink_to_fit();
                Ok(Verified { header, footer: footer.footer, index, summary: footer.summary(hash) })
            }
            (State::Header, _) => Err(short_header(&self.part).at(0)),
            _ => Err(ErrorKind::Truncated.at(self.bytes)),
        }
    }

    fn walk(&mut self, bytes: &[u8]) -> Result<(), ErrorKind> {
        let mut rest = bytes;
        // What the hash has not seen: it gets large pieces. The seal is not hashed.
        let mut unhashed = bytes;
        while !rest.is_empty() {
            rest = match &mut self.state {
                State::Payload { .. } => self.payload(rest)?,
                State::Index(check) => match check.feed(rest, &self.building.index)? {
                    None => &[],
                    Some(rest) => {
                        self.position += self.building.head().index_bytes();
                        self.state = State::Footer;
                        rest
                    }
                },
                State::Done { .. } => return Err(ErrorKind::TrailingBytes),
                _ => {
                    let wanted = self.wanted();
                    let (now, later) = rest.split_at(rest.len().min(wanted.saturating_sub(self.part.len())));
                    self.part.extend_from_slice(now);
                    if self.part.len() >= wanted {
                        if matches!(self.state, State::Footer) {
                            self.hasher.update(&unhashed[..unhashed.len() - later.len()]);
                            unhashed = &[];
                        }
                        self.step()?;
                    }
                    later
                }
            };
        }
        if !matches!(self.state, State::Seal { .. } | State::Done { .. }) {
            self.hasher.update(unhashed);
        }
        Ok(())
    }

    /// How many bytes the part has that is waited for.
    const fn wanted(&self) -> usize {
        match &self.state {
            State::Header => HEADER_BYTES,
            State::Disks { disks } => header_bytes(*disks),
            State::Next => TAG_BYTES,
            State::RecordHead => RECORD_HEAD_BYTES,
            State::Extents { head, .. } => head.extent_bytes(),
            State::IndexHead => INDEX_HEAD_BYTES,
            State::Footer => FOOTER_BYTES,
            State::Seal { .. } => SEAL_BYTES,
            State::Payload { .. } | State::Index(_) | State::Done { .. } => 0,
        }
    }

    /// Goes on to the next state with a part that has arrived.
    fn step(&mut self) -> Result<(), ErrorKind> {
        let mut part = mem::take(&mut self.part);
        self.state = self.next(&part)?;
        if !matches!(self.state, State::Disks { .. } | State::RecordHead | State::IndexHead) {
            // Those three are the same part, of which only the start was looked at so far.
            part.clear();
        }
        self.part = part;
        Ok(())
    }

    fn next(&mut self, part: &[u8]) -> Result<State, ErrorKind> {
        Ok(match &self.state {
            State::Header => State::Disks { disks: header_disks(array(part)?)? },
            State::Disks { disks } => {
                self.building = Building::new(*disks);
                self.header = Some(decode_header(part)?);
                self.position = self.building.position;
                State::Next
            }
            State::Next if part == INDEX_TAG => State::IndexHead,
            State::Next => State::RecordHead,
            State::RecordHead => {
                let (head, crc) = RecordHead::decode(array(part)?)?;
                self.building.check_head(&head, self.disks())?;
                State::Extents { head, crc }
            }
            State::Extents { head, crc } => {
                let (head, mut crc) = (*head, *crc);
                crc.add(part);
                let disks = self.header.as_ref().map_or(&[][..], |header| &header.disks);
                self.building.add(&head, decode_extents(part), disks)?;
                match head.stored_bytes as usize {
                    0 => self.end_of_record(&head, crc)?,
                    left => State::Payload { head, crc, left },
                }
            }
            State::IndexHead => {
                let head = IndexHead::decode(array(part)?)?;
                if head != self.building.head() {
                    return Err(ErrorKind::IndexMismatch);
                }
                self.building.check_disjoint(self.disks().len())?;
                State::Index(IndexCheck::new(head, part))
            }
            State::Footer => State::Seal { footer: *array(part)?, hash: *self.hasher.finalize().as_bytes() },
            State::Seal { footer, hash } => {
                let (footer, hash) = (self.checked_footer(footer, hash, array(part)?)?, *hash);
                self.position = footer.total_bytes();
                State::Done { footer, hash }
            }
            State::Payload { .. } | State::Index(_) | State::Done { .. } => {
                return Err(ErrorKind::TrailingBytes);
            }
        })
    }

    fn disks(&self) -> &[DiskInfo] {
        self.header.as_ref().map_or(&[], |header| &header.disks)
    }

    /// Takes what is the payload's of `bytes` and gives the rest.
    fn payload<'b>(&mut self, bytes: &'b [u8]) -> Result<&'b [u8], ErrorKind> {
        let State::Payload { head, crc, left } = &mut self.state else { return Ok(bytes) };
        let (now, later) = bytes.split_at(bytes.len().min(*left));
        crc.add(now);
        *left -= now.len();
        if let Some(payload) = &mut self.payload
            && head.encoding == Encoding::Zstd
        {
            payload.extend_from_slice(now);
        }
        if *left == 0 {
            let (head, crc) = (*head, *crc);
            self.state = self.end_of_record(&head, crc)?;
        }
        Ok(later)
    }

    fn end_of_record(&mut self, head: &RecordHead, crc: RecordCrc) -> Result<State, ErrorKind> {
        crc.check()?;
        if let Some(payload) = &mut self.payload
            && head.encoding == Encoding::Zstd
        {
            decompress(payload, head.raw_bytes, &mut self.scratch)?;
            payload.clear();
        }
        self.position = self.building.position;
        Ok(State::Next)
    }

    fn checked_footer(
        &self,
        bytes: &[u8; FOOTER_BYTES],
        hash: &[u8; 32],
        seal: &[u8; SEAL_BYTES],
    ) -> Result<FooterPart, ErrorKind> {
        let claimed = decode_seal(bytes, seal)?;
        if claimed != *hash {
            return Err(ErrorKind::HashMismatch);
        }
        let footer = FooterPart::decode(bytes)?;
        if footer != self.building.footer(footer.footer) {
            return Err(ErrorKind::IndexMismatch);
        }
        Ok(footer)
    }
}

/// Checks a whole log as [`Verifier`] does, and that every record decompresses to its length.
pub fn verify(log: &mut (impl Read + ?Sized)) -> Result<Verified> {
    let mut verifier = Verifier { payload: Some(Vec::new()), ..Verifier::new() };
    let mut buffer = vec![0; READ_BYTES];
    loop {
        match log.read(&mut buffer) {
            Ok(0) => return verifier.finish(),
            Ok(read) => verifier.feed(&buffer[..read])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::io("read", verifier.bytes, error)),
        }
    }
}

fn array<const N: usize>(part: &[u8]) -> Result<&[u8; N], ErrorKind> {
    part.try_into().map_err(|_| ErrorKind::Truncated)
}
