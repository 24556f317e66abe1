//! The scheduler, which selects the sequences of each step. It runs on one thread that owns the
//! model.
//!
//! A step is one [`Batch`]: one token of every decoding sequence, and a chunk of the prompt of
//! other sequences. Chunks always end at multiples of a fixed size. So a compressed cache sees the
//! same chunks under any load and gives the same answers.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::metrics::Metrics;
use crate::prefixes::Prefixes;
use longctx_core::{
    Batch, CausalLm, Error, Footprint, Greedy, Logits, Result, Sampler, Sampling, SeqId,
    candle_core::Tensor,
};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, error::TryRecvError};

/// One prompt to continue.
pub struct Request {
    /// The prompt's tokens, at least one.
    pub prompt: Vec<u32>,
    /// The largest number of tokens to generate, at least one.
    pub max_tokens: usize,
    /// The parameters of sampling.
    pub sampling: Sampling,
    /// Tokens that end the text.
    pub stop: Vec<u32>,
    /// The receiver of events. The request is cancelled when the receiver is dropped.
    pub events: UnboundedSender<Event>,
}

/// An event of a request.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The request has started, possibly again.
    Started {
        /// Tokens of the prompt whose keys and values come from an earlier request.
        cached: usize,
    },
    /// A token was generated.
    Token(u32),
    /// The text ended, at a stop token or at the limit of tokens.
    Done {
        /// Whether a stop token ended it.
        stopped: bool,
    },
    /// The request failed.
    Failed(String),
}

/// Options of the scheduler.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Tokens of a prompt per step; `None` for the whole prompt, which is exact with every cache.
    pub prefill_chunk: Option<usize>,
    /// Tokens of a step at which no further prompt is added to it.
    pub step_tokens: usize,
    /// Largest number of prompt prefixes kept for later requests.
    pub prefixes: usize,
}

/// A request that has not started, or that was stopped for lack of memory.
struct Waiting {
    request: Request,
    /// The tokens that it has sent.
    sent: Vec<u32>,
}

/// A running request.
struct Running {
    request: Request,
    seq: SeqId,
    sampler: Sampler,
    /// Number of the prompt's tokens that have been fed.
    fed: usize,
    /// The last generated token, which has not been fed yet.
    last: Option<u32>,
    written: usize,
    /// The tokens that it has sent: more than `written` while a stopped request catches up.
    sent: Vec<u32>,
}

impl Running {
    /// Returns the tokens that the next step feeds.
    fn next(&self, chunk: Option<usize>) -> &[u32] {
        if let Some(last) = &self.last {
            return std::slice::from_ref(last);
        }
        let left = &self.request.prompt[self.fed..];
        match chunk {
            Some(chunk) => &left[..left.len().min(chunk - self.fed % chunk)],
            None => left,
        }
    }

    /// Returns the largest number of tokens that are still to be fed.
    fn left(&self) -> usize {
        let prompt = self.request.prompt.len() - self.fed;
        prompt + self.request.max_tokens - self.written
    }
}

/// The result of a step for a sequence.
enum Output {
    /// The token, chosen on the model's device because all sequences of the step are greedy.
    Token(Result<u32>),
    /// The logits of the next token.
    Logits(Vec<f32>),
}

/// Time between two measurements of the cache's bytes and, while memory is full, between two
/// attempts to admit a request. Both visit every block table.
const MEASURE_EVERY: Duration = Duration::from_millis(100);

/// The scheduler of a model's requests.
pub struct Scheduler {
    model: Box<dyn CausalLm + Send>,
    options: Options,
    waiting: VecDeque<Waiting>,
    running: Vec<Running>,
    prefixes: Prefixes,
    next_seq: SeqId,
    greedy: Greedy,
    metrics: Arc<Metrics>,
    /// Whether the oldest waiting request did not fit in memory, and no request has ended since.
    full: bool,
    /// Whether a request was stopped for lack of memory, and none has ended since.
    stopped: bool,
    measured: Instant,
}

impl Scheduler {
    /// Creates a scheduler without requests.
    pub fn new(model: Box<dyn CausalLm + Send>, options: Options, metrics: Arc<Metrics>) -> Self {
        let prefixes = Prefixes::new(options.prefixes);
        let (waiting, running) = (VecDeque::new(), Vec::new());
        let (greedy, measured) = (Greedy::default(), Instant::now());
        Self {
            model,
            options,
            waiting,
            running,
            prefixes,
            next_seq: 0,
            greedy,
            metrics,
            full: false,
            stopped: false,
            measured,
        }
    }

    /// Serves requests until all senders are dropped and the last request is done. The sender counts
    /// a request in [`Metrics::waiting`], and the scheduler uncounts it when it starts or ends: the
    /// requests that arrive during a step count too.
    pub fn run(&mut self, mut requests: UnboundedReceiver<Request>) {
        let mut open = true;
        while open || !self.waiting.is_empty() || !self.running.is_empty() {
            if self.waiting.is_empty() && self.running.is_empty() {
                match requests.blocking_recv() {
                    Some(request) => self.wait(request),
                    None => open = false,
                }
            }
            loop {
                match requests.try_recv() {
                    Ok(request) => self.wait(request),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => break open = false,
                }
            }
            self.step();
        }
    }

    fn wait(&mut self, request: Request) {
        self.waiting.push_back(Waiting { request, sent: Vec::new() });
    }

    /// Drops cancelled requests, admits waiting ones that fit in memory, and feeds one batch.
    pub fn step(&mut self) {
        self.drop_cancelled();
        self.admit();
        if !self.running.is_empty() {
            self.feed();
        }
        self.metrics.running.set(self.running.len() as i64);
        self.metrics.sequences.set(self.model.seqs().len() as i64);
        if self.running.is_empty() || self.measured.elapsed() > MEASURE_EVERY {
            let Footprint { payload, scales, residual, .. } = self.model.footprint();
            self.metrics.kv_bytes.set((payload + scales + residual) as i64);
            self.measured = Instant::now();
            // A cache that evicts may have freed memory.
            self.full = self.stopped;
        }
    }

    fn drop_cancelled(&mut self) {
        let model = &mut self.model;
        let (waited, ran) = (self.waiting.len(), self.running.len());
        self.waiting.retain(|waiting| !waiting.request.events.is_closed());
        self.metrics.waiting.dec_by((waited - self.waiting.len()) as i64);
        self.running.retain(|running| {
            let keep = !running.request.events.is_closed();
            if !keep {
                model.remove(running.seq);
            }
            keep
        });
        self.full &= (waited, ran) == (self.waiting.len(), self.running.len());
        self.stopped &= ran == self.running.len();
    }

    /// Starts waiting requests, the oldest first, as long as the memory suffices for all running
    /// requests up to their limits. Kept prefixes are removed before a request has to wait.
    fn admit(&mut self) {
        while let Some(Waiting { request, .. }) = self.waiting.front().filter(|_| !self.full) {
            let (prefix, cached) = match self.prefixes.find(&request.prompt) {
                Some((seq, len)) => (Some(seq), len),
                None => (None, 0),
            };
            let left = request.prompt.len() - cached + request.max_tokens;
            match self.begin(prefix, left) {
                Ok(Some(seq)) => {
                    let Some(waiting) = self.waiting.pop_front() else { return };
                    self.metrics.waiting.dec();
                    self.start(waiting, seq, cached);
                }
                // Other prefixes are removed first, and the one found above last.
                Ok(None) if self.drop_prefix(prefix) => {}
                Ok(None) if self.running.is_empty() => {
                    let message = "the prompt and its answer do not fit the server's memory";
                    self.refuse(message.into());
                }
                Ok(None) => self.full = true,
                Err(error) => self.refuse(error.to_string()),
            }
        }
    }

    /// Returns a sequence for a request that needs `left` tokens after a kept prefix, if there is
    /// room.
    fn begin(&mut self, prefix: Option<SeqId>, left: usize) -> Result<Option<SeqId>> {
        let seq = self.next_seq;
        self.next_seq += 1;
        if let Some(prefix) = prefix {
            self.model.fork(prefix, seq)?;
        }
        let running = self.running.iter().map(|running| (running.seq, running.left()));
        let all: Vec<_> = running.chain([(seq, left)]).filter(|(_, left)| *left > 0).collect();
        if Batch::new(&all).is_ok_and(|batch| self.model.can_append(&batch)) {
            return Ok(Some(seq));
        }
        self.model.remove(seq);
        Ok(None)
    }

    fn start(&mut self, Waiting { request, sent }: Waiting, seq: SeqId, cached: usize) {
        self.metrics.cached_tokens.inc_by(cached as u64);
        match Sampler::new(request.sampling) {
            Ok(sampler) => {
                let _ = request.events.send(Event::Started { cached });
                let (fed, last, written) = (cached, None, 0);
                self.running.push(Running { request, seq, sampler, fed, last, written, sent });
            }
            Err(error) => {
                self.model.remove(seq);
                let _ = request.events.send(Event::Failed(error.to_string()));
            }
        }
    }

    fn refuse(&mut self, message: String) {
        if let Some(Waiting { request, .. }) = self.waiting.pop_front() {
            self.metrics.waiting.dec();
            let _ = request.events.send(Event::Failed(message));
        }
    }

    /// Frees the least recently used prefix; `last` only if there is no other. Returns whether
    /// there was one.
    fn drop_prefix(&mut self, last: Option<SeqId>) -> bool {
        let oldest = self.prefixes.drop_oldest(last);
        self.full &= oldest.is_none();
        oldest.is_some_and(|seq| self.model.remove(seq))
    }

    /// Feeds a batch and sends the generated tokens.
    fn feed(&mut self) {
        let chunk = self.options.prefill_chunk;
        let (mut seqs, mut ids, mut fed) = (Vec::new(), Vec::new(), Vec::new());
        // Decoding sequences come first, so that a prompt delays them by at most one step.
        let decodes = |running: &Running| running.last.is_some();
        let order = (0..self.running.len()).filter(|&i| decodes(&self.running[i]));
        let order: Vec<_> =
            order.chain((0..self.running.len()).filter(|&i| !decodes(&self.running[i]))).collect();
        for i in order {
            let next = self.running[i].next(chunk);
            let joins = decodes(&self.running[i])
                || ids.is_empty()
                || ids.len() + next.len() <= self.options.step_tokens;
            if joins {
                seqs.push((self.running[i].seq, next.len()));
                ids.extend_from_slice(next);
                fed.push(i);
            }
        }
        match self.forward(&fed, &seqs, &ids) {
            Ok(outputs) => self.advance(&fed, &seqs, outputs),
            Err(error) => self.recover(&fed, &error),
        }
    }

    fn forward(
        &mut self,
        fed: &[usize],
        seqs: &[(SeqId, usize)],
        ids: &[u32],
    ) -> Result<Vec<Output>> {
        let start = Instant::now();
        let logits = self.model.forward(&Batch::new(seqs)?, ids, Logits::Last)?;
        let returned = Instant::now();
        self.metrics.steps.inc();
        self.metrics.forward_seconds.inc_by((returned - start).as_secs_f64());
        let outputs = self.sample(fed, &logits);
        self.metrics.sample_seconds.inc_by(returned.elapsed().as_secs_f64());
        outputs
    }

    /// Copies what sampling needs from the model's device.
    fn sample(&mut self, fed: &[usize], logits: &Tensor) -> Result<Vec<Output>> {
        if fed.iter().all(|&i| self.running[i].request.sampling == Sampling::Greedy) {
            let tokens = self.greedy.choose(logits)?;
            return Ok(tokens.into_iter().map(Output::Token).collect());
        }
        Ok(logits.to_vec2()?.into_iter().map(Output::Logits).collect())
    }

    /// Handles a failed step. If memory is missing, a kept prefix is freed, or the newest request
    /// waits again, and the step is tried again. Otherwise one request fails and the others
    /// continue: that of a poisoned sequence, or the newest of the step.
    fn recover(&mut self, fed: &[usize], error: &Error) {
        if matches!(error, Error::PoolFull { .. }) && (self.drop_prefix(None) || self.stop_newest())
        {
            return;
        }
        let poisoned = |&i: &usize| match error {
            Error::Poisoned { seq, .. } => self.running[i].seq == *seq,
            _ => false,
        };
        let newest = || fed.iter().copied().max_by_key(|&i| self.running[i].seq);
        if let Some(i) = fed.iter().copied().find(poisoned).or_else(newest) {
            self.end(i, Event::Failed(error.to_string()));
        }
    }

    /// Frees the memory of the newest request if others are running. It waits until one of them
    /// ends, and then starts again. Returns whether there was one.
    fn stop_newest(&mut self) -> bool {
        let newest = (0..self.running.len()).max_by_key(|&i| self.running[i].seq);
        let Some(newest) = newest.filter(|_| self.running.len() > 1) else { return false };
        let Running { request, seq, sent, .. } = self.running.remove(newest);
        self.model.remove(seq);
        self.waiting.push_front(Waiting { request, sent });
        self.metrics.waiting.inc();
        (self.full, self.stopped) = (true, true);
        true
    }

    /// Counts the fed tokens, and generates the next token of each sequence whose prompt is
    /// complete.
    fn advance(&mut self, fed: &[usize], seqs: &[(SeqId, usize)], outputs: Vec<Output>) {
        let mut ended = Vec::new();
        for ((&i, &(_, count)), output) in fed.iter().zip(seqs).zip(outputs) {
            if self.running[i].last.is_none() {
                self.running[i].fed += count;
                self.metrics.prompt_tokens.inc_by(count as u64);
                self.keep_prefix(i);
                if self.running[i].fed < self.running[i].request.prompt.len() {
                    continue;
                }
            }
            if let Some(event) = self.write(i, output) {
                ended.push((i, event));
            }
        }
        // In descending order, so that removals do not change the remaining indices.
        ended.sort_by_key(|(i, _)| std::cmp::Reverse(*i));
        for (i, event) in ended {
            self.end(i, event);
        }
    }

    /// Keeps the fed part of the prompt as a prefix, if it is a whole number of chunks.
    fn keep_prefix(&mut self, i: usize) {
        let Running { request, seq, fed, .. } = &self.running[i];
        let whole = self.options.prefill_chunk.is_some_and(|chunk| fed.is_multiple_of(chunk));
        if !whole || self.options.prefixes == 0 || self.prefixes.has(&request.prompt[..*fed]) {
            return;
        }
        let copy = self.next_seq;
        self.next_seq += 1;
        if self.model.fork(*seq, copy).is_ok() {
            let dropped = self.prefixes.keep(&request.prompt[..*fed], copy);
            dropped.map(|seq| self.model.remove(seq));
        }
    }

    /// Chooses a token and sends it. Returns the event that ends the request, if any.
    fn write(&mut self, i: usize, output: Output) -> Option<Event> {
        let running = &mut self.running[i];
        let token = match output {
            Output::Token(token) => token,
            Output::Logits(logits) => running.sampler.sample(&logits),
        };
        let token = match token {
            Ok(token) => token,
            Err(error) => return Some(Event::Failed(error.to_string())),
        };
        let ends = running.sent.len() == running.written && running.request.stop.contains(&token);
        if ends {
            return Some(Event::Done { stopped: true });
        }
        // A request that was stopped repeats the tokens that it has sent.
        let repeated = running.sent.get(running.written).copied();
        running.last = repeated.or(Some(token));
        running.written += 1;
        if repeated.is_none() {
            running.sent.push(token);
            self.metrics.written_tokens.inc();
            let _ = running.request.events.send(Event::Token(token));
        }
        let done = running.written == running.request.max_tokens;
        done.then_some(Event::Done { stopped: false })
    }

    fn end(&mut self, i: usize, event: Event) {
        let running = self.running.remove(i);
        self.model.remove(running.seq);
        (self.full, self.stopped) = (false, false);
        let _ = running.request.events.send(event);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use base_models::{LoadOptions, Transformer};
    use longctx_examples::methods::Method;
    use tokio::sync::mpsc::unbounded_channel;

    /// Returns a scheduler with a small model whose vocabulary has 96 tokens.
    fn scheduler(method: &str, capacity: Option<usize>, prefixes: usize) -> Scheduler {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../crates/base-models/tests");
        let folder = fixtures.join("fixtures/llama");
        let model = Transformer::from_folder(&folder, &LoadOptions::default()).unwrap();
        let method = Method::named(method).unwrap();
        let cache = |spec: &_| method.cache_within(spec, capacity);
        let options = Options { prefill_chunk: Some(16), step_tokens: 40, prefixes };
        Scheduler::new(Box::new(model.session(cache).unwrap()), options, Metrics::default().into())
    }

    fn prompt(seed: usize, len: usize) -> Vec<u32> {
        (0..len).map(|i| ((i * 31 + seed * 17 + i * i * seed) % 96) as u32).collect()
    }

    fn ask(
        scheduler: &mut Scheduler,
        prompt: Vec<u32>,
        max_tokens: usize,
    ) -> UnboundedReceiver<Event> {
        let (events, received) = unbounded_channel();
        let (sampling, stop) = (Sampling::Greedy, Vec::new());
        scheduler.metrics.waiting.inc();
        scheduler.wait(Request { prompt, max_tokens, sampling, stop, events });
        received
    }

    fn finish(scheduler: &mut Scheduler) {
        for _ in 0..10_000 {
            if scheduler.waiting.is_empty() && scheduler.running.is_empty() {
                return;
            }
            scheduler.step();
        }
        panic!("requests that never end");
    }

    fn events(received: &mut UnboundedReceiver<Event>) -> (Vec<u32>, Option<Event>) {
        let (mut tokens, mut last) = (Vec::new(), None);
        while let Ok(event) = received.try_recv() {
            match event {
                Event::Started { .. } => {}
                Event::Token(token) => tokens.push(token),
                event => last = Some(event),
            }
        }
        (tokens, last)
    }

    #[test]
    fn answers_under_load_equal_separate_ones_and_all_memory_is_freed() {
        for method in ["dense-f32", "kivi-4", "h2o-4x", "snap-kv-2x-kivi-4"] {
            let sizes = [(5, 9), (70, 3), (33, 20), (16, 1), (64, 12), (1, 30), (48, 7), (90, 5)];
            let mut busy = scheduler(method, None, 0);
            let mut all: Vec<_> = sizes
                .iter()
                .enumerate()
                .map(|(i, &(len, most))| ask(&mut busy, prompt(i, len), most))
                .collect();
            // A third of the clients disconnect, before the first step or after some steps.
            all[1].close();
            busy.step();
            busy.step();
            busy.step();
            all[4].close();
            all[5].close();
            finish(&mut busy);
            for (i, received) in all.iter_mut().enumerate() {
                let (tokens, last) = events(received);
                if [1, 4, 5].contains(&i) {
                    assert!(last.is_none());
                    continue;
                }
                let mut alone = scheduler(method, None, 0);
                let mut single = ask(&mut alone, prompt(i, sizes[i].0), sizes[i].1);
                finish(&mut alone);
                assert_eq!((tokens, last), events(&mut single), "{method}, request {i}");
            }
            assert!(busy.model.seqs().is_empty(), "{method}");
            assert_eq!(busy.model.footprint().payload, 0, "{method}");
        }
    }

    #[test]
    fn a_prefix_is_fed_once_and_changes_no_answer() {
        for method in ["dense-f32", "kivi-2"] {
            let document = prompt(7, 80);
            let question = |seed| [document.clone(), prompt(seed, 9)].concat();
            let mut keeps = scheduler(method, None, 8);
            let mut started = Vec::new();
            for seed in [1, 2, 3] {
                let mut received = ask(&mut keeps, question(seed), 8);
                finish(&mut keeps);
                started.push(received.try_recv().unwrap());
                let mut alone = scheduler(method, None, 0);
                let mut single = ask(&mut alone, question(seed), 8);
                finish(&mut alone);
                assert_eq!(events(&mut received), events(&mut single), "{method}");
            }
            let cached = |cached| Event::Started { cached };
            assert_eq!(started, [cached(0), cached(80), cached(80)], "{method}");
        }
    }

    #[test]
    fn an_error_ends_the_poisoned_request_or_the_newest() {
        let mut busy = scheduler("dense-f32", None, 0);
        let mut all: Vec<_> = (0..3).map(|i| ask(&mut busy, prompt(i, 8), 20)).collect();
        busy.step();
        let seq = busy.running[1].seq;
        busy.recover(&[0, 1, 2], &Error::Poisoned { seq, reason: "NaN".into() });
        busy.recover(&[0, 1], &Error::Unsupported("this step".into()));
        finish(&mut busy);
        let ends: Vec<_> = all.iter_mut().map(|received| events(received).1.unwrap()).collect();
        assert!(matches!(&ends[0], Event::Done { .. }), "{ends:?}");
        assert!(matches!(&ends[1], Event::Failed(why) if why.contains("NaN")), "{ends:?}");
        assert!(matches!(&ends[2], Event::Failed(why) if why.contains("this step")), "{ends:?}");
    }

    #[test]
    fn a_request_that_is_stopped_for_lack_of_memory_gives_the_same_answer() {
        for sampling in [
            Sampling::Greedy,
            Sampling::Random { temperature: 1.0, top_k: None, top_p: None, seed: 5 },
        ] {
            let run = |every: usize| {
                let mut busy = scheduler("kivi-4", None, 0);
                let mut all = Vec::new();
                for i in 0..3 {
                    all.push(ask(&mut busy, prompt(i, 40), 20));
                    busy.waiting[i].request.sampling = sampling;
                }
                let mut stopped = 0;
                for step in 1.. {
                    if busy.waiting.is_empty() && busy.running.is_empty() {
                        break;
                    }
                    if step % every == 0 && busy.running.len() > 1 {
                        let what = "blocks".into();
                        busy.recover(&[0], &Error::PoolFull { what, needed: 9, free: 0 });
                        stopped += 1;
                    }
                    busy.step();
                }
                (all.iter_mut().map(events).collect::<Vec<_>>(), stopped)
            };
            let (undisturbed, _) = run(1000);
            assert!(undisturbed.iter().all(|(tokens, _)| tokens.len() == 20));
            let (answers, stopped) = run(5);
            assert_eq!(answers, undisturbed);
            assert!(stopped > 2, "{stopped}");
        }
    }

    #[test]
    fn requests_wait_for_memory_and_one_that_never_fits_is_refused() {
        let mut small = scheduler("dense-f32", Some(40_000), 4);
        let mut all: Vec<_> = (0..6).map(|i| ask(&mut small, prompt(i, 40), 20)).collect();
        let mut never = ask(&mut small, prompt(9, 90), 4000);
        small.step();
        assert!((1..6).contains(&small.running.len()), "{}", small.running.len());
        finish(&mut small);
        for received in &mut all {
            let (tokens, last) = events(received);
            assert_eq!((tokens.len(), last), (20, Some(Event::Done { stopped: false })));
        }
        let (tokens, last) = events(&mut never);
        assert!(tokens.is_empty() && matches!(last, Some(Event::Failed(_))), "{last:?}");
    }
}
