//! The format once more, as `docs/format/log-v1.md` has it and without this crate's code: makes the logs that
//! an encoder never would, and checks that the encoder writes what the page says.

/// A log's parts, with checksums that are right whatever the parts say.
#[derive(Debug, Clone)]
pub struct Craft {
    pub header: Vec<u8>,
    pub records: Vec<CraftRecord>,
    /// The records that the index lists, if they are others.
    pub listed: Option<Vec<CraftRecord>>,
    pub class: u8,
    pub covered_bytes: u64,
    pub total_bytes: u64,
}

#[derive(Debug, Clone, Default)]
pub struct CraftRecord {
    pub disk: u16,
    pub encoding: u8,
    pub extents: Vec<(u64, u64)>,
    pub raw_bytes: u32,
    pub payload: Vec<u8>,
}

pub fn with_crc(mut bytes: Vec<u8>) -> Vec<u8> {
    let crc = crc32c::crc32c(&bytes);
    bytes.extend(crc.to_le_bytes());
    bytes
}

/// A header without its CRC.
pub fn header(version: u16, purpose: u8, number: u64, disks: &[(&str, u64)]) -> Vec<u8> {
    let mut bytes = b"\x89AFTLOG\n".to_vec();
    bytes.extend(version.to_le_bytes());
    bytes.extend((disks.len() as u16).to_le_bytes());
    bytes.extend([purpose, 0, 0, 0]);
    bytes.extend([0x11; 16]);
    bytes.extend([0x22; 16]);
    bytes.extend([0x33; 16]);
    bytes.extend(number.to_le_bytes());
    bytes.extend(1_700_000_000_123_456_i64.to_le_bytes());
    for (name, size_bytes) in disks {
        bytes.extend(size_bytes.to_le_bytes());
        bytes.push(name.len() as u8);
        bytes.extend([0; 7]);
        let mut padded = [0; 64];
        padded[..name.len()].copy_from_slice(name.as_bytes());
        bytes.extend(padded);
    }
    bytes
}

impl CraftRecord {
    fn entry(&self) -> Vec<u8> {
        let mut bytes = self.disk.to_le_bytes().to_vec();
        bytes.extend([self.encoding, 0]);
        bytes.extend((self.extents.len() as u32).to_le_bytes());
        bytes.extend((self.payload.len() as u32).to_le_bytes());
        bytes.extend(self.raw_bytes.to_le_bytes());
        bytes
    }

    fn extents(&self) -> Vec<u8> {
        self.extents
            .iter()
            .flat_map(|(offset, len)| [offset.to_le_bytes(), len.to_le_bytes()])
            .flatten()
            .collect()
    }

    fn record(&self) -> Vec<u8> {
        let mut head = b"RECD".to_vec();
        head.extend(self.entry());
        let covered = [&head[..], &self.extents(), &self.payload].concat();
        head.extend(crc32c::crc32c(&covered).to_le_bytes());
        [&head[..], &covered[20..]].concat()
    }

    fn len(&self) -> u64 {
        self.extents.iter().fold(0, |sum: u64, (_, len)| sum.saturating_add(*len))
    }
}

impl Craft {
    /// A log of the purpose "changes" that makes a crash-consistent point, without any record.
    pub fn new(disks: &[(&str, u64)]) -> Self {
        Self {
            header: header(1, 2, 7, disks),
            records: vec![],
            listed: None,
            class: 1,
            covered_bytes: 0,
            total_bytes: 0,
        }
    }

    pub fn build(&self) -> Vec<u8> {
        let mut log = with_crc(self.header.clone());
        log.extend(self.records.iter().flat_map(CraftRecord::record));
        let index_position = log.len() as u64;

        let listed = self.listed.as_ref().unwrap_or(&self.records);
        let counts = [listed.len() as u32, listed.iter().map(|record| record.extents.len() as u32).sum()];
        let counts = counts.map(u32::to_le_bytes).concat();
        let mut index = [b"INDX", &counts[..], &[0; 4]].concat();
        index.extend(listed.iter().flat_map(|record| [record.entry(), record.extents()].concat()));
        log.extend(with_crc(index));

        let sum = |zero| {
            let records = listed.iter().filter(|record| (record.encoding == 0) == zero);
            records.fold(0_u64, |sum, record| sum.saturating_add(record.len()))
        };
        log.extend(b"FOOT");
        log.extend([self.class, 0, 0, 0]);
        for field in [self.covered_bytes, self.total_bytes, index_position, sum(false), sum(true)] {
            log.extend(field.to_le_bytes());
        }
        log.extend(counts);
        log.extend([0; 40]);
        reseal(&mut log);
        log
    }
}

/// Makes the BLAKE3 and the footer's CRC right again.
pub fn reseal(log: &mut [u8]) {
    let (hashed, seal) = log.split_at_mut(log.len() - 40);
    let hash = *blake3::hash(hashed).as_bytes();
    seal[..32].copy_from_slice(&hash);
    let crc = crc32c::crc32c(&[&hashed[hashed.len() - 56..], &hash[..]].concat());
    seal[32..36].copy_from_slice(&crc.to_le_bytes());
    seal[36..].copy_from_slice(b"DONE");
}
