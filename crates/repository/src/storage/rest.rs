//! A repository on a REST server, by restic's REST protocol, version 2.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;
use ureq::http::{Method, Request, header};

use super::http::{Answer, Client, WRITERS};
use super::{FileKind, FileName, Storage, Trouble, TroubleKind, id_of};
use crate::error::Error;
use crate::id::Id;
use crate::location::Access;

#[derive(Debug)]
pub(crate) struct RestStorage {
    shown: String,
    /// Ends in a slash.
    base: String,
    client: Client,
    authorization: Option<Authorization>,
}

/// Shows nothing of what it holds.
struct Authorization(String);

impl std::fmt::Debug for Authorization {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

#[derive(Deserialize)]
struct Entry {
    name: String,
    size: u64,
}

impl RestStorage {
    pub(crate) fn new(shown: String, base: &str, access: &Access) -> Result<Self, Error> {
        let authorization = access.user.as_ref().map(|user| {
            let secret = access.secret.as_ref().map_or("", |secret| secret.expose());
            Authorization(format!("Basic {}", BASE64_STANDARD.encode(format!("{user}:{secret}"))))
        });
        Ok(Self { shown, client: Client::new(base, access)?, base: base.to_owned(), authorization })
    }

    /// Sends a request to a path below the base, with these headers.
    fn send(
        &self,
        method: &Method,
        path: &str,
        headers: &[(header::HeaderName, String)],
        body: &[u8],
    ) -> Result<Answer, Trouble> {
        self.client.send(&|| {
            let mut request = Request::builder().method(method.clone()).uri(format!("{}{path}", self.base));
            if let Some(Authorization(value)) = &self.authorization {
                request = request.header(header::AUTHORIZATION, value);
            }
            for (name, value) in headers {
                request = request.header(name, value);
            }
            request.body(body).map_err(|error| Trouble::other(error.to_string()))
        })
    }
}

/// Packs have no folders of two digits here: how the server keeps them is its own matter.
fn path_of(file: &FileName) -> String {
    match file.kind {
        FileKind::Config => file.kind.folder().to_owned(),
        kind => format!("{}/{}", kind.folder(), file.id),
    }
}

impl Storage for RestStorage {
    fn location(&self) -> &str {
        &self.shown
    }

    fn create(&self) -> Result<(), Trouble> {
        self.send(&Method::POST, "?create=true", &[], &[]).map(drop)
    }

    fn list(&self, kind: FileKind) -> Result<Vec<(Id, u64)>, Trouble> {
        let accept = [(header::ACCEPT, "application/vnd.x.restic.rest.v2".to_owned())];
        let answer = match self.send(&Method::GET, &format!("{}/", kind.folder()), &accept, &[]) {
            // Some servers have no folder before its first file.
            Err(trouble) if trouble.kind == TroubleKind::Missing => return Ok(Vec::new()),
            answer => answer?,
        };
        let entries: Option<Vec<Entry>> = serde_json::from_slice(&answer.bytes).map_err(|error| {
            Trouble::other(format!(
                "the server's list is none of restic's REST protocol, version 2 ({error})"
            ))
        })?;
        let entries = entries.unwrap_or_default();
        Ok(entries.into_iter().filter_map(|entry| Some((id_of(&entry.name)?, entry.size))).collect())
    }

    fn size(&self, file: &FileName) -> Result<Option<u64>, Trouble> {
        match self.send(&Method::HEAD, &path_of(file), &[], &[]) {
            Ok(answer) => Ok(Some(answer.length.unwrap_or_default())),
            Err(trouble) if trouble.kind == TroubleKind::Missing => Ok(None),
            Err(trouble) => Err(trouble),
        }
    }

    fn read(&self, file: &FileName) -> Result<Vec<u8>, Trouble> {
        Ok(self.send(&Method::GET, &path_of(file), &[], &[])?.bytes)
    }

    fn read_at(&self, file: &FileName, offset: u64, into: &mut [u8]) -> Result<(), Trouble> {
        if into.is_empty() {
            return Ok(());
        }
        let range = [(header::RANGE, range_of(offset, into.len()))];
        fill(into, &self.send(&Method::GET, &path_of(file), &range, &[])?.bytes)
    }

    fn write(&self, file: &FileName, bytes: &[u8]) -> Result<(), Trouble> {
        let kind = [(header::CONTENT_TYPE, "application/octet-stream".to_owned())];
        match self.send(&Method::POST, &path_of(file), &kind, bytes) {
            // A server that lets nothing be overwritten says so where an answer was lost and the file was sent
            // again: it is there already.
            Err(trouble)
                if trouble.kind == TroubleKind::Denied && self.size(file) == Ok(Some(bytes.len() as u64)) =>
            {
                Ok(())
            }
            sent => sent.map(drop),
        }
    }

    fn remove(&self, file: &FileName) -> Result<(), Trouble> {
        match self.send(&Method::DELETE, &path_of(file), &[], &[]) {
            Err(trouble) if trouble.kind != TroubleKind::Missing => Err(trouble),
            _ => Ok(()),
        }
    }

    fn writers(&self) -> usize {
        WRITERS
    }
}

/// The header that asks for a part of a file.
pub(crate) fn range_of(offset: u64, len: usize) -> String {
    format!("bytes={offset}-{}", offset + len as u64 - 1)
}

/// Takes the part that was asked for out of an answer.
pub(crate) fn fill(into: &mut [u8], bytes: &[u8]) -> Result<(), Trouble> {
    if bytes.len() < into.len() {
        return Err(Trouble::new(TroubleKind::Short, "the file is shorter"));
    }
    if bytes.len() > into.len() {
        return Err(Trouble::other("the server does not give parts of files"));
    }
    into.copy_from_slice(bytes);
    Ok(())
}
