use rand::prelude::*;

use super::{
    CITIES, Parts, Size, THINGS, make, max_tokens_for, person, pick, quarters, right_lines,
    same_lines,
};
use crate::task::one_prediction;
use crate::{Category, Result, Sample, Samples, Score, Task};

/// Copies a table with one edit: every row of one city gets a new item.
///
/// Scored by the share of lines that are right and at the right index.
#[derive(Debug, Clone, Copy)]
pub struct TableEdit(pub Size);

impl Task for TableEdit {
    fn name(&self) -> &str {
        "table-edit"
    }

    fn category(&self) -> Category {
        Category::LongGeneration
    }

    fn samples(&self) -> Result<Samples> {
        make(self.0, |rng| {
            let (city, new) = (pick(rng, &CITIES), "compass");
            let (mut table, mut answer) = (String::new(), String::new());
            for i in 0..self.0.items {
                let person = person(i);
                let (thing, place) = (pick(rng, &THINGS), pick(rng, &CITIES));
                let number = rng.random_range(100..1000);
                table += &format!("{person},{thing},{place},{number}\n");
                let thing = if place == city { new } else { thing };
                answer += &format!("{person},{thing},{place},{number}\n");
            }
            let turn = format!(
                "Here is a table with the columns name, thing, city, number.\n\n{table}\nWrite the whole table again, line by line \
                 and in the same order. Where the city is {city}, write {new} as the thing. Write nothing else."
            );
            let max_new_tokens = max_tokens_for(&answer);
            Parts { turns: vec![turn], answers: vec![answer], max_new_tokens }
        })
    }

    fn score(&self, sample: &Sample, predictions: &[String]) -> Result<Score> {
        let prediction = one_prediction(sample, predictions)?;
        let scores = sample.answers.iter().map(|answer| same_lines(prediction, answer));
        let right = sample.answers.first().map(|answer| right_lines(prediction, answer));
        let quarters = right.and_then(|right| quarters(&right));
        Ok(Score { value: scores.fold(0.0, f64::max), partial: None, quarters })
    }
}
