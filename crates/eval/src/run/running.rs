//! One sample on its way through a model: its conversation so far, and the turn that it is in.

use std::mem;
use std::time::Duration;

use longctx_core::SeqId;

use super::reader::Text;
use super::shorten::Short;
use super::subject::{Answer, Fault, Question};

/// A sample that a model answers in a sequence of its own.
pub(super) struct Running<'a> {
    /// Its number in the queue.
    pub number: usize,
    pub question: Question<'a>,
    pub seq: SeqId,
    pub answer: Answer,
    /// Tokens that compression took.
    pub saved: usize,
    /// Turns of both sides, as they were read and written.
    conversation: Vec<String>,
    /// The text that the model has read and written.
    read: String,
    /// Tokens of it that were written in earlier turns and not fed yet.
    pending: Vec<u32>,
    /// Tokens written in this turn.
    written: Vec<u32>,
    /// How many of them were fed.
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

    /// The turn that is to be answered; `None` if all are.
    pub fn turn(&self) -> Option<&'a str> {
        let turns = &self.question.sample.turns;
        turns.get(self.answer.predictions.len()).map(String::as_str)
    }

    pub fn is_first_turn(&self) -> bool {
        self.answer.predictions.is_empty()
    }

    /// The tokens to feed for a turn, and whether they follow those fed before; else the sequence
    /// begins anew with them.
    pub fn prompt(&mut self, turn: Short, text: &dyn Text) -> Result<(Vec<u32>, bool), Fault> {
        let sample = self.question.sample;
        self.saved += turn.saved;
        self.answer.model += turn.spent;
        self.conversation.push(turn.text);
        let in_template = if sample.chat { text.chat(&self.conversation)? } else { None };
        let template = in_template.is_some();
        // A space at the end would be a token of its own, which models have seldom seen there.
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

    /// Counts the time of a turn's prompt, which was made ready in `before` and had its first token
    /// after `all`.
    pub fn prefilled(&mut self, before: Duration, all: Duration) {
        if self.is_first_turn() {
            self.answer.first_token = all;
        }
        self.answer.model += all - before;
    }

    /// Takes the token that the model chose; returns whether the turn's answer goes on.
    pub fn take(&mut self, token: u32, text: &dyn Text) -> Result<bool, Fault> {
        if self.written.len() >= self.question.max_new_tokens || text.stop().contains(&token) {
            return Ok(false);
        }
        self.written.push(token);
        let line_can_end = self.question.stops_at_newline && self.written.len() > 1;
        let ended = line_can_end && text.decode(&[token])?.contains('\n');
        Ok(!ended && self.written.len() < self.question.max_new_tokens)
    }

    /// The token to feed: the one written last.
    pub fn last(&self) -> u32 {
        self.written[self.fed]
    }

    /// Counts a step that fed it.
    pub fn stepped(&mut self, share: Duration) {
        self.fed += 1;
        self.answer.decode_steps += 1;
        self.answer.decode += share;
        self.answer.model += share;
    }

    /// Ends the turn's answer.
    pub fn end_turn(&mut self, text: &dyn Text) -> Result<(), Fault> {
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
