//! How much a VM changes, and when.
//!
//! A log holds each block that changed once, so its size grows slower than the time that it covers: with
//! the power [`Churn::growth`]. At 1 nothing is ever written twice.

use std::f64::consts::TAU;

use crate::clock::{HOUR, Micros, SECOND};

/// The interval for which rates are given.
const REFERENCE_SECONDS: f64 = 30.0;
/// Quantiles of the noise of single logs that are kept ready.
const NOISE_STEPS: usize = 1024;
/// Quarters of an hour in a day.
const QUARTERS: usize = 96;

/// How the VMs of a fleet change.
#[derive(Debug, Clone, PartialEq)]
pub struct Churn {
    /// Changed bytes per second, measured over 30 s; the mean over all VMs.
    pub mean_bytes_per_s: f64,
    /// How unlike VMs are: the sigma of the log-normal distribution of their rates.
    pub skew: f64,
    /// No VM changes faster than this.
    pub max_bytes_per_s: f64,
    /// The power of time with which changed bytes grow, 0 to 1.
    pub growth: f64,
    /// The sigma of the log-normal noise from one log to the next.
    pub noise: f64,
    /// The greatest swing between day and night, 0 to 1; each VM has its own, up to this.
    pub swing: f64,
    /// The share of VMs that are busiest at two in the night, not at two in the afternoon.
    pub night_share: f64,
    /// Bursts; none if `None`.
    pub bursts: Option<Bursts>,
}

/// Minutes in which a VM changes much faster than else.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bursts {
    /// How much faster.
    pub factor: f64,
    /// How long one lasts, on average, in seconds.
    pub seconds: f64,
    /// How far apart they are, on average, in seconds.
    pub every_seconds: f64,
}

impl Churn {
    /// What is published of clouds; docs/fleet.md has the sources.
    #[must_use]
    pub fn published() -> Self {
        Self {
            mean_bytes_per_s: 187e3,
            skew: 1.68,
            max_bytes_per_s: 50e6,
            growth: 0.75,
            noise: 0.8,
            swing: 0.8,
            night_share: 0.1,
            bursts: Some(Bursts { factor: 20.0, seconds: 120.0, every_seconds: 7200.0 }),
        }
    }

    /// Every log of every VM is of the same size, and none overwrites another.
    #[must_use]
    pub fn constant(bytes_per_s: f64) -> Self {
        Self {
            mean_bytes_per_s: bytes_per_s,
            skew: 0.0,
            max_bytes_per_s: f64::INFINITY,
            growth: 1.0,
            noise: 0.0,
            swing: 0.0,
            night_share: 0.0,
            bursts: None,
        }
    }

    /// Draws a VM.
    pub fn vm(&self, now: Micros, rng: &mut fastrand::Rng) -> VmChurn {
        let mean_of_bursts = self.bursts.map_or(1.0, |bursts| {
            1.0 + (bursts.factor - 1.0) * bursts.seconds / (bursts.seconds + bursts.every_seconds)
        });
        let base = self.mean_bytes_per_s / mean_of_bursts;
        let scale = (self.skew * normal(rng.f64()) - self.skew * self.skew / 2.0).exp();
        let peak = if rng.f64() < self.night_share { 2 } else { 14 };
        VmChurn {
            bytes_per_s: (base * scale).min(self.max_bytes_per_s),
            swing: self.swing * rng.f64(),
            peak,
            bursting: false,
            turns_at: self.bursts.map_or(Micros::MAX, |bursts| now + exponential(bursts.every_seconds, rng)),
        }
    }
}

/// How one VM changes.
#[derive(Debug, Clone)]
pub struct VmChurn {
    /// Its rate over 30 s, outside bursts, averaged over the day.
    pub bytes_per_s: f64,
    swing: f64,
    /// The hour at which it is busiest.
    peak: i64,
    bursting: bool,
    /// When its burst begins or ends.
    turns_at: Micros,
}

/// Draws the sizes of logs. It keeps what is the same for all of them.
#[derive(Debug, Clone)]
pub struct LogSizes {
    churn: Churn,
    noise: Vec<f64>,
    /// One cosine over a day, by quarters of an hour.
    day: [f64; QUARTERS],
    /// The time that a usual log covers, and what it weighs in reference seconds.
    usual: (Micros, f64),
}

impl LogSizes {
    /// For logs that usually cover `interval`.
    #[must_use]
    pub fn new(churn: &Churn, interval: Micros) -> Self {
        let step = |n: usize| normal((n as f64 + 0.5) / NOISE_STEPS as f64);
        let mut noise: Vec<f64> = (0..NOISE_STEPS).map(|n| (churn.noise * step(n)).exp()).collect();
        let mean = noise.iter().sum::<f64>() / NOISE_STEPS as f64;
        noise.iter_mut().for_each(|value| *value /= mean);
        let usual = (interval, grown(interval, churn.growth));
        let day = std::array::from_fn(|quarter| (TAU * quarter as f64 / QUARTERS as f64).cos());
        Self { churn: churn.clone(), noise, day, usual }
    }

    /// The bytes of a log of this VM that covers the time from `since` to `now`.
    pub fn draw(&self, vm: &mut VmChurn, since: Micros, now: Micros, rng: &mut fastrand::Rng) -> f64 {
        let covered = now - since;
        let weight = if covered == self.usual.0 { self.usual.1 } else { grown(covered, self.churn.growth) };
        let mut bytes = vm.bytes_per_s * weight * self.daily(vm, now);
        if let Some(bursts) = self.churn.bursts {
            while vm.turns_at <= now {
                vm.bursting = !vm.bursting;
                let mean = if vm.bursting { bursts.seconds } else { bursts.every_seconds };
                vm.turns_at += exponential(mean, rng);
            }
            if vm.bursting {
                bytes *= bursts.factor;
            }
        }
        if self.churn.noise > 0.0 {
            bytes *= self.noise[rng.usize(..NOISE_STEPS)];
        }
        bytes
    }

    /// The swing at `now`: 1 on average over a day.
    fn daily(&self, vm: &VmChurn, now: Micros) -> f64 {
        let quarter = (now / (HOUR / 4) - vm.peak * 4).rem_euclid(QUARTERS as i64);
        1.0 + vm.swing * self.day[quarter as usize]
    }

    /// The bytes that a VM changes in `time`, without noise.
    #[must_use]
    pub fn expected(&self, vm: &VmChurn, time: Micros) -> f64 {
        vm.bytes_per_s * grown(time, self.churn.growth)
    }

    /// What is left of `bytes` in `logs` logs when each block is counted once.
    #[must_use]
    pub fn survivors(&self, bytes: f64, logs: u64) -> f64 {
        if logs <= 1 { bytes } else { bytes * (logs as f64).powf(self.churn.growth - 1.0) }
    }
}

/// The reference seconds that changes over `time` are worth.
fn grown(time: Micros, growth: f64) -> f64 {
    REFERENCE_SECONDS * (time as f64 / (REFERENCE_SECONDS * SECOND as f64)).powf(growth)
}

/// A time with an exponential distribution around `mean` seconds.
pub(crate) fn exponential(mean: f64, rng: &mut fastrand::Rng) -> Micros {
    let seconds = -mean * (1.0 - rng.f64()).ln();
    (seconds * SECOND as f64) as Micros + 1
}

/// The quantile of the standard normal distribution: Abramowitz and Stegun's formula 26.2.23, good to 0.0005.
fn normal(share: f64) -> f64 {
    let tail = share.min(1.0 - share).max(1e-9);
    let t = (-2.0 * tail.ln()).sqrt();
    let quantile = t
        - (2.515_517 + t * (0.802_853 + t * 0.010_328))
            / (1.0 + t * (1.432_788 + t * (0.189_269 + t * 0.001_308)));
    if share < 0.5 { -quantile } else { quantile }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fifth_of_the_vms_makes_four_fifths_of_the_changes() {
        let churn = Churn::published();
        let mut rng = fastrand::Rng::with_seed(1);
        let mut rates: Vec<f64> = (0..100_000).map(|_| churn.vm(0, &mut rng).bytes_per_s).collect();
        rates.sort_by(f64::total_cmp);
        let all: f64 = rates.iter().sum();
        let top: f64 = rates[80_000..].iter().sum();
        assert!((top / all - 0.8).abs() < 0.02, "{}", top / all);
    }

    #[test]
    fn a_day_of_logs_comes_to_the_published_mean() {
        let churn = Churn { growth: 1.0, ..Churn::published() };
        let sizes = LogSizes::new(&churn, 30 * SECOND);
        let mut rng = fastrand::Rng::with_seed(2);
        let (vms, mut bytes) = (2000, 0.0);
        for _ in 0..vms {
            let mut vm = churn.vm(0, &mut rng);
            vm.bytes_per_s = churn.mean_bytes_per_s; // the skew is tested above
            for cycle in 1..=2880 {
                let now = cycle * 30 * SECOND;
                bytes += sizes.draw(&mut vm, now - 30 * SECOND, now, &mut rng);
            }
        }
        let rate = bytes / f64::from(vms) / 86_400.0 / churn.mean_bytes_per_s;
        let with_bursts = 1.0 + 19.0 * 120.0 / 7320.0;
        assert!((rate / with_bursts - 1.0).abs() < 0.02, "{rate} for {with_bursts}");
    }

    #[test]
    fn what_is_written_twice_is_applied_once() {
        let sizes = LogSizes::new(&Churn::published(), 30 * SECOND);
        let vm = Churn::constant(1e6).vm(0, &mut fastrand::Rng::with_seed(3));
        let (one, ten) = (sizes.expected(&vm, 30 * SECOND), sizes.expected(&vm, 300 * SECOND));
        assert!((sizes.survivors(10.0 * one, 10) - ten).abs() < 1.0);
    }
}
