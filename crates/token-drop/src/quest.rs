//! Quest: Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", arXiv 2406.10774.

use crate::{Group, check::check_cpu_step, rows::Rows};
use candle_core::{DType, Tensor};
use longctx_core::attention::{self, Element, Page, with_slice};
use longctx_core::{AttentionShape, Error, Footprint, KvCache, Partial, Result, Step, Visible};

/// Nothing is dropped: a decoded token reads the few pages whose keys could match its query best.
///
/// Each page of 16 tokens keeps the least and the largest number of each channel of its keys, which bound the score that any of
/// them can reach. The pages with the highest bounds are read, each kv head's own, with the newest page always among them. The
/// query heads of a group read the same pages, chosen by their largest bound. Calls of several tokens are exact, as in the published code.
///
/// It saves time, not memory: what is held is a dense cache and two keys more per page. The rows are its own and not a
/// [`KvStore`](longctx_core::KvStore)'s, since a store attends over all that it holds: so there is no packed Quest, and `T` can
/// only be `f32`, `f16` or `bf16`. On the CPU alone: tensors of another device are [`Error::Unsupported`].
///
/// ```
/// use candle_core::{Device, Tensor};
/// use longctx_core::{AttentionShape, KvCache, Rope, RopeScaling, Step};
/// use token_drop::Quest;
///
/// let shape = AttentionShape::new(8, 2, 64)?;
/// let rope = Rope::new(64, 64, 10_000.0, RopeScaling::None)?;
/// let mut cache = Quest::<f32>::new(64, shape)?;
/// for tokens in [400, 1] {
///     let q = Tensor::randn(0f32, 1., (1, 8, tokens, 64), &Device::Cpu)?;
///     let k = Tensor::randn(0f32, 1., (1, 2, tokens, 64), &Device::Cpu)?;
///     cache.attend(&Step { q: &q, k: &k, v: &k, shape: &shape, rope: &rope })?;
/// }
/// assert_eq!(cache.held(), 401);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Quest<T> {
    shape: AttentionShape,
    pages: usize,
    page: usize,
    held: Option<Held<T>>,
    seen: usize,
}

#[derive(Debug)]
struct Held<T> {
    rows: Rows<T>,
    /// For each head, the least and the largest of each channel in each whole or growing page: `[pages, 2, head_dim]`.
    bounds: Vec<Vec<T>>,
}

impl<T: Element> Quest<T> {
    /// A decoded token reads at most `budget` tokens, in pages of 16.
    ///
    /// # Errors
    /// [`Error::Setting`] if the budget is less than a page; [`Error::Unsupported`] if the layer has a sliding window.
    pub fn new(budget: usize, shape: AttentionShape) -> Result<Self> {
        Self::with_page(budget, 16, shape)
    }

    /// The same with pages of another size.
    ///
    /// # Errors
    /// As [`new`](Self::new), and if the page is empty.
    pub fn with_page(budget: usize, page: usize, shape: AttentionShape) -> Result<Self> {
        if page == 0 {
            return Err(Error::setting("page", "at least 1 token", 0));
        }
        if budget < page {
            return Err(Error::setting("budget", format!("at least a page of {page}"), budget));
        }
        if shape.window.is_some() {
            let what = "Quest in a layer that has a sliding window of its own";
            return Err(Error::Unsupported(what.into()));
        }
        Ok(Self { shape, pages: budget / page, page, held: None, seen: 0 })
    }

    fn decode(&self, held: &Held<T>, q: &Tensor) -> Result<Partial> {
        let (group, d) = (self.shape.group(), self.shape.head_dim);
        let q32 = q.to_dtype(DType::F32)?.contiguous()?;
        let chosen: Vec<_> = with_slice::<f32, _>(&q32, |q| {
            let queries = q.chunks_exact(group * d).enumerate();
            Ok(queries.map(|(head, queries)| self.choose(&held.bounds[head], queries)).collect())
        })?;
        let runs = |(head, pages): (usize, Vec<usize>)| self.runs(&held.rows, head, &pages);
        let pages: Vec<_> = chosen.into_iter().enumerate().map(runs).collect();
        attention::attend_pages(q, &pages, &self.shape, Visible::All)
    }

    /// The pages of the highest bounds, in the order of the text; the newest always.
    fn choose(&self, bounds: &[T], queries: &[f32]) -> Vec<usize> {
        let d = self.shape.head_dim;
        let count = bounds.len() / (2 * d);
        let mut order: Vec<_> = (0..count).collect();
        if count <= self.pages {
            return order;
        }
        let mut scratch = Vec::new();
        let bounds = T::widen(bounds, &mut scratch);
        let bound = |query: &[f32], page: &[f32]| {
            let (low, high) = page.split_at(d);
            let ends = low.iter().zip(high).zip(query);
            ends.map(|((low, high), q)| (q * low).max(q * high)).sum::<f32>()
        };
        let of_head = |query| bounds.chunks_exact(2 * d).map(|page| bound(query, page)).collect();
        let heads: Vec<Vec<f32>> = queries.chunks_exact(d).map(of_head).collect();
        let mut scores = Group::Max.join(&heads);
        scores[count - 1] = f32::INFINITY;
        order.select_nth_unstable_by(self.pages - 1, |&a, &b| scores[b].total_cmp(&scores[a]));
        order.truncate(self.pages);
        order.sort_unstable();
        order
    }

    /// Neighbouring pages read as one.
    fn runs<'a>(&self, rows: &'a Rows<T>, head: usize, pages: &[usize]) -> Vec<Page<'a, T>> {
        pages
            .chunk_by(|a, b| a + 1 == *b)
            .map(|run| {
                let end = (run[run.len() - 1] + 1) * self.page;
                rows.page(head, run[0] * self.page..end.min(rows.len()))
            })
            .collect()
    }
}

impl<T: Element> Held<T> {
    fn append(&mut self, k: &Tensor, v: &Tensor, page: usize) -> Result<()> {
        let first = self.rows.len() / page;
        self.rows.append(k, v)?;
        let len = self.rows.len();
        for (head, bounds) in self.bounds.iter_mut().enumerate() {
            let d = self.rows.head_dim();
            bounds.truncate(first * 2 * d);
            for start in (first * page..len).step_by(page) {
                let keys = self.rows.page(head, start..(start + page).min(len)).keys;
                let fold = |pick: fn(T, T) -> T| {
                    let column = |c: usize| keys[c..].iter().step_by(d).copied();
                    (0..d).map(move |c| column(c).reduce(pick).unwrap_or(keys[c]))
                };
                bounds.extend(fold(|a, b| if b < a { b } else { a }));
                bounds.extend(fold(|a, b| if b > a { b } else { a }));
            }
        }
        Ok(())
    }
}

impl<T: Element> KvCache for Quest<T> {
    fn attend(&mut self, step: &Step<'_>) -> Result<Tensor> {
        let held = self.held.as_ref().map(|held| held.rows.heads() / self.shape.kv_heads);
        let (batch, tokens) = check_cpu_step(step, &self.shape, held)?;
        let heads = batch * self.shape.kv_heads;
        let q = step.rope.apply(step.q, self.seen)?;
        let k = step.rope.apply(step.k, self.seen)?;
        let mut held = self.held.take().unwrap_or_else(|| Held {
            rows: Rows::new(heads, self.shape.head_dim),
            bounds: vec![Vec::new(); heads],
        });
        held.append(&k, step.v, self.page)?;
        let out = match tokens {
            1 => self.decode(&held, &q)?,
            _ => {
                let whole: Vec<_> = (0..heads).map(|head| vec![held.rows.whole(head)]).collect();
                attention::attend_pages(&q, &whole, &self.shape, Visible::Causal)?
            }
        };
        self.seen += tokens;
        self.held = Some(held);
        out.into_output(step.q.dtype())
    }

    fn seen(&self) -> usize {
        self.seen
    }

    fn held(&self) -> usize {
        self.seen
    }

    fn footprint(&self) -> Footprint {
        let Some(held) = &self.held else { return Footprint::default() };
        let bounds: usize = held.bounds.iter().map(Vec::capacity).sum();
        let bookkeeping = bounds * size_of::<T>();
        held.rows.footprint() + Footprint { bookkeeping, ..Default::default() }
    }

    fn reset(&mut self) {
        self.held = None;
        self.seen = 0;
    }
}
