//! What a peer may do at this site, decided by its entry and never by what it says of itself.
//!
//! ```text
//! act on VM N ─▶ revoked? ─▶ whose is N?  nobody's: may it begin one?  its own: go on
//!                                         another's: refused, but for a take-over within one trust group
//!             ─▶ does a pattern fit N's name?      (not asked of a withdrawal: it only gives up)
//! bytes of a log ─▶ is there room in the quota?
//! ```

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{GroupName, VmName};

/// Longest text of a pattern, in bytes: as long as a VM's name can be, and some stars.
const PATTERN_BYTES_MAX: usize = 128;
/// Patterns in one entry.
const PATTERNS_MAX: usize = 64;

/// Which VMs an entry is for: a name fits if it fits one of the patterns, as a whole. `*` stands for any number of
/// characters, `?` for one. Written with commas between them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmPatterns(Vec<String>);

impl VmPatterns {
    /// Every VM.
    #[must_use]
    pub fn all() -> Self {
        Self(vec!["*".to_owned()])
    }

    /// No VM at all.
    #[must_use]
    pub const fn none() -> Self {
        Self(Vec::new())
    }

    /// Whether a VM of this name is meant.
    #[must_use]
    pub fn fits(&self, name: &str) -> bool {
        self.0.iter().any(|pattern| fits(pattern.as_bytes(), name.as_bytes()))
    }
}

/// Walks both texts once; where they part, the last star takes one more character.
fn fits(pattern: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p + 1, n));
                p += 1;
            }
            Some(b'?') => (p, n) = (p + 1, n + 1),
            Some(byte) if *byte == name[n] => (p, n) = (p + 1, n + 1),
            _ => match star {
                Some((after, taken)) => {
                    star = Some((after, taken + 1));
                    (p, n) = (after, taken + 1);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

/// A text that names no VMs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{pattern:?} fits no VM: {why}; use the letters, digits, '.', '_' and '-' of names, '*' for anything, '?' for one character, and commas between patterns"
)]
pub struct PatternError {
    pattern: String,
    why: &'static str,
}

impl FromStr for VmPatterns {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        let refuse = |pattern: &str, why| {
            Err(PatternError { pattern: pattern.chars().take(PATTERN_BYTES_MAX).collect(), why })
        };
        let patterns: Vec<&str> = text.split(',').map(str::trim).collect();
        if patterns.len() > PATTERNS_MAX {
            return refuse(text, "it has too many patterns");
        }
        for pattern in &patterns {
            let usable = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b'*' | b'?');
            match *pattern {
                "" => return refuse(text, "a pattern in it is empty"),
                pattern if pattern.len() > PATTERN_BYTES_MAX => return refuse(pattern, "it is too long"),
                pattern if !pattern.bytes().all(usable) => {
                    return refuse(pattern, "it has a character that no name has");
                }
                _ => {}
            }
        }
        Ok(Self(patterns.into_iter().map(str::to_owned).collect()))
    }
}

impl TryFrom<String> for VmPatterns {
    type Error = PatternError;
    fn try_from(text: String) -> Result<Self, PatternError> {
        if text.is_empty() { Ok(Self::none()) } else { text.parse() }
    }
}

impl From<VmPatterns> for String {
    fn from(patterns: VmPatterns) -> Self {
        patterns.to_string()
    }
}

impl fmt::Display for VmPatterns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join(","))
    }
}

/// What people have granted a peer at this site.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Which VMs it may replicate to this site.
    pub vms: VmPatterns,
    /// The folder that its new replicas are made in; the site's own if none is named.
    pub storage: Option<PathBuf>,
    /// How many bytes its replicas may take up here; as much as there is if none is said.
    pub quota_bytes: Option<u64>,
    /// How fast its logs are taken, in bytes per second over all its VMs; as they come if none is said.
    pub bandwidth_bytes_per_s: Option<u64>,
    /// The trust group: its peers may take over each other's relationships.
    pub group: Option<GroupName>,
}

impl Default for Entry {
    /// Every VM, into the site's own folder, without bounds, and nobody else's.
    fn default() -> Self {
        Self {
            vms: VmPatterns::all(),
            storage: None,
            quota_bytes: None,
            bandwidth_bytes_per_s: None,
            group: None,
        }
    }
}

/// What a peer wants of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Act {
    /// To begin a relationship, or to square up one that there is.
    Offer,
    /// Anything that goes on with one: logs, digests, reports, a hand-over.
    Use,
    /// To end one from its side; what is here stays.
    Withdraw,
    /// To become the primary of one that is another peer's.
    TakeOver,
}

/// Whose a VM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner<'a> {
    /// The peer that protects it.
    pub peer: &'a str,
    /// That peer's trust group; none also where that peer is no peer any more.
    pub group: Option<&'a GroupName>,
}

/// A request, as far as it is decided here.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// Who asks, as this site calls it.
    pub peer: &'a str,
    /// What it has been granted.
    pub entry: &'a Entry,
    /// A person has taken back all of that.
    pub revoked: bool,
    /// What it wants.
    pub act: Act,
    /// The VM's name: of the replica here if there is one, else as it is offered.
    pub vm: &'a VmName,
    /// Whose it is; none for one that is not here.
    pub owner: Option<Owner<'a>>,
}

/// Why a peer may not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Denied {
    /// All it had been granted was taken back.
    Revoked,
    /// No pattern of its entry fits the VM's name.
    NotAllowed,
    /// The VM is another peer's.
    Foreign,
    /// The VM is another peer's, and the two are in no trust group together.
    OtherGroup,
    /// There is no such VM to be taken over.
    NoSuchVm,
}

/// Whether a peer may do what it asks for.
pub fn decide(asked: &Asked<'_>) -> Result<(), Denied> {
    if asked.revoked {
        return Err(Denied::Revoked);
    }
    let is_own = asked.owner.is_none_or(|owner| owner.peer == asked.peer);
    match asked.act {
        Act::TakeOver if asked.owner.is_none() => return Err(Denied::NoSuchVm),
        Act::TakeOver if !is_own && !is_of_one_group(asked) => return Err(Denied::OtherGroup),
        Act::Offer | Act::Use | Act::Withdraw if !is_own => return Err(Denied::Foreign),
        Act::Withdraw => return Ok(()),
        Act::Offer | Act::Use | Act::TakeOver => {}
    }
    if asked.entry.vms.fits(asked.vm.as_str()) { Ok(()) } else { Err(Denied::NotAllowed) }
}

/// Peers without a group are in none, not in one together.
fn is_of_one_group(asked: &Asked<'_>) -> bool {
    let theirs = asked.owner.and_then(|owner| owner.group);
    asked.entry.group.as_ref().is_some_and(|group| theirs == Some(group))
}

/// What a peer would take up is more than it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OverQuota {
    /// What it may.
    pub quota_bytes: u64,
    /// What its replicas take up by now.
    pub used_bytes: u64,
    /// What it was about to bring.
    pub more_bytes: u64,
}

impl Entry {
    /// How many bytes it may still bring when its replicas take up `used_bytes`; none for as many as there is room.
    #[must_use]
    pub fn left_bytes(&self, used_bytes: u64) -> Option<u64> {
        self.quota_bytes.map(|quota| quota.saturating_sub(used_bytes))
    }

    /// Whether it may bring `more_bytes`.
    pub fn admit_bytes(&self, used_bytes: u64, more_bytes: u64) -> Result<(), OverQuota> {
        match self.quota_bytes {
            Some(quota_bytes) if more_bytes > quota_bytes.saturating_sub(used_bytes) => {
                Err(OverQuota { quota_bytes, used_bytes, more_bytes })
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
#[path = "authorization_tests.rs"]
mod tests;
