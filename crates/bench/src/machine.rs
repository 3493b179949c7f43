//! What was measured on: a table of figures says nothing without it.

use std::fmt;
use std::fs;
use std::path::Path;
use std::process::Command;

/// Facts about the machine and the tools, in the order in which they are shown.
pub struct Machine(Vec<(&'static str, String)>);

/// Looks at this machine, and at the file system that `dir` is on.
pub fn describe(dir: &Path) -> Machine {
    let mut facts = vec![("machine", hardware()), ("kernel", kernel()), ("file system", file_system(dir))];
    let afterimage = rig::this_program().ok();
    let afterimage = afterimage.as_deref().and_then(|path| said(Command::new(path).arg("--version")));
    facts.push(("afterimage", afterimage.unwrap_or_else(|| "?".into())));
    for (program, argument) in [
        ("qemu-storage-daemon", "--version"),
        ("restic", "version"),
        ("borg", "--version"),
        ("nbdcopy", "--version"),
        ("fio", "--version"),
        ("dd", "--version"),
    ] {
        if let Some(version) = said(Command::new(program).arg(argument)) {
            facts.push((program, version));
        }
    }
    Machine(facts)
}

impl Machine {
    /// As a list in Markdown.
    pub fn markdown(&self) -> String {
        self.0.iter().map(|(what, fact)| format!("- {what}: {fact}\n")).collect()
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, (what, fact)) in self.0.iter().enumerate() {
            write!(f, "{}{what:<20} {fact}", if n == 0 { "" } else { "\n" })?;
        }
        Ok(())
    }
}

fn hardware() -> String {
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let processor = field(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default(), "model name");
    let memory = field(&fs::read_to_string("/proc/meminfo").unwrap_or_default(), "MemTotal");
    let memory = memory.trim_end_matches(" kB").parse::<f64>().unwrap_or(0.0) * 1024.0 / (1u64 << 30) as f64;
    format!("{cores} cores ({processor}), {memory:.0} GiB of memory")
}

fn kernel() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!("Linux {}", release.trim())
}

fn file_system(dir: &Path) -> String {
    said(Command::new("stat").args(["-f", "-c", "%T"]).arg(dir)).unwrap_or_else(|| "?".into())
}

/// The value of the first `name : value` line.
fn field(text: &str, name: &str) -> String {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.trim_start().strip_prefix(':'));
    line.map_or_else(|| "?".into(), |value| value.trim().to_owned())
}

/// The first line that a command prints, if it can be started.
fn said(command: &mut Command) -> Option<String> {
    let output = command.output().ok()?;
    let line = String::from_utf8_lossy(&output.stdout).lines().next()?.trim().to_owned();
    (!line.is_empty()).then_some(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_proc_are_found() {
        let text = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nMemTotal:  16 kB\n";
        assert_eq!(field(text, "model name"), "Some CPU @ 2 GHz");
        assert_eq!(field(text, "MemTotal"), "16 kB");
        assert_eq!(field(text, "nothing"), "?");
    }
}
