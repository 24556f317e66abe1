#![doc = include_str!("../README.md")]

mod memory;
mod mutation;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

pub use memory::Counting;
use mutation::mutated;
use rand::SeedableRng;
use rand::rngs::StdRng;

/// The time limit per input.
const LONGEST: Duration = Duration::from_secs(10);
/// The number of inputs unless `LONGCTX_FUZZ_INPUTS` is set.
const INPUTS: u64 = 1000;

/// A test of a function that reads one kind of file.
pub struct Trial<'a> {
    /// The name of the test, and of the file to which a failing input is written.
    pub name: &'a str,
    /// Valid files, from which inputs are derived.
    pub corpus: &'a [Vec<u8>],
    /// Returns the largest number of bytes that reading may allocate for a file of the given size.
    /// Checked if [`Counting`] is the global allocator.
    pub memory: fn(usize) -> usize,
}

impl Trial<'_> {
    /// Calls `read` with the corpus and with mutations of it. Returns the number of mutations.
    ///
    /// # Panics
    /// If `read` panics, allocates too much memory or takes too long. The message contains the path
    /// of the input.
    pub fn run(&self, mut read: impl FnMut(&[u8])) -> u64 {
        let wanted = std::env::var("LONGCTX_FUZZ_INPUTS").ok().and_then(|text| text.parse().ok());
        let wanted: u64 = wanted.unwrap_or(INPUTS);
        // The first calls are not measured, because they initialize tables and other global state.
        self.corpus.iter().for_each(|input| read(input));
        for input in self.corpus {
            self.check(input, &mut read);
        }
        for seed in 0..wanted {
            let input = mutated(&mut StdRng::seed_from_u64(seed), self.corpus);
            self.check(&input, &mut read);
        }
        wanted
    }

    fn check(&self, input: &[u8], read: &mut impl FnMut(&[u8])) {
        let (before, started) = (memory::restart(), Instant::now());
        let panicked = catch_unwind(AssertUnwindSafe(|| read(input))).is_err();
        let taken = memory::peak().saturating_sub(before);
        let most = (self.memory)(input.len());
        let fault = match started.elapsed() {
            _ if panicked => "panicked".to_owned(),
            _ if taken > most => {
                format!("took {taken} bytes of memory, at most {most} are allowed")
            }
            time if time > LONGEST => format!("took {time:?}"),
            _ => return,
        };
        let path = std::env::temp_dir().join(format!("{}-{}.bin", self.name, std::process::id()));
        let left = std::fs::write(&path, input).is_ok();
        let place = if left { path.display().to_string() } else { format!("{input:?}") };
        panic!("{}: an input of {} bytes {fault}: {place}", self.name, input.len());
    }
}
