//! Network cards of a VM, and what they are connected to at this site.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The network that stands for all that are not named.
const ANY: &str = "*";
/// What Linux takes for a name of an interface, in bytes.
const INTERFACE_BYTES_MAX: usize = 15;

/// A card's address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac([u8; 6]);

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("'{text}' is no address of a network card, such as 52:54:00:12:34:56");
        let mut bytes = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut bytes {
            let is_byte =
                |part: &&str| part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
            let part = parts.next().filter(is_byte).ok_or_else(wrong)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() { Err(wrong()) } else { Ok(Self(bytes)) }
    }
}

impl TryFrom<String> for Mac {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// What kind of card: a guest has a driver for the one that it knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NicModel {
    /// virtio.
    Virtio,
    /// Intel's, of old.
    E1000,
    /// Intel's.
    E1000e,
    /// Realtek's.
    Rtl8139,
    /// VMware's.
    Vmxnet3,
}

impl NicModel {
    /// By QEMU's name of the device, or libvirt's.
    fn of_device(device: &str) -> Option<Self> {
        match device {
            _ if device.starts_with("virtio") => Some(Self::Virtio),
            "e1000" | "e1000-82540em" => Some(Self::E1000),
            "e1000e" => Some(Self::E1000e),
            "rtl8139" => Some(Self::Rtl8139),
            "vmxnet3" => Some(Self::Vmxnet3),
            _ => None,
        }
    }

    /// As QEMU calls it.
    #[must_use]
    pub const fn device(self) -> &'static str {
        match self {
            Self::Virtio => "virtio-net-pci",
            Self::E1000 => "e1000",
            Self::E1000e => "e1000e",
            Self::Rtl8139 => "rtl8139",
            Self::Vmxnet3 => "vmxnet3",
        }
    }
}

/// A network card of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nic {
    /// What kind.
    pub model: NicModel,
    /// Its address, which guests and switches know it by.
    pub mac: Mac,
    /// What it is connected to at the primary's site: libvirt's name of the network or bridge, else QEMU's of the netdev.
    pub network: String,
}

impl Nic {
    /// One entry of a definition's networks, if it is one.
    pub(crate) fn of_definition(told: &Value) -> Option<Self> {
        Some(Self {
            model: NicModel::of_device(told["device"].as_str()?)?,
            mac: told["mac"].as_str()?.parse().ok()?,
            network: told["network"].as_str().unwrap_or_default().to_owned(),
        })
    }
}

/// What a card is connected to here.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Connection {
    /// Nothing: the card is there, its cable is not.
    #[default]
    None,
    /// A bridge of this machine, through `qemu-bridge-helper`.
    Bridge(String),
    /// A tap device that is there and that QEMU may use.
    Tap(String),
    /// The outside behind an address of QEMU's own: no one can call in.
    User,
}

impl FromStr for Connection {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let interface = |name: &str| {
            let is_name = (1..=INTERFACE_BYTES_MAX).contains(&name.len())
                && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
            is_name
                .then(|| name.to_owned())
                .ok_or_else(|| format!("'{name}' is no name of a network interface"))
        };
        match text.split_once(':') {
            None if text == "none" => Ok(Self::None),
            None if text == "user" => Ok(Self::User),
            Some(("bridge", name)) => Ok(Self::Bridge(interface(name)?)),
            Some(("tap", name)) => Ok(Self::Tap(interface(name)?)),
            _ => Err(format!(
                "'{text}' is no connection: 'bridge:NAME', 'tap:NAME', 'user' (out, not in) or 'none'"
            )),
        }
    }
}

impl TryFrom<String> for Connection {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Connection> for String {
    fn from(connection: Connection) -> Self {
        connection.to_string()
    }
}

impl fmt::Display for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::User => f.write_str("user"),
            Self::Bridge(name) => write!(f, "bridge:{name}"),
            Self::Tap(name) => write!(f, "tap:{name}"),
        }
    }
}

/// Which network of the primary's site is which of this one.
pub type NetworkMap = BTreeMap<String, Connection>;

/// What a network of the primary's site is here: what the first of these maps that knows it says, then what the first
/// says of all others (`*`); else nothing, as a VM in a wrong network does more harm than one in none.
#[must_use]
pub fn connection(network: &str, maps: &[&NetworkMap]) -> Connection {
    let of = |name: &str| maps.iter().find_map(|map| map.get(name));
    of(network).or_else(|| of(ANY)).cloned().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_read_back_as_they_are_written_and_names_bring_no_options_with_them() {
        for text in ["none", "user", "bridge:br-dr", "tap:tap0.7"] {
            assert_eq!(text.parse::<Connection>().unwrap().to_string(), text);
        }
        for wrong in
            ["", "bridge", "bridge:", "bridge:a,script=/x", "tap:0123456789abcdef", "tap:../x", "vlan:3"]
        {
            assert!(wrong.parse::<Connection>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_network_is_what_the_nearest_map_says() {
        let map = |entries: &[(&str, &str)]| -> NetworkMap {
            entries.iter().map(|(name, to)| ((*name).to_owned(), to.parse().unwrap())).collect()
        };
        let (vm, site) =
            (map(&[("lan", "bridge:br1")]), map(&[("lan", "bridge:br2"), ("dmz", "tap:t"), ("*", "user")]));
        let of = |network| connection(network, &[&vm, &site]).to_string();
        assert_eq!([of("lan"), of("dmz"), of("other")], ["bridge:br1", "tap:t", "user"]);
        assert_eq!(connection("lan", &[]), Connection::None);
    }

    #[test]
    fn an_address_of_a_card_is_six_bytes() {
        assert_eq!("52-54-00-AB-CD-EF".parse::<Mac>().unwrap().to_string(), "52:54:00:ab:cd:ef");
        for wrong in [
            "",
            "52:54:00:ab:cd",
            "52:54:00:ab:cd:ef:01",
            "5254:00:ab:cd:ef:1",
            "xx:54:00:ab:cd:ef",
            "+5:54:00:ab:cd:ef",
        ] {
            assert!(wrong.parse::<Mac>().is_err(), "{wrong}");
        }
    }
}
