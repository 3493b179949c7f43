//! Random bytes, from the operating system.

use crate::failure::{Code, Failure};

/// As many random bytes as are asked for.
pub(crate) fn bytes<const N: usize>() -> Result<[u8; N], Failure> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes)
        .map_err(|error| Failure::new(Code::Internal, format!("the system gave no random bytes: {error}")))?;
    Ok(bytes)
}
