//! Side by side with other tools, on this machine, in one run: a table of medians and ratios.
//!
//! Not a test: nothing here passes or fails by time. `make bench` runs everything; `make bench
//! BENCH="backup --runs 3"` one part. Data goes to `--dir` (about 60 GB while it runs). What is compared
//! alternates within a run, so that whatever else the machine does hits all alike; page caches are warm
//! for all.

mod disk;
mod image;
mod limits;
mod machine;
mod measure;
mod parts;
mod peers;
mod table;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, ensure};
use clap::{Parser, ValueEnum};

use crate::table::Table;

/// Side by side with restic, borg, nbdcopy and dd: a table of medians and ratios.
#[derive(Debug, Parser)]
#[command(name = "afterimage-bench", max_term_width = 100)]
struct Arguments {
    /// The parts to run; all if none is named.
    parts: Vec<Part>,
    /// Runs of each measurement; the table shows medians.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Where images, sites and repositories go.
    #[arg(long, default_value = "/var/tmp/afterimage-bench")]
    dir: PathBuf,
    /// The size of the realistic image in GiB.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=1024))]
    image_gib: u64,
    /// The size of the disk of the part `resync` in GiB; it takes a little more than twice of that.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=1024))]
    resync_gib: u64,
    /// How many VMs the part `scale` protects, one count after the other.
    #[arg(long, value_delimiter = ',', default_value = "1,10,100,1000")]
    vms: Vec<usize>,
    /// How long the part `scale` watches the largest of them, in minutes.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=1440))]
    minutes: u64,
    /// How many VMs the part `nightly` backs up in one night.
    #[arg(long, default_value_t = 200)]
    nightly_vms: usize,
    /// Leave images, sites and repositories where they are.
    #[arg(long)]
    keep: bool,
    /// Write the table to a file as well, as Markdown.
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Draw what was measured, as SVG files in a folder.
    #[arg(long, value_name = "DIR")]
    plots: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// What this machine can do at most.
    Limits,
    /// Full and incremental backup, restore and check of a realistic image, beside restic, borg, rustic and virtnbdbackup.
    Backup,
    /// 100 MB changed on a 100 GiB and on a 10 GiB sparse disk, beside restic.
    Sparse,
    /// How cycles and backups grow with the disk and with the change, beside restic.
    Curves,
    /// A delta of 1 GiB, from the moment to the durable acknowledgement, beside nbdcopy.
    Replicate,
    /// Folding a sequential delta into the base, beside dd.
    Apply,
    /// How often the replica writes each changed byte.
    Io,
    /// What a guest's writes feel of cycles every 5 s and every 30 s.
    Guest,
    /// An unplanned failover of a 100 GiB disk with a thousand logs that are not folded in.
    Failover,
    /// A resynchronization after a kill of QEMU, beside cat of both images.
    Resync,
    /// How many VMs one site takes at an interval of 30 s.
    Scale,
    /// A night in which many VMs are backed up at once, with strict and with pinned views.
    Nightly,
}

impl Part {
    fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    fn run(self, arguments: &Arguments, table: &mut Table) -> anyhow::Result<()> {
        match self {
            Self::Limits => limits::run(arguments, table),
            Self::Backup => parts::backup::run(arguments, table),
            Self::Sparse => parts::sparse::run(arguments, table),
            Self::Curves => parts::curves::run(arguments, table),
            Self::Replicate => parts::replicate::run(arguments, table),
            Self::Apply => parts::apply::run(arguments, table),
            Self::Io => parts::io::run(arguments, table),
            Self::Guest => parts::guest::run(arguments, table),
            Self::Failover => parts::failover::run(arguments, table),
            Self::Resync => parts::resync::run(arguments, table),
            Self::Scale => parts::scale::run(arguments, table),
            Self::Nightly => parts::nightly::run(arguments, table),
        }
    }

    /// What it needs besides QEMU's storage daemon: programs and the packages that have them.
    fn programs(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Limits => &[("dd", "coreutils"), ("time", "time")],
            Self::Backup => &[
                ("restic", "restic"),
                ("borg", "borgbackup"),
                ("rustic", "rustic, by scripts/setup bench"),
                ("virtnbdbackup", "virtnbdbackup"),
                ("libvirtd", "libvirt-daemon libvirt-daemon-driver-qemu"),
                ("virsh", "libvirt-clients"),
                ("qemu-img", "qemu-utils"),
                ("nbdcopy", "libnbd-bin"),
                ("time", "time"),
            ],
            Self::Sparse | Self::Curves => &[("restic", "restic"), ("time", "time")],
            Self::Replicate => &[("nbdcopy", "libnbd-bin"), ("rsync", "rsync"), ("time", "time")],
            Self::Apply => &[("dd", "coreutils"), ("time", "time")],
            Self::Io | Self::Scale => &[],
            Self::Nightly => &[("restic", "restic")],
            Self::Resync => &[("cmp", "diffutils"), ("time", "time")],
            Self::Failover => &[("qemu-io", "qemu-utils"), ("qemu-img", "qemu-utils")],
            Self::Guest => &[("fio", "fio")],
        }
    }

    /// The space that it needs at its fullest, in GiB.
    fn space_gib(self, image_gib: u64) -> u64 {
        match self {
            Self::Limits => 2 * image_gib + 4,
            Self::Backup => 5 * image_gib + 12,
            Self::Sparse | Self::Curves => 40,
            Self::Replicate => 2 * image_gib + 14,
            Self::Apply | Self::Io | Self::Failover => 8,
            Self::Guest => 20,
            Self::Resync => 48,
            Self::Scale => 24,
            Self::Nightly => 8,
        }
    }
}

impl Arguments {
    fn chosen(&self) -> Vec<Part> {
        let all = Part::value_variants().iter().copied();
        all.filter(|part| self.parts.is_empty() || self.parts.contains(part)).collect()
    }

    /// The realistic image, made when it is first asked for.
    fn image(&self) -> anyhow::Result<PathBuf> {
        let path = self.image_path();
        if !path.exists() {
            say(&format!("making an image of {} GiB from /usr", self.image_gib));
            image::realistic(&path, self.image_gib).context("making the realistic image")?;
        }
        Ok(path)
    }

    fn image_path(&self) -> PathBuf {
        self.dir.join(format!("realistic-{}.raw", self.image_gib))
    }
}

/// What goes on, on standard error: the table alone is on standard output.
fn say(what: &str) {
    eprintln!("bench: {what}");
}

fn main() -> anyhow::Result<ExitCode> {
    let mut arguments = Arguments::parse();
    std::fs::create_dir_all(&arguments.dir).with_context(|| arguments.dir.display().to_string())?;
    arguments.dir = arguments.dir.canonicalize()?;
    let chosen = arguments.chosen();
    prepare(&arguments, &chosen)?;
    let machine = machine::describe(&arguments.dir);
    println!("{machine}\n");
    let (mut table, mut failed) = (Table::default(), false);
    for part in chosen {
        say(&format!("part {}", part.name()));
        // What the other parts have measured is worth more than an early end.
        if let Err(error) = part.run(&arguments, &mut table) {
            failed = true;
            table.note(&format!("part {} failed: {error:#}", part.name()));
        }
    }
    if !arguments.keep {
        let _ = std::fs::remove_file(arguments.image_path());
        let _ = std::fs::remove_dir(&arguments.dir);
    }
    println!("{table}");
    if let Some(path) = &arguments.markdown {
        let text = format!("{}\n{}", machine.markdown(), table.markdown());
        std::fs::write(path, text).with_context(|| path.display().to_string())?;
    }
    if let Some(dir) = &arguments.plots {
        std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
        for (name, svg) in table.plots() {
            std::fs::write(dir.join(name), svg).with_context(|| dir.join(name).display().to_string())?;
        }
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Everything that would end a part late is found now: programs, and space.
fn prepare(arguments: &Arguments, parts: &[Part]) -> anyhow::Result<()> {
    rig::this_program().context("make build makes it, and so does make bench")?;
    rig::need("qemu-storage-daemon", "qemu-utils")?;
    for (program, package) in parts.iter().flat_map(|part| part.programs()) {
        rig::need(program, package)?;
    }
    let needed = parts.iter().map(|part| part.space_gib(arguments.image_gib)).max().unwrap_or(0);
    space(&arguments.dir, needed)
}

fn space(dir: &Path, needed_gib: u64) -> anyhow::Result<()> {
    let free = measure::free_bytes(dir)?;
    ensure!(
        free >= needed_gib << 30,
        "{} has {:.0} GiB free and {needed_gib} are needed; name another folder with --dir, a smaller image \
         with --image-gib, or parts that need less",
        dir.display(),
        free as f64 / (1u64 << 30) as f64
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Arguments::command().debug_assert();
        let arguments = Arguments::parse_from(["bench", "sparse", "backup", "--runs", "3"]);
        assert_eq!(arguments.chosen(), [Part::Backup, Part::Sparse]);
        assert_eq!(Arguments::parse_from(["bench"]).chosen(), Part::value_variants());
    }
}
