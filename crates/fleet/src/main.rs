//! `afterimage-fleet`: runs the studies and writes the tables and figures of docs/fleet.md.

use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Parser;
use fleet::{Size, figures, markdown, study};

/// Simulates a fleet's night: how often backups collide with applies, and what each policy makes of it.
#[derive(Debug, Parser)]
struct Args {
    /// Where the tables and figures go.
    #[arg(long, default_value = "docs/fleet", value_name = "DIR")]
    out: PathBuf,
    /// The seed; the same one gives the same figures, on every machine.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// A small fleet and coarse curves, in seconds instead of minutes.
    #[arg(long)]
    quick: bool,
    /// Threads; all processors if none is given. The figures do not depend on it.
    #[arg(long)]
    threads: Option<usize>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let size = if args.quick { Size::QUICK } else { Size::FULL };
    let threads = args.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, Into::into));
    let began = Instant::now();
    let results = study(size, args.seed, threads, &|what| {
        eprintln!("{:7.1} s  {what}", began.elapsed().as_secs_f64());
    });
    fs::create_dir_all(&args.out).with_context(|| format!("making the folder {}", args.out.display()))?;
    let tables = [("results.md", markdown(&results, args.seed))];
    for (name, content) in tables.into_iter().chain(figures::all(&results)) {
        let path = args.out.join(name);
        fs::write(&path, content).with_context(|| format!("writing {}", path.display()))?;
        println!("{}", path.display());
    }
    let cycles: u64 = results.fleets.iter().map(|fleet| fleet.tally.cycles).sum();
    eprintln!("{:7.1} s  {cycles} cycles", began.elapsed().as_secs_f64());
    Ok(())
}
