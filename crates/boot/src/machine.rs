//! What kind of machine a VM is, from what its QEMU told: numbers and known names, nothing else.

use std::collections::BTreeMap;

use serde_json::Value;

/// Memory where nothing was told, in MiB.
const MEMORY_MIB: u64 = 1024;

/// The board.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// i440FX.
    Pc,
    /// Q35.
    Q35,
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
        Self {
            kind,
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

/// How likely a disk is the one to boot from, by its first sector: the least first. A BIOS tries one disk alone, and a VM
/// does not tell which.
#[must_use]
pub fn boot_rank(first_sector: &[u8]) -> u8 {
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
        }));
        assert_eq!((machine.kind, machine.firmware), (Kind::Q35, Firmware::Uefi));
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
            json!({"query-block": 5, "disk-devices": "x", "machine-type": 7}),
        ] {
            let machine = Machine::of_definition(&nothing);
            assert_eq!((machine.kind, machine.firmware), (Kind::Pc, Firmware::Bios));
            assert_eq!((machine.memory_mib, machine.cpus), (1024, 1));
        }
    }

    #[test]
    fn a_disk_with_boot_code_comes_before_one_with_partitions_alone() {
        let mut sector = [0; 512];
        assert_eq!((boot_rank(&sector), boot_rank(&[])), (2, 2));
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        assert_eq!(boot_rank(&sector), 1);
        sector[450] = 7; // a partition
        assert_eq!(boot_rank(&sector), 1);
        sector[0] = 0xeb;
        assert_eq!(boot_rank(&sector), 0);
    }
}
