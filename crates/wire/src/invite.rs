//! An invite: the one line that makes two sites trust each other. `docs/format/invite-v1.md` has its bytes.

use std::fmt;
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use model::{Timestamp, human_duration};
use serde::{Deserialize, Serialize};

use crate::identity::Fingerprint;

const PREFIX: &str = "afterimage1.";
const CHECKSUM_BYTES: usize = 4;
/// Fingerprint, secret, expiry, and the length of the address.
const FIXED_BYTES: usize = 32 + 32 + 8 + 1;
/// The longest address: a DNS name of 253 bytes would not fit beside its port.
const ADDRESS_BYTES_MAX: usize = 255;

/// 32 random bytes that prove once that somebody was invited. Shown nowhere.
#[derive(Clone, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Secret([u8; 32]);

impl Secret {
    /// A new secret.
    pub fn generate() -> Result<Self, getrandom::Error> {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes)?;
        Ok(Self(bytes))
    }

    /// What to keep of it.
    #[must_use]
    pub fn hash(&self) -> SecretHash {
        SecretHash(blake3::derive_key("afterimage 2026 invite secret v1", &self.0).into())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl TryFrom<String> for Secret {
    type Error = &'static str;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| "a secret is written in base64url")?;
        bytes.try_into().map(Self).map_err(|_| "a secret has 32 bytes")
    }
}

impl From<Secret> for String {
    fn from(secret: Secret) -> Self {
        URL_SAFE_NO_PAD.encode(secret.0)
    }
}

/// What the inviting site keeps of a secret: enough to know it again, not enough to use it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SecretHash(blake3::Hash);

impl SecretHash {
    /// Whether `secret` is the one; takes as long whether it is or not.
    #[must_use]
    pub fn matches(&self, secret: &Secret) -> bool {
        self == &secret.hash()
    }
}

/// In constant time, as `blake3` compares.
impl PartialEq for SecretHash {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

impl Eq for SecretHash {}

impl TryFrom<String> for SecretHash {
    type Error = &'static str;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        blake3::Hash::from_hex(text).map(Self).map_err(|_| "a secret's hash has 64 hexadecimal digits")
    }
}

impl From<SecretHash> for String {
    fn from(hash: SecretHash) -> Self {
        hash.0.to_hex().to_string()
    }
}

/// Why a line is no invite that can be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InviteError {
    /// It does not begin as one.
    #[error(
        "this is not an invite: it begins with '{PREFIX}'; paste the whole line that 'afterimage peer invite' gave"
    )]
    NotAnInvite,
    /// It is of a later version.
    #[error(
        "this invite is of version {0}, which this program does not know: update this site, or invite from an older one"
    )]
    Version(String),
    /// It has a character that none has.
    #[error(
        "this invite was mistyped: {character:?} (character {position} of the line) is in no invite; copy and paste it"
    )]
    Character {
        /// The character.
        character: char,
        /// Its place in the line, from 1.
        position: usize,
    },
    /// Its end is missing.
    #[error("this invite is cut off: {has} of its {wanted} characters are here; paste the whole line")]
    Truncated {
        /// The characters of the line.
        has: usize,
        /// How many it should have.
        wanted: usize,
    },
    /// Its check digits are not right.
    #[error("this invite was mistyped: a character was changed, added or left out; copy and paste it")]
    Mistyped,
    /// The address cannot be one.
    #[error(
        "{0:?} is no address to invite to: HOST:PORT is expected, such as 'dr.example.org:8443' or '[2001:db8::1]:8443'"
    )]
    Address(String),
    /// Its time is over.
    #[error("this invite expired {} ago: ask for a new one ('afterimage peer invite NAME' on the other site), and check that both clocks are right", human_duration(*.ago))]
    Expired {
        /// How long ago.
        ago: std::time::Duration,
    },
}

/// Where the inviting site is, how it is known, and what proves that it has invited.
#[derive(Debug, Clone)]
pub struct Invite {
    /// The inviting site's address, `host:port`.
    pub address: String,
    /// Its certificate.
    pub fingerprint: Fingerprint,
    /// Proves, once, that somebody was invited.
    pub secret: Secret,
    /// From when on the invite is worth nothing.
    pub expires_at: Timestamp,
}

impl Invite {
    /// A new invite to the site at `address`.
    pub fn new(
        address: impl Into<String>,
        fingerprint: Fingerprint,
        secret: Secret,
        expires_at: Timestamp,
    ) -> Result<Self, InviteError> {
        let address = address.into();
        check_address(&address)?;
        Ok(Self { address, fingerprint, secret, expires_at })
    }

    /// Whether it can still be used.
    pub fn check_time(&self, now: Timestamp) -> Result<(), InviteError> {
        if now < self.expires_at {
            Ok(())
        } else {
            Err(InviteError::Expired { ago: now.since(self.expires_at) })
        }
    }

    fn encode(&self) -> Vec<u8> {
        let address = self.address.as_bytes();
        let address = &address[..address.len().min(ADDRESS_BYTES_MAX)];
        let mut bytes = Vec::with_capacity(FIXED_BYTES + address.len() + CHECKSUM_BYTES);
        bytes.extend_from_slice(self.fingerprint.as_bytes());
        bytes.extend_from_slice(&self.secret.0);
        bytes.extend_from_slice(&self.expires_at.0.to_be_bytes());
        bytes.push(u8::try_from(address.len()).unwrap_or(u8::MAX));
        bytes.extend_from_slice(address);
        let checksum = checksum(&bytes);
        bytes.extend_from_slice(&checksum);
        bytes
    }
}

/// The line to paste.
impl fmt::Display for Invite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", URL_SAFE_NO_PAD.encode(self.encode()))
    }
}

impl FromStr for Invite {
    type Err = InviteError;

    /// Reads the line; blanks around it do not matter. Whether it is still in time is [`Invite::check_time`]'s.
    fn from_str(line: &str) -> Result<Self, InviteError> {
        let line = line.trim();
        let text = line.strip_prefix(PREFIX).ok_or_else(|| not_an_invite(line))?;
        let is_alphabet = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if let Some((at, character)) = text.chars().enumerate().find(|&(_, c)| !is_alphabet(c)) {
            return Err(InviteError::Character { character, position: PREFIX.len() + at + 1 });
        }
        // A line that was cut has no whole number of bytes, or a last character with bits that stand for nothing.
        let whole = text.len() - usize::from(text.len() % 4 == 1);
        let lenient = base64::engine::GeneralPurpose::new(
            &base64::alphabet::URL_SAFE,
            base64::engine::general_purpose::NO_PAD.with_decode_allow_trailing_bits(true),
        );
        let bytes = lenient.decode(&text[..whole]).map_err(|_| InviteError::Mistyped)?;
        decode(&bytes, text)
    }
}

fn not_an_invite(line: &str) -> InviteError {
    match line.strip_prefix("afterimage").and_then(|rest| rest.split_once('.')) {
        Some((version, _)) if !version.is_empty() && version.bytes().all(|b| b.is_ascii_digit()) => {
            InviteError::Version(version.chars().take(10).collect())
        }
        _ => InviteError::NotAnInvite,
    }
}

fn decode(bytes: &[u8], text: &str) -> Result<Invite, InviteError> {
    let wanted = |address: usize| (FIXED_BYTES + address + CHECKSUM_BYTES) * 4;
    let truncated = |address: usize| InviteError::Truncated {
        has: PREFIX.len() + text.len(),
        wanted: PREFIX.len() + wanted(address).div_ceil(3),
    };
    let Some((fixed, rest)) = bytes.split_at_checked(FIXED_BYTES) else { return Err(truncated(1)) };
    let address_len = usize::from(fixed[FIXED_BYTES - 1]);
    if rest.len() < address_len + CHECKSUM_BYTES {
        return Err(truncated(address_len));
    }
    let (checked, found) = bytes.split_at(bytes.len() - CHECKSUM_BYTES);
    let exact = URL_SAFE_NO_PAD.encode(bytes) == text;
    if rest.len() != address_len + CHECKSUM_BYTES || !exact || checksum(checked) != found {
        return Err(InviteError::Mistyped);
    }
    let address = String::from_utf8(rest[..address_len].to_vec()).map_err(|_| InviteError::Mistyped)?;
    check_address(&address)?;
    let take =
        |from: usize| -> [u8; 32] { fixed[from..from + 32].try_into().expect("32 bytes were cut out") };
    let expires_at = i64::from_be_bytes(fixed[64..72].try_into().expect("8 bytes were cut out"));
    Ok(Invite {
        address,
        fingerprint: Fingerprint::from_bytes(take(0)),
        secret: Secret(take(32)),
        expires_at: Timestamp(expires_at),
    })
}

fn checksum(bytes: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let hash = blake3::hash(bytes);
    let mut checksum = [0; CHECKSUM_BYTES];
    checksum.copy_from_slice(&hash.as_bytes()[..CHECKSUM_BYTES]);
    checksum
}

/// Whether `address` can be `host:port`. Whether anybody is there is another matter.
pub(crate) fn check_address(address: &str) -> Result<(), InviteError> {
    let refuse = || InviteError::Address(address.chars().take(80).collect());
    let (host, port) = address.rsplit_once(':').ok_or_else(refuse)?;
    let host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(v6) => {
            return v6
                .parse::<std::net::Ipv6Addr>()
                .map(drop)
                .or(Err(refuse()))
                .and(check_port(port, refuse));
        }
        None => host,
    };
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    if host.is_empty() || address.len() > ADDRESS_BYTES_MAX || !host.bytes().all(allowed) {
        return Err(refuse());
    }
    check_port(port, refuse)
}

fn check_port(port: &str, refuse: impl Fn() -> InviteError) -> Result<(), InviteError> {
    match port.parse::<u16>() {
        Ok(number) if number > 0 && port.bytes().all(|b| b.is_ascii_digit()) => Ok(()),
        _ => Err(refuse()),
    }
}

#[cfg(test)]
#[path = "invite_tests.rs"]
mod tests;
