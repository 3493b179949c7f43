//! What is wrong with a policy.

/// A policy that cannot be used: where, why, and what can be written there instead.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// It is not TOML, or has a setting that there is not.
    #[error("{0}")]
    Text(String),
    /// A time zone that is not known.
    #[error("time-zone = {0:?} is not known; use a name as 'Europe/Berlin' or 'UTC'")]
    TimeZone(String),
    /// A schedule that cannot be read, or never comes.
    #[error(
        "schedule = {text:?}: {why}; five fields are wanted: minute, hour, day of the month, month, day of the week"
    )]
    Schedule {
        /// What was written.
        text: String,
        /// What is wrong with it.
        why: String,
    },
    /// A blackout that cannot be read.
    #[error(
        "blackout = {text:?}: {why}; write days and times of the day, as 'Mon-Fri 08:00-18:00' or '12:00-13:30'"
    )]
    Blackout {
        /// What was written.
        text: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A setting that contradicts another, or does not fit.
    #[error("{setting}: {why}")]
    Setting {
        /// Which.
        setting: &'static str,
        /// What is wrong with it.
        why: String,
    },
}

impl PolicyError {
    pub(crate) fn setting(setting: &'static str, why: impl Into<String>) -> Self {
        Self::Setting { setting, why: why.into() }
    }
}
