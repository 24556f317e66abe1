use std::collections::HashSet;

use rand::prelude::*;

use super::{CITIES, Parts, Size, THINGS, lines, make, max_tokens_for, person, pick, quarters};
use crate::task::one_prediction;
use crate::{Category, Result, Sample, Samples, Score, Task};

/// Lists all records that match: a third of them, in any order, one per line.
///
/// Scored by F1 over the set of lines, case-sensitive. A repeated line counts as a wrong one.
#[derive(Debug, Clone, Copy)]
pub struct Listing(pub Size);

impl Task for Listing {
    fn name(&self) -> &str {
        "listing"
    }

    fn category(&self) -> Category {
        Category::LongGeneration
    }

    fn samples(&self) -> Result<Samples> {
        make(self.0, |rng| {
            let city = pick(rng, &CITIES);
            let sure = rng.random_range(0..self.0.items);
            let mut records = String::new();
            let mut answer = String::new();
            for i in 0..self.0.items {
                let matches = i == sure || rng.random_range(0..3) == 0;
                let others: Vec<&str> = CITIES.into_iter().filter(|other| *other != city).collect();
                let place = if matches { city } else { pick(rng, &others) };
                let person = person(i);
                records += &format!("{person}; {}; {place}\n", pick(rng, &THINGS));
                if matches {
                    answer += &format!("{person}\n");
                }
            }
            let turn = format!(
                "Each line is a record: name; thing; city.\n\n{records}\nList the names of all records whose city is {city}, \
                 in full, one name a line and nothing else."
            );
            let max_new_tokens = max_tokens_for(&answer);
            Parts { turns: vec![turn], answers: vec![answer], max_new_tokens }
        })
    }

    fn score(&self, sample: &Sample, predictions: &[String]) -> Result<Score> {
        let prediction = one_prediction(sample, predictions)?;
        let wanted: HashSet<&str> =
            sample.answers.iter().flat_map(|answer| lines(answer)).collect();
        let found: HashSet<&str> = lines(prediction).filter(|line| wanted.contains(line)).collect();
        let all = lines(prediction).count() + wanted.len();
        let in_order = sample.answers.iter().flat_map(|answer| lines(answer));
        let right: Vec<bool> = in_order.map(|line| found.contains(line)).collect();
        let value = 2.0 * found.len() as f64 / all.max(1) as f64;
        Ok(Score { value, partial: None, quarters: quarters(&right) })
    }
}
