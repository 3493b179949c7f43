//! A disk that loses what was not synced when its power goes: the program `afterimage-lossy`.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use crate::programs::{need, program_beside};
use crate::{Result, Trouble, doing};

/// A lossy file system, mounted as long as this lives.
pub struct LossyDisk {
    at: PathBuf,
    backing: PathBuf,
    running: Option<Running>,
}

struct Running {
    process: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl LossyDisk {
    /// Mounts the folder `backing` at the folder `at`.
    pub fn mount(at: &Path, backing: &Path) -> Result<Self> {
        need("fusermount3", "fuse3")?;
        let mut disk = Self { at: at.to_owned(), backing: backing.to_owned(), running: None };
        disk.start()?;
        Ok(disk)
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.at
    }

    /// The power goes: of what was not synced a part is lost, chosen by `seed`. Then the disk is there again.
    /// What was lost, in words.
    pub fn lose_power(&mut self, seed: u64) -> Result<String> {
        let lost = self.order(&format!("lose {seed}"))?;
        self.stop();
        self.start()?;
        Ok(lost)
    }

    /// Gives the program an order and takes its answer.
    pub fn order(&mut self, order: &str) -> Result<String> {
        let gone = || Trouble(format!("the lossy file system at {} has ended", self.at.display()));
        let running = self.running.as_mut().ok_or_else(gone)?;
        writeln!(running.orders, "{order}").map_err(|_| gone())?;
        let mut answer = String::new();
        running.answers.read_line(&mut answer).map_err(doing(order))?;
        match answer.trim() {
            "" => Err(gone()),
            error if error.starts_with("error:") => Err(Trouble(format!("{order}: {error}"))),
            answer => Ok(answer.to_owned()),
        }
    }

    fn start(&mut self) -> Result<()> {
        let mut command = Command::new(program_beside("afterimage-lossy")?);
        command.args([&self.at, &self.backing]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn().map_err(doing("starting afterimage-lossy"))?;
        let (Some(orders), Some(answers)) = (process.stdin.take(), process.stdout.take()) else {
            return Err(Trouble("afterimage-lossy has no standard input or output".into()));
        };
        let mut answers = BufReader::new(answers);
        let mut ready = String::new();
        answers.read_line(&mut ready).map_err(doing("starting afterimage-lossy"))?;
        self.running = Some(Running { process, orders, answers });
        if ready.starts_with("mounted") {
            return Ok(());
        }
        self.stop();
        Err(Trouble("afterimage-lossy could not mount; what it said is on standard error".into()))
    }

    /// At the end of its orders it unmounts.
    fn stop(&mut self) {
        let Some(Running { mut process, orders, answers }) = self.running.take() else { return };
        drop((orders, answers));
        let _ = process.wait();
    }
}

impl Drop for LossyDisk {
    fn drop(&mut self) {
        self.stop();
    }
}
