//! What shows that a guest lives.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The longest text that is waited for on a console, in bytes.
const TEXT_BYTES_MAX: usize = 200;

/// What a boot check waits for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum SignOfLife {
    /// The guest agent answers.
    Agent,
    /// This text is on the serial console.
    Console(String),
    /// Something listens on this TCP port of the guest, which gets an address by DHCP.
    Tcp(u16),
    /// The VM has run for so long without a stop, a panic or a reset. The weakest: a boot loader's error message runs too.
    Runs(Duration),
}

impl Default for SignOfLife {
    fn default() -> Self {
        Self::Runs(Duration::from_secs(30))
    }
}

/// A text that names no sign of life.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no sign of life: use agent, console:TEXT, tcp:PORT or runs:30s")]
pub struct NoSign(String);

impl FromStr for SignOfLife {
    type Err = NoSign;

    fn from_str(text: &str) -> Result<Self, NoSign> {
        let no_sign = || NoSign(text.chars().take(TEXT_BYTES_MAX).collect());
        match text.split_once(':') {
            None if text == "agent" => Ok(Self::Agent),
            Some(("console", line))
                if (1..=TEXT_BYTES_MAX).contains(&line.len()) && !line.chars().any(char::is_control) =>
            {
                Ok(Self::Console(line.to_owned()))
            }
            Some(("tcp", port)) => match port.parse() {
                Ok(port) if port != 0 => Ok(Self::Tcp(port)),
                _ => Err(no_sign()),
            },
            Some(("runs", time)) => humantime::parse_duration(time).map(Self::Runs).map_err(|_| no_sign()),
            _ => Err(no_sign()),
        }
    }
}

impl fmt::Display for SignOfLife {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Agent => f.write_str("agent"),
            Self::Console(text) => write!(f, "console:{text}"),
            Self::Tcp(port) => write!(f, "tcp:{port}"),
            Self::Runs(time) => write!(f, "runs:{}", humantime::format_duration(*time)),
        }
    }
}

impl TryFrom<String> for SignOfLife {
    type Error = NoSign;

    fn try_from(text: String) -> Result<Self, NoSign> {
        text.parse()
    }
}

impl From<SignOfLife> for String {
    fn from(sign: SignOfLife) -> Self {
        sign.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signs_are_what_they_were_written_as() {
        for text in ["agent", "console:login:", "console:ack sqlite 5", "tcp:22", "runs:30s", "runs:2m"] {
            assert_eq!(text.parse::<SignOfLife>().unwrap().to_string(), text);
        }
        assert_eq!(SignOfLife::default().to_string(), "runs:30s");
    }

    #[test]
    fn what_is_no_sign_is_refused_and_says_what_is_one() {
        let long = format!("console:{}", "x".repeat(TEXT_BYTES_MAX + 1));
        for text in [
            "",
            "console:",
            "console:a\nb",
            "tcp:0",
            "tcp:65536",
            "tcp:",
            "runs:",
            "runs:soon",
            "ping",
            &long,
        ] {
            let error = text.parse::<SignOfLife>().unwrap_err().to_string();
            assert!(error.contains("console:TEXT"), "{error}");
        }
    }
}
