//! `afterimage-lossy MOUNTPOINT BACKING`: mounts the file system and takes commands on standard input, one a
//! line: `lose SEED`, `faults [write=N] [sync=N] [slow=MICROSECONDS] [no-space]`, `unmount`. Each is answered with one line. At the
//! end of its input it unmounts.

use std::io::{self, BufRead};
use std::path::PathBuf;
use std::process::ExitCode;

use lossy::{Faults, Mount};

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(at), Some(backing), None) = (arguments.next(), arguments.next(), arguments.next()) else {
        eprintln!("usage: afterimage-lossy MOUNTPOINT BACKING");
        return ExitCode::from(64);
    };
    match run(&at, &backing) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("afterimage-lossy: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(at: &std::path::Path, backing: &std::path::Path) -> io::Result<()> {
    let mount = Mount::new(at, backing)?;
    println!("mounted {}", at.display());
    for line in io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["lose", seed] => {
                match seed.parse().map_err(io::Error::other).and_then(|s| mount.lose_power(s)) {
                    Ok(lost) => println!("{lost:?}"),
                    Err(error) => println!("error: {error}"),
                }
            }
            ["faults", wanted @ ..] => match faults(wanted) {
                Some(faults) => {
                    mount.set_faults(faults);
                    println!("{faults:?}");
                }
                None => println!("error: faults [write=N] [sync=N] [slow=MICROSECONDS] [no-space]"),
            },
            ["unmount"] => break,
            _ => println!(
                "error: lose SEED, faults [write=N] [sync=N] [slow=MICROSECONDS] [no-space], or unmount"
            ),
        }
    }
    mount.unmount()
}

fn faults(words: &[&str]) -> Option<Faults> {
    let mut faults = Faults::default();
    for word in words {
        match word.split_once('=') {
            Some(("write", count)) => faults.write_fails_after = Some(count.parse().ok()?),
            Some(("sync", count)) => faults.sync_fails_after = Some(count.parse().ok()?),
            Some(("slow", micros)) => faults.slow_us = micros.parse().ok()?,
            None if *word == "no-space" => faults.no_space = true,
            _ => return None,
        }
    }
    Some(faults)
}
