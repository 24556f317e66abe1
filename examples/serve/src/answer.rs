//! The answer to one request: converts the scheduler's events to text.

use std::sync::Arc;
use std::time::Instant;

use crate::api::{Failure, PromptTokens, Usage};
use crate::routes::App;
use crate::scheduler::Event;
use crate::text::{Detokenizer, StopStrings};
use tokio::sync::mpsc::UnboundedReceiver;

/// A part of an answer.
pub enum Piece {
    /// A piece of text.
    Text(String),
    /// The end of the answer, with its reason: "stop" or "length".
    End(&'static str),
}

/// A streamed answer. Dropping it cancels the request.
pub struct Answer {
    app: Arc<App>,
    events: UnboundedReceiver<Event>,
    detokenizer: Detokenizer,
    stops: StopStrings,
    asked: Instant,
    prompt_tokens: usize,
    written: usize,
    cached: usize,
    /// The reason of the end, if text remains to be returned before it.
    ended: Option<&'static str>,
}

impl Answer {
    /// Creates the answer from the events of a request that was received at `asked`.
    pub fn new(
        app: Arc<App>,
        events: UnboundedReceiver<Event>,
        prompt_tokens: usize,
        stops: Vec<String>,
        asked: Instant,
    ) -> Self {
        let (detokenizer, stops) = (Detokenizer::default(), StopStrings::new(stops));
        let (written, cached, ended) = (0, 0, None);
        Self { app, events, detokenizer, stops, asked, prompt_tokens, written, cached, ended }
    }

    /// Returns the next piece of text that is not empty, or the end.
    ///
    /// # Errors
    /// If the request failed, or the scheduler has stopped.
    pub async fn next(&mut self) -> Result<Piece, Failure> {
        loop {
            if let Some(reason) = self.ended {
                return Ok(Piece::End(reason));
            }
            let (text, ended) = match self.events.recv().await {
                Some(Event::Token(token)) => self.token(token)?,
                Some(Event::Done { stopped, cached }) => {
                    self.cached = cached;
                    (self.rest()?, Some(if stopped { "stop" } else { "length" }))
                }
                Some(Event::Failed(message)) => return Err(Failure::unavailable(message)),
                None => return Err(Failure::unavailable("the server is shutting down")),
            };
            self.ended = ended;
            if !text.is_empty() {
                return Ok(Piece::Text(text));
            }
        }
    }

    fn token(&mut self, token: u32) -> Result<(String, Option<&'static str>), Failure> {
        if self.written == 0 {
            self.app.metrics.first_token.observe(self.asked.elapsed().as_secs_f64());
        }
        self.written += 1;
        let decode = |tokens: &[u32]| self.app.llm.decode(tokens);
        let piece = self.detokenizer.push(token, &decode).map_err(Failure::unavailable)?;
        let (text, stopped) = self.stops.push(&piece);
        if stopped {
            // This cancels the request in the scheduler.
            self.events.close();
        }
        Ok((text, stopped.then_some("stop")))
    }

    /// Returns the text that was held back.
    fn rest(&mut self) -> Result<String, Failure> {
        let decode = |tokens: &[u32]| self.app.llm.decode(tokens);
        let piece = self.detokenizer.finish(&decode).map_err(Failure::unavailable)?;
        let (text, stopped) = self.stops.push(&piece);
        Ok(if stopped { text } else { text + &self.stops.finish() })
    }

    /// Returns the numbers of tokens so far.
    pub fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.prompt_tokens,
            completion_tokens: self.written,
            total_tokens: self.prompt_tokens + self.written,
            prompt_tokens_details: PromptTokens { cached_tokens: self.cached },
        }
    }
}
