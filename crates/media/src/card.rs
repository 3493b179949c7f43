//! The card of a set: the one file in plain text, written first.

use model::{MediaId, VmId};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// The card's file.
pub const CARD_FILE: &str = "afterimage-media.json";

const FORMAT: &str = "afterimage-media";
const VERSION: u16 = 1;
/// No card is longer, in bytes.
pub const CARD_BYTES_MAX: usize = 4096;

/// Whose set a folder holds. It says nothing that is not in each file too; only it can be read with bare eyes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Card {
    /// The set.
    pub set: MediaId,
    /// The VM.
    pub vm: VmId,
}

#[derive(Serialize, Deserialize)]
struct Written {
    format: String,
    version: u16,
    set: MediaId,
    vm: VmId,
}

impl Card {
    /// As the file has it.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let written = Written { format: FORMAT.into(), version: VERSION, set: self.set, vm: self.vm };
        let mut text = serde_json::to_vec(&written).expect("a card can be written as JSON");
        text.push(b'\n');
        text
    }

    /// Reads it.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        if bytes.len() > CARD_BYTES_MAX {
            return Err(Error::NotMedia);
        }
        let written: Written = serde_json::from_slice(bytes).map_err(|_| Error::NotMedia)?;
        match written {
            Written { format, .. } if format != FORMAT => Err(Error::NotMedia),
            Written { version, .. } if version != VERSION => Err(Error::Version(version)),
            Written { set, vm, .. } => Ok(Self { set, vm }),
        }
    }
}
