//! InfLLM: Xiao et al., "InfLLM: Training-Free Long-Context Extrapolation for LLMs with an Efficient Context Memory", arXiv 2402.04617.

mod memory;
mod settings;

use crate::{check::check_cpu_step, rows::Rows};
use candle_core::{D, DType, Device, Tensor};
use longctx_core::attention::{self, Element, Page};
use longctx_core::{
    AttentionShape, Error, Footprint, KvCache, Partial, Result, Rope, Step, Visible,
};
use memory::Memory;
pub use settings::InfLlmSettings;

/// Decoded tokens by which the window's buffer may outgrow the window before it is cut.
const OVERHANG: usize = 256;

/// Nothing is dropped: queries see the first tokens, a local window, and a few blocks of the past that are fetched for them.
///
/// The past is cut into blocks; the tokens of a block that received the most attention from the local windows of later queries represent
/// it. Each chunk of queries fetches the blocks whose representatives suit its mean query best, the same for all heads. Keys outside
/// the window count as if at distance `local - 1`: positions never grow past what the model knows. Tokens that have left the window and
/// do not fill a block yet are seen too.
///
/// Blocks that were fetched lately are resident, the others may lie in slower memory. On a CPU both lie in its memory and nothing is
/// copied: [`footprint`](KvCache::footprint) counts everything, and [`resident_footprint`](InfLlm::resident_footprint) what an
/// accelerator would have to hold.
///
/// A prompt is read in chunks, each of which sees no more than the above. [`with_exact_prompt`](InfLlm::with_exact_prompt) gives the first call exact
/// attention instead.
///
/// Blocks are rows of its own, unrotated, and not a [`KvStore`](longctx_core::KvStore)'s, since a store attends over all that it holds: so there
/// is no packed InfLLM, and the format `T` of keys and values can only be `f32`, `f16` or `bf16`. On the CPU alone: tensors of another
/// device are [`Error::Unsupported`].
///
/// ```
/// use candle_core::{Device, Tensor};
/// use longctx_core::{AttentionShape, KvCache, Rope, RopeScaling, Step};
/// use token_drop::{InfLlm, InfLlmSettings};
///
/// let shape = AttentionShape::new(8, 2, 64)?;
/// let rope = Rope::new(64, 64, 10_000.0, RopeScaling::None)?;
/// let sizes = InfLlmSettings { init: 4, local: 64, block: 16, top_blocks: 2, resident_blocks: 4, representatives: 2, chunk: 32 };
/// let mut cache = InfLlm::<f32>::new(sizes, shape)?;
/// let q = Tensor::randn(0f32, 1., (1, 8, 400, 64), &Device::Cpu)?;
/// let k = Tensor::randn(0f32, 1., (1, 2, 400, 64), &Device::Cpu)?;
/// cache.attend(&Step { q: &q, k: &k, v: &k, shape: &shape, rope: &rope })?;
/// // 400 tokens: 4 first ones, 64 in the window, the others in 20 blocks of 16 and a remainder.
/// assert_eq!(cache.blocks(0), 20);
/// assert!(cache.resident_footprint().total() < cache.footprint().total() / 2);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct InfLlm<T> {
    shape: AttentionShape,
    size: Size,
    exact_prompt: bool,
    published_remainder: bool,
    seen: usize,
    state: Option<State<T>>,
}

#[derive(Debug, Clone, Copy)]
enum Size {
    Fixed(InfLlmSettings),
    RatioOfPrompt(f64),
}

#[derive(Debug)]
struct State<T> {
    sizes: InfLlmSettings,
    /// The first tokens, and those that have left the window for no block yet; unrotated.
    init: Rows<T>,
    remainder: Rows<T>,
    /// The window and up to `OVERHANG` tokens before it, rotated at their positions.
    window: Rows<T>,
    window_start: usize,
    /// Attention that the tokens of the remainder and the window received, a list per batch entry and query head.
    scores: Vec<Vec<f32>>,
    scores_start: usize,
    memories: Vec<Memory<T>>,
}

impl<T: Element> InfLlm<T> {
    /// With fixed sizes.
    ///
    /// # Errors
    /// [`Error::Setting`] for sizes that do not fit together; [`Error::Unsupported`] if the layer has a sliding window of its own.
    pub fn new(sizes: InfLlmSettings, shape: AttentionShape) -> Result<Self> {
        sizes.check()?;
        Self::with_size(Size::Fixed(sizes), shape)
    }

    /// With sizes that are [a ratio](InfLlmSettings::of_prompt) of the first call's tokens.
    ///
    /// # Errors
    /// As [`new`](Self::new), and [`Error::Setting`] unless the ratio lies between 0 and 1.
    pub fn with_ratio(ratio: f64, shape: AttentionShape) -> Result<Self> {
        InfLlmSettings::of_prompt(ratio, 1)?;
        Self::with_size(Size::RatioOfPrompt(ratio), shape)
    }

    fn with_size(size: Size, shape: AttentionShape) -> Result<Self> {
        if shape.window.is_some() {
            let what = "InfLLM in a layer that has a sliding window of its own";
            return Err(Error::Unsupported(what.into()));
        }
        let (exact_prompt, published_remainder) = (false, false);
        Ok(Self { shape, size, exact_prompt, published_remainder, seen: 0, state: None })
    }

    /// Exact attention among the tokens of the first call, which is the whole prompt if it comes in one; blocks are fetched after it.
    #[must_use]
    pub fn with_exact_prompt(mut self) -> Self {
        self.exact_prompt = true;
        self
    }

    /// Masks the remainder as the published code does (thunlp/InfLLM, `get_global_hidden_and_mask`): tokens that leave the window within a
    /// chunk are seen by all of the chunk's queries, so that early queries see them twice, in the window and at the clipped distance.
    #[must_use]
    pub fn with_published_remainder(mut self) -> Self {
        self.published_remainder = true;
        self
    }

    /// Blocks of a batch entry's past.
    pub fn blocks(&self, batch: usize) -> usize {
        self.memory(batch).map_or(0, |memory| memory.blocks.len())
    }

    /// The blocks of a batch entry that are resident, in the order of the text.
    pub fn resident(&self, batch: usize) -> Vec<usize> {
        self.memory(batch).map_or(Vec::new(), Memory::resident)
    }

    /// The blocks of a batch entry that the newest chunk of queries fetched, in the order of the text.
    pub fn fetched(&self, batch: usize) -> Vec<usize> {
        self.memory(batch).map_or(Vec::new(), Memory::fetched)
    }

    fn memory(&self, batch: usize) -> Option<&Memory<T>> {
        self.state.as_ref()?.memories.get(batch)
    }

    /// What an accelerator would have to hold: everything but the blocks that are not resident.
    pub fn resident_footprint(&self) -> Footprint {
        self.state.as_ref().map_or(Footprint::default(), |state| state.footprint(true))
    }

    fn start(&self, batch: usize, tokens: usize) -> Result<State<T>> {
        let sizes = match self.size {
            Size::Fixed(sizes) => sizes,
            Size::RatioOfPrompt(ratio) => InfLlmSettings::of_prompt(ratio, tokens)?,
        };
        let rows = Rows::new(batch * self.shape.kv_heads, self.shape.head_dim);
        Ok(State {
            sizes,
            init: rows.clone(),
            remainder: rows.clone(),
            window: rows,
            window_start: 0,
            scores: vec![Vec::new(); batch * self.shape.heads],
            scores_start: 0,
            memories: (0..batch).map(|_| Memory::new()).collect(),
        })
    }
}

impl<T: Element> State<T> {
    /// One chunk of queries at positions from `start` on. `exact`: the attention output if it is known already.
    fn take(
        &mut self,
        step: &Step<'_>,
        start: usize,
        published: bool,
        exact: Option<Partial>,
    ) -> Result<Partial> {
        let tokens = step.q.dim(2)?;
        let q = step.rope.apply(step.q, start)?;
        self.window.append(&step.rope.apply(step.k, start)?, step.v)?;
        self.scores.iter_mut().for_each(|scores| scores.resize(scores.len() + tokens, 0.0));
        self.leave_window(start, tokens, step.rope)?;
        let far = vec![self.sizes.local as i64 - 1; tokens];
        let q_far = step.rope.apply_at(step.q, &far)?;
        let chosen = self.choose(&q_far)?;
        let near = AttentionShape { window: Some(self.sizes.local), ..*step.shape };
        let whole = match exact {
            Some(whole) => whole,
            None => {
                let mut parts = self.attend_past(&q_far, &chosen, step.shape, published)?;
                let window = self.pages(&self.window);
                parts.push(attention::attend_pages(&q, &window, &near, Visible::Causal)?);
                Partial::merge(&parts)?
            }
        };
        let window = self.pages(&self.window);
        let mass = attention::mass_pages(&q, &whole.lse, &window, &near, Visible::Causal)?;
        self.note(&mass);
        self.settle(step.shape, if tokens > 1 { 0 } else { OVERHANG });
        Ok(whole)
    }

    fn pages<'a>(&self, rows: &'a Rows<T>) -> Vec<Vec<Page<'a, T>>> {
        (0..rows.heads()).map(|head| vec![rows.whole(head)]).collect()
    }

    /// Tokens that the last of `tokens` queries from `start` on no longer has in its window join the remainder, unrotated. They stay in the
    /// window's buffer for the queries before it.
    fn leave_window(&mut self, start: usize, tokens: usize, rope: &Rope) -> Result<()> {
        let left = |end: usize| end.saturating_sub(self.sizes.local);
        let leaving = left(start)..left(start + tokens);
        if leaving.is_empty() {
            return Ok(());
        }
        let entries = leaving.start - self.window_start..leaving.end - self.window_start;
        let (heads, count) = (self.window.heads(), entries.len());
        let tensor = |part: fn(Page<'_, T>) -> &[T]| -> Result<Tensor> {
            let rows = (0..heads).flat_map(|head| part(self.window.page(head, entries.clone())));
            let rows: Vec<T> = rows.copied().collect();
            let d = rows.len() / (heads * count);
            Ok(Tensor::from_vec(rows, (1, heads, count, d), &Device::Cpu)?.to_dtype(DType::F32)?)
        };
        let back: Vec<_> = leaving.map(|position| -(position as i64)).collect();
        let keys = rope.apply_at(&tensor(|page| page.keys)?, &back)?;
        self.remainder.append(&keys, &tensor(|page| page.values)?)
    }

    /// The blocks that suit the mean of the queries, for each batch entry.
    fn choose(&mut self, q_far: &Tensor) -> Result<Vec<Vec<usize>>> {
        let mean = q_far.to_dtype(DType::F32)?.mean(2)?.flatten_from(1)?.to_vec2::<f32>()?;
        let sizes = self.sizes;
        let choose = |(memory, query): (&mut Memory<T>, Vec<f32>)| {
            let chosen = memory.choose(&query, sizes.top_blocks);
            memory.fetch(&chosen, sizes.resident_blocks);
            chosen
        };
        Ok(self.memories.iter_mut().zip(mean).map(choose).collect())
    }

    /// Attention over what lies outside the window, all of it at the same distance.
    fn attend_past(
        &self,
        q_far: &Tensor,
        chosen: &[Vec<usize>],
        shape: &AttentionShape,
        published: bool,
    ) -> Result<Vec<Partial>> {
        let (tokens, count) = (q_far.dim(2)?, self.remainder.len());
        // What leaves the window within the chunk is not past yet for its early queries.
        let staggered = tokens > 1 && !published && count > 0;
        let mut pages = self.pages(&self.init);
        for (head, pages) in pages.iter_mut().enumerate() {
            let (batch, kv_head) = (head / shape.kv_heads, head % shape.kv_heads);
            let memory = &self.memories[batch];
            pages.extend(chosen[batch].iter().map(|&block| memory.blocks[block].whole(kv_head)));
            if !staggered {
                pages.push(self.remainder.whole(head));
            }
        }
        let mut parts = vec![attention::attend_pages(q_far, &pages, shape, Visible::All)?];
        if staggered {
            let late = tokens.min(count);
            let q = q_far.narrow(2, tokens - late, late)?;
            let remainder = self.pages(&self.remainder);
            let part = attention::attend_pages(&q, &remainder, shape, Visible::Causal)?;
            let out = part.out.pad_with_zeros(2, tokens - late, 0)?;
            let (batch, heads, _) = part.lse.dims3()?;
            let none = (batch, heads, tokens - late);
            let none = Tensor::full(f32::NEG_INFINITY, none, part.lse.device())?;
            parts.push(Partial { out, lse: Tensor::cat(&[&none, &part.lse], D::Minus1)? });
        }
        Ok(parts)
    }

    /// Adds the attention that the window's buffer received.
    fn note(&mut self, mass: &[Vec<f32>]) {
        // What lies in the buffer before the remainder is out of every window and received none.
        let skip = self.scores_start.saturating_sub(self.window_start);
        let at = (self.window_start + skip) - self.scores_start;
        for (scores, mass) in self.scores.iter_mut().zip(mass) {
            scores[at..].iter_mut().zip(&mass[skip..]).for_each(|(score, mass)| *score += mass);
        }
    }

    /// Fills the first tokens and then blocks from the remainder, and cuts the window's buffer if it is longer by more than `overhang`.
    fn settle(&mut self, shape: &AttentionShape, overhang: usize) {
        let wanted = (self.sizes.init - self.init.len()).min(self.remainder.len());
        if wanted > 0 {
            self.init.join(self.remainder.take_front(wanted));
            self.drop_scores(wanted);
        }
        while self.remainder.len() >= self.sizes.block {
            let block = self.remainder.take_front(self.sizes.block);
            self.add_block(block, shape);
            self.drop_scores(self.sizes.block);
        }
        let surplus = self.window.len().saturating_sub(self.sizes.local);
        if surplus > overhang {
            self.window.take_front(surplus);
            self.window_start += surplus;
            self.window.shrink();
        }
    }

    /// Splits a block of all batch entries' heads into one block for each.
    fn add_block(&mut self, mut block: Rows<T>, shape: &AttentionShape) {
        let scores: Vec<_> = self.scores.iter().map(|s| &s[..self.sizes.block]).collect();
        for (memory, scores) in self.memories.iter_mut().zip(scores.chunks(shape.heads)) {
            let own = block.take_heads(shape.kv_heads);
            memory.add(own, scores, self.sizes.representatives);
        }
    }

    fn drop_scores(&mut self, count: usize) {
        self.scores.iter_mut().for_each(|scores| drop(scores.drain(..count)));
        self.scores_start += count;
    }

    fn footprint(&self, resident: bool) -> Footprint {
        let rows = [&self.init, &self.remainder, &self.window].map(Rows::footprint);
        let mut sum: Footprint = rows.into_iter().sum();
        for memory in &self.memories {
            let blocks: Footprint = match resident {
                true => memory.resident().into_iter().map(|i| memory.blocks[i].footprint()).sum(),
                false => memory.blocks.iter().map(Rows::footprint).sum(),
            };
            sum += blocks;
            sum.bookkeeping += memory.bookkeeping();
        }
        sum.bookkeeping +=
            self.scores.iter().map(|s| s.capacity() * size_of::<f32>()).sum::<usize>();
        sum
    }
}

impl<T: Element> InfLlm<T> {
    fn check(&self, step: &Step<'_>) -> Result<()> {
        let held = self.state.as_ref().map(|state| state.memories.len());
        check_cpu_step(step, &self.shape, held).map(drop)
    }

    /// Takes tokens in chunk by chunk. `exact`: their attention output if it is known already.
    fn take(&mut self, step: &Step<'_>, exact: Option<&Partial>) -> Result<Tensor> {
        let (batch, tokens) = self.shape.check_q(step.q)?;
        let mut state = match self.state.take() {
            Some(state) => state,
            None => self.start(batch, tokens)?,
        };
        let mut outs = Vec::new();
        for start in (0..tokens).step_by(state.sizes.chunk) {
            let count = state.sizes.chunk.min(tokens - start);
            let part = |x: &Tensor| x.narrow(2, start, count)?.contiguous();
            let (q, k, v) = (part(step.q)?, part(step.k)?, part(step.v)?);
            let exact = match exact {
                Some(whole) => Some(Partial { out: part(&whole.out)?, lse: part(&whole.lse)? }),
                None => None,
            };
            let chunk = Step { q: &q, k: &k, v: &v, ..*step };
            let position = self.seen + start;
            outs.push(state.take(&chunk, position, self.published_remainder, exact)?.out);
        }
        self.seen += tokens;
        self.state = Some(state);
        Ok(Tensor::cat(&outs, 2)?.to_dtype(step.q.dtype())?)
    }
}

impl<T: Element> KvCache for InfLlm<T> {
    fn attend(&mut self, step: &Step<'_>) -> Result<Tensor> {
        self.check(step)?;
        if !self.exact_prompt || self.seen > 0 {
            return self.take(step, None);
        }
        let (q, k) = (step.rope.apply(step.q, 0)?, step.rope.apply(step.k, 0)?);
        let whole = attention::attend(&q, &k, step.v, step.shape, Visible::Causal)?;
        self.take(step, Some(&whole))
    }

    fn take_prompt(&mut self, step: &Step<'_>, whole: &Partial) -> Result<()> {
        self.check(step)?;
        if self.seen > 0 {
            return Err(Error::mismatch("tokens seen before a prompt", 0, self.seen));
        }
        self.take(step, Some(whole)).map(drop)
    }

    fn seen(&self) -> usize {
        self.seen
    }

    fn held(&self) -> usize {
        self.seen
    }

    fn footprint(&self) -> Footprint {
        self.state.as_ref().map_or(Footprint::default(), |state| state.footprint(false))
    }

    fn reset(&mut self) {
        self.state = None;
        self.seen = 0;
    }
}
