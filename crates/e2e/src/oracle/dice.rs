//! Chance from a seed.

use witness::Random;

/// Numbers that look random, the same for the same seed.
#[derive(Debug, Clone)]
pub struct Dice(Random);

impl Dice {
    /// Dice of this seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(Random::new(seed))
    }

    /// The next 64 bits.
    pub fn roll(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0.below(end)
    }

    /// A number of sectors from 1 to `max`, short ones as likely as long ones: each power of two has its share.
    pub fn sectors(&mut self, max: u64) -> u64 {
        let power = self.below(u64::from(max.ilog2()) + 1);
        let least = 1 << power;
        (least + self.below(least)).min(max)
    }
}
