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
    /// Whether the answer was returned to its end, or failed, and counted in the metrics.
    counted: bool,
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
        Self {
            app,
            events,
            detokenizer: Detokenizer::default(),
            stops: StopStrings::new(stops),
            asked,
            prompt_tokens,
            written: 0,
            cached: 0,
            ended: None,
            counted: false,
        }
    }

    /// Returns the next piece of text that is not empty, or the end.
    ///
    /// # Errors
    /// If the request failed, or the scheduler has stopped.
    pub async fn next(&mut self) -> Result<Piece, Failure> {
        let piece = self.next_piece().await;
        let metrics = &self.app.metrics;
        match piece {
            Ok(Piece::Text(_)) => return piece,
            Ok(Piece::End(_)) => metrics.done.inc(),
            Err(_) => metrics.failed.inc(),
        };
        self.counted = true;
        piece
    }

    async fn next_piece(&mut self) -> Result<Piece, Failure> {
        loop {
            if let Some(reason) = self.ended {
                return Ok(Piece::End(reason));
            }
            let (text, ended) = match self.events.recv().await {
                Some(Event::Started { cached }) => {
                    self.cached = cached;
                    continue;
                }
                Some(Event::Token(token)) => self.token(token)?,
                Some(Event::Done { stopped }) => {
                    let (text, found) = self.rest()?;
                    (text, Some(if stopped || found { "stop" } else { "length" }))
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

    /// Returns the text that was held back, and whether a stop string was found in it.
    fn rest(&mut self) -> Result<(String, bool), Failure> {
        let decode = |tokens: &[u32]| self.app.llm.decode(tokens);
        let piece = self.detokenizer.finish(&decode).map_err(Failure::unavailable)?;
        let (text, stopped) = self.stops.push(&piece);
        Ok((if stopped { text } else { text + &self.stops.finish() }, stopped))
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

impl Drop for Answer {
    fn drop(&mut self) {
        if !self.counted {
            self.app.metrics.cancelled.inc();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use longctx_examples::{llm::Llm, model, place::Place};
    use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

    fn app() -> Arc<App> {
        let path = model::embedded();
        let llm = Llm::open(path.to_str().unwrap(), &Place::default()).unwrap();
        Arc::new(App {
            llm,
            name: "small".into(),
            context: 100,
            vocab_size: 100,
            max_tokens: 100,
            queue: 100,
            api_key: None,
            requests: unbounded_channel().0,
            metrics: Default::default(),
            count: Default::default(),
        })
    }

    fn answer(app: &Arc<App>, stop: &str) -> (UnboundedSender<Event>, Answer) {
        let (events, received) = unbounded_channel();
        let answer = Answer::new(app.clone(), received, 20, vec![stop.into()], Instant::now());
        (events, answer)
    }

    async fn finished(answer: &mut Answer) -> (String, &'static str) {
        let mut text = String::new();
        loop {
            match answer.next().await {
                Ok(Piece::Text(piece)) => text += &piece,
                Ok(Piece::End(reason)) => return (text, reason),
                Err(_) => return (text, "failed"),
            }
        }
    }

    /// Each answer counts once: as done (also if a stop string ends it), as failed or as cancelled.
    #[tokio::test]
    async fn answers_are_counted_by_their_end() {
        let app = app();
        let tokens = app.llm.encode(" the key is long").unwrap();
        let send = |events: &UnboundedSender<Event>, end: Event| {
            events.send(Event::Started { cached: 16 }).unwrap();
            for &token in &tokens {
                events.send(Event::Token(token)).unwrap();
            }
            events.send(end).unwrap();
        };
        let whole = app.llm.decode(&tokens).unwrap();
        let counts =
            || (app.metrics.done.get(), app.metrics.failed.get(), app.metrics.cancelled.get());

        let (events, mut stopped) = answer(&app, "key");
        send(&events, Event::Done { stopped: false });
        let before = whole.split_once("key").unwrap().0;
        assert_eq!(finished(&mut stopped).await, (before.into(), "stop"));
        assert_eq!(stopped.usage().prompt_tokens_details.cached_tokens, 16);
        assert!(events.is_closed());
        drop(stopped);
        assert_eq!(counts(), (1, 0, 0));

        let (events, mut done) = answer(&app, "nothing");
        send(&events, Event::Done { stopped: false });
        assert_eq!(finished(&mut done).await, (whole, "length"));
        drop(done);
        assert_eq!(counts(), (2, 0, 0));

        let (events, mut failed) = answer(&app, "nothing");
        send(&events, Event::Failed("a reason".into()));
        assert_eq!(finished(&mut failed).await.1, "failed");
        drop(failed);
        assert_eq!(counts(), (2, 1, 0));

        let (events, mut left) = answer(&app, "nothing");
        send(&events, Event::Done { stopped: false });
        assert!(matches!(left.next().await, Ok(Piece::Text(_))));
        drop(left);
        assert_eq!(counts(), (2, 1, 1));
    }
}
