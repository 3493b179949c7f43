//! What the index of a large repository takes up in memory, and how long it takes to fill and to ask: with simulated
//! metadata, of as many chunks as the given TiB of backups have at their usual length of 768 KiB.
//!
//! `cargo run --release -p afterimage-repository --example index_memory -- 10`

use std::time::Instant;

fn main() {
    let tebibytes: u64 = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(10);
    let chunks = (tebibytes << 40) / (768 << 10);
    let began = Instant::now();
    let (counted, has) = repository::fuzzing::simulated_index(chunks);
    let filled = began.elapsed();
    let (resident, most) = (status("VmRSS"), status("VmHWM"));
    let began = Instant::now();
    let step = usize::try_from(chunks / 1_000_000).unwrap_or(1).max(1);
    let found = (0..2 * chunks).step_by(step).filter(|number| has(*number)).count();
    let asked = 2 * chunks / step as u64;
    println!("{tebibytes} TiB: {chunks} chunks");
    println!(
        "index       {:.0} MB, {:.1} bytes a chunk",
        counted as f64 / 1e6,
        counted as f64 / chunks as f64
    );
    println!("resident    {:.0} MB, at most {:.0} MB", resident as f64 / 1e6, most as f64 / 1e6);
    println!("filled in   {:.1} s", filled.as_secs_f64());
    println!(
        "asked       {asked} times, {found} found, {:.2} us each",
        began.elapsed().as_secs_f64() * 1e6 / asked as f64
    );
}

/// A line of what the kernel says of this process, in bytes.
fn status(name: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).unwrap_or_default() * 1024
}
