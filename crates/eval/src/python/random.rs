//! The functions of Python's `random.Random` and numpy's `RandomState` that RULER uses.

use rand_mt::Mt;

/// `random.Random(seed)` of CPython 3.
pub struct Random(Mt);

impl Random {
    pub fn new(seed: u32) -> Self {
        Self(Mt::new_with_key([seed]))
    }

    /// `random()`: 53 bits.
    pub fn random(&mut self) -> f64 {
        let (high, low) = (self.0.next_u32() >> 5, self.0.next_u32() >> 6);
        (f64::from(high) * 67_108_864.0 + f64::from(low)) / 9_007_199_254_740_992.0
    }

    /// `getrandbits(128)`.
    pub fn bits_128(&mut self) -> u128 {
        (0..4).fold(0, |sum, word| sum | (u128::from(self.0.next_u32()) << (32 * word)))
    }

    /// `randrange(n)`, by rejection.
    ///
    /// # Panics
    /// For 0 and for more than 2^32 - 1.
    pub fn below(&mut self, n: usize) -> usize {
        let n = u32::try_from(n).expect("at most 2^32 - 1 choices");
        assert!(n > 0, "no choice");
        let unused = n.leading_zeros();
        loop {
            let drawn = self.0.next_u32() >> unused;
            if drawn < n {
                return drawn as usize;
            }
        }
    }

    /// `''.join(choices(letters, k=count))`.
    pub fn letters(&mut self, letters: &[u8], count: usize) -> String {
        let one = |_| char::from(letters[(self.random() * letters.len() as f64) as usize]);
        (0..count).map(one).collect()
    }

    /// `shuffle(items)`.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            let j = self.below(i + 1);
            items.swap(i, j);
        }
    }

    /// `sample(range(n), count)`; `None` if `count > n`, where Python raises an exception.
    pub fn sample(&mut self, n: usize, count: usize) -> Option<Vec<usize>> {
        if count > n {
            return None;
        }
        // Python uses a pool if that needs less memory than a set of the selected values.
        let mut set_size = 21;
        if count > 5 {
            set_size += 4_usize.pow(((3 * count) as f64).log(4.0).ceil() as u32);
        }
        if n <= set_size {
            let mut pool: Vec<usize> = (0..n).collect();
            let draw = |i| {
                let j = self.below(n - i);
                let drawn = pool[j];
                pool[j] = pool[n - i - 1];
                drawn
            };
            return Some((0..count).map(draw).collect());
        }
        let mut drawn = std::collections::HashSet::new();
        let mut draw = |_| {
            loop {
                let j = self.below(n);
                if drawn.insert(j) {
                    return j;
                }
            }
        };
        Some((0..count).map(&mut draw).collect())
    }
}

/// `numpy.random.RandomState(seed)`.
pub struct RandomState(Mt);

impl RandomState {
    pub fn new(seed: u32) -> Self {
        Self(Mt::new(seed))
    }

    /// `randint(low, high)`, for fewer than 2^32 numbers.
    pub fn randint(&mut self, low: u32, high: u32) -> u32 {
        let span = high - low - 1;
        let mask = u32::MAX.checked_shr(span.leading_zeros()).unwrap_or(0);
        loop {
            let drawn = self.0.next_u32() & mask;
            if drawn <= span {
                return low + drawn;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The expected values were printed by Python 3.11.7 and numpy 2.4.
    #[test]
    fn draws_are_pythons() {
        let mut random = Random::new(42);
        assert_eq!(random.random(), 0.639_426_798_457_883_7);
        assert_eq!(random.sample(1000, 4).unwrap(), RANDOM_SAMPLE);
        assert_eq!(random.sample(30, 6).unwrap(), RANDOM_POOL);
        let mut items: Vec<u32> = (0..8).collect();
        random.shuffle(&mut items);
        assert_eq!(items, RANDOM_SHUFFLED);
        assert_eq!(random.letters(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", 5), RANDOM_LETTERS);
        assert_eq!(random.bits_128(), RANDOM_BITS);
        assert_eq!(random.below(9_000_000), RANDOM_BELOW);
        assert_eq!(random.sample(3, 4), None);
        let mut state = RandomState::new(42);
        assert_eq!([(); 4].map(|()| state.randint(10_000, 99_999)), NUMPY);
    }

    const RANDOM_SAMPLE: [usize; 4] = [25, 759, 281, 250];
    const RANDOM_POOL: [usize; 6] = [7, 4, 23, 3, 21, 27];
    const RANDOM_SHUFFLED: [u32; 8] = [7, 2, 5, 6, 0, 3, 4, 1];
    const RANDOM_LETTERS: &str = "GPOSS";
    const RANDOM_BITS: u128 = 200516721935610438873046705726946649764;
    const RANDOM_BELOW: usize = 4667265;
    const NUMPY: [u32; 4] = [25795, 10860, 86820, 64886];
}
