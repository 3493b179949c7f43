//! Timing whole commands, and what the kernel counts of a process.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, bail, ensure};

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
    /// Processor time, its own and the kernel's for it, in seconds.
    pub cpu_s: f64,
    /// What it printed.
    pub stdout: String,
}

/// Runs a command to its end, under `time` for its memory and processor time; it must succeed.
pub fn run(command: &Command) -> anyhow::Result<Ran> {
    let report = tempfile::NamedTempFile::new()?;
    let mut timed = Command::new("time");
    timed
        .args(["-f", "%M %U %S", "-o"])
        .arg(report.path())
        .arg(command.get_program())
        .args(command.get_args());
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
    let numbers: Vec<f64> = report.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let [kib, user_s, system_s] = numbers[..] else { bail!("time reported {report:?}") };
    Ok(Ran { seconds, peak_mb: kib * 1024.0 / 1e6, cpu_s: user_s + system_s, stdout })
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

/// Processor time that a process has used so far, in seconds.
pub fn cpu_seconds(pid: u32) -> anyhow::Result<f64> {
    /// The kernel counts in hundredths of a second, whatever its own tick (USER_HZ).
    const TICKS_PER_SECOND: f64 = 100.0;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name before it may have spaces and brackets; user and system time are the 12th and 13th field after it.
    let fields = stat.rsplit_once(')').context("no name in /proc/PID/stat")?.1;
    let ticks = fields.split_whitespace().skip(11).take(2).map(str::parse::<f64>);
    Ok(ticks.sum::<Result<f64, _>>()? / TICKS_PER_SECOND)
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
        assert!(cpu_seconds(pid).unwrap() < 3600.0);
        assert!(free_bytes(Path::new("/")).unwrap() > 0);
        assert!(disk_usage(Path::new("/proc/self/exe")).is_ok());
        assert_eq!(first_number(" 12345 /some/folder\n").unwrap(), 12345.0);
        assert!(first_number("").is_err());
    }

    #[test]
    fn a_command_is_timed_and_its_failure_is_told() {
        let ran = run(Command::new("sh").args(["-c", "echo $WORD"]).env("WORD", "said")).unwrap();
        assert_eq!(ran.stdout, "said\n");
        assert!(ran.peak_mb > 0.1 && ran.seconds < 10.0 && ran.cpu_s < 10.0);
        let error = run(Command::new("sh").args(["-c", "echo why >&2; exit 3"])).err().unwrap().to_string();
        assert!(error.contains("why"), "{error}");
    }
}
