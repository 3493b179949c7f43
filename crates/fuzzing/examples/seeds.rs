//! Writes the inputs that the fuzzers start with: `cargo run -p afterimage-fuzzing --example seeds -- DIR`.

use std::path::Path;

fn main() -> std::io::Result<()> {
    let dir = std::env::args().nth(1).unwrap_or_else(|| "fuzz/corpus".into());
    fuzzing::write_seeds(Path::new(&dir))
}
