//! Keys and values of one layer, and attention over them: what caches and policies are built from.

use crate::{AttentionShape, Error, Footprint, Result};
use candle_core::{D, DType, Tensor};

/// Holds keys and values for some positions per kv head, and attends over them.
///
/// A store knows nothing of positions or the rotary embedding: keys come rotated as the cache wants them. Entries are numbered
/// per kv head in the order in which they were appended; after [`retain`](KvStore::retain) the survivors close ranks, so
/// that entry i of one head and of another may come from different tokens.
pub trait KvStore: Send {
    /// Appends keys and values `[batch, kv_heads, tokens, head_dim]` to every head.
    ///
    /// # Errors
    /// If the tensors do not fit the store's shape or its batch; [`Error::NotFinite`] from stores that quantize.
    fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<()>;

    /// Appends to each kv head the tokens selected for it among those of `k` and `v`, `[batch, kv_heads, tokens, head_dim]`.
    ///
    /// # Errors
    /// As [`append`](KvStore::append), and if the selection is not one list per batch entry and kv head, strictly increasing, within the tokens.
    fn append_selected(&mut self, k: &Tensor, v: &Tensor, tokens: &Selection) -> Result<()> {
        let (batch, count) = self.shape().check_kv(k, v)?;
        tokens.check(&vec![count; batch * self.shape().kv_heads])?;
        let lists = tokens.heads();
        let longest = lists.iter().map(Vec::len).max().unwrap_or(0);
        self.append(&gather(k, lists, longest)?, &gather(v, lists, longest)?)?;
        if lists.iter().all(|list| list.len() == longest) {
            return Ok(());
        }
        // Shorter lists were filled up to the longest one's length: what fills them goes again.
        let own = |(len, list): (usize, &Vec<u32>)| 0..(len - longest + list.len()) as u32;
        let heads = self.lens().into_iter().zip(lists).map(|head| own(head).collect());
        let keep = Selection::new(heads.collect());
        self.retain(&keep)
    }

    /// Attention of queries `[batch, heads, tokens, head_dim]` over the entries that `visible` allows.
    ///
    /// # Errors
    /// If `q` does not fit the store, or `visible` speaks of more entries than there are.
    fn attend(&self, q: &Tensor, visible: Visible) -> Result<Partial>;

    /// Attention probability received by each entry, summed over the queries: for query head h of batch b, the vector
    /// `[b * heads + h]` with one number per entry of its kv head.
    ///
    /// `lse` (`[batch, heads, tokens]`) is the log-sum-exp of *all* that the queries see, here and in other stores, so that the
    /// masses of several stores add up to the number of queries.
    ///
    /// # Errors
    /// As [`attend`](KvStore::attend).
    fn mass(&self, q: &Tensor, lse: &Tensor, visible: Visible) -> Result<Vec<Vec<f32>>>;

    /// Keeps the selected entries of each kv head and frees the others.
    ///
    /// # Errors
    /// If the selection is not one list per batch and kv head, strictly increasing, within the entries held.
    fn retain(&mut self, keep: &Selection) -> Result<()>;

    /// The keys and values of one kv head, dequantized to f32: two tensors `[entries, head_dim]`. For policies and tests.
    ///
    /// # Errors
    /// If there is no such batch entry or kv head.
    fn read(&self, batch: usize, kv_head: usize) -> Result<(Tensor, Tensor)>;

    /// Entries held by each kv head: `[batch * kv_heads]` numbers. Empty before the first append.
    fn lens(&self) -> Vec<usize>;

    /// Entries held by the head that holds the most.
    fn len(&self) -> usize {
        self.lens().into_iter().max().unwrap_or(0)
    }

    /// Whether nothing is held.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The layer that it was made for.
    fn shape(&self) -> &AttentionShape;

    /// Bytes held.
    fn footprint(&self) -> Footprint;

    /// Forgets everything and gives the memory back.
    fn reset(&mut self);
}

/// The listed tokens of each head of `[batch, kv_heads, tokens, head_dim]`; lists shorter than `count` end with their last token repeated.
fn gather(x: &Tensor, lists: &[Vec<u32>], count: usize) -> Result<Tensor> {
    let (batch, kv_heads, tokens, d) = x.dims4()?;
    let rows: Vec<u32> = (0..)
        .zip(lists)
        .flat_map(|(head, list)| {
            let last = list.last().copied().unwrap_or(0);
            let filled = list.iter().copied().chain(std::iter::repeat(last)).take(count);
            filled.map(move |token| head * tokens as u32 + token)
        })
        .collect();
    let rows = Tensor::from_vec(rows, batch * kv_heads * count, x.device())?;
    let flat = x.contiguous()?.reshape((batch * kv_heads * tokens, d))?;
    Ok(flat.index_select(&rows, 0)?.reshape((batch, kv_heads, count, d))?)
}

/// Which entries a query sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Visible {
    /// Every query sees every entry: they all lie in its past.
    All,
    /// The last `tokens` entries are the queries' own tokens. Query i sees the entries up to its own; with the layer's
    /// sliding window, only the last `window` of these.
    Causal,
}

impl Visible {
    /// The range of entries that query `i` of `queries` sees among `len`.
    pub fn range(
        self,
        i: usize,
        queries: usize,
        len: usize,
        window: Option<usize>,
    ) -> std::ops::Range<usize> {
        match self {
            Visible::All => 0..len,
            Visible::Causal => {
                let end = (len + i + 1).saturating_sub(queries);
                end.saturating_sub(window.unwrap_or(end))..end
            }
        }
    }
}

/// Attention over a part of what a query sees: mergeable with other parts without loss.
#[derive(Debug, Clone)]
pub struct Partial {
    /// The softmax-weighted sum of the part's values, normalised within the part: f32, `[batch, heads, tokens, head_dim]`.
    pub out: Tensor,
    /// The logarithm of the part's sum of exponentiated scores: f32, `[batch, heads, tokens]`; -inf where nothing was seen.
    pub lse: Tensor,
}

impl Partial {
    /// Joins attention over disjoint sets of entries into attention over their union.
    ///
    /// # Errors
    /// If `parts` is empty, or their shapes differ.
    pub fn merge(parts: &[Partial]) -> Result<Partial> {
        let [first, rest @ ..] = parts else {
            return Err(Error::mismatch("parts of an attention", "at least one", 0));
        };
        if rest.is_empty() {
            return Ok(first.clone());
        }
        let lse = Tensor::stack(&parts.iter().map(|p| &p.lse).collect::<Vec<_>>(), 0)?;
        // A query that sees nothing in any part keeps -inf as its log-sum-exp and zero as its output.
        let max = lse.max(0)?.maximum(f32::MIN)?;
        let weights = lse.broadcast_sub(&max.unsqueeze(0)?)?.exp()?;
        let sum = weights.sum(0)?;
        let scaled = weights.broadcast_div(&sum.maximum(f32::MIN_POSITIVE)?.unsqueeze(0)?)?;
        let mut out = first.out.broadcast_mul(&scaled.get(0)?.unsqueeze(D::Minus1)?)?;
        for (i, part) in rest.iter().enumerate() {
            out = (out + part.out.broadcast_mul(&scaled.get(i + 1)?.unsqueeze(D::Minus1)?)?)?;
        }
        Ok(Partial { out, lse: (max + sum.log()?)? })
    }

    /// The output alone, in the dtype that the model computes in.
    ///
    /// # Errors
    /// If the conversion fails.
    pub fn into_output(self, dtype: DType) -> Result<Tensor> {
        Ok(self.out.to_dtype(dtype)?)
    }
}

/// Which entries stay: for each batch entry and kv head (`[batch * kv_heads]`), entry numbers in increasing order.
///
/// ```
/// use longctx_core::Selection;
///
/// // Two heads that hold 5 and 4 entries: the first keeps its ends, the second all.
/// let keep = Selection::new(vec![vec![0, 4], vec![0, 1, 2, 3]]);
/// assert!(keep.check(&[5, 4]).is_ok());
/// assert!(keep.check(&[4, 4]).unwrap_err().to_string().contains("head 0"));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selection {
    heads: Vec<Vec<u32>>,
}

impl Selection {
    /// One list per batch entry and kv head, batch-major.
    pub fn new(heads: Vec<Vec<u32>>) -> Self {
        Self { heads }
    }

    /// The same list for `heads` heads.
    pub fn uniform(heads: usize, keep: Vec<u32>) -> Self {
        Self { heads: vec![keep; heads] }
    }

    /// The lists.
    pub fn heads(&self) -> &[Vec<u32>] {
        &self.heads
    }

    /// Checks the lists against the entries that each head holds.
    ///
    /// # Errors
    /// [`Error::Mismatch`] naming the first head whose list is not strictly increasing or goes past its end.
    pub fn check(&self, lens: &[usize]) -> Result<()> {
        if self.heads.len() != lens.len() {
            return Err(Error::mismatch("heads of a selection", lens.len(), self.heads.len()));
        }
        for (head, (keep, &len)) in self.heads.iter().zip(lens).enumerate() {
            let what = || format!("selection for head {head}");
            if let Some(w) = keep.windows(2).find(|w| w[0] >= w[1]) {
                let got = format!("{} before {}", w[0], w[1]);
                return Err(Error::mismatch(what(), "strictly increasing entries", got));
            }
            if let Some(&last) = keep.last().filter(|&&last| last as usize >= len) {
                return Err(Error::mismatch(what(), format!("entries below {len}"), last));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DenseStore;
    use candle_core::Device;

    #[test]
    fn each_head_takes_the_tokens_selected_for_it() {
        let shape = AttentionShape::new(2, 2, 1).unwrap();
        let mut store = DenseStore::new(shape, DType::F32).unwrap();
        let k = Tensor::arange(0f32, 10., &Device::Cpu).unwrap().reshape((1, 2, 5, 1)).unwrap();
        let v = (&k + 100.0).unwrap();
        let ragged = Selection::new(vec![vec![1, 3, 4], vec![]]);
        let even = Selection::new(vec![vec![0, 2], vec![3, 4]]);
        store.append_selected(&k, &v, &ragged).unwrap();
        store.append_selected(&k, &v, &even).unwrap();
        let keys = |head| store.read(0, head).unwrap().0.flatten_all().unwrap().to_vec1().unwrap();
        let (first, second): (Vec<f32>, Vec<f32>) = (keys(0), keys(1));
        assert_eq!((first, second), (vec![1., 3., 4., 0., 2.], vec![8., 9.]));
        let (keys, values) = store.read(0, 1).unwrap();
        let apart: Vec<f32> = (values - keys).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(apart, [100.0; 2]);
        let past = Selection::new(vec![vec![5], vec![]]);
        assert!(store.append_selected(&k, &v, &past).unwrap_err().to_string().contains("head 0"));
    }
}
