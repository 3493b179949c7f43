//! Why a file of a set is not taken.

/// Why bytes are not what a file of a set should be. Whoever has the file adds its name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// It does not begin as a file of a set, or is no card.
    #[error("it is no file of Afterimage's media")]
    NotMedia,
    /// It is of a later version.
    #[error(
        "it is of version {0} of the format of media, which this program does not know; update this site"
    )]
    Version(u16),
    /// A field has a value that none has.
    #[error("it is damaged: its {0} cannot be")]
    Field(&'static str),
    /// The file belongs to something else.
    #[error("it is of another {0}: files of several sets were mixed")]
    Foreign(&'static str),
    /// Its end is missing.
    #[error("it is cut off: its end is missing")]
    Truncated,
    /// A chunk does not open: it is not what was sealed in its place with this key.
    #[error("it is damaged or was changed: chunk {0} is not what was sealed there")]
    Seal(u64),
    /// It would be larger than any file of a set.
    #[error("it is too large for one file")]
    TooLarge,
}

impl Error {
    /// The stable code, for scripts.
    #[must_use]
    pub const fn code(&self) -> &'static str {
        match self {
            Self::NotMedia => "media-none",
            Self::Version(_) => "media-version",
            Self::Field(_) => "media-field",
            Self::Foreign(_) => "media-foreign",
            Self::Truncated => "media-truncated",
            Self::Seal(_) => "media-seal",
            Self::TooLarge => "media-too-large",
        }
    }
}

/// The outcome of what this crate does.
pub type Result<T, E = Error> = std::result::Result<T, E>;
