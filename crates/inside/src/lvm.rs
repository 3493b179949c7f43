//! Logical volumes of LVM, as far as each lies in plain stretches of physical ones.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use crate::lvm_text::{Value, parse};
use crate::source::{ReadAt, Window, bytes_at, le32, le64};

/// What is read of a volume group's metadata; real ones have some KiB.
const TEXT_BYTES_MAX: u64 = 4 << 20;
/// Stretches of one logical volume.
const SEGMENTS_MAX: u64 = 65_536;
const MAGIC: &[u8] = b" LVM2 x[5A%r0N*>";

/// Where a physical volume's own header is, in bytes; none if it is none.
pub(crate) fn label(source: &dyn ReadAt) -> Option<u64> {
    (0..4).find_map(|sector| {
        let at = sector * 512;
        let label = bytes_at::<32>(source, at)?;
        let is_label = label.starts_with(b"LABELONE") && label[24..32] == *b"LVM2 001";
        is_label.then(|| at.checked_add(le32(&label, 20).into())).flatten()
    })
}

/// A physical volume.
struct Physical {
    id: String,
    source: Arc<dyn ReadAt>,
    group: Option<Value>,
}

/// The logical volumes of all physical ones, as `group/volume`. What has stripes, mirrors, pools or missing parts is
/// named, and has no bytes.
pub(crate) fn logical_volumes(sources: &[Arc<dyn ReadAt>]) -> Vec<(String, Option<Window>)> {
    let physical: Vec<Physical> = sources.iter().filter_map(read).collect();
    // Each physical volume has the whole group's text; the newest counts.
    let mut groups: BTreeMap<&str, (&String, &Value)> = BTreeMap::new();
    for (name, group) in physical.iter().filter_map(|volume| volume.group.as_ref()).flat_map(Value::section) {
        let Some(id) = group.text("id") else { continue };
        let number = |group: &Value| group.number("seqno").unwrap_or(0);
        if groups.get(id).is_none_or(|(_, known)| number(known) < number(group)) {
            groups.insert(id, (name, group));
        }
    }
    let mut found = Vec::new();
    for (name, group) in groups.into_values() {
        for (volume, described) in group.get("logical_volumes").into_iter().flat_map(Value::section) {
            if is_visible(described) {
                found.push((format!("{name}/{volume}"), window(group, described, &physical)));
            }
        }
    }
    found
}

fn is_visible(volume: &Value) -> bool {
    match volume.get("status") {
        Some(Value::List(flags)) => flags.iter().any(|flag| flag.as_text() == Some("VISIBLE")),
        _ => false,
    }
}

fn read(source: &Arc<dyn ReadAt>) -> Option<Physical> {
    let header = label(source.as_ref())?;
    let id = String::from_utf8_lossy(&bytes_at::<32>(source.as_ref(), header)?).into_owned();
    let group = metadata_areas(source.as_ref(), header)
        .into_iter()
        .find_map(|area| metadata(source.as_ref(), area))
        .and_then(|text| parse(&text));
    Some(Physical { id, source: source.clone(), group })
}

/// The areas with metadata, named behind those with data.
fn metadata_areas(source: &dyn ReadAt, header: u64) -> Vec<u64> {
    let (mut at, mut lists, mut areas) = (header.saturating_add(40), 0, Vec::new());
    for _ in 0..32 {
        let Some(area) = bytes_at::<16>(source, at) else { break };
        match (le64(&area, 0), lists) {
            (0, 0) => lists = 1,
            (0, _) => break,
            (_, 0) => {}
            (start, _) => areas.push(start),
        }
        at = at.saturating_add(16);
    }
    areas
}

/// The text in an area: a ring behind its header.
fn metadata(source: &dyn ReadAt, area: u64) -> Option<String> {
    let header = bytes_at::<64>(source, area).filter(|header| header[4..20] == *MAGIC)?;
    let (area_bytes, offset, len) = (le64(&header, 32), le64(&header, 40), le64(&header, 48));
    let is_sane =
        len > 0 && len <= TEXT_BYTES_MAX && offset >= 512 && offset < area_bytes && len < area_bytes;
    let mut text = vec![0; is_sane.then(|| usize::try_from(len).ok()).flatten()?];
    let first = usize::try_from(area_bytes - offset).unwrap_or(usize::MAX).min(text.len());
    source.read_at(area.checked_add(offset)?, &mut text[..first]).ok()?;
    source.read_at(area.checked_add(512)?, &mut text[first..]).ok()?;
    Some(String::from_utf8_lossy(&text).into_owned())
}

fn window(group: &Value, volume: &Value, physical: &[Physical]) -> Option<Window> {
    let extent = group.number("extent_size")?.checked_mul(512)?;
    let count = volume.number("segment_count").filter(|count| *count <= SEGMENTS_MAX)?;
    let mut stretches = Vec::new();
    let mut next = 0;
    for number in 1..=count {
        let segment = volume.get(&format!("segment{number}"))?;
        if segment.number("start_extent")? != next {
            return None;
        }
        let extents = segment.number("extent_count")?;
        next = next.checked_add(extents)?;
        let is_plain = segment.text("type") == Some("striped") && segment.number("stripe_count") == Some(1);
        let Some(Value::List(stripe)) = segment.get("stripes").filter(|_| is_plain) else { return None };
        let [Value::Text(name), Value::Number(start)] = &stripe[..] else { return None };
        let described = group.get("physical_volumes")?.get(name)?;
        let id = described.text("id")?.replace('-', "");
        let source = physical.iter().find(|volume| volume.id == id)?.source.clone();
        stretches.push((source, bytes(described.number("pe_start")?, *start, extents, extent)?));
    }
    Window::new(stretches)
}

fn bytes(first_sector: u64, start: u64, extents: u64, extent: u64) -> Option<Range<u64>> {
    let start = first_sector.checked_mul(512)?.checked_add(start.checked_mul(extent)?)?;
    Some(start..start.checked_add(extents.checked_mul(extent)?)?)
}
