//! How requests to S3 are signed: AWS Signature Version 4, with the hash of the body.

use aws_lc_rs::hmac;
use sha2::{Digest, Sha256};

/// What a request is signed with.
pub(crate) struct Signer<'a> {
    pub(crate) key_id: &'a str,
    pub(crate) secret: &'a str,
    pub(crate) region: &'a str,
}

/// The parts of a request that are signed.
pub(crate) struct Parts<'a> {
    pub(crate) method: &'a str,
    pub(crate) host: &'a str,
    /// As it is sent: every byte but letters, digits, `-._~` and `/` in percent encoding.
    pub(crate) path: &'a str,
    /// Names and values, in order of names, encoded like the path and with it `/`.
    pub(crate) query: &'a str,
    /// SHA-256 of the body, in hexadecimal.
    pub(crate) body_hash: &'a str,
    /// `YYYYMMDDTHHMMSSZ`.
    pub(crate) time: &'a str,
}

impl Signer<'_> {
    /// The value of the header `Authorization`; the headers signed are `host`, `x-amz-content-sha256` and
    /// `x-amz-date`.
    pub(crate) fn authorization(&self, parts: &Parts<'_>) -> String {
        const SIGNED: &str = "host;x-amz-content-sha256;x-amz-date";
        let Parts { method, host, path, query, body_hash, time } = parts;
        let canonical = format!(
            "{method}\n{path}\n{query}\nhost:{host}\nx-amz-content-sha256:{body_hash}\nx-amz-date:{time}\n\n{SIGNED}\n{body_hash}"
        );
        let day = &time[..8.min(time.len())];
        let scope = format!("{day}/{}/s3/aws4_request", self.region);
        let to_sign =
            format!("AWS4-HMAC-SHA256\n{time}\n{scope}\n{}", hex::encode(Sha256::digest(canonical)));
        let mut key = keyed(format!("AWS4{}", self.secret).as_bytes(), day.as_bytes());
        for part in [self.region.as_bytes(), b"s3", b"aws4_request", to_sign.as_bytes()] {
            key = keyed(&key, part);
        }
        format!(
            "AWS4-HMAC-SHA256 Credential={}/{scope}, SignedHeaders={SIGNED}, Signature={}",
            self.key_id,
            hex::encode(key)
        )
    }
}

fn keyed(key: &[u8], message: &[u8]) -> Vec<u8> {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), message).as_ref().to_vec()
}

/// Percent encoding as S3 wants it; a slash stays if it separates folders.
pub(crate) fn encoded(text: &str, keep_slash: bool) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => out.push(byte.into()),
            b'/' if keep_slash => out.push('/'),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of AWS's documentation for a list of a bucket (`GET ?max-keys=2&prefix=J`).
    #[test]
    fn the_documented_example_is_signed_as_documented() {
        let signer = Signer {
            key_id: "AKIAIOSFODNN7EXAMPLE",
            secret: "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
            region: "us-east-1",
        };
        let empty = hex::encode(Sha256::digest(b""));
        let authorization = signer.authorization(&Parts {
            method: "GET",
            host: "examplebucket.s3.amazonaws.com",
            path: "/",
            query: "max-keys=2&prefix=J",
            body_hash: &empty,
            time: "20130524T000000Z",
        });
        assert!(
            authorization.ends_with("34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"),
            "{authorization}"
        );
    }

    #[test]
    fn encoding_leaves_what_is_unreserved() {
        assert_eq!(encoded("a b/c~é", true), "a%20b/c~%C3%A9");
        assert_eq!(encoded("a/b+", false), "a%2Fb%2B");
    }
}
