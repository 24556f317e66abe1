use std::ops::Range;

use crate::attention::{Page, attend_each, attend_pages, attention_sums_pages, with_slice};
use crate::store::check_range;
use crate::{
    AttentionShape, AttentionState, AttentionSums, Batch, Error, Footprint, KvStore, Mark, Mask,
    Result, Selection, SeqId,
};
use candle_core::{DType, Device, Tensor};

/// Number of entries that attention reads at a time: 4.5 MiB in f32 for DeepSeek's 576 channels.
const CHUNK: usize = 2048;

/// A store for multi-head latent attention, which holds the latent of each token once, in a store
/// of any format.
///
/// A token has one key for all heads: a rotated part, followed by the compressed latent. The latent
/// is also the token's value. The inner store holds the rotated part as its keys and the latent as
/// its values, so it can have any format of keys and values.
///
/// Attention reads a chunk of entries, expands it to f32 and concatenates the two parts. All query
/// heads share the one key, so this is a small part of the work.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use longctx_core::{AttentionShape, Batch, DenseStore, KvStore, LatentStore};
///
/// // 16 query heads over keys of 64 rotated channels and a latent of 512.
/// let shape = AttentionShape { value_dim: 512, ..AttentionShape::new(16, 1, 576)? };
/// let mut store = LatentStore::new(shape, |parts| DenseStore::new(parts, DType::F16))?;
/// let k = Tensor::randn(0f32, 1., (100, 1, 576), &Device::Cpu)?;
/// store.append(&Batch::single(0, 100)?, &k, &k.narrow(2, 64, 512)?)?;
/// assert_eq!(store.footprint().payload, 100 * 576 * 2);
/// # Ok::<(), longctx_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct LatentStore<S> {
    shape: AttentionShape,
    parts: S,
}

impl<S: KvStore> LatentStore<S> {
    /// Creates an empty store. `make` creates the inner store from its shape: keys have the width
    /// of the rotated part, values that of the latent.
    ///
    /// # Errors
    /// [`Error::Setting`] for more than one kv head, values as wide as the keys, or a sliding
    /// window; [`Error::Mismatch`] if `make` returns a store of another shape; errors of `make`.
    pub fn new(
        shape: AttentionShape,
        make: impl FnOnce(AttentionShape) -> Result<S>,
    ) -> Result<Self> {
        check_shape(&shape)?;
        let of_parts = AttentionShape { head_dim: shape.head_dim - shape.value_dim, ..shape };
        let parts = make(of_parts)?;
        if parts.shape() != &of_parts {
            let (expected, got) = (format!("{of_parts:?}"), format!("{:?}", parts.shape()));
            return Err(Error::mismatch("the shape of the latent's parts", expected, got));
        }
        Ok(Self { shape, parts })
    }

    /// Returns the inner store.
    pub fn parts(&self) -> &S {
        &self.parts
    }

    /// Returns the rotated part of a call's keys. On the CPU, values that differ from the rest of
    /// the keys are an error. On other devices this is not checked, because the check would wait
    /// for the device.
    fn rotated(&self, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        self.shape.check_kv(k, v)?;
        let (rotated, latent) = (self.rotated_dim(), self.shape.value_dim);
        if k.device().is_cpu() {
            let differs = k.narrow(2, rotated, latent)?.ne(&v.to_dtype(k.dtype())?)?;
            if differs.to_dtype(DType::U32)?.sum_all()?.to_scalar::<u32>()? > 0 {
                let expected = format!("the last {latent} channels of k");
                return Err(Error::mismatch("v of latent attention", expected, "others"));
            }
        }
        Ok(k.narrow(2, 0, rotated)?.contiguous()?)
    }

    fn rotated_dim(&self) -> usize {
        self.shape.head_dim - self.shape.value_dim
    }

    fn check_q(&self, batch: &Batch, q: &Tensor) -> Result<()> {
        let tokens = self.shape.check_q(q)?;
        match tokens == batch.tokens() {
            true => Ok(()),
            false => Err(Error::mismatch("tokens of q", batch.tokens(), tokens)),
        }
    }

    /// Returns the entries that the queries of sequence `i` attend to, in chunks of at most
    /// [`CHUNK`], each with its mask. Only the chunk of the call's own tokens can have a causal
    /// mask.
    fn chunks(
        &self,
        batch: &Batch,
        i: usize,
        mask: Mask<'_>,
    ) -> Result<Vec<(Range<usize>, Mask<'static>)>> {
        let seq = batch.seqs()[i];
        let len = self.parts.len(seq);
        let split = |range: &Range<usize>| {
            let end = range.end;
            range.clone().step_by(CHUNK).map(move |at| (at..end.min(at + CHUNK), Mask::Full))
        };
        match mask {
            Mask::Full => Ok(split(&(0..len)).collect()),
            Mask::Entries(ranges) => Ok(ranges.heads()[i].iter().flat_map(split).collect()),
            Mask::Causal => {
                let queries = batch.cu_seqlens()[i + 1] - batch.cu_seqlens()[i];
                let own = len.checked_sub(queries).ok_or_else(|| {
                    let what = format!("entries of sequence {seq}");
                    Error::mismatch(what, format!("at least its {queries} queries' own"), len)
                })?;
                Ok(split(&(0..own)).chain([(own..len, Mask::Causal)]).collect())
            }
        }
    }

    fn check_ranges(&self, batch: &Batch, mask: Mask<'_>) -> Result<()> {
        let Mask::Entries(ranges) = mask else { return Ok(()) };
        let lens: Vec<_> = batch.seqs().iter().map(|&seq| self.parts.len(seq)).collect();
        ranges.check(&lens)
    }

    /// Returns the attention of a sequence's queries over a range of its entries.
    fn attend_chunk(
        &self,
        seq: SeqId,
        q: &Tensor,
        entries: Range<usize>,
        mask: Mask<'_>,
    ) -> Result<AttentionState> {
        let batch = Batch::single(seq, q.dim(0)?)?;
        let (k, v) = self.read_range(seq, 0, entries)?;
        if !q.device().is_cpu() {
            let q = q.to_dtype(DType::F32)?;
            let of = |x: &Tensor| x.unsqueeze(0)?.unsqueeze(0);
            return attend_each(&batch, &q, &self.shape, mask, |_| Ok((of(&k)?, of(&v)?)));
        }
        with_slice::<f32, _>(&k, |keys| {
            with_slice::<f32, _>(&v, |values| {
                attend_pages(&batch, q, &[vec![Page { keys, values }]], &self.shape, mask)
            })
        })
    }

    /// Returns the attention sum of each entry of a range, `[heads][entries]`, on the CPU.
    fn sums_of_chunk(
        &self,
        seq: SeqId,
        (q, lse): (&Tensor, &Tensor),
        entries: Range<usize>,
        mask: Mask<'_>,
    ) -> Result<Vec<Vec<f32>>> {
        let batch = Batch::single(seq, q.dim(0)?)?;
        let (k, v) = self.read_range(seq, 0, entries)?;
        let (k, v) = (k.to_device(&Device::Cpu)?, v.to_device(&Device::Cpu)?);
        with_slice::<f32, _>(&k, |keys| {
            with_slice::<f32, _>(&v, |values| {
                let pages = [vec![Page { keys, values }]];
                attention_sums_pages(&batch, q, lse, &pages, &self.shape, mask)
            })
        })
    }

    /// Returns keys and values from the two parts.
    fn joined(&self, (rotated, latent): (Tensor, Tensor)) -> Result<(Tensor, Tensor)> {
        Ok((Tensor::cat(&[&rotated, &latent], 1)?, latent.contiguous()?))
    }
}

/// Checks that a shape is valid for latent attention.
pub(crate) fn check_shape(shape: &AttentionShape) -> Result<()> {
    if shape.kv_heads != 1 {
        return Err(Error::setting("kv heads of latent attention", 1, shape.kv_heads));
    }
    if shape.value_dim == 0 || shape.value_dim >= shape.head_dim {
        let expected = format!("1 to {}: a part of the key", shape.head_dim.saturating_sub(1));
        return Err(Error::setting("value_dim of latent attention", expected, shape.value_dim));
    }
    match shape.window {
        Some(window) => Err(Error::setting("window of latent attention", "none", window)),
        None => Ok(()),
    }
}

impl<S: KvStore> KvStore for LatentStore<S> {
    fn shape(&self) -> &AttentionShape {
        &self.shape
    }

    fn append(&mut self, batch: &Batch, k: &Tensor, v: &Tensor) -> Result<()> {
        let rotated = self.rotated(k, v)?;
        self.parts.append(batch, &rotated, v)
    }

    fn append_selected(
        &mut self,
        batch: &Batch,
        k: &Tensor,
        v: &Tensor,
        tokens: &[Selection],
    ) -> Result<()> {
        let rotated = self.rotated(k, v)?;
        self.parts.append_selected(batch, &rotated, v, tokens)
    }

    fn attend(&self, batch: &Batch, q: &Tensor, mask: Mask<'_>) -> Result<AttentionState> {
        self.check_q(batch, q)?;
        self.check_ranges(batch, mask)?;
        let (mut outs, mut lses) = (Vec::new(), Vec::new());
        for (i, (seq, own)) in batch.iter().enumerate() {
            let q = q.narrow(0, own.start, own.len())?;
            let of_chunk = |(entries, mask)| self.attend_chunk(seq, &q, entries, mask);
            let parts = self.chunks(batch, i, mask)?.into_iter().map(of_chunk);
            let parts: Vec<_> = parts.collect::<Result<_>>()?;
            let state = match parts.is_empty() {
                true => nothing(&q, &self.shape)?,
                false => AttentionState::merge(&parts)?,
            };
            outs.push(state.out);
            lses.push(state.lse);
        }
        Ok(AttentionState { out: Tensor::cat(&outs, 0)?, lse: Tensor::cat(&lses, 0)? })
    }

    fn attention_sums(
        &self,
        batch: &Batch,
        q: &Tensor,
        lse: &Tensor,
        mask: Mask<'_>,
    ) -> Result<Vec<AttentionSums>> {
        self.check_q(batch, q)?;
        self.check_ranges(batch, mask)?;
        let (heads, device) = (self.shape.heads, q.device());
        let mut all = Vec::new();
        for (i, (seq, own)) in batch.iter().enumerate() {
            let of = |x: &Tensor| x.narrow(0, own.start, own.len())?.to_device(&Device::Cpu);
            let (q, lse) = (of(q)?, of(lse)?);
            let len = self.parts.len(seq);
            let mut sums = vec![0.0; heads * len];
            for (entries, mask) in self.chunks(batch, i, mask)? {
                let part = self.sums_of_chunk(seq, (&q, &lse), entries.clone(), mask)?;
                for (head, part) in part.iter().enumerate() {
                    sums[head * len..][entries.clone()].copy_from_slice(part);
                }
            }
            let sums = Tensor::from_vec(sums, heads * len, &Device::Cpu)?.to_device(device)?;
            all.push(AttentionSums::new(sums, heads, vec![len])?);
        }
        Ok(all)
    }

    fn retain(&mut self, seq: SeqId, keep: &Selection) -> Result<()> {
        self.parts.retain(seq, keep)
    }

    fn retain_each(&mut self, keep: &[(SeqId, Selection)]) -> Result<Vec<bool>> {
        self.parts.retain_each(keep)
    }

    fn read(&self, seq: SeqId, kv_head: usize) -> Result<(Tensor, Tensor)> {
        self.joined(self.parts.read(seq, kv_head)?)
    }

    fn read_range(
        &self,
        seq: SeqId,
        kv_head: usize,
        entries: Range<usize>,
    ) -> Result<(Tensor, Tensor)> {
        check_range(&entries, self.parts.len(seq))?;
        self.joined(self.parts.read_range(seq, kv_head, entries)?)
    }

    fn lens(&self, seq: SeqId) -> Vec<usize> {
        self.parts.lens(seq)
    }

    fn fork(&mut self, from: SeqId, to: SeqId) -> Result<()> {
        self.parts.fork(from, to)
    }

    fn check_truncate_heads(&self, seq: SeqId, lens: &[usize]) -> Result<()> {
        self.parts.check_truncate_heads(seq, lens)
    }

    fn truncate_heads(&mut self, seq: SeqId, lens: &[usize]) -> Result<()> {
        self.parts.truncate_heads(seq, lens)
    }

    fn mark(&self, seq: SeqId) -> Mark {
        self.parts.mark(seq)
    }

    fn restore(&mut self, seq: SeqId, mark: &Mark) -> Result<()> {
        self.parts.restore(seq, mark)
    }

    fn remove(&mut self, seq: SeqId) -> bool {
        self.parts.remove(seq)
    }

    fn seqs(&self) -> Vec<SeqId> {
        self.parts.seqs()
    }

    fn can_append(&self, batch: &Batch) -> bool {
        self.parts.can_append(batch)
    }

    fn footprint(&self) -> Footprint {
        self.parts.footprint()
    }

    fn seq_footprint(&self, seq: SeqId) -> Footprint {
        self.parts.seq_footprint(seq)
    }

    fn clear(&mut self) {
        self.parts.clear();
    }
}

/// Returns the attention of queries that attend to no entry.
fn nothing(q: &Tensor, shape: &AttentionShape) -> Result<AttentionState> {
    let (tokens, heads) = (q.dim(0)?, shape.heads);
    let out = Tensor::zeros((tokens, heads, shape.value_dim), DType::F32, q.device())?;
    let lse = Tensor::full(f32::NEG_INFINITY, (tokens, heads), q.device())?;
    Ok(AttentionState { out, lse })
}
