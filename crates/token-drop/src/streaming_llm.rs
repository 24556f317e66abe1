//! StreamingLLM: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453.

use crate::check::check_step;
use candle_core::{DType, Tensor};
use longctx_core::{
    DenseStore, Error, Footprint, KvCache, KvStore, Partial, Result, Selection, Step, Visible,
    attention,
};

/// Share of the kept tokens that are sinks, where a ratio of the prompt is kept (arXiv 2407.01527).
const SINK_SHARE: f64 = 0.021;

/// The first tokens ("sinks") and a window of the newest ones, at constant memory however long the text grows.
///
/// Positions are those *within the cache*: with 4 sinks and a window of 60, the newest token is never past position 64.
/// The published code rotates the whole window anew for every token. That is not needed, since attention sees only
/// differences of positions: keys of the window stay rotated at their true positions and meet queries rotated at theirs; keys
/// of the sinks stay where they were at first and meet queries rotated at their place within the cache. The two parts of the
/// attention are merged without loss. So the window may lie in any store, packed ones included; the few sinks lie in f32.
///
/// The whole prompt in one call gets exact attention; tokens are dropped afterwards.
#[derive(Debug)]
pub struct StreamingLlm<S> {
    size: Size,
    step: usize,
    sinks: DenseStore,
    window: S,
    /// Tokens that the sinks and the window have room for; a ratio is settled by the first call.
    room: (usize, usize),
    seen: usize,
}

#[derive(Debug, Clone, Copy)]
enum Size {
    Tokens { sinks: usize, window: usize },
    RatioOfPrompt(f64),
}

impl Size {
    fn of(self, prompt: usize) -> (usize, usize) {
        match self {
            Size::Tokens { sinks, window } => (sinks, window),
            Size::RatioOfPrompt(ratio) => {
                let kept = (ratio * prompt as f64) as usize;
                let sinks = (kept as f64 * SINK_SHARE) as usize;
                (sinks, (kept - sinks).max(1))
            }
        }
    }
}

impl<S: KvStore> StreamingLlm<S> {
    /// Keeps the first `sinks` tokens, and the newest `window` ones in `store`.
    ///
    /// # Errors
    /// [`Error::Setting`] if `window` is 0 or `store` holds something; [`Error::Unsupported`] if the layer has a sliding
    /// window of its own.
    pub fn new(sinks: usize, window: usize, store: S) -> Result<Self> {
        if window == 0 {
            return Err(Error::setting("window", "at least 1 token", window));
        }
        Self::with_size(Size::Tokens { sinks, window }, store)
    }

    /// Keeps `ratio` of the tokens of the first call: 2.1% of these as sinks, the others as the window.
    ///
    /// # Errors
    /// As [`new`](Self::new), and [`Error::Setting`] if `ratio` is not between 0 and 1, ends excluded.
    pub fn with_ratio(ratio: f64, store: S) -> Result<Self> {
        if !(ratio > 0.0 && ratio < 1.0) {
            return Err(Error::setting("ratio", "a number between 0 and 1", ratio));
        }
        Self::with_size(Size::RatioOfPrompt(ratio), store)
    }

    fn with_size(size: Size, window: S) -> Result<Self> {
        let shape = *window.shape();
        if shape.window.is_some() {
            let what = "StreamingLLM in a layer that has a sliding window of its own";
            return Err(Error::Unsupported(what.into()));
        }
        if !window.is_empty() {
            return Err(Error::setting("store", "an empty store", window.len()));
        }
        let sinks = DenseStore::new(shape, DType::F32)?;
        Ok(Self { size, step: 1, sinks, window, room: (0, 0), seen: 0 })
    }

    /// Drops `step` tokens at a time, so that the window holds from `window - step + 1` to `window` of them. A step of a whole
    /// group spares a packed store from packing all groups anew.
    ///
    /// # Errors
    /// [`Error::Setting`] if `step` is 0 or more than the window.
    pub fn with_step(mut self, step: usize) -> Result<Self> {
        let most = match self.size {
            Size::Tokens { window, .. } => window,
            Size::RatioOfPrompt(_) => usize::MAX,
        };
        if step == 0 || step > most {
            return Err(Error::setting("step", "from 1 to the window", step));
        }
        self.step = step;
        Ok(self)
    }

    /// The sinks.
    pub fn sinks(&self) -> &DenseStore {
        &self.sinks
    }

    /// The newest tokens.
    pub fn window(&self) -> &S {
        &self.window
    }

    /// Checks a call before anything changes; gives its tokens.
    fn check(&self, step: &Step<'_>) -> Result<usize> {
        let shape = self.window.shape();
        let heads = self.window.lens().len();
        let (_, tokens) = check_step(step, shape, (heads > 0).then_some(heads / shape.kv_heads))?;
        Ok(tokens)
    }

    /// Tokens that must leave the window before `coming` ones join it.
    fn surplus(&self, coming: usize) -> usize {
        let over = (self.window.len() + coming).saturating_sub(self.room.1);
        // A ratio of a short prompt may leave a window smaller than the step.
        over.next_multiple_of(self.step.min(self.room.1))
    }

    fn drop_oldest(&mut self, count: usize) -> Result<()> {
        let heads = self.window.lens().len();
        let newest = count as u32..self.window.len() as u32;
        self.window.retain(&Selection::uniform(heads, newest.collect()))
    }

    /// Takes in rotated keys and their values, and never holds more than there is room for.
    fn take(&mut self, k: &Tensor, v: &Tensor) -> Result<()> {
        let tokens = k.dim(2)?;
        let first = (self.room.0 - self.sinks.len()).min(tokens);
        if first > 0 {
            self.sinks.append(&k.narrow(2, 0, first)?, &v.narrow(2, 0, first)?)?;
        }
        let surplus = self.surplus(tokens - first);
        let old = surplus.min(self.window.len());
        if old > 0 {
            self.drop_oldest(old)?;
        }
        let skip = first + surplus - old;
        if skip < tokens {
            let newest = |x: &Tensor| x.narrow(2, skip, tokens - skip);
            self.window.append(&newest(k)?, &newest(v)?)?;
        }
        Ok(())
    }
}

impl<S: KvStore> KvCache for StreamingLlm<S> {
    fn attend(&mut self, step: &Step<'_>) -> Result<Tensor> {
        let tokens = self.check(step)?;
        if self.seen == 0 {
            self.room = self.size.of(tokens);
        }
        let q = step.rope.apply(step.q, self.seen)?;
        let k = step.rope.apply(step.k, self.seen)?;
        let mut parts = Vec::new();
        if !self.sinks.is_empty() {
            let within_cache = step.rope.apply(step.q, self.held())?;
            parts.push(self.sinks.attend(&within_cache, Visible::All)?);
        }
        if tokens == 1 && self.sinks.len() == self.room.0 {
            // A decoded token reads the window once, itself included.
            self.window.append(&k, step.v)?;
            parts.push(self.window.attend(&q, Visible::Causal)?);
            let surplus = self.surplus(0);
            if surplus > 0 {
                self.drop_oldest(surplus)?;
            }
        } else {
            if !self.window.is_empty() {
                parts.push(self.window.attend(&q, Visible::All)?);
            }
            parts.push(attention::attend(&q, &k, step.v, step.shape, Visible::Causal)?);
            self.take(&k, step.v)?;
        }
        self.seen += tokens;
        Partial::merge(&parts)?.into_output(step.q.dtype())
    }

    fn take_prompt(&mut self, step: &Step<'_>, _: &Partial) -> Result<()> {
        let tokens = self.check(step)?;
        if self.seen > 0 {
            return Err(Error::mismatch("tokens seen before a prompt", 0, self.seen));
        }
        self.room = self.size.of(tokens);
        self.take(&step.rope.apply(step.k, 0)?, step.v)?;
        self.seen = tokens;
        Ok(())
    }

    fn seen(&self) -> usize {
        self.seen
    }

    fn held(&self) -> usize {
        self.sinks.len() + self.window.len()
    }

    fn footprint(&self) -> Footprint {
        self.sinks.footprint() + self.window.footprint()
    }

    fn reset(&mut self) {
        self.sinks.reset();
        self.window.reset();
        self.seen = 0;
    }
}
