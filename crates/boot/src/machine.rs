//! What kind of machine a VM is, from what its QEMU told: numbers and known names, nothing else.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::network::Nic;

/// Memory where nothing was told, in MiB.
const MEMORY_MIB: u64 = 1024;
/// No machine has more network cards: a bus has no more places.
const NICS_MAX: usize = 16;

/// The board.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// i440FX.
    Pc,
    /// Q35.
    Q35,
}

impl Kind {
    /// As QEMU calls the newest one it has.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pc => "pc",
            Self::Q35 => "q35",
        }
    }

    /// As QEMU calls the one of a version.
    #[must_use]
    pub fn versioned(self, (major, minor): (u16, u16)) -> String {
        let chipset = match self {
            Self::Pc => "i440fx",
            Self::Q35 => "q35",
        };
        format!("pc-{chipset}-{major}.{minor}")
    }
}

/// What starts the boot loader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Firmware {
    /// SeaBIOS.
    Bios,
    /// OVMF; the VM's own variables are not replicated, so the disk's fallback loader is started.
    Uefi,
}

/// How a disk is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bus {
    /// virtio-blk.
    Virtio,
    /// virtio-scsi.
    Scsi,
    /// IDE on a `pc`, AHCI on a `q35`.
    Ide,
    /// NVMe.
    Nvme,
}

/// A machine that a VM's disks can be booted in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// The board.
    pub kind: Kind,
    /// Which QEMU's board of that kind, such as 7.2; a guest takes another one for other hardware.
    pub version: Option<(u16, u16)>,
    /// What a guest knows its machine by (SMBIOS): licences hang on it.
    pub uuid: Option<String>,
    /// Network cards.
    pub nics: Vec<Nic>,
    /// What starts the boot loader.
    pub firmware: Firmware,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Processors.
    pub cpus: u32,
    /// How disks are attached, by their node's name; those that are not here are virtio's.
    pub buses: BTreeMap<String, Bus>,
}

impl Machine {
    /// What a definition tells, whatever is in it.
    #[must_use]
    pub fn of_definition(definition: &Value) -> Self {
        let told = |key: &str| definition.get(key).and_then(Value::as_str).unwrap_or_default();
        let kind = if told("machine-type").contains("q35") { Kind::Q35 } else { Kind::Pc };
        let has_flash = definition["query-block"]
            .as_array()
            .is_some_and(|blocks| blocks.iter().any(|block| block["device"].as_str() == Some("pflash0")));
        let bytes = definition["query-memory-size-summary"]["base-memory"].as_u64();
        let cpus = definition["query-cpus-fast"].as_array().map_or(1, Vec::len);
        let buses = definition["disk-devices"].as_object().into_iter().flatten();
        let nics = definition["networks"].as_array().into_iter().flatten();
        Self {
            kind,
            version: version(told("machine-type")),
            uuid: definition["query-uuid"]["UUID"].as_str().and_then(uuid),
            nics: nics.filter_map(Nic::of_definition).take(NICS_MAX).collect(),
            firmware: if has_flash { Firmware::Uefi } else { Firmware::Bios },
            memory_mib: bytes.map_or(MEMORY_MIB, |bytes| bytes >> 20).max(64),
            cpus: u32::try_from(cpus).unwrap_or(1).max(1),
            buses: buses
                .map(|(node, device)| (node.clone(), Bus::of_device(device.as_str().unwrap_or_default())))
                .collect(),
        }
    }

    /// The same with no more than this.
    #[must_use]
    pub fn at_most(mut self, memory_mib: u64, cpus: u32) -> Self {
        self.memory_mib = self.memory_mib.min(memory_mib);
        self.cpus = self.cpus.min(cpus);
        self
    }

    /// How a disk is attached.
    #[must_use]
    pub fn bus(&self, disk: &str) -> Bus {
        self.buses.get(disk).copied().unwrap_or(Bus::Virtio)
    }
}

impl Bus {
    /// By QEMU's name of the device.
    fn of_device(device: &str) -> Self {
        match device {
            _ if device.starts_with("scsi") => Self::Scsi,
            _ if device.starts_with("ide") => Self::Ide,
            _ if device.starts_with("nvme") => Self::Nvme,
            _ => Self::Virtio,
        }
    }
}

/// The version in QEMU's name of a board: 7.2 of `pc-q35-7.2-machine`.
fn version(board: &str) -> Option<(u16, u16)> {
    let version = board.strip_suffix("-machine")?.rsplit('-').next()?;
    let (major, minor) = version.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// A UUID, unless it is the one of a machine that was given none.
fn uuid(text: &str) -> Option<String> {
    let is_form = text.len() == 36
        && text.char_indices().all(|(at, c)| match at {
            8 | 13 | 18 | 23 => c == '-',
            _ => c.is_ascii_hexdigit(),
        });
    (is_form && text.chars().any(|c| !matches!(c, '0' | '-'))).then(|| text.to_ascii_lowercase())
}

/// How likely a disk is the one to boot from: the least first, and last one whose first sector cannot be read. A BIOS tries
/// one disk alone, and a VM does not tell which.
pub fn boot_rank<E>(read_first_sector: impl FnOnce(&mut [u8]) -> Result<(), E>) -> u8 {
    let mut sector = [0; 512];
    read_first_sector(&mut sector).map_or(u8::MAX, |()| rank(&sector))
}

fn rank(first_sector: &[u8]) -> u8 {
    /// Where a boot sector's code ends and its partition table begins.
    const CODE_BYTES: usize = 440;
    let is_marked = first_sector.get(510..512) == Some(&[0x55, 0xaa]);
    let has_code = first_sector.iter().take(CODE_BYTES).any(|&byte| byte != 0);
    match (is_marked, has_code) {
        (true, true) => 0,
        (true, false) => 1,
        (false, _) => 2,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_machine_is_read_from_what_qemu_told() {
        let machine = Machine::of_definition(&json!({
            "source": "qmp", "machine-type": "pc-q35-7.2-machine",
            "query-memory-size-summary": {"base-memory": 4_294_967_296_u64, "plugged-memory": 0},
            "query-cpus-fast": [{"cpu-index": 0}, {"cpu-index": 1}],
            "query-block": [{"device": "pflash0"}, {"device": ""}],
            "disk-devices": {"system": "ide-hd", "data": "virtio-blk-device", "logs": "scsi-hd", "fast": "nvme"},
            "query-uuid": {"UUID": "6F1E0B3C-0000-4000-8000-0123456789ab"},
            "networks": [{"device": "virtio-net-pci", "mac": "52:54:00:AB:cd:01", "network": "lan"}, {"device": "x"}],
        }));
        assert_eq!((machine.kind, machine.firmware), (Kind::Q35, Firmware::Uefi));
        assert_eq!(machine.version, Some((7, 2)));
        assert_eq!(machine.uuid.as_deref(), Some("6f1e0b3c-0000-4000-8000-0123456789ab"));
        assert_eq!(machine.nics.len(), 1, "what is no card is none");
        assert_eq!(
            (machine.nics[0].mac.to_string(), &*machine.nics[0].network),
            ("52:54:00:ab:cd:01".into(), "lan")
        );
        assert_eq!((machine.memory_mib, machine.cpus), (4096, 2));
        let buses = ["system", "data", "logs", "fast", "new"].map(|disk| machine.bus(disk));
        assert_eq!(buses, [Bus::Ide, Bus::Virtio, Bus::Scsi, Bus::Nvme, Bus::Virtio]);
        let less = machine.at_most(512, 1);
        assert_eq!((less.memory_mib, less.cpus), (512, 1));
    }

    #[test]
    fn a_definition_that_tells_nothing_is_a_small_pc() {
        for nothing in [
            json!(null),
            json!({}),
            json!([1]),
            json!({"query-block": 5, "disk-devices": "x", "machine-type": 7, "networks": {"a": 1}}),
            json!({"query-uuid": {"UUID": "00000000-0000-0000-0000-000000000000"}, "machine-type": "pc-1,x-machine"}),
        ] {
            let machine = Machine::of_definition(&nothing);
            assert_eq!((machine.kind, machine.firmware), (Kind::Pc, Firmware::Bios));
            assert_eq!((machine.memory_mib, machine.cpus), (1024, 1));
            assert_eq!((machine.version, machine.uuid, machine.nics.len()), (None, None, 0));
        }
    }

    #[test]
    fn a_disk_with_boot_code_comes_before_one_with_partitions_alone() {
        let mut sector = [0; 512];
        assert_eq!((rank(&sector), rank(&[])), (2, 2));
        assert_eq!(boot_rank(|_| Err(())), u8::MAX);
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        assert_eq!(rank(&sector), 1);
        sector[450] = 7; // a partition
        assert_eq!(rank(&sector), 1);
        sector[0] = 0xeb;
        assert_eq!(rank(&sector), 0);
    }
}
