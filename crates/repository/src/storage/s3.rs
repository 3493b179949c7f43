//! A repository in a bucket of an S3-compatible store. The bucket is named in the path, which every such store
//! understands. What is written carries its SHA-256, so a store takes nothing else for it, and one that locks
//! objects takes it at all.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use sha2::{Digest, Sha256};
use ureq::http::{Method, Request, header};

use super::http::{Answer, Client, WRITERS};
use super::rest::{fill, range_of};
use super::signature::{Parts, Signer, encoded};
use super::{FileKind, FileName, Storage, Trouble, TroubleKind, id_of};
use crate::error::Error;
use crate::id::Id;
use crate::location::{Access, Bucket};

#[derive(Debug)]
pub(crate) struct S3Storage {
    shown: String,
    bucket: Bucket,
    access: Access,
    client: Client,
}

/// One request.
struct Ask<'a> {
    method: Method,
    /// Below the bucket; nothing for the bucket itself.
    key: &'a str,
    query: &'a str,
    range: Option<String>,
    body: &'a [u8],
}

impl<'a> Ask<'a> {
    fn new(method: Method, key: &'a str) -> Self {
        Self { method, key, query: "", range: None, body: &[] }
    }
}

impl S3Storage {
    pub(crate) fn new(shown: String, bucket: &Bucket, access: &Access) -> Result<Self, Error> {
        if access.user.is_none() || access.secret.is_none() {
            return Err(Error::Unsupported {
                what: format!(
                    "the repository at {shown} needs an access key: set 'user' to its id, and one of 'secret-file', 'secret-command' and 'secret-env'"
                ),
            });
        }
        let client = Client::new(&bucket.endpoint, access)?;
        Ok(Self { shown, bucket: bucket.clone(), access: access.clone(), client })
    }

    fn key_of(&self, path: &str) -> String {
        match self.bucket.prefix.as_str() {
            "" => path.to_owned(),
            prefix => format!("{prefix}/{path}"),
        }
    }

    fn send(&self, ask: &Ask<'_>) -> Result<Answer, Trouble> {
        let path = match ask.key {
            "" => format!("/{}", encoded(&self.bucket.name, false)),
            key => format!("/{}/{}", encoded(&self.bucket.name, false), encoded(key, true)),
        };
        let hash = Sha256::digest(ask.body);
        let (body_hash, checksum) = (hex::encode(hash), BASE64_STANDARD.encode(hash));
        let signer = Signer {
            key_id: self.access.user.as_deref().unwrap_or_default(),
            secret: self.access.secret.as_ref().map_or("", |secret| secret.expose()),
            region: self.access.region.as_deref().unwrap_or("us-east-1"),
        };
        self.client.send(&|| {
            let time = jiff::Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string();
            let authorization = signer.authorization(&Parts {
                method: ask.method.as_str(),
                host: &self.bucket.host,
                path: &path,
                query: ask.query,
                body_hash: &body_hash,
                time: &time,
            });
            let question = if ask.query.is_empty() { "" } else { "?" };
            let mut request = Request::builder()
                .method(ask.method.clone())
                .uri(format!("{}{path}{question}{}", self.bucket.endpoint, ask.query))
                .header("x-amz-content-sha256", &body_hash)
                .header("x-amz-date", &time)
                .header(header::AUTHORIZATION, authorization);
            if ask.method == Method::PUT && !ask.key.is_empty() {
                request = request.header("x-amz-checksum-sha256", &checksum);
            }
            if let Some(range) = &ask.range {
                request = request.header(header::RANGE, range);
            }
            request.body(ask.body).map_err(|error| Trouble::other(error.to_string()))
        })
    }
}

impl Storage for S3Storage {
    fn location(&self) -> &str {
        &self.shown
    }

    /// There are no folders; the bucket is made if there is none.
    fn create(&self) -> Result<(), Trouble> {
        match self.send(&Ask::new(Method::HEAD, "")) {
            Err(trouble) if trouble.kind == TroubleKind::Missing => {
                self.send(&Ask::new(Method::PUT, "")).map(drop)
            }
            found => found.map(drop),
        }
    }

    fn list(&self, kind: FileKind) -> Result<Vec<(Id, u64)>, Trouble> {
        let prefix = encoded(&self.key_of(&format!("{}/", kind.folder())), false);
        let (mut found, mut after) = (Vec::new(), None::<String>);
        loop {
            let token = after
                .as_deref()
                .map_or(String::new(), |token| format!("continuation-token={}&", encoded(token, false)));
            let query = format!("{token}list-type=2&prefix={prefix}");
            let answer = self.send(&Ask { query: &query, ..Ask::new(Method::GET, "") })?;
            let page = page_of(&answer.bytes)?;
            found.extend(page.files);
            match page.next {
                Some(next) if after.as_ref() == Some(&next) => {
                    return Err(Trouble::other("the server's list has no end"));
                }
                Some(next) => after = Some(next),
                None => return Ok(found),
            }
        }
    }

    fn size(&self, file: &FileName) -> Result<Option<u64>, Trouble> {
        match self.send(&Ask::new(Method::HEAD, &self.key_of(&file.path()))) {
            Ok(answer) => Ok(Some(answer.length.unwrap_or_default())),
            Err(trouble) if trouble.kind == TroubleKind::Missing => Ok(None),
            Err(trouble) => Err(trouble),
        }
    }

    fn read(&self, file: &FileName) -> Result<Vec<u8>, Trouble> {
        Ok(self.send(&Ask::new(Method::GET, &self.key_of(&file.path())))?.bytes)
    }

    fn read_at(&self, file: &FileName, offset: u64, into: &mut [u8]) -> Result<(), Trouble> {
        if into.is_empty() {
            return Ok(());
        }
        let key = self.key_of(&file.path());
        let ask = Ask { range: Some(range_of(offset, into.len())), ..Ask::new(Method::GET, &key) };
        fill(into, &self.send(&ask)?.bytes)
    }

    fn write(&self, file: &FileName, bytes: &[u8]) -> Result<(), Trouble> {
        self.send(&Ask { body: bytes, ..Ask::new(Method::PUT, &self.key_of(&file.path())) }).map(drop)
    }

    fn remove(&self, file: &FileName) -> Result<(), Trouble> {
        match self.send(&Ask::new(Method::DELETE, &self.key_of(&file.path()))) {
            Err(trouble) if trouble.kind != TroubleKind::Missing => Err(trouble),
            _ => Ok(()),
        }
    }

    fn writers(&self) -> usize {
        WRITERS
    }
}

/// A page of a list of objects.
struct Page {
    files: Vec<(Id, u64)>,
    next: Option<String>,
}

fn page_of(xml: &[u8]) -> Result<Page, Trouble> {
    let no_list = |why: String| Trouble::other(format!("the server's list is none of S3's ({why})"));
    let text = std::str::from_utf8(xml).map_err(|error| no_list(error.to_string()))?;
    let document = roxmltree::Document::parse(text).map_err(|error| no_list(error.to_string()))?;
    let root = document.root_element();
    let child = |node: roxmltree::Node<'_, '_>, name: &str| {
        let found = node.children().find(|child| child.tag_name().name() == name);
        found.and_then(|child| child.text()).map(str::to_owned)
    };
    if root.tag_name().name() != "ListBucketResult" {
        return Err(no_list(format!("it is a {}", root.tag_name().name())));
    }
    let mut files = Vec::new();
    for node in root.children().filter(|node| node.tag_name().name() == "Contents") {
        let key = child(node, "Key").ok_or_else(|| no_list("an object has no key".into()))?;
        let size = child(node, "Size").and_then(|size| size.parse().ok());
        let size = size.ok_or_else(|| no_list("an object has no size".into()))?;
        files.extend(key.rsplit('/').next().and_then(id_of).map(|id| (id, size)));
    }
    let more = child(root, "IsTruncated").is_some_and(|text| text == "true");
    let next = child(root, "NextContinuationToken");
    if more && next.is_none() {
        return Err(no_list("it ends without a token for the rest".into()));
    }
    Ok(Page { files, next: next.filter(|_| more) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_read_or_refused_never_cut_short() {
        let id = Id::of(b"pack");
        let page = |inner: &str| {
            page_of(format!("<ListBucketResult xmlns=\"http://s3\">{inner}</ListBucketResult>").as_bytes())
        };
        let object = format!("<Contents><Key>p/data/ab/{id}</Key><Size>7</Size></Contents>");
        let other = "<Contents><Key>p/data/ab/half.tmp</Key><Size>7</Size></Contents>";
        let whole = page(&format!("<IsTruncated>false</IsTruncated>{object}{other}")).unwrap();
        assert_eq!((whole.files, whole.next), (vec![(id, 7)], None));
        let first = "<IsTruncated>true</IsTruncated><NextContinuationToken>t/1</NextContinuationToken>";
        assert_eq!(page(first).unwrap().next.as_deref(), Some("t/1"));
        assert!(page("<IsTruncated>true</IsTruncated>").is_err());
        assert!(page_of(b"<Error/>").is_err() && page_of(b"<ListBucketResult>").is_err());
        assert!(page("<Contents><Key>k</Key></Contents>").is_err());
    }
}
