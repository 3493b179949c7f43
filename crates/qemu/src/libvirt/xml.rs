//! What the XML of a running domain says that we need: its disks, its guest agent, and whom its QEMU runs as. Pure.

use std::collections::BTreeMap;

use roxmltree::{Document, Node};

/// The channel that libvirt takes for the guest agent's, by its name.
const AGENT: &str = "org.qemu.guest_agent.0";

/// A running domain, as far as we need it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Description {
    /// Its writable disks, in the order of the XML.
    pub disks: Vec<TargetDisk>,
    /// Whether it has a channel to a guest agent.
    pub has_agent: bool,
    /// The user and the group that its QEMU runs as, where libvirt chose them.
    pub runs_as: Option<(u32, u32)>,
    /// What keeps its QEMU from files that are not its own: `apparmor` or `selinux`.
    pub confined_by: Option<String>,
}

/// A writable disk of a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetDisk {
    /// What it is called in the domain's XML (`vda`), whatever QEMU calls it in this life.
    pub target: String,
    /// The id of its device in QEMU.
    pub alias: Option<String>,
    /// Why it cannot be protected, if it cannot.
    pub unusable: Option<&'static str>,
}

impl Description {
    /// Reads the XML of a running domain.
    pub fn read(xml: &str) -> Result<Self, String> {
        let document = Document::parse(xml).map_err(|error| error.to_string())?;
        let domain = document.root_element();
        let devices: Vec<Node<'_, '_>> =
            children(domain, "devices").flat_map(|node| node.children()).collect();
        let of_kind =
            |kind: &'static str| devices.iter().filter(move |node| node.has_tag_name(kind)).copied();
        let label = |model: &str| {
            let mut labels =
                children(domain, "seclabel").filter(|node| node.attribute("model") == Some(model));
            labels.find_map(|node| children(node, "label").next()?.text())
        };
        Ok(Self {
            disks: of_kind("disk").filter_map(disk).collect(),
            has_agent: of_kind("channel")
                .any(|node| children(node, "target").any(|target| target.attribute("name") == Some(AGENT))),
            runs_as: label("dac").and_then(ids),
            confined_by: ["apparmor", "selinux"]
                .into_iter()
                .find(|model| label(model).is_some())
                .map(Into::into),
        })
    }

    /// The disks of these targets, or all; else why not: the disk, and what is wrong with it.
    pub fn choose(&self, wanted: &[String]) -> Result<Vec<&TargetDisk>, (String, String)> {
        let chosen: Vec<&TargetDisk> = if wanted.is_empty() {
            self.disks.iter().collect()
        } else {
            let find = |target: &String| {
                let found = self.disks.iter().find(|disk| disk.target == *target);
                found.ok_or_else(|| {
                    (
                        target.clone(),
                        format!("the domain has no such writable disk; it has: {}", self.known()),
                    )
                })
            };
            wanted.iter().map(find).collect::<Result<_, _>>()?
        };
        match chosen.iter().find_map(|disk| Some((disk, disk.unusable?))) {
            None => Ok(chosen),
            Some((disk, why)) if wanted.is_empty() => {
                let why = format!("{why}; name the disks to protect with --disk ({})", self.known());
                Err((disk.target.clone(), why))
            }
            Some((disk, why)) => Err((disk.target.clone(), why.to_owned())),
        }
    }

    fn known(&self) -> String {
        let usable = self.disks.iter().filter(|disk| disk.unusable.is_none());
        let targets: Vec<&str> = usable.map(|disk| disk.target.as_str()).collect();
        if targets.is_empty() { "none".to_owned() } else { targets.join(", ") }
    }
}

fn children<'a, 'i: 'a>(node: Node<'a, 'i>, name: &'static str) -> impl Iterator<Item = Node<'a, 'i>> {
    node.children().filter(move |child| child.has_tag_name(name))
}

/// The network, bridge or device that each network card of a domain is connected to, by the card's address.
pub(crate) fn network_sources(xml: &str) -> BTreeMap<String, String> {
    let Ok(document) = Document::parse(xml) else { return BTreeMap::new() };
    let devices = children(document.root_element(), "devices");
    let cards = devices.flat_map(|devices| children(devices, "interface"));
    let sources = cards.filter_map(|card| {
        let mac = children(card, "mac").next()?.attribute("address")?.to_ascii_lowercase();
        let source = children(card, "source").next()?;
        let name = ["network", "bridge", "dev"].iter().find_map(|kind| source.attribute(*kind))?;
        Some((mac, name.to_owned()))
    });
    sources.collect()
}

/// A disk that the guest can write to.
fn disk(node: Node<'_, '_>) -> Option<TargetDisk> {
    let kind = node.attribute("device").unwrap_or("disk");
    let has = |name| children(node, name).next().is_some();
    if !matches!(kind, "disk" | "lun") || has("readonly") {
        return None;
    }
    let unusable = match node.attribute("type") {
        _ if kind == "lun" => {
            Some("the guest sends SCSI commands past QEMU to it (device='lun'), so its writes cannot be seen")
        }
        _ if has("shareable") => {
            Some("other VMs write to it too (<shareable/>), and their writes cannot be seen")
        }
        Some("vhostuser" | "vhostvdpa") => {
            Some("it is served by another program than QEMU, so its writes cannot be seen")
        }
        _ => None,
    };
    Some(TargetDisk {
        target: children(node, "target").next()?.attribute("dev")?.to_owned(),
        alias: children(node, "alias").next().and_then(|alias| alias.attribute("name")).map(Into::into),
        unusable,
    })
}

/// `+64055:+104`: the user and the group.
fn ids(label: &str) -> Option<(u32, u32)> {
    let (user, group) = label.split_once(':')?;
    let id = |text: &str| text.strip_prefix('+').unwrap_or(text).parse().ok();
    Some((id(user)?, id(group)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const XML: &str = "<domain type='kvm' id='7'><name>web</name><devices>
        <emulator>/usr/bin/qemu-system-x86_64</emulator>
        <disk type='file' device='disk'><source file='/a.qcow2' index='2'/><target dev='vda' bus='virtio'/><alias name='virtio-disk0'/></disk>
        <disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/><alias name='sata0-0-0'/></disk>
        <disk type='file' device='disk'><target dev='vdb' bus='virtio'/><readonly/></disk>
        <disk type='block'><target dev='sdb' bus='scsi'/><alias name='scsi0-0-0-1'/></disk>
        <channel type='unix'><source mode='bind' path='/p'/><target type='virtio' name='org.qemu.guest_agent.0' state='connected'/></channel>
        </devices>
        <seclabel type='dynamic' model='apparmor' relabel='yes'><label>libvirt-1</label></seclabel>
        <seclabel type='dynamic' model='dac' relabel='yes'><label>+64055:+104</label></seclabel></domain>";

    #[test]
    fn a_card_is_connected_to_what_its_source_names() {
        let xml = "<domain><devices>
            <interface type='network'><mac address='52:54:00:AA:00:01'/><source network='default'/></interface>
            <interface type='bridge'><mac address='52:54:00:aa:00:02'/><source bridge='br0'/></interface>
            <interface type='direct'><mac address='52:54:00:aa:00:03'/><source dev='eth0' mode='bridge'/></interface>
            <interface type='user'><mac address='52:54:00:aa:00:04'/></interface></devices></domain>";
        let found: Vec<_> = network_sources(xml).into_iter().collect();
        let pair = |mac: &str, name: &str| (format!("52:54:00:aa:00:{mac}"), name.to_owned());
        assert_eq!(found, [pair("01", "default"), pair("02", "br0"), pair("03", "eth0")]);
        assert!(network_sources("<domain").is_empty());
    }

    #[test]
    fn the_writable_disks_are_found_by_their_targets() {
        let found = Description::read(XML).unwrap();
        let brief: Vec<_> = found.disks.iter().map(|d| (d.target.as_str(), d.alias.as_deref())).collect();
        assert_eq!(brief, [("vda", Some("virtio-disk0")), ("sdb", Some("scsi0-0-0-1"))]);
        assert_eq!((found.has_agent, found.runs_as), (true, Some((64055, 104))));
        assert_eq!(found.confined_by.as_deref(), Some("apparmor"));
        let targets = |wanted: &[&str]| {
            let wanted: Vec<String> = wanted.iter().map(|&target| target.to_owned()).collect();
            found.choose(&wanted).map(|disks| disks.iter().map(|d| d.target.clone()).collect::<Vec<_>>())
        };
        assert_eq!(targets(&[]).unwrap(), ["vda", "sdb"]);
        assert_eq!(targets(&["sdb"]).unwrap(), ["sdb"]);
        let (disk, why) = targets(&["vdb"]).unwrap_err();
        assert!(disk == "vdb" && why.ends_with("it has: vda, sdb"), "{disk}: {why}");
    }

    #[test]
    fn what_cannot_be_tracked_is_refused_unless_it_is_left_out() {
        for (kind, more, words) in [
            ("type='block' device='lun'", "", "SCSI commands"),
            ("type='file'", "<shareable/>", "other VMs"),
            ("type='vhostuser' device='disk'", "", "another program"),
        ] {
            let xml = format!(
                "<domain><devices><disk {kind}><target dev='vdb'/>{more}</disk>
                 <disk type='file'><target dev='vda'/></disk></devices></domain>"
            );
            let found = Description::read(&xml).unwrap();
            let (disk, why) = found.choose(&[]).unwrap_err();
            assert!(disk == "vdb" && why.contains(words) && why.contains("--disk (vda)"), "{why}");
            assert!(found.choose(&["vdb".into()]).unwrap_err().1.contains(words));
            assert_eq!(found.choose(&["vda".into()]).unwrap().len(), 1);
        }
    }

    #[test]
    fn a_users_own_domain_runs_as_that_user_and_what_is_no_xml_says_so() {
        let found = Description::read("<domain><devices/></domain>").unwrap();
        assert_eq!(found, Description::default());
        assert!(Description::read("<domain>").is_err());
    }
}
