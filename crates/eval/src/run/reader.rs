//! A causal language model as a subject.

use std::ops::Range;
use std::time::Instant;

use longctx_core::{Batch, CausalLm, Greedy, Logits, PromptCompressor, Rate, SeqId, prefill};

use super::running::Running;
use super::shorten::{Compressor, ShortenedTurn, shorten};
use super::subject::{Answer, Passage, Question, Queue, Subject, SubjectError};
use crate::TeacherForced;

/// The sequence of a text that is read with teacher forcing.
const SEQ: SeqId = 0;

/// Tokens of a warm-up: more than a cache keeps as attention sinks or a window before it uses its
/// format.
const WARM_UP_TOKENS: usize = 192;

/// A model's tokenizer and chat template.
pub trait Text {
    /// Tokenizes a text. `special` adds the tokens that begin a text.
    ///
    /// # Errors
    /// Errors of the tokenizer.
    fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, SubjectError>;

    /// Decodes tokens, without special tokens.
    ///
    /// # Errors
    /// Errors of the tokenizer.
    fn decode(&self, tokens: &[u32]) -> Result<String, SubjectError>;

    /// Formats a conversation with the model's chat template, up to the start of the model's
    /// answer; `None` if there is no template. Turns of the user and of the model alternate,
    /// beginning and ending with the user.
    ///
    /// # Errors
    /// Errors of the template.
    fn chat(&self, conversation: &[String]) -> Result<Option<String>, SubjectError>;

    /// Tokens that end an answer.
    fn stop(&self) -> &[u32];

    /// The text of the beginning-of-sequence token that [`encode`](Self::encode) adds, such as
    /// `<s>`; `None` if it adds none.
    fn bos(&self) -> Option<&str>;
}

/// Returns the bytes of a dense cache with the given number of tokens.
type DenseBytes = Box<dyn Fn(usize) -> usize + Send>;

/// A [`CausalLm`] with any cache that reads prompts and decodes greedily.
///
/// A turn's text is truncated in the middle to the context limit, then compressed, then formatted
/// with the chat template. If a sample marks its context, only the context is compressed, as in
/// longctx_bench: instruction and question are kept.
///
/// Decoding uses continuous batching: each prompt is prefilled separately, each step then feeds one
/// token of every running sample, and the next sample replaces one that has ended.
pub struct Reader {
    model: Box<dyn CausalLm>,
    text: Box<dyn Text>,
    context: usize,
    batch: usize,
    settings: usize,
    prefill_chunk: Option<usize>,
    compressor: Option<Compressor>,
    dense_bytes: Option<DenseBytes>,
    greedy: Greedy,
}

impl Reader {
    /// Creates a reader of at most `context` tokens per turn, with prefill in one call.
    pub fn new(model: impl CausalLm + 'static, text: impl Text + 'static, context: usize) -> Self {
        Self {
            model: Box::new(model),
            text: Box::new(text),
            context,
            batch: 1,
            settings: 1,
            prefill_chunk: None,
            compressor: None,
            dense_bytes: None,
            greedy: Greedy::default(),
        }
    }

    /// Sets the largest number of samples in a decode batch; 0 counts as 1.
    #[must_use]
    pub fn with_batch(mut self, samples: usize) -> Self {
        self.batch = samples.max(1);
        self
    }

    /// Answers for several settings with one prefill of each prompt.
    ///
    /// The model must hold the sequences of all settings: those of setting `s` have ids congruent
    /// to `s` modulo `settings + 1`. A sequence with remainder `settings` is a prompt for all of
    /// them, which is forked into sequences of each.
    #[must_use]
    pub fn with_shared_prefill(mut self, settings: usize) -> Self {
        self.settings = settings.max(1);
        self
    }

    /// Feeds prompts in chunks, so that later tokens see the compressed cache of earlier chunks.
    #[must_use]
    pub fn with_prefill_chunk(mut self, chunk: Option<usize>) -> Self {
        self.prefill_chunk = chunk;
        self
    }

    /// Compresses each turn's text first, or only the context if the sample marks it.
    #[must_use]
    pub fn with_compressor(mut self, compressor: Box<dyn PromptCompressor>, rate: Rate) -> Self {
        self.compressor = Some((compressor, rate));
        self
    }

    /// Sets the function that returns the bytes of a dense f16 cache for a number of tokens.
    /// Compression ratios are relative to it. It must count layers with a sliding window only up to
    /// their window.
    #[must_use]
    pub fn with_dense_bytes(mut self, bytes: impl Fn(usize) -> usize + Send + 'static) -> Self {
        self.dense_bytes = Some(Box::new(bytes));
        self
    }

    /// Feeds a short text and one decode step to the cache of every setting, and removes them.
    ///
    /// On a device other than the CPU, a cache creates its memory with the first tokens. So a
    /// format without kernels for the device is an error here, not in every sample.
    ///
    /// # Errors
    /// Errors of the tokenizer, the model and the caches.
    pub fn warm_up(mut self) -> Result<Self, SubjectError> {
        let text = (0..WARM_UP_TOKENS).map(|i| format!("{i} ")).collect::<String>();
        let mut tokens = self.text.encode(&text, true)?;
        let longest = self.model.context_length().map_or(usize::MAX, |len| len.saturating_sub(1));
        tokens.truncate(WARM_UP_TOKENS.min(longest).min(self.context));
        self.model.clear();
        for setting in 0..self.settings {
            let seq = setting as SeqId;
            prefill(&mut *self.model, seq, &tokens, self.prefill_chunk)?;
            self.model.forward(&Batch::decode(&[seq])?, &tokens[..1], Logits::Last)?;
            self.model.remove(seq);
        }
        self.model.clear();
        Ok(self)
    }

    fn shorten(
        &mut self,
        turn: &str,
        context: Option<&Range<usize>>,
        question: Option<&str>,
    ) -> Result<ShortenedTurn, SubjectError> {
        shorten(turn, context, question, (&*self.text, self.context), self.compressor.as_mut())
    }

    /// Returns the bytes of a sequence, without free capacity.
    fn kv_bytes(&self, seq: SeqId) -> usize {
        let held = self.model.seq_footprint(seq);
        held.total() - held.slack
    }

    /// Returns the bytes of a dense cache of the text before compression removed `saved` tokens.
    fn dense_bytes(&self, seq: SeqId, saved: usize) -> Option<usize> {
        let tokens = self.model.seen(seq) + saved;
        self.dense_bytes.as_ref().map(|bytes| bytes(tokens))
    }

    /// Prefills a sample's turn and returns the first token of the answer.
    fn prefill(&mut self, sample: &mut Running<'_>, turn: &str) -> Result<u32, SubjectError> {
        let started = Instant::now();
        let asked = sample.question.sample;
        let context = asked.context.as_ref().filter(|_| sample.is_first_turn());
        let short = self.shorten(turn, context, asked.question.as_deref())?;
        let (tokens, continues) = sample.prompt(short, &*self.text)?;
        if !continues {
            self.model.remove(sample.seq);
        }
        let before = started.elapsed();
        let logits = prefill(&mut *self.model, sample.seq, &tokens, self.prefill_chunk)?;
        let token = self.greedy.choose(&logits)?.remove(0)?;
        sample.prefilled(before, started.elapsed());
        Ok(token)
    }

    /// Prefills a sample's next turn, and further turns while their answers end with their first
    /// token. Returns whether the sample needs further steps.
    fn begin_turns(&mut self, sample: &mut Running<'_>) -> Result<bool, SubjectError> {
        while let Some(turn) = sample.turn() {
            let token = self.prefill(sample, turn)?;
            if sample.take(token, &*self.text)? {
                return Ok(true);
            }
            sample.end_turn(&*self.text)?;
        }
        Ok(false)
    }

    /// Begins a sample: as a fork of its prompt if settings share the prefill.
    fn begin<'a>(
        &mut self,
        sample: &mut Running<'a>,
        kept: &mut Option<Prompt<'a>>,
    ) -> Result<bool, SubjectError> {
        if self.settings > 1 {
            let is_its_prompt = |prompt: &Prompt<'a>| {
                std::ptr::eq(prompt.state.question.sample, sample.question.sample)
            };
            if !kept.as_ref().is_some_and(is_its_prompt) {
                *kept = self.prompt(sample.question);
            }
            if let Some(prompt) = kept {
                self.model.fork(prompt.state.seq, sample.seq)?;
                *sample = prompt.state.fork(sample.number, sample.question, sample.seq);
                return self.go_on(sample, Ok(prompt.first));
            }
        }
        self.begin_turns(sample)
    }

    /// Prefills a sample's first turn for all settings. Returns `None` if that fails; each setting
    /// then prefills the turn itself and has its own error.
    fn prompt<'a>(&mut self, question: Question<'a>) -> Option<Prompt<'a>> {
        let seq = self.settings as SeqId;
        self.model.remove(seq);
        let mut state = Running::new(0, question, seq);
        let first = state.turn().map(|turn| self.prefill(&mut state, turn));
        match first {
            Some(Ok(first)) => Some(Prompt { state, first }),
            _ => {
                self.model.remove(seq);
                None
            }
        }
    }

    /// Returns an unused sequence for a setting.
    fn sequence(&self, running: &[Running<'_>], setting: usize) -> SeqId {
        let stride = if self.settings > 1 { self.settings + 1 } else { 1 };
        let unused = |seq: &SeqId| running.iter().all(|sample| sample.seq != *seq);
        (setting as SeqId..).step_by(stride).find(unused).unwrap_or(SEQ)
    }

    /// Runs one decode step and returns each sample's next token. If the step fails, each sample is
    /// fed separately, so that an error affects its own sample only.
    fn step(&mut self, samples: &mut [Running<'_>]) -> Vec<Result<u32, SubjectError>> {
        let started = Instant::now();
        let (seqs, ids): (Vec<_>, Vec<_>) = samples.iter().map(|s| (s.seq, s.last())).unzip();
        let tokens = Batch::decode(&seqs)
            .and_then(|batch| self.model.forward_greedy(&batch, &ids, &mut self.greedy));
        let tokens = match tokens {
            Err(_) if samples.len() > 1 => {
                return samples.chunks_mut(1).flat_map(|sample| self.step(sample)).collect();
            }
            Err(error) => return vec![Err(error.into())],
            Ok(tokens) => tokens,
        };
        let share = started.elapsed() / samples.len() as u32;
        samples.iter_mut().for_each(|sample| sample.stepped(share));
        tokens.into_iter().map(|token| Ok(token?)).collect()
    }

    /// Appends a step's token, and begins the next turn if it ends one. Returns whether the sample
    /// needs further steps.
    fn go_on(
        &mut self,
        sample: &mut Running<'_>,
        token: Result<u32, SubjectError>,
    ) -> Result<bool, SubjectError> {
        if sample.take(token?, &*self.text)? {
            return Ok(true);
        }
        sample.end_turn(&*self.text)?;
        self.begin_turns(sample)
    }

    /// Keeps a sample that needs further steps; otherwise reports its answer or error.
    fn keep<'a>(
        &mut self,
        sample: Running<'a>,
        goes_on: Result<bool, SubjectError>,
        running: &mut Vec<Running<'a>>,
        queue: &mut dyn Queue<'a>,
    ) {
        let number = sample.number;
        match goes_on {
            Ok(true) => running.push(sample),
            Ok(false) => queue.answered(number, Ok(self.finish(sample))),
            Err(fault) => {
                self.model.remove(sample.seq);
                queue.answered(number, Err(fault));
            }
        }
    }

    /// Removes a sample's sequence and returns its answer.
    fn finish(&mut self, mut sample: Running<'_>) -> Answer {
        let seq = sample.seq;
        sample.answer.kv_bytes = Some(self.kv_bytes(seq));
        sample.answer.dense_bytes = self.dense_bytes(seq, sample.saved);
        sample.answer.batch = (self.batch > 1).then_some(self.batch);
        sample.answer.settings = (self.settings > 1).then_some(self.settings);
        self.model.remove(seq);
        sample.answer
    }
}

impl Subject for Reader {
    fn answer(&mut self, question: &Question<'_>) -> Result<Answer, SubjectError> {
        let mut alone = Alone { question: Some(*question), answer: None };
        self.answer_all(&mut alone);
        alone.answer.unwrap_or_else(|| Err("the sample was not answered".into()))
    }

    fn answer_all<'a>(&mut self, queue: &mut dyn Queue<'a>) {
        self.model.clear();
        let mut running: Vec<Running<'a>> = Vec::new();
        let mut kept = None;
        loop {
            while running.len() < self.batch {
                let Some((number, question)) = queue.next() else { break };
                let seq = self.sequence(&running, question.setting);
                let mut sample = Running::new(number, question, seq);
                let begun = self.begin(&mut sample, &mut kept);
                self.keep(sample, begun, &mut running, queue);
            }
            if running.is_empty() {
                return;
            }
            // A cache attends for adjacent sequences in one call.
            running.sort_by_key(|sample| sample.question.setting);
            let tokens = self.step(&mut running);
            for (mut sample, token) in std::mem::take(&mut running).into_iter().zip(tokens) {
                let gone_on = self.go_on(&mut sample, token);
                self.keep(sample, gone_on, &mut running, queue);
            }
        }
    }

    fn teacher_forced(
        &mut self,
        passages: &[Passage<'_>],
    ) -> Result<Vec<TeacherForced>, SubjectError> {
        self.model.clear();
        let mut all = Vec::new();
        for (seq, passage) in passages.iter().enumerate() {
            let ShortenedTurn { text: prompt, saved, .. } =
                self.shorten(passage.prompt, None, None)?;
            let prompt = self.text.encode(&prompt, true)?;
            let tokens = self.text.encode(passage.text, false)?;
            let first = prefill(&mut *self.model, seq as SeqId, &prompt, self.prefill_chunk)?;
            let logits = vec![first.flatten_all()?.to_vec1()?];
            all.push((saved, TeacherForced { tokens, logits, kv_bytes: None, dense_bytes: None }));
        }
        // Token `i` of each text that has a token after it.
        for i in 0.. {
            let reading =
                all.iter_mut().enumerate().filter(|(_, (_, one))| i + 1 < one.tokens.len());
            let mut reading: Vec<_> = reading.map(|(seq, (_, one))| (seq as SeqId, one)).collect();
            if reading.is_empty() {
                break;
            }
            let seqs: Vec<_> = reading.iter().map(|(seq, _)| *seq).collect();
            let ids: Vec<_> = reading.iter().map(|(_, one)| one.tokens[i]).collect();
            let logits = self.model.forward(&Batch::decode(&seqs)?, &ids, Logits::Last)?;
            for ((_, one), logits) in reading.iter_mut().zip(logits.to_vec2()?) {
                one.logits.push(logits);
            }
        }
        let all = all.into_iter().enumerate().map(|(seq, (saved, one))| {
            let seq = seq as SeqId;
            let (kv_bytes, dense_bytes) = (Some(self.kv_bytes(seq)), self.dense_bytes(seq, saved));
            TeacherForced { kv_bytes, dense_bytes, ..one }
        });
        Ok(all.collect())
    }
}

/// A prompt that was prefilled for all settings.
struct Prompt<'a> {
    state: Running<'a>,
    /// The first token of the answer.
    first: u32,
}

/// A queue of one sample.
struct Alone<'a> {
    question: Option<Question<'a>>,
    answer: Option<Result<Answer, SubjectError>>,
}

impl<'a> Queue<'a> for Alone<'a> {
    fn next(&mut self) -> Option<(usize, Question<'a>)> {
        Some((0, self.question.take()?))
    }

    fn answered(&mut self, _: usize, answer: Result<Answer, SubjectError>) {
        self.answer = Some(answer);
    }
}
