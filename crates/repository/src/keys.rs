//! Keys: each is the repository's master key behind a password of its own. Whoever has one of the passwords has
//! everything in the repository; a key that is removed shuts nobody out who has read it before.

use serde::{Deserialize, Serialize};

use crate::Repository;
use crate::error::Error;
use crate::id::{BackupId, Id};
use crate::storage::FileKind;

/// One key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyInfo {
    /// Its id, of which commands take the first few digits too.
    pub id: BackupId,
    /// Whether this repository was opened with it.
    pub current: bool,
    /// Whom it is for, as it was said when it was made.
    pub user: String,
    /// The machine that made it.
    pub host: String,
    /// When it was made, as RFC 3339 has it; empty if it does not say.
    pub created: String,
}

/// What a key file says beside the key.
#[derive(Default, Deserialize)]
#[serde(default)]
struct KeyJson {
    username: Option<String>,
    hostname: Option<String>,
    created: Option<String>,
}

impl Repository {
    /// The keys there are, the oldest first.
    pub fn keys(&self) -> Result<Vec<KeyInfo>, Error> {
        let current = self.store.opened.key_id();
        let mut keys = Vec::new();
        for id in self.store.list(FileKind::Key)? {
            let json: KeyJson = serde_json::from_slice(&self.store.read_key(&id)?).unwrap_or_default();
            keys.push(KeyInfo {
                id: BackupId(id),
                current: Some(id) == current,
                user: json.username.unwrap_or_default(),
                host: json.hostname.unwrap_or_default(),
                created: json.created.unwrap_or_default(),
            });
        }
        keys.sort_by(|a, b| (&a.created, a.id).cmp(&(&b.created, b.id)));
        Ok(keys)
    }

    /// Adds a key with this password, for `user`.
    pub fn add_key(&self, password: &str, user: &str) -> Result<BackupId, Error> {
        if password.is_empty() {
            return Err(Error::Unsupported { what: "the new password is empty; no key was made".into() });
        }
        self.store.opened.add_key(password, user).map(BackupId)
    }

    /// Removes the key whose id begins with these digits. The one that is in use stays.
    pub fn remove_key(&self, prefix: &str) -> Result<BackupId, Error> {
        let wanted = prefix.to_ascii_lowercase();
        let mut ids: Vec<Id> = self.store.list(FileKind::Key)?;
        ids.retain(|id| !wanted.is_empty() && id.to_string().starts_with(&wanted));
        let [id] = ids[..] else {
            let what = match ids.len() {
                0 => format!("the repository at {} has no key {prefix:?}", self.at()),
                several => format!("{several} keys have ids that begin with {prefix:?}; give more digits"),
            };
            return Err(Error::Unsupported { what });
        };
        if Some(id) == self.store.opened.key_id() {
            let short = BackupId(id).short();
            return Err(Error::Unsupported {
                what: format!(
                    "key {short} is the one that the repository was opened with; it was not removed"
                ),
            });
        }
        self.store.remove(FileKind::Key, &id)?;
        Ok(BackupId(id))
    }
}
