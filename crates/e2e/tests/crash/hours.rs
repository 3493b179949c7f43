//! Hours go by, so that points are dropped and logs merged: the sites' clocks are moved on.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use rig::{Result, wait_for};

use super::drive::await_death;
use super::pair::{Pair, Side, order, trouble};
use super::plan::Case;
use crate::common::{LONG, VM};

const LIBRARY: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1";
/// Of an hour that is over ten points and the last one are kept: what is made beyond that is dropped.
const POINTS: u32 = 15;

/// Two sites whose clocks can be moved on.
pub struct Hours {
    pair: Pair,
    /// From the real time to ten minutes past the next full hour: no hour ends by itself meanwhile.
    ahead_s: u64,
    hour: u64,
    bursts: u64,
}

impl Hours {
    /// A replica with some points of one hour and many of the next.
    pub fn new(lossy: bool) -> Result<Self> {
        if !Path::new(LIBRARY).exists() {
            return Err(trouble("libfaketime is needed: apt-get install faketime"));
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_err(trouble)?.as_secs();
        let ahead_s = 3600 - now % 3600 + 600;
        let mut hours = Self { pair: Pair::new(90, lossy, "24")?, ahead_s, hour: 0, bursts: 0 };
        hours.more_points(2)?;
        hours.fill_an_hour()?;
        Ok(hours)
    }

    fn serve(&mut self, side: Side, hour: u64, more: &[(&str, &str)]) -> Result<()> {
        let ahead = format!("+{}", self.ahead_s + 3600 * hour);
        let clock =
            [("LD_PRELOAD", LIBRARY), ("FAKETIME", ahead.as_str()), ("FAKETIME_DONT_FAKE_MONOTONIC", "1")];
        let site = self.pair.site(side);
        site.kill();
        site.serve_with(&[&clock[..], more].concat())
    }

    /// An hour later, at both sites, many points are made.
    fn fill_an_hour(&mut self) -> Result<()> {
        self.serve(Side::Branch, self.hour, &[])?;
        self.serve(Side::Head, self.hour, &[])?;
        self.more_points(POINTS)
    }

    fn more_points(&mut self, count: u32) -> Result<()> {
        for _ in 0..count {
            self.bursts += 1;
            self.pair.burst(self.bursts)?;
            self.pair.sync()?;
        }
        Ok(())
    }

    /// The hour is over at the replica: it dies at a step of what it does then, and does it after all.
    pub fn crash(&mut self, case: &Case, power: Option<u64>, lost: &mut Option<String>) -> Result<()> {
        if self.hour > 0 {
            self.fill_an_hour()?;
        }
        let expect = self.pair.expect()?;
        let (merged, fail_at) = (self.merged()?, case.fail_at());
        self.hour += 1;
        // It may be so quick that it dies before it has answered.
        let _ = self.serve(Side::Head, self.hour, &[(steps::FAIL_AT, &fail_at)]);
        let begun = order(&self.pair.branch, &["sync", VM])?;
        let died = await_death(self.pair.site(Side::Head), &fail_at);
        drop(begun);
        died?;
        if let Some(seed) = power {
            *lost = Some(self.pair.lose_power(Side::Head, seed)?);
        }
        self.serve(Side::Head, self.hour, &[])?;
        self.pair.check(&expect, false, false)?;
        wait_for("logs to be merged", LONG, || Ok((self.merged()? != merged).then_some(())))
    }

    /// The logs that were made of several.
    fn merged(&self) -> Result<Vec<String>> {
        let entries = std::fs::read_dir(self.pair.storage()?.join("logs")).map_err(trouble)?.flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        let mut merged: Vec<String> = names.filter(|name| name.contains('-')).collect();
        merged.sort();
        Ok(merged)
    }
}
