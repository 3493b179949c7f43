//! `afterimage-simulate`: runs seeds, replays one, shrinks one.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Parser;
use simulate::coverage::Coverage;
use simulate::plan::Schedule;
use simulate::run::{EVENTS, run, shrink};
use simulate::world::Violation;

/// Runs seeded worlds over Afterimage's own code, and checks what must always be true.
#[derive(Debug, Parser)]
#[command(name = "afterimage-simulate")]
struct Args {
    /// The seeds to run, as FIRST..END (END is not run).
    #[arg(long, value_parser = seeds, conflicts_with_all = ["seed", "shrink"])]
    seeds: Option<Range<u64>>,
    /// Run one seed.
    #[arg(long)]
    seed: Option<u64>,
    /// Print what happens, line by line.
    #[arg(long, requires = "seed")]
    trace: bool,
    /// Take events away from a failing seed as long as it still fails, and print what is left.
    #[arg(long, conflicts_with = "seed")]
    shrink: Option<u64>,
    /// Worlds at once.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Events in each world.
    #[arg(long, default_value_t = EVENTS)]
    steps: usize,
    /// End after this many seconds, whatever is left.
    #[arg(long)]
    seconds: Option<u64>,
    /// Print what happened, in figures.
    #[arg(long)]
    coverage: bool,
}

fn seeds(text: &str) -> anyhow::Result<Range<u64>> {
    let (first, end) = text.split_once("..").context("say FIRST..END, as in 0..1000")?;
    Ok(first.parse()?..end.parse()?)
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    std::panic::set_hook(Box::new(|_| ())); // a panic is a violation like any other, and is reported as one
    match (args.seed, args.shrink) {
        (Some(seed), _) => one(seed, &args),
        (None, Some(seed)) => shrunk(seed, &args),
        (None, None) => many(args.seeds.clone().unwrap_or(0..1000), &args),
    }
}

fn one(seed: u64, args: &Args) -> anyhow::Result<()> {
    let schedule = Schedule::of(seed, args.steps);
    let outcome = run(&schedule, args.trace);
    if args.trace {
        println!("{:#?}", schedule.plan);
    }
    outcome.trace.iter().for_each(|line| println!("{line}"));
    if args.coverage {
        print!("{}", outcome.coverage);
    }
    match outcome.violation {
        None => println!("seed {seed}: nothing wrong in {:?} of simulated time", outcome.simulated),
        Some(violation) => bail!("seed {seed}: {violation}"),
    }
    Ok(())
}

fn shrunk(seed: u64, args: &Args) -> anyhow::Result<()> {
    let schedule = Schedule::of(seed, args.steps);
    let Some(violation) = run(&schedule, false).violation else {
        bail!("seed {seed} does not fail with {} events", args.steps);
    };
    println!("seed {seed}: {violation}");
    let small = shrink(&schedule);
    println!("{:#?}", small.plan);
    let outcome = run(&small, true);
    outcome.trace.iter().for_each(|line| println!("{line}"));
    bail!(
        "{} of {} events are enough: {}",
        small.events.len(),
        schedule.events.len(),
        said(outcome.violation)
    );
}

fn said(violation: Option<Violation>) -> String {
    violation.map_or_else(|| "it no longer fails".into(), |violation| violation.to_string())
}

/// What all worlds came to.
#[derive(Default)]
struct Total {
    coverage: Coverage,
    simulated: Duration,
    failed: Vec<(u64, Violation)>,
}

fn many(seeds: Range<u64>, args: &Args) -> anyhow::Result<()> {
    let (next, stop, total) =
        (AtomicU64::new(seeds.start), AtomicBool::new(false), Mutex::new(Total::default()));
    let began = Instant::now();
    let over = || args.seconds.is_some_and(|seconds| began.elapsed() >= Duration::from_secs(seconds));
    std::thread::scope(|scope| {
        for _ in 0..args.threads.max(1) {
            scope.spawn(|| {
                let mut mine = Total::default();
                while !stop.load(Ordering::Relaxed) && !over() {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        break;
                    }
                    let outcome = run(&Schedule::of(seed, args.steps), false);
                    mine.coverage.add(&outcome.coverage);
                    mine.coverage.hit("worlds");
                    mine.simulated += outcome.simulated;
                    if let Some(violation) = outcome.violation {
                        mine.failed.push((seed, violation));
                        stop.store(true, Ordering::Relaxed);
                    }
                }
                let mut total = total.lock().expect("no thread has panicked");
                total.coverage.add(&mine.coverage);
                total.simulated += mine.simulated;
                total.failed.extend(mine.failed);
            });
        }
    });
    let total = total.into_inner().expect("no thread has panicked");
    summary(&total, began.elapsed(), args);
    match total.failed.iter().min_by_key(|(seed, _)| *seed) {
        None => Ok(()),
        Some((seed, violation)) => {
            let steps = if args.steps == EVENTS { String::new() } else { format!(" --steps {}", args.steps) };
            bail!(
                "seed {seed}: {violation}\n\nreplay it with: afterimage-simulate --seed {seed} --trace{steps}\nmake it small with: afterimage-simulate --shrink {seed}{steps}"
            )
        }
    }
}

fn summary(total: &Total, took: Duration, args: &Args) {
    let coverage = &total.coverage;
    let worlds = coverage.of("worlds");
    println!(
        "{worlds} worlds in {:.1} s ({:.1} a second), {:.1} years of simulated time",
        took.as_secs_f64(),
        worlds as f64 / took.as_secs_f64().max(0.001),
        total.simulated.as_secs_f64() / (365.25 * 86_400.0)
    );
    println!(
        "{} events, {} deaths of sites, {} points and {} backups checked byte by byte, {} refusals of the gate",
        coverage.sum("event "),
        coverage.sum("deaths of"),
        coverage.of("points checked"),
        coverage.of("backups checked"),
        coverage.sum("refused ")
    );
    if args.coverage {
        print!("{coverage}");
    }
}
