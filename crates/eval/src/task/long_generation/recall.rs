use rand::prelude::*;

use super::{CITIES, Parts, Size, THINGS, make, person, pick, quarters};
use crate::task::check_turns;
use crate::{Category, Result, Sample, Samples, Score, Task};

/// Number of questions after the facts, one per turn.
const QUESTIONS: usize = 8;

/// Multi-turn recall: facts about people in the first turn, then one question per turn.
///
/// Scored by the share of turns whose answer contains the right code and no other.
#[derive(Debug, Clone, Copy)]
pub struct Recall(pub Size);

impl Task for Recall {
    fn name(&self) -> &str {
        "recall"
    }

    fn category(&self) -> Category {
        Category::LongGeneration
    }

    fn samples(&self) -> Result<Samples> {
        make(self.0, |rng| {
            let people: Vec<String> = (0..self.0.items).map(person).collect();
            let codes: Vec<String> =
                people.iter().map(|_| rng.random_range(10_000..100_000).to_string()).collect();
            let mut turn = "Remember these facts. I will ask about them.\n\n".to_owned();
            for (person, code) in people.iter().zip(&codes) {
                let (thing, city) = (pick(rng, &THINGS), pick(rng, &CITIES));
                turn += &format!(
                    "{person} took the {thing} to {city}. The code of {person} is {code}.\n"
                );
            }
            let (mut turns, mut answers) = (Vec::new(), Vec::new());
            for _ in 0..QUESTIONS {
                let i = rng.random_range(0..people.len());
                let person = &people[i];
                turn += &format!("\nWhat is the code of {person}? Answer with the number only.");
                turns.push(std::mem::take(&mut turn));
                answers.push(codes[i].clone());
            }
            Parts { turns, answers, max_new_tokens: 32 }
        })
    }

    fn score(&self, sample: &Sample, predictions: &[String]) -> Result<Score> {
        check_turns(sample, predictions)?;
        let right = |(prediction, answer): (&String, &String)| {
            let mut numbers = prediction
                .split(|c: char| !c.is_ascii_digit())
                .filter(|number| !number.is_empty())
                .peekable();
            numbers.peek().is_some() && numbers.all(|number| number == answer)
        };
        let right: Vec<bool> = predictions.iter().zip(&sample.answers).map(right).collect();
        let count = right.iter().filter(|right| **right).count();
        let value = count as f64 / right.len().max(1) as f64;
        Ok(Score { value, partial: None, quarters: quarters(&right) })
    }
}
