use rand::prelude::*;

use super::{Parts, Size, make, max_tokens_for, quarters, right_lines, same_lines};
use crate::task::one_prediction;
use crate::{Category, Result, Sample, Samples, Score, Task};

const STATES: [&str; 6] = ["red", "green", "blue", "white", "black", "grey"];

/// Continues a state machine: six states, two inputs, a sequence of inputs. Each step is a line.
///
/// Scored by the share of steps that are right and at the right index, so that an error also costs
/// all steps that depend on it.
#[derive(Debug, Clone, Copy)]
pub struct StateMachine(pub Size);

impl Task for StateMachine {
    fn name(&self) -> &str {
        "state-machine"
    }

    fn category(&self) -> Category {
        Category::LongGeneration
    }

    fn samples(&self) -> Result<Samples> {
        make(self.0, |rng| {
            let next: Vec<[usize; 2]> =
                STATES.iter().map(|_| [0, 1].map(|_| rng.random_range(0..STATES.len()))).collect();
            let mut rules = String::new();
            for (state, [on_a, on_b]) in STATES.iter().zip(&next) {
                rules += &format!(
                    "{state}: a goes to {}, b goes to {}.\n",
                    STATES[*on_a], STATES[*on_b]
                );
            }
            let start = rng.random_range(0..STATES.len());
            let (mut state, mut inputs, mut answer) = (start, String::new(), String::new());
            for step in 1..=self.0.items {
                let input = rng.random_range(0..2);
                state = next[state][input];
                inputs += &format!("{step}. {}\n", ["a", "b"][input]);
                answer += &format!("{step}. {}\n", STATES[state]);
            }
            let turn = format!(
                "A machine has these rules.\n\n{rules}\nIt starts in {}. Its inputs are:\n\n{inputs}\nWrite the state after each \
                 input, one a line, numbered like the inputs, and nothing else.",
                STATES[start]
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
