//! Names and ids. What comes from outside is checked here once, so that no other crate has to.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::points::LATEST;

/// Why a name was not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{what} name {name:?} is not usable: {why}; use 1 to {max} letters, digits, '.', '_' or '-', not starting with '.' or '-'"
)]
pub struct NameError {
    what: &'static str,
    name: String,
    why: &'static str,
    max: usize,
}

/// Longest VM or disk name in bytes; leaves room for suffixes within a 255-byte file name.
const NAME_BYTES_MAX: usize = 64;

fn check_name(what: &'static str, name: &str) -> Result<(), NameError> {
    let refuse = |why| {
        let shown: String = name.chars().take(80).collect();
        Err(NameError { what, name: shown, why, max: NAME_BYTES_MAX })
    };
    if name.is_empty() {
        return refuse("it is empty");
    }
    if name.len() > NAME_BYTES_MAX {
        return refuse("it is too long");
    }
    if name.starts_with(['.', '-']) {
        return refuse("it starts with '.' or '-'");
    }
    if !name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-')) {
        return refuse("it has a character that is not allowed");
    }
    Ok(())
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(name: String) -> Result<Self, NameError> {
                check_name($what, &name)?;
                Ok(Self(name))
            }
        }

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(name: &str) -> Result<Self, NameError> {
                Self::try_from(name.to_owned())
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name_type!(
    /// What people call a VM. Safe as one path component.
    VmName,
    "VM"
);
name_type!(
    /// What people call a disk of a VM: its QEMU node name unless another was given. Safe as one path component.
    DiskName,
    "disk"
);
name_type!(
    /// What a person calls a recovery point. It cannot be taken for an id: [`PointName::new`] refuses what could be
    /// the beginning of one.
    PointName,
    "point"
);

name_type!(
    /// What people call a group: of peers that trust each other with a VM, or of VMs that are fixed at one moment.
    GroupName,
    "group"
);
name_type!(
    /// What a policy of backups is called. Safe as one path component.
    PolicyName,
    "policy"
);

impl PointName {
    /// A name for a point, unless it could be the beginning of a point's id.
    pub fn new(name: &str) -> Result<Self, NameError> {
        let named: Self = name.parse()?;
        let why = match name {
            LATEST => "it means the newest point",
            _ if is_id_prefix(name) => "it could be the beginning of an id, give it a letter beyond f",
            _ => return Ok(named),
        };
        Err(NameError { what: "point", name: name.to_owned(), why, max: NAME_BYTES_MAX })
    }
}

/// Whether a text could be the beginning of an id.
pub(crate) fn is_id_prefix(text: &str) -> bool {
    (1..=32).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Why an id was not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an id: 32 hexadecimal digits are expected")]
pub struct IdError(String);

macro_rules! id_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name([u8; 16]);

        impl $name {
            /// The id made of these 16 bytes (random ones, for a new id).
            #[must_use]
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(bytes)
            }
            /// The 16 bytes of the id.
            #[must_use]
            pub const fn as_bytes(&self) -> &[u8; 16] {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                parse_id(text).map(Self).ok_or_else(|| IdError(text.chars().take(40).collect()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(text: String) -> Result<Self, IdError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.to_string()
            }
        }
    };
}

fn parse_id(text: &str) -> Option<[u8; 16]> {
    if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = [0; 16];
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

id_type!(
    /// A set of media that carries an initial replication: given by the primary when it is begun.
    MediaId
);
id_type!(
    /// One protected VM: made when it is first protected, the same on every site that holds a copy.
    VmId
);
id_type!(
    /// One attempt to ship a log. A log given up and made again has the same number and another id.
    LogId
);
id_type!(
    /// One moment of a group of VMs: the same for the points of all of them.
    MomentId
);

impl LogId {
    /// The predecessor of a chain's first log.
    pub const NONE: Self = Self([0; 16]);
}

/// The place of a log in its chain, from 1; it never goes back, over resynchronizations too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LogNumber(pub u64);

impl LogNumber {
    /// Before the first log: the empty base.
    pub const ZERO: Self = Self(0);

    /// The number that follows; the last of all is followed by itself, so that no log ever follows it.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for LogNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_harmless_path_component() {
        for good in ["web", "db-1", "Vm_2.prod", "a", &"x".repeat(64)] {
            assert!(good.parse::<VmName>().is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "../x", "a/b", "a\0b", "-rf", ".hidden", "ä", "a b", &"x".repeat(65)] {
            let error = bad.parse::<VmName>().unwrap_err().to_string();
            assert!(error.contains("VM name") && error.contains("use 1 to 64"), "{error}");
        }
    }

    #[test]
    fn ids_round_trip_and_refuse_anything_else() {
        let id = VmId::from_bytes([0xab; 16]);
        assert_eq!(id.to_string().parse::<VmId>().unwrap(), id);
        for bad in ["", "zz", "+1", &"0".repeat(31), &"g".repeat(32), &"é".repeat(16)] {
            assert!(bad.parse::<VmId>().is_err(), "{bad}");
        }
    }
}
