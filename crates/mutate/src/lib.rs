#![doc = include_str!("../README.md")]

mod memory;
mod mutation;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

pub use memory::Counting;
use mutation::mutated;
use rand::SeedableRng;
use rand::rngs::StdRng;

/// The longest that one input may take.
const LONGEST: Duration = Duration::from_secs(10);
/// Inputs that are tried if `LONGCTX_FUZZ_INPUTS` does not say how many.
const INPUTS: u64 = 1000;

/// A test of what reads one kind of file.
pub struct Trial<'a> {
    /// What is read; it names the file in which an input that fails is left.
    pub name: &'a str,
    /// Files that are right, which inputs are made from.
    pub corpus: &'a [Vec<u8>],
    /// The most bytes that reading a file of so many bytes may take. Checked where [`Counting`] is
    /// the allocator.
    pub memory: fn(usize) -> usize,
}

impl Trial<'_> {
    /// Has `read` read the corpus and mutations of it; returns how many inputs.
    ///
    /// # Panics
    /// With the path of the input that made `read` panic, take too much memory or take too long.
    pub fn run(&self, mut read: impl FnMut(&[u8])) -> u64 {
        let wanted = std::env::var("LONGCTX_FUZZ_INPUTS").ok().and_then(|text| text.parse().ok());
        let wanted: u64 = wanted.unwrap_or(INPUTS);
        // What is made once, such as tables, is made by the first reading, which is not measured.
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
