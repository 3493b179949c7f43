//! Chance with a seed: the same numbers on every machine, whatever else happens.

/// xoshiro256** (Blackman and Vigna), seeded through splitmix64 as its authors recommend.
#[derive(Debug, Clone)]
pub struct Chance([u64; 4]);

/// Spreads a seed over 64 bits; also good enough to derive one seed from another.
#[must_use]
pub const fn splitmix(seed: u64) -> u64 {
    let mut mixed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

impl Chance {
    /// The stream of this seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        let a = splitmix(seed);
        let b = splitmix(a);
        let c = splitmix(b);
        Self([a, b, c, splitmix(c)])
    }

    /// Any number.
    pub const fn next(&mut self) -> u64 {
        let state = &mut self.0;
        let result = state[1].wrapping_mul(5).rotate_left(7).wrapping_mul(9);
        let shifted = state[1] << 17;
        state[2] ^= state[0];
        state[3] ^= state[1];
        state[1] ^= state[2];
        state[0] ^= state[3];
        state[2] ^= shifted;
        state[3] = state[3].rotate_left(45);
        result
    }

    /// A number below `bound`; 0 where there is none below it. (The bias is below 2^-32 for the bounds used here.)
    pub const fn below(&mut self, bound: u64) -> u64 {
        if bound == 0 { 0 } else { self.next() % bound }
    }

    /// A number from `from` to `to`, both included.
    pub const fn within(&mut self, from: u64, to: u64) -> u64 {
        from + self.below(to - from + 1)
    }

    /// A place in something of this length.
    pub fn place(&mut self, len: usize) -> usize {
        usize::try_from(self.below(len as u64)).unwrap_or(0)
    }

    /// True once in `n` times.
    pub const fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// True in so many of a hundred times.
    pub const fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// Uniform in 0..1.
    pub fn unit(&mut self) -> f64 {
        // 53 bits: as many as the fraction of a double has.
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Sixteen bytes, for ids.
    pub fn bytes(&mut self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.next().to_le_bytes());
        bytes[8..].copy_from_slice(&self.next().to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_means_the_same_numbers_everywhere() {
        // The reference values of splitmix64 for seed 0: https://prng.di.unimi.it/splitmix64.c
        assert_eq!(splitmix(0), 0xe220_a839_7b1d_cdaf);
        let (mut one, mut other) = (Chance::new(7), Chance::new(7));
        assert!((0..100).all(|_| one.next() == other.next()));
        assert_ne!(Chance::new(7).next(), Chance::new(8).next());
        assert!((0..1000).all(|_| (3..=5).contains(&one.within(3, 5))));
    }
}
