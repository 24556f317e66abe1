//! State of a sample while a model answers it: the conversation so far and the current turn.

use std::mem;
use std::time::Duration;

use longctx_core::SeqId;

use super::reader::Text;
use super::shorten::ShortenedTurn;
use super::subject::{Answer, Question, SubjectError};

/// A sample that is being answered in its own sequence.
#[derive(Clone)]
pub(super) struct Running<'a> {
    /// Its number in the queue.
    pub number: usize,
    pub question: Question<'a>,
    pub seq: SeqId,
    pub answer: Answer,
    /// Tokens that compression removed.
    pub saved: usize,
    /// Turns of both sides.
    conversation: Vec<String>,
    /// The text so far, read and written.
    read: String,
    /// Its last tokens that have not been fed yet.
    pending: Vec<u32>,
    /// Tokens written in this turn.
    written: Vec<u32>,
    /// Number of these tokens that have been fed.
    fed: usize,
}

impl<'a> Running<'a> {
    pub fn new(number: usize, question: Question<'a>, seq: SeqId) -> Self {
        Self {
            number,
            question,
            seq,
            answer: Answer::default(),
            saved: 0,
            conversation: Vec::new(),
            read: String::new(),
            pending: Vec::new(),
            written: Vec::new(),
            fed: 0,
        }
    }

    /// Returns the state of a sample whose sequence `seq` is a fork of this one's. The time of the
    /// prefill counts for the first of them.
    pub fn fork(&mut self, number: usize, question: Question<'a>, seq: SeqId) -> Self {
        let fork = Self { number, question, seq, ..self.clone() };
        self.answer.model = Duration::ZERO;
        fork
    }

    /// Returns the turn to answer; `None` if all have been answered.
    pub fn turn(&self) -> Option<&'a str> {
        let turns = &self.question.sample.turns;
        turns.get(self.answer.predictions.len()).map(String::as_str)
    }

    pub fn is_first_turn(&self) -> bool {
        self.answer.predictions.is_empty()
    }

    /// Returns the tokens to feed for a turn, and whether they continue the sequence; otherwise it
    /// starts again.
    pub fn prompt(
        &mut self,
        turn: ShortenedTurn,
        text: &dyn Text,
    ) -> Result<(Vec<u32>, bool), SubjectError> {
        let sample = self.question.sample;
        self.saved += turn.saved;
        self.answer.model += turn.spent;
        self.conversation.push(turn.text);
        let in_template = if sample.chat { text.chat(&self.conversation)? } else { None };
        let template = in_template.is_some();
        // A trailing space would be a separate token, which is rare at this position in training
        // data.
        let plain = || self.conversation.join("\n").trim_end_matches(' ').to_owned();
        let mut full = in_template.unwrap_or_else(plain);
        if self.answer.predictions.len() + 1 == sample.turns.len() {
            full += sample.answer_prefix.as_deref().unwrap_or("");
        }
        let pending = mem::take(&mut self.pending);
        let answer = &mut self.answer;
        let prompt = match full.strip_prefix(&self.read) {
            Some(rest) if !answer.predictions.is_empty() => {
                let rest = text.encode(rest, false)?;
                answer.prompt_tokens += rest.len();
                ([pending, rest].concat(), true)
            }
            _ => {
                let all = text.encode(&full, !template)?;
                answer.prompt_tokens = all.len().saturating_sub(answer.new_tokens);
                (all, false)
            }
        };
        self.read = full;
        Ok(prompt)
    }

    /// Adds the time of a turn's prompt: `before` is the time until the prefill, `all` the time
    /// until the first token.
    pub fn prefilled(&mut self, before: Duration, all: Duration) {
        if self.is_first_turn() {
            self.answer.first_token = all;
        }
        self.answer.model += all - before;
    }

    /// Appends a token to the turn's answer and returns whether the answer continues.
    pub fn take(&mut self, token: u32, text: &dyn Text) -> Result<bool, SubjectError> {
        if self.written.len() >= self.question.max_new_tokens || text.stop().contains(&token) {
            return Ok(false);
        }
        self.written.push(token);
        let line_can_end = self.question.stops_at_newline && self.written.len() > 1;
        let ended = line_can_end && text.decode(&[token])?.contains('\n');
        Ok(!ended && self.written.len() < self.question.max_new_tokens)
    }

    /// Returns the next token to feed: the last one written.
    pub fn last(&self) -> u32 {
        self.written[self.fed]
    }

    /// Records a decode step, which fed the last token. `share` is the sample's share of its time.
    pub fn stepped(&mut self, share: Duration) {
        self.fed += 1;
        self.answer.decode_steps += 1;
        self.answer.decode += share;
        self.answer.model += share;
    }

    /// Ends the turn's answer.
    pub fn end_turn(&mut self, text: &dyn Text) -> Result<(), SubjectError> {
        let written = mem::take(&mut self.written);
        self.answer.new_tokens += written.len();
        let answer = text.decode(&written)?;
        self.pending = written[mem::take(&mut self.fed)..].to_vec();
        self.read += &answer;
        self.conversation.push(answer.clone());
        self.answer.predictions.push(answer);
        Ok(())
    }
}
