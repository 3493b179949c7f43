//! What there is to know of a certificate: whose key it is for, who made it, until when. Nothing is decided here.
//!
//! Read from the DER by hand, a dozen fields that come one after the other: what a stranger shows passes through here,
//! so nothing is allocated, and no length is believed that the bytes do not have.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use model::Timestamp;
use rustls_pki_types::CertificateDer;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::identity::{Fingerprint, FingerprintError};

/// The SHA-256 of a public key as certificates hold it (its DER, with the algorithm): who a site is, whatever certificate
/// it has for it. Written as 64 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct KeyId(Fingerprint);

impl KeyId {
    fn of(public_key: &[u8]) -> Self {
        Self(Fingerprint::from_bytes(Sha256::digest(public_key).into()))
    }

    pub(crate) const fn as_bytes(&self) -> &[u8; 32] {
        self.0.as_bytes()
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for KeyId {
    type Err = FingerprintError;
    fn from_str(text: &str) -> Result<Self, FingerprintError> {
        text.parse().map(Self)
    }
}

/// A certificate that somebody has shown, with those that came with it. Whoever shows it on a connection holds its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// Which certificate it is.
    pub fingerprint: Fingerprint,
    /// The key that it is for.
    pub key: KeyId,
    /// Until when it says that it is good.
    pub expires_at: Timestamp,
    /// Nobody but its own key's holder has made it.
    pub is_self_made: bool,
    pub(crate) chain: Vec<CertificateDer<'static>>,
}

impl Shown {
    /// Reads a certificate, the first of `chain`; none if it is not one.
    #[must_use]
    pub fn of(chain: &[CertificateDer<'_>]) -> Option<Self> {
        let first = chain.first()?;
        let Fields { issuer, subject, not_after, public_key } = fields(first)?;
        Some(Self {
            fingerprint: Fingerprint::of(first),
            key: KeyId::of(public_key),
            expires_at: not_after,
            is_self_made: issuer == subject,
            chain: chain.iter().map(|certificate| certificate.clone().into_owned()).collect(),
        })
    }

    /// How long it is still good; none if it is not any more.
    #[must_use]
    pub fn left(&self, now: Timestamp) -> Option<Duration> {
        (now < self.expires_at).then(|| self.expires_at.since(now))
    }
}

struct Fields<'a> {
    issuer: &'a [u8],
    subject: &'a [u8],
    not_after: Timestamp,
    public_key: &'a [u8],
}

const SEQUENCE: u8 = 0x30;
const INTEGER: u8 = 0x02;
const BIT_STRING: u8 = 0x03;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
/// `[0]`: the version, which a certificate of the first has not.
const VERSION: u8 = 0xa0;

/// `Certificate ::= { tbs { [version], serial, algorithm, issuer, validity { from, until }, subject, key, … }, … }`
fn fields<'a>(certificate: &'a CertificateDer<'_>) -> Option<Fields<'a>> {
    let mut whole = Der(certificate.as_ref());
    let mut certificate = Der(whole.expect(SEQUENCE)?.content);
    let mut tbs = Der(certificate.expect(SEQUENCE)?.content);
    let mut serial = tbs.next()?;
    if serial.tag == VERSION {
        serial = tbs.next()?;
    }
    if serial.tag != INTEGER {
        return None;
    }
    tbs.expect(SEQUENCE)?;
    let issuer = tbs.expect(SEQUENCE)?.whole;
    let mut validity = Der(tbs.expect(SEQUENCE)?.content);
    validity.next()?;
    let not_after = moment(&validity.next()?)?;
    let subject = tbs.expect(SEQUENCE)?.whole;
    let public_key = tbs.expect(SEQUENCE)?.whole;
    Some(Fields { issuer, subject, not_after, public_key })
}

/// The algorithm and the bits of a certificate's key, as those who verify signatures want them.
pub(crate) fn public_key<'a>(certificate: &'a CertificateDer<'_>) -> Option<(&'a [u8], &'a [u8])> {
    let mut whole = Der(fields(certificate)?.public_key);
    let mut info = Der(whole.expect(SEQUENCE)?.content);
    let algorithm = info.expect(SEQUENCE)?.content;
    // The first byte says how many bits of the last one do not count: none, where keys are bytes.
    let bits = info.expect(BIT_STRING)?.content.strip_prefix(&[0])?;
    Some((algorithm, bits))
}

/// What is left to read.
struct Der<'a>(&'a [u8]);

/// One element.
struct Element<'a> {
    tag: u8,
    content: &'a [u8],
    whole: &'a [u8],
}

impl<'a> Der<'a> {
    fn next(&mut self) -> Option<Element<'a>> {
        let bytes = self.0;
        let (&tag, rest) = bytes.split_first()?;
        let (&first, rest) = rest.split_first()?;
        let (len, rest) = match first {
            0..=0x7f => (usize::from(first), rest),
            0x81..=0x83 => {
                let (digits, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
                (digits.iter().fold(0, |len, digit| len << 8 | usize::from(*digit)), rest)
            }
            _ => return None,
        };
        let content = rest.get(..len)?;
        let head = bytes.len() - rest.len();
        self.0 = &rest[len..];
        Some(Element { tag, content, whole: &bytes[..head + len] })
    }

    fn expect(&mut self, tag: u8) -> Option<Element<'a>> {
        self.next().filter(|element| element.tag == tag)
    }
}

/// `YYMMDDhhmmssZ`, or with four digits for the year.
fn moment(element: &Element<'_>) -> Option<Timestamp> {
    let text = std::str::from_utf8(element.content).ok()?.strip_suffix('Z')?;
    let year_digits = match element.tag {
        UTC_TIME => 2,
        GENERALIZED_TIME => 4,
        _ => return None,
    };
    if text.len() != year_digits + 10 || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let number = |from: usize, len: usize| text[from..from + len].parse::<i64>().ok();
    let year = match (year_digits, number(0, year_digits)?) {
        (2, year @ 50..) => 1900 + year,
        (2, year) => 2000 + year,
        (_, year) => year,
    };
    let part = |place: usize| number(year_digits + 2 * place, 2);
    let (month, day) = (part(0)?, part(1)?);
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    let seconds = days(year, month, day) * 86_400 + part(2)? * 3600 + part(3)? * 60 + part(4)?;
    Some(Timestamp(seconds * 1_000_000))
}

/// Days from 1970-01-01 to a date, by the rules of the Gregorian calendar; years begin in March, so that the day that some
/// have more is their last one.
const fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let year_of_era = year - era * 400;
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

/// The date of a moment: year, month, day.
pub(crate) fn date(moment: Timestamp) -> (i32, u8, u8) {
    let days = moment.0.div_euclid(86_400 * 1_000_000) + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days - era * 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year as i32, month as u8, day as u8)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn made(until: (i32, u8, u8)) -> CertificateDer<'static> {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::default();
        params.not_after = rcgen::date_time_ymd(until.0, until.1, until.2);
        params.self_signed(&key).unwrap().der().clone()
    }

    #[test]
    fn a_certificate_tells_its_key_and_its_end() {
        for (until, seconds) in
            [((2001, 1, 1), 978_307_200), ((2049, 12, 31), 2_524_521_600), ((2050, 1, 1), 2_524_608_000)]
        {
            let shown = Shown::of(&[made(until)]).unwrap();
            assert_eq!(shown.expires_at, Timestamp(seconds * 1_000_000), "{until:?}");
            assert!(shown.is_self_made);
        }
    }

    #[test]
    fn the_key_is_the_same_in_each_certificate_for_it() {
        let key = rcgen::KeyPair::generate().unwrap();
        let of = |year| {
            let mut params = rcgen::CertificateParams::default();
            params.not_after = rcgen::date_time_ymd(year, 1, 1);
            Shown::of(&[params.self_signed(&key).unwrap().der().clone()]).unwrap()
        };
        let (one, other) = (of(2030), of(2031));
        assert_eq!(one.key, other.key);
        assert_ne!(one.fingerprint, other.fingerprint);
        assert_ne!(one.key, Shown::of(&[made((2030, 1, 1))]).unwrap().key);
        // As the library that TLS uses sees it.
        let der = one.chain[0].clone();
        let parsed = rustls::server::ParsedCertificate::try_from(&der).unwrap();
        assert_eq!(one.key, KeyId::of(parsed.subject_public_key_info().as_ref()));
    }

    proptest! {
        #[test]
        fn a_date_is_the_days_since_1970_and_back(day in -200_000_i64..2_000_000) {
            let (year, month, of_month) = date(Timestamp(day * 86_400 * 1_000_000));
            prop_assert_eq!(days(year.into(), month.into(), of_month.into()), day);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>) {
            let _ = Shown::of(&[bytes.into()]);
        }

        /// A real one with a byte changed or its end missing is read, or it is not.
        #[test]
        fn a_damaged_certificate_is_no_panic(place: prop::sample::Index, byte: u8, cut: prop::sample::Index) {
            let mut bytes = made((2040, 1, 1)).to_vec();
            let place = place.index(bytes.len());
            bytes[place] = byte;
            let _ = Shown::of(&[bytes[..cut.index(bytes.len())].to_vec().into()]);
            let _ = Shown::of(&[bytes.into()]);
        }
    }
}
