//! A person's word on a setting that may be absent.

use serde::{Deserialize, Serialize};

/// What is to become of a setting that may be absent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Change<T> {
    /// Nothing: it stays.
    #[default]
    Keep,
    /// There is to be none.
    Clear,
    /// It is to be this.
    Set(T),
}

impl<T> Change<T> {
    /// What is there afterwards.
    pub fn of(self, before: Option<T>) -> Option<T> {
        match self {
            Self::Keep => before,
            Self::Clear => None,
            Self::Set(value) => Some(value),
        }
    }
}
