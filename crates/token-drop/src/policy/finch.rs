//! Finch: Corallo and Papotti, "FINCH: Prompt-guided Key-Value Cache Compression for Large Language Models", TACL 2024.

use super::window::{check_window, end_with};
use crate::Group;
use longctx_core::{EvictionPolicy, Held, Mass, Needs, Protected, Result};

/// Keeps what the question at the prompt's end attends to, and closes the gaps: kept keys are rotated to contiguous positions.
///
/// Each query of the question counts by the number of tokens before it, and nothing is smoothed.
#[derive(Debug, Clone, Copy)]
pub struct Finch {
    question: usize,
    group: Group,
}

impl Finch {
    /// With a question of so many tokens at the prompt's end, which stay.
    ///
    /// # Errors
    /// [`Error::Setting`](longctx_core::Error::Setting) if there are none.
    pub fn new(question: usize) -> Result<Self> {
        check_window(question)?;
        Ok(Self { question, group: Group::Mean })
    }

    /// How the scores of a group's query heads are joined; by default by their mean.
    #[must_use]
    pub fn with_group(mut self, group: Group) -> Self {
        self.group = group;
        self
    }
}

impl EvictionPolicy for Finch {
    fn needs(&self) -> Needs {
        let mass = Mass::Newest { queries: self.question, by_position: true };
        Needs { mass: Some(mass), ..Default::default() }
    }

    fn score(&self, held: &Held<'_>) -> Result<Vec<Vec<f32>>> {
        let scores = held.heads.iter().map(|head| {
            let mut joined = self.group.join(head.mass);
            joined.truncate(head.positions.len().saturating_sub(self.question));
            joined
        });
        let lens: Vec<_> = held.heads.iter().map(|head| head.positions.len()).collect();
        Ok(end_with(scores.collect(), &lens))
    }

    fn protects(&self, _: usize) -> Protected {
        Protected { sinks: 0, recent: self.question }
    }

    fn rerotates(&self) -> bool {
        true
    }

    /// The question comes once.
    fn decode_step(&self) -> Option<usize> {
        None
    }
}
