//! Timing whole commands, and what the kernel counts of a process.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, ensure};

/// The median; of an even number of figures the mean of the two in the middle.
pub fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        count if count % 2 == 1 => sorted[count / 2],
        count => f64::midpoint(sorted[count / 2 - 1], sorted[count / 2]),
    }
}

/// The largest figure.
pub fn largest(figures: &[f64]) -> f64 {
    figures.iter().copied().fold(0.0, f64::max)
}

/// What a command took.
pub struct Ran {
    /// Wall time in seconds.
    pub seconds: f64,
    /// The most memory that it used, in MB.
    pub peak_mb: f64,
    /// What it printed.
    pub stdout: String,
}

/// Runs a command to its end, under `time` for its memory; it must succeed.
pub fn run(command: &Command) -> anyhow::Result<Ran> {
    let report = tempfile::NamedTempFile::new()?;
    let mut timed = Command::new("time");
    timed.args(["-f", "%M", "-o"]).arg(report.path()).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => timed.env(name, value),
            None => timed.env_remove(name),
        };
    }
    if let Some(dir) = command.get_current_dir() {
        timed.current_dir(dir);
    }
    let started = Instant::now();
    let output = timed.stdin(Stdio::null()).output().context("time is needed: apt-get install time")?;
    let seconds = started.elapsed().as_secs_f64();
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} ended with {}: {stdout}{stderr}", output.status);
    let report = std::fs::read_to_string(report.path())?;
    let kib: f64 = report.trim().parse().with_context(|| format!("time reported {report:?}"))?;
    Ok(Ran { seconds, peak_mb: kib * 1024.0 / 1e6, stdout })
}

/// Lets what was written before reach the disk, so that nobody else's measurement waits for it.
pub fn settle() -> anyhow::Result<()> {
    rig::tool(&mut Command::new("sync"))?;
    Ok(())
}

/// The most memory that a process has used, in MB.
pub fn peak_mb(pid: u32) -> anyhow::Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    let kib: f64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib * 1024.0 / 1e6)
}

/// Bytes that a process has made the kernel write to disks so far.
pub fn written_bytes(pid: u32) -> anyhow::Result<u64> {
    let io = std::fs::read_to_string(format!("/proc/{pid}/io"))?;
    let line = io.lines().find_map(|line| line.strip_prefix("write_bytes:")).context("no write_bytes")?;
    Ok(line.trim().parse()?)
}

/// Bytes that a folder or file takes on the disk.
pub fn disk_usage(path: &Path) -> anyhow::Result<f64> {
    first_number(&rig::tool(Command::new("du").args(["-s", "-B1"]).arg(path))?)
}

/// Bytes that are free where `path` is.
pub fn free_bytes(path: &Path) -> anyhow::Result<u64> {
    let said = rig::tool(Command::new("df").args(["-B1", "--output=avail"]).arg(path))?;
    let free = said.lines().nth(1).with_context(|| format!("df printed {said:?}"))?;
    Ok(first_number(free)? as u64)
}

fn first_number(text: &str) -> anyhow::Result<f64> {
    let word = text.split_whitespace().next().context("a number was expected, and nothing was printed")?;
    word.parse().with_context(|| format!("{word:?} is no number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[7.0]), 7.0);
        assert!(median(&[]).is_nan());
        assert_eq!(largest(&[1.0, 3.0, 2.0]), 3.0);
    }

    #[test]
    fn the_kernels_counts_can_be_read() {
        let pid = std::process::id();
        assert!(peak_mb(pid).unwrap() > 0.1);
        written_bytes(pid).unwrap();
        assert!(free_bytes(Path::new("/")).unwrap() > 0);
        assert!(disk_usage(Path::new("/proc/self/exe")).is_ok());
        assert_eq!(first_number(" 12345 /some/folder\n").unwrap(), 12345.0);
        assert!(first_number("").is_err());
    }

    #[test]
    fn a_command_is_timed_and_its_failure_is_told() {
        let ran = run(Command::new("sh").args(["-c", "echo $WORD"]).env("WORD", "said")).unwrap();
        assert_eq!(ran.stdout, "said\n");
        assert!(ran.peak_mb > 0.1 && ran.seconds < 10.0);
        let error = run(Command::new("sh").args(["-c", "echo why >&2; exit 3"])).err().unwrap().to_string();
        assert!(error.contains("why"), "{error}");
    }
}
