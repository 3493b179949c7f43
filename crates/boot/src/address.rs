//! The addresses that a guest is to take at this site, and what it is told to take them. Pure.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::network::Mac;

/// An address with the length of its network's prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cidr {
    /// The address.
    pub address: IpAddr,
    /// The prefix, in bits.
    pub prefix: u8,
}

impl FromStr for Cidr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let read = || {
            let (address, prefix) = text.split_once('/')?;
            let (address, prefix) = (address.parse::<IpAddr>().ok()?, prefix.parse::<u8>().ok()?);
            let bits = if address.is_ipv4() { 32 } else { 128 };
            (prefix <= bits).then_some(Self { address, prefix })
        };
        read().ok_or_else(|| format!("'{text}' is no address with its prefix, such as 192.0.2.7/24"))
    }
}

impl TryFrom<String> for Cidr {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Cidr> for String {
    fn from(cidr: Cidr) -> Self {
        cidr.to_string()
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

/// What one network card of a guest is to be set to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct IpSettings {
    /// The card.
    pub mac: Mac,
    /// Its addresses, instead of those that it has.
    pub addresses: Vec<Cidr>,
    /// The way to everywhere else.
    #[serde(default)]
    pub gateway: Option<IpAddr>,
    /// Name servers.
    #[serde(default)]
    pub dns: Vec<IpAddr>,
}

/// What kind of guest is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestSystem {
    /// With `ip` of iproute2 or BusyBox.
    Unix,
    /// With `netsh`.
    Windows,
}

/// Name servers where systemd-resolved keeps them, else in the file that the C library reads.
const UNIX_DNS: &str = r#"card=$1; shift
if command -v resolvectl >/dev/null && resolvectl dns "$card" "$@"; then exit 0; fi
printf 'nameserver %s\n' "$@" > /etc/resolv.conf"#;

impl IpSettings {
    /// The commands that set a guest's interface, in order; each has to succeed.
    #[must_use]
    pub fn commands(&self, system: GuestSystem, interface: &str) -> Vec<Vec<String>> {
        match system {
            GuestSystem::Unix => self.unix(interface),
            GuestSystem::Windows => self.windows(interface),
        }
    }

    fn unix(&self, interface: &str) -> Vec<Vec<String>> {
        let ip = |words: &[&str]| -> Vec<String> {
            [&["ip"], words, &["dev", interface]].concat().into_iter().map(Into::into).collect()
        };
        let mut commands = vec![ip(&["addr", "flush"])];
        commands.extend(self.addresses.iter().map(|cidr| ip(&["addr", "add", &cidr.to_string()])));
        commands.push(["ip", "link", "set", interface, "up"].map(Into::into).into());
        if let Some(gateway) = self.gateway {
            let family = if gateway.is_ipv4() { "-4" } else { "-6" };
            commands.push(ip(&[family, "route", "replace", "default", "via", &gateway.to_string()]));
        }
        if !self.dns.is_empty() {
            let mut command: Vec<String> = ["sh", "-c", UNIX_DNS, "sh", interface].map(Into::into).into();
            command.extend(self.dns.iter().map(ToString::to_string));
            commands.push(command);
        }
        commands
    }

    fn windows(&self, interface: &str) -> Vec<Vec<String>> {
        let name = format!("name={interface}");
        let netsh = |address: &IpAddr, words: &[&str]| -> Vec<String> {
            let family = if address.is_ipv4() { "ipv4" } else { "ipv6" };
            [&["netsh", "interface", family], words].concat().into_iter().map(Into::into).collect()
        };
        let mut commands = Vec::new();
        // The first one of IPv4 takes the place of DHCP and of what was set before.
        let first = self.addresses.iter().position(|cidr| cidr.address.is_ipv4());
        for (place, cidr) in self.addresses.iter().enumerate() {
            let text = cidr.to_string();
            commands.push(match first {
                Some(first) if first == place => {
                    netsh(&cidr.address, &["set", "address", &name, "static", &text])
                }
                _ => netsh(&cidr.address, &["add", "address", &name, &text]),
            });
        }
        if let Some(gateway) = self.gateway {
            let everywhere = if gateway.is_ipv4() { "0.0.0.0/0" } else { "::/0" };
            commands.push(netsh(&gateway, &["add", "route", everywhere, &name, &gateway.to_string()]));
        }
        for (place, server) in self.dns.iter().enumerate() {
            let text = server.to_string();
            commands.push(match place {
                0 => netsh(server, &["set", "dnsservers", &name, "static", &text, "validate=no"]),
                _ => netsh(server, &["add", "dnsservers", &name, &text, "validate=no"]),
            });
        }
        commands
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> IpSettings {
        IpSettings {
            mac: "52:54:00:12:34:56".parse().unwrap(),
            addresses: ["2001:db8::7/64", "192.0.2.7/24", "192.0.2.8/24"]
                .map(|text| text.parse().unwrap())
                .into(),
            gateway: Some("192.0.2.1".parse().unwrap()),
            dns: vec!["192.0.2.53".parse().unwrap(), "2001:db8::53".parse().unwrap()],
        }
    }

    fn lines(system: GuestSystem, interface: &str) -> Vec<String> {
        settings().commands(system, interface).iter().map(|words| words.join(" ")).collect()
    }

    #[test]
    fn a_linux_guest_is_told_with_ip() {
        let lines = lines(GuestSystem::Unix, "ens3");
        let told = [
            "ip addr flush dev ens3",
            "ip addr add 2001:db8::7/64 dev ens3",
            "ip addr add 192.0.2.7/24 dev ens3",
            "ip addr add 192.0.2.8/24 dev ens3",
            "ip link set ens3 up",
            "ip -4 route replace default via 192.0.2.1 dev ens3",
        ];
        assert_eq!(lines[..6], told);
        assert!(lines[6].ends_with("sh ens3 192.0.2.53 2001:db8::53"), "{}", lines[6]);
    }

    #[test]
    fn a_windows_guest_is_told_with_netsh() {
        let told = [
            "netsh interface ipv6 add address name=Ethernet 2 2001:db8::7/64",
            "netsh interface ipv4 set address name=Ethernet 2 static 192.0.2.7/24",
            "netsh interface ipv4 add address name=Ethernet 2 192.0.2.8/24",
            "netsh interface ipv4 add route 0.0.0.0/0 name=Ethernet 2 192.0.2.1",
            "netsh interface ipv4 set dnsservers name=Ethernet 2 static 192.0.2.53 validate=no",
            "netsh interface ipv6 add dnsservers name=Ethernet 2 2001:db8::53 validate=no",
        ];
        assert_eq!(lines(GuestSystem::Windows, "Ethernet 2"), told);
    }

    #[test]
    fn an_address_has_a_prefix_that_fits() {
        assert_eq!("10.0.0.7/8".parse::<Cidr>().unwrap().to_string(), "10.0.0.7/8");
        for wrong in ["10.0.0.7", "10.0.0.7/33", "::1/129", "x/8", "10.0.0.7/-1", "10.0.0.7/8; reboot"] {
            assert!(wrong.parse::<Cidr>().is_err(), "{wrong}");
        }
    }
}
