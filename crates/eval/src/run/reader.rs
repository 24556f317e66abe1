//! A causal language model as a subject.

use std::ops::{ControlFlow, Range};
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};
use longctx_core::{
    Batch, CausalLm, Footprint, GenerateOptions, Generation, Logits, PromptCompressor, Rate, SeqId,
    generate, prefill,
};

use super::shorten::{Compressor, Short, shorten};
use super::subject::{Answer, Fault, Question, Subject};
use crate::Forced;

/// The sequence of every sample.
const SEQ: SeqId = 0;

/// A model's tokenizer and chat template.
pub trait Text {
    /// Tokenizes a text. `special` adds the tokens that begin a text.
    ///
    /// # Errors
    /// Errors of the tokenizer.
    fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, Fault>;

    /// Decodes tokens, without special tokens.
    ///
    /// # Errors
    /// Errors of the tokenizer.
    fn decode(&self, tokens: &[u32]) -> Result<String, Fault>;

    /// Formats a conversation with the model's chat template, up to the start of the model's
    /// answer; `None` if there is no template. Turns of the user and of the model alternate,
    /// beginning and ending with the user.
    ///
    /// # Errors
    /// Errors of the template.
    fn chat(&self, conversation: &[String]) -> Result<Option<String>, Fault>;

    /// Tokens that end an answer.
    fn stop(&self) -> &[u32];
}

/// A [`CausalLm`] with any cache that reads prompts and decodes greedily.
///
/// A turn's text is truncated in the middle to the context limit, then compressed, then formatted
/// with the chat template. If a sample marks its context, only the context is compressed, as in
/// longctx_bench: instruction and question are kept.
pub struct Reader {
    model: Box<dyn CausalLm>,
    text: Box<dyn Text>,
    context: usize,
    prefill_chunk: Option<usize>,
    compressor: Option<Compressor>,
    dense_bytes_per_token: Option<f64>,
}

impl Reader {
    /// Creates a reader of at most `context` tokens per turn, with prefill in one call.
    pub fn new(model: impl CausalLm + 'static, text: impl Text + 'static, context: usize) -> Self {
        Self {
            model: Box::new(model),
            text: Box::new(text),
            context,
            prefill_chunk: None,
            compressor: None,
            dense_bytes_per_token: None,
        }
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

    /// Sets the bytes per token of a dense f16 cache, the reference of ratios.
    #[must_use]
    pub fn with_dense_bytes_per_token(mut self, bytes: f64) -> Self {
        self.dense_bytes_per_token = Some(bytes);
        self
    }

    fn shorten(
        &mut self,
        turn: &str,
        context: Option<&Range<usize>>,
        question: Option<&str>,
    ) -> Result<Short, Fault> {
        shorten(turn, context, question, (&*self.text, self.context), self.compressor.as_mut())
    }

    /// Returns the bytes of the model's caches or states.
    fn kv_bytes(&self) -> usize {
        let held = self.model.footprint();
        held.total() - held.slack
    }

    /// Returns the bytes of a dense cache of the text before compression removed `saved` tokens.
    fn dense_bytes(&self, saved: usize) -> Option<usize> {
        let tokens = self.model.seen(SEQ) + saved;
        self.dense_bytes_per_token.map(|each| (each * tokens as f64) as usize)
    }

    /// Generates from `tokens`. Also returns the time spent in the model.
    fn write(
        &mut self,
        tokens: &[u32],
        question: &Question<'_>,
        spent: &mut Duration,
    ) -> Result<Generation, Fault> {
        let options = GenerateOptions {
            max_tokens: question.max_new_tokens,
            stop: self.text.stop().to_vec(),
            prefill_chunk: self.prefill_chunk,
            ..Default::default()
        };
        let mut model = Timed { inner: &mut *self.model, spent: Duration::ZERO };
        let mut written = 0;
        let mut broken = None;
        let done = generate(&mut model, SEQ, tokens, &options, |token| {
            written += 1;
            if !question.stops_at_newline || written < 2 {
                return ControlFlow::Continue(());
            }
            match self.text.decode(&[token]) {
                Ok(text) if !text.contains('\n') => ControlFlow::Continue(()),
                Ok(_) => ControlFlow::Break(()),
                Err(fault) => {
                    broken = Some(fault);
                    ControlFlow::Break(())
                }
            }
        })?;
        *spent += model.spent;
        broken.map_or(Ok(done), Err)
    }
}

impl Subject for Reader {
    fn answer(&mut self, question: &Question<'_>) -> Result<Answer, Fault> {
        self.model.remove(SEQ);
        let mut done = Answer::default();
        let mut conversation = Vec::new();
        // The text so far, read and written, and its tokens that have not been fed yet.
        let (mut read, mut pending) = (String::new(), Vec::new());
        let mut saved = 0;
        for (i, turn) in question.sample.turns.iter().enumerate() {
            let started = Instant::now();
            let sample = question.sample;
            let context = sample.context.as_ref().filter(|_| i == 0);
            let short = self.shorten(turn, context, sample.question.as_deref())?;
            saved += short.saved;
            done.model += short.spent;
            conversation.push(short.text);
            let in_template =
                if question.sample.chat { self.text.chat(&conversation)? } else { None };
            let template = in_template.is_some();
            // A trailing space would be a separate token, which is rare at this position in
            // training data.
            let mut full = in_template
                .unwrap_or_else(|| conversation.join("\n").trim_end_matches(' ').to_owned());
            if i + 1 == sample.turns.len() {
                full += sample.answer_prefix.as_deref().unwrap_or("");
            }
            let tokens = match full.strip_prefix(&read) {
                Some(rest) if i > 0 => {
                    [std::mem::take(&mut pending), self.text.encode(rest, false)?].concat()
                }
                _ => {
                    self.model.remove(SEQ);
                    self.text.encode(&full, !template)?
                }
            };
            let before = started.elapsed();
            let written = self.write(&tokens, question, &mut done.model)?;
            if i == 0 {
                done.first_token = before + written.prefill;
            }
            done.prompt_tokens += tokens.len();
            done.new_tokens += written.tokens.len();
            done.decode += written.decode;
            done.decode_steps += written.decode_steps;
            let answer = self.text.decode(&written.tokens)?;
            pending = written.tokens[written.decode_steps.min(written.tokens.len())..].to_vec();
            read = full + &answer;
            conversation.push(answer.clone());
            done.predictions.push(answer);
        }
        done.kv_bytes = Some(self.kv_bytes());
        done.dense_bytes = self.dense_bytes(saved);
        Ok(done)
    }

    fn teacher_forced(&mut self, prompt: &str, text: &str) -> Result<Forced, Fault> {
        self.model.remove(SEQ);
        let Short { text: prompt, saved, .. } = self.shorten(prompt, None, None)?;
        let prompt = self.text.encode(&prompt, true)?;
        let tokens = self.text.encode(text, false)?;
        let mut next = prefill(&mut *self.model, SEQ, &prompt, self.prefill_chunk)?;
        let mut logits = Vec::with_capacity(tokens.len());
        for (i, &token) in tokens.iter().enumerate() {
            logits.push(next.flatten_all()?.to_vec1()?);
            if i + 1 < tokens.len() {
                next = self.model.forward(&Batch::single(SEQ, 1)?, &[token], Logits::Last)?;
            }
        }
        let (kv_bytes, dense_bytes) = (Some(self.kv_bytes()), self.dense_bytes(saved));
        Ok(Forced { tokens, logits, kv_bytes, dense_bytes })
    }
}

/// A model with a timer.
struct Timed<'a> {
    inner: &'a mut dyn CausalLm,
    spent: Duration,
}

impl CausalLm for Timed<'_> {
    fn forward(
        &mut self,
        batch: &Batch,
        ids: &[u32],
        logits: Logits,
    ) -> longctx_core::Result<Tensor> {
        let started = Instant::now();
        let out = self.inner.forward(batch, ids, logits);
        self.spent += started.elapsed();
        out
    }
    fn fork(&mut self, from: SeqId, to: SeqId) -> longctx_core::Result<()> {
        self.inner.fork(from, to)
    }
    fn check_truncate(&self, seq: SeqId, len: usize) -> longctx_core::Result<()> {
        self.inner.check_truncate(seq, len)
    }
    fn truncate(&mut self, seq: SeqId, len: usize) -> longctx_core::Result<()> {
        self.inner.truncate(seq, len)
    }
    fn remove(&mut self, seq: SeqId) -> bool {
        self.inner.remove(seq)
    }
    fn seqs(&self) -> Vec<SeqId> {
        self.inner.seqs()
    }
    fn seen(&self, seq: SeqId) -> usize {
        self.inner.seen(seq)
    }
    fn can_take(&self, batch: &Batch) -> bool {
        self.inner.can_take(batch)
    }
    fn footprint(&self) -> Footprint {
        self.inner.footprint()
    }
    fn seq_footprint(&self, seq: SeqId) -> Footprint {
        self.inner.seq_footprint(seq)
    }
    fn clear(&mut self) {
        self.inner.clear();
    }
    fn vocab_size(&self) -> usize {
        self.inner.vocab_size()
    }
    fn context_length(&self) -> Option<usize> {
        self.inner.context_length()
    }
    fn family(&self) -> &str {
        self.inner.family()
    }
    fn device(&self) -> &Device {
        self.inner.device()
    }
}
