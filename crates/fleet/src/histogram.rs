//! Distributions in bounded memory, to be added up over sites.

/// Steps between a value and its double: quantiles are right to about 1 %.
const STEPS: u64 = 64;
const STEPS_BITS: u32 = STEPS.trailing_zeros();

/// A distribution of whole numbers. Adding two up gives the same in any order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Histogram {
    counts: Vec<u64>,
    count: u64,
    sum: u128,
    max: u64,
}

impl Histogram {
    /// Adds a value.
    pub fn add(&mut self, value: u64) {
        let slot = slot(value);
        if slot >= self.counts.len() {
            self.counts.resize(slot + 1, 0);
        }
        self.counts[slot] += 1;
        self.count += 1;
        self.sum += u128::from(value);
        self.max = self.max.max(value);
    }

    /// Adds another distribution.
    pub fn merge(&mut self, other: &Self) {
        if other.counts.len() > self.counts.len() {
            self.counts.resize(other.counts.len(), 0);
        }
        self.counts.iter_mut().zip(&other.counts).for_each(|(mine, theirs)| *mine += theirs);
        self.count += other.count;
        self.sum += other.sum;
        self.max = self.max.max(other.max);
    }

    /// How many values there are.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Their mean; 0 without values.
    #[must_use]
    pub fn mean(&self) -> f64 {
        if self.count == 0 { 0.0 } else { self.sum as f64 / self.count as f64 }
    }

    /// The greatest; 0 without values.
    #[must_use]
    pub fn max(&self) -> u64 {
        self.max
    }

    /// The value that this share of all values does not exceed; 0 without values.
    #[must_use]
    pub fn quantile(&self, share: f64) -> u64 {
        let rank = (share * self.count as f64).ceil().max(1.0) as u64;
        let mut seen = 0;
        let found = self.counts.iter().position(|count| {
            seen += count;
            seen >= rank
        });
        // The middle of the slot: its ends would be off always to the same side.
        let middle = |slot: usize| if slot == 0 { 0 } else { (value(slot - 1) + 1 + value(slot)) / 2 };
        found.map_or(0, |slot| middle(slot).min(self.max))
    }
}

/// Small values have slots of their own, larger ones share one with their neighbours.
fn slot(value: u64) -> usize {
    if value < STEPS {
        return value as usize;
    }
    let octave = value.ilog2() - STEPS_BITS;
    (u64::from(octave + 1) * STEPS + (value >> octave) - STEPS) as usize
}

/// The greatest value of a slot.
fn value(slot: usize) -> u64 {
    let (octave, step) = (slot as u64 / STEPS, slot as u64 % STEPS);
    if octave == 0 { step } else { ((STEPS + step + 1) << (octave - 1)) - 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_right_to_a_part_in_sixty_four() {
        let mut histogram = Histogram::default();
        (1..=1_000_000).for_each(|value| histogram.add(value));
        for share in [0.001, 0.5, 0.99, 1.0] {
            let (found, exact) = (histogram.quantile(share) as f64, share * 1e6);
            assert!((found / exact - 1.0).abs() < 1.0 / 64.0, "{share}: {found}");
        }
        assert_eq!((histogram.max(), histogram.mean()), (1_000_000, 500_000.5));
    }

    #[test]
    fn every_value_lies_in_its_slot() {
        for n in (0..64).map(|bit| 1_u64 << bit).chain(0..5000) {
            let at = slot(n);
            assert!(value(at) >= n && (at == 0 || value(at - 1) < n), "{n}");
        }
    }

    #[test]
    fn sums_do_not_depend_on_the_order() {
        let (mut one, mut two) = (Histogram::default(), Histogram::default());
        (0..100).for_each(|n| one.add(n));
        (50..5000).for_each(|n| two.add(n));
        let sum = |first: &Histogram, second: &Histogram| {
            let mut sum = first.clone();
            sum.merge(second);
            sum
        };
        assert_eq!(sum(&one, &two), sum(&two, &one));
        assert_eq!(Histogram::default().quantile(0.5), 0);
    }
}
