//! Tasks with long answers or many turns. They show what a cache forgets while the model generates,
//! which LongBench's short answers cannot show. Generated from a seed, of any length, scored by
//! program.

mod copy;
mod listing;
mod machine;
mod recall;
mod table;

use rand::prelude::*;
use rand_chacha::ChaCha8Rng;

pub use copy::Copy;
pub use listing::Listing;
pub use machine::StateMachine;
pub use recall::Recall;
pub use table::TableEdit;

use crate::{Error, Result, Sample, Samples, Task};

/// The largest number of items of a sample, and of samples of a task.
const MAX: usize = 100_000;

/// The size of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Records, rows, facts or steps per sample; the length of the text is proportional to it.
    pub items: usize,
    /// Number of samples.
    pub samples: usize,
    /// Seed.
    pub seed: u64,
}

/// Returns all five tasks at one size.
///
/// ```
/// use longctx_eval::long_generation::{Size, tasks};
///
/// for task in tasks(Size { items: 20, samples: 2, seed: 1 }) {
///     let sample = task.samples()?.samples.remove(0);
///     assert_eq!(task.score(&sample, &sample.answers)?.value, 1.0);
/// }
/// # Ok::<(), longctx_eval::Error>(())
/// ```
pub fn tasks(size: Size) -> Vec<Box<dyn Task>> {
    vec![
        Box::new(Recall(size)),
        Box::new(Copy(size)),
        Box::new(Listing(size)),
        Box::new(TableEdit(size)),
        Box::new(StateMachine(size)),
    ]
}

/// Returns the names of the five tasks.
pub fn names() -> impl Iterator<Item = &'static str> {
    ["recall", "copy", "listing", "table-edit", "state-machine"].into_iter()
}

const NAMES: [&str; 20] = [
    "Anna", "Bruno", "Clara", "Daniel", "Edith", "Felix", "Greta", "Henry", "Ida", "Jonas",
    "Katrin", "Leo", "Marta", "Nils", "Olga", "Peter", "Rosa", "Simon", "Tilda", "Viktor",
];
const THINGS: [&str; 16] = [
    "lantern", "letter", "map", "basket", "notebook", "ladder", "kettle", "rope", "mirror",
    "violin", "cart", "hammer", "bench", "clock", "boat", "chair",
];
const CITIES: [&str; 12] = [
    "Almaty", "Belgrade", "Cairo", "Dakar", "Helsinki", "Istanbul", "Jakarta", "Lisbon", "Mumbai",
    "Nairobi", "Sofia", "Toronto",
];

/// Returns the name of person `i`, all different: "Anna", …, "Anna 2", …
fn person(i: usize) -> String {
    let name = NAMES[i % NAMES.len()];
    if i < NAMES.len() { name.to_owned() } else { format!("{name} {}", i / NAMES.len() + 1) }
}

fn pick<'a>(rng: &mut ChaCha8Rng, from: &[&'a str]) -> &'a str {
    from[rng.random_range(0..from.len())]
}

/// Generates `size.samples` samples of a task, each with its own random generator.
fn make(size: Size, sample: impl Fn(&mut ChaCha8Rng) -> Parts) -> Result<Samples> {
    for (name, value, least) in [("items", size.items, 1), ("samples", size.samples, 0)] {
        if !(least..=MAX).contains(&value) {
            return Err(Error::setting(name, format!("{least} to {MAX}"), value));
        }
    }
    let one = |i: usize| {
        let mut rng = ChaCha8Rng::seed_from_u64(size.seed);
        rng.set_stream(i as u64);
        let Parts { turns, answers, max_new_tokens } = sample(&mut rng);
        let id = format!("{}-{}-{i}", size.items, size.seed);
        Sample {
            id,
            turns,
            context: None,
            question: None,
            answers,
            classes: Vec::new(),
            max_new_tokens,
            chat: true,
            ..Sample::default()
        }
    };
    Ok(Samples { samples: (0..size.samples).map(one).collect(), skipped: Vec::new() })
}

/// The parts that differ between the samples of a task.
struct Parts {
    turns: Vec<String>,
    answers: Vec<String>,
    max_new_tokens: usize,
}

/// Returns a number of tokens that suffices for twice the length of `text`, because no tokenizer
/// uses more than one token per character.
fn max_tokens_for(text: &str) -> usize {
    text.len() + 16
}

/// Returns the lines that are not empty, without the white space around them.
fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(str::trim).filter(|line| !line.is_empty())
}

/// Returns for each line of the answer whether the prediction has it at the same index.
fn right_lines(prediction: &str, answer: &str) -> Vec<bool> {
    let ours = lines(prediction).map(Some).chain(std::iter::repeat(None));
    lines(answer).zip(ours).map(|(theirs, ours)| ours == Some(theirs)).collect()
}

/// Returns the number of equal lines at the same index, divided by the number of lines of the
/// longer text.
fn same_lines(prediction: &str, answer: &str) -> f64 {
    let same = right_lines(prediction, answer).into_iter().filter(|right| *right).count();
    let longer = lines(prediction).count().max(lines(answer).count());
    if longer == 0 { 1.0 } else { same as f64 / longer as f64 }
}

/// Returns the share that is right in each quarter; `None` for fewer than four items.
fn quarters(right: &[bool]) -> Option<[f64; 4]> {
    if right.len() < 4 {
        return None;
    }
    let share = |quarter: usize| {
        let part = &right[quarter * right.len() / 4..(quarter + 1) * right.len() / 4];
        part.iter().filter(|right| **right).count() as f64 / part.len() as f64
    };
    Some([0, 1, 2, 3].map(share))
}
