//! Makes the checksums of a would-be log right, so that a fuzzer gets past them: an attacker has a CRC too.
//!
//! `docs/format/log-v1.md` once more, without the code of crate `log`.

const HEADER_BYTES: usize = 80;
const DISK_BYTES: usize = 80;
const RECORD_HEAD_BYTES: usize = 24;
const ENTRY: std::ops::Range<usize> = 4..20;
const UNIT_BYTES: usize = 16;
const FOOTER_BYTES: usize = 56;
const SEAL_BYTES: usize = 40;

fn u32_at(bytes: &[u8], at: usize) -> Option<usize> {
    let bytes = bytes.get(at..at + 4)?;
    usize::try_from(u32::from_le_bytes(bytes.try_into().ok()?)).ok()
}

fn put_crc(bytes: &mut [u8], at: usize, crc: u32) {
    if let Some(place) = bytes.get_mut(at..at + 4) {
        place.copy_from_slice(&crc.to_le_bytes());
    }
}

/// Sets the CRCs and the hash of everything that can be made out.
pub(crate) fn mend(log: &mut [u8]) {
    let Some(end_of_header) = mend_header(log) else { return };
    let (end_of_records, _) = mend_records(log, end_of_header);
    mend_tail(log, end_of_records);
}

/// The same, and gives the log the index and the footer that its records ask for.
pub(crate) fn finish(log: &mut Vec<u8>) {
    let Some(end_of_header) = mend_header(log) else { return };
    let (end_of_records, records) = mend_records(log, end_of_header);
    let class = log.get(end_of_records).map_or(1, |byte| byte % 4);
    log.truncate(end_of_records);
    let mut units = Vec::new();
    let (mut extents, mut data_bytes, mut zero_bytes) = (0, 0_u64, 0_u64);
    for &record in &records {
        let count = u32_at(log, record + 8).unwrap_or(0);
        let listed = &log[record + RECORD_HEAD_BYTES..][..count * UNIT_BYTES];
        let lengths = listed.chunks_exact(UNIT_BYTES).map(|unit| u64_at(unit, 8));
        let sum = lengths.fold(0_u64, u64::wrapping_add);
        let total = if log[record + 6] == 0 { &mut zero_bytes } else { &mut data_bytes };
        *total = total.wrapping_add(sum);
        units.extend_from_slice(&log[record..][ENTRY]);
        units.extend_from_slice(listed);
        extents += count;
    }
    let counts = [records.len() as u32, extents as u32].map(u32::to_le_bytes).concat();
    let index = [b"INDX", &counts[..], &[0; 4], &units].concat();
    let crc = crc32c::crc32c(&index);
    log.extend(index);
    log.extend(crc.to_le_bytes());
    log.extend(b"FOOT");
    log.extend([class, 0, 0, 0]);
    for field in [0, 0, end_of_records as u64, data_bytes, zero_bytes] {
        log.extend(field.to_le_bytes());
    }
    log.extend(counts);
    log.extend([0; SEAL_BYTES]);
    seal(log);
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).map_or(0, |bytes| u64::from_le_bytes(bytes.try_into().unwrap_or([0; 8])))
}

fn mend_header(log: &mut [u8]) -> Option<usize> {
    let disks = usize::from(u16::from_le_bytes(log.get(10..12)?.try_into().ok()?));
    let fields = HEADER_BYTES + disks * DISK_BYTES;
    let crc = crc32c::crc32c(log.get(..fields)?);
    put_crc(log, fields, crc);
    Some(fields + 4)
}

/// Where the records end, and where each begins.
fn mend_records(log: &mut [u8], mut at: usize) -> (usize, Vec<usize>) {
    let mut records = Vec::new();
    while log.get(at..at + 4) == Some(b"RECD") {
        let (Some(extents), Some(stored)) = (u32_at(log, at + 8), u32_at(log, at + 12)) else { break };
        let len = extents.saturating_mul(UNIT_BYTES).saturating_add(stored);
        let Some(end) = at.checked_add(RECORD_HEAD_BYTES).and_then(|at| at.checked_add(len)) else { break };
        let Some(rest) = log.get(at + RECORD_HEAD_BYTES..end) else { break };
        let crc = crc32c::crc32c_append(crc32c::crc32c(&log[at..at + ENTRY.end]), rest);
        put_crc(log, at + ENTRY.end, crc);
        records.push(at);
        at = end;
    }
    (at.min(log.len()), records)
}

fn mend_tail(log: &mut [u8], index: usize) {
    if let (Some(records), Some(extents)) = (u32_at(log, index + 4), u32_at(log, index + 8)) {
        let units = records.saturating_add(extents).saturating_mul(UNIT_BYTES);
        let end = index.saturating_add(UNIT_BYTES).saturating_add(units);
        if let Some(covered) = log.get(index..end) {
            let crc = crc32c::crc32c(covered);
            put_crc(log, end, crc);
        }
    }
    seal(log);
}

fn seal(log: &mut [u8]) {
    let Some((hashed, seal)) = log.split_last_chunk_mut::<SEAL_BYTES>() else { return };
    let Some(footer) = hashed.last_chunk::<FOOTER_BYTES>() else { return };
    let hash = *blake3::hash(hashed).as_bytes();
    let crc = crc32c::crc32c_append(crc32c::crc32c(footer), &hash);
    seal[..32].copy_from_slice(&hash);
    seal[32..36].copy_from_slice(&crc.to_le_bytes());
    seal[36..].copy_from_slice(b"DONE");
}
