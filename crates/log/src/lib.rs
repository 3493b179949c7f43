//! The log format: encode, decode, verify.

mod types;

pub use types::{DiskInfo, Encoding, Extent, Footer, Header, Index, RecordEntry};
