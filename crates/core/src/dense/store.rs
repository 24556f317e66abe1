use std::collections::BTreeMap;

use super::pool::Pool;
use super::rows::Rows;
use crate::attention::{self, Element, Page};
use crate::store::check_selections;
use crate::{
    AttentionShape, AttentionState, Batch, EntryRanges, Error, Footprint, KvStore, Mask, Result,
    Selection, SeqId,
};
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};

/// Keys and values as they are, in f32, f16 or bf16.
///
/// On the CPU they lie in blocks of 32 entries of one kv head, in a pool that all sequences share.
/// On other devices each sequence has one tensor for all heads, which then keep equally many
/// entries. The first tensors decide on the device; later ones from another are refused.
#[derive(Debug)]
pub struct DenseStore {
    shape: AttentionShape,
    dtype: DType,
    capacity: usize,
    held: Held,
}

#[derive(Debug)]
enum Held {
    F32(Pool<f32>),
    F16(Pool<f16>),
    BF16(Pool<bf16>),
    OnDevice(BTreeMap<SeqId, Rows>),
}

/// Runs an expression on the pool of whichever type is held, or another on a device's rows.
macro_rules! on_pool {
    ($held:expr, $pool:ident => $host:expr, $rows:ident => $device:expr) => {
        match $held {
            Held::F32($pool) => $host,
            Held::F16($pool) => $host,
            Held::BF16($pool) => $host,
            Held::OnDevice($rows) => $device,
        }
    };
}

impl DenseStore {
    /// An empty store that will hold `dtype` and grows as it must.
    ///
    /// # Errors
    /// [`Error::Setting`] unless `dtype` is f32, f16 or bf16.
    pub fn new(shape: AttentionShape, dtype: DType) -> Result<Self> {
        Self::with_capacity(shape, dtype, usize::MAX)
    }

    /// The same with a pool of at most `bytes` bytes of blocks. An append that does not fit is
    /// [`Error::PoolFull`].
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_capacity(shape: AttentionShape, dtype: DType, bytes: usize) -> Result<Self> {
        let held = empty(&shape, dtype, bytes)?;
        Ok(Self { shape, dtype, capacity: bytes, held })
    }

    /// The format of keys and values.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    fn known(&self, seq: SeqId) -> bool {
        on_pool!(&self.held, pool => !pool.lens(seq).is_empty(), rows => rows.contains_key(&seq))
    }

    fn check_known(&self, seq: SeqId) -> Result<()> {
        if self.known(seq) { Ok(()) } else { Err(Error::UnknownSequence(seq)) }
    }

    /// Checks an append before anything changes; an empty store moves to the tensors' device.
    fn settle(&mut self, batch: &Batch, k: &Tensor, v: &Tensor) -> Result<()> {
        let tokens = self.shape.check_kv(k, v)?;
        if tokens != batch.tokens() {
            return Err(Error::mismatch("tokens of k", batch.tokens(), tokens));
        }
        let host = !matches!(self.held, Held::OnDevice(_));
        if host == k.device().is_cpu() {
            return Ok(());
        }
        if !self.seqs().is_empty() {
            let (held, got) = if host { ("the CPU", "another") } else { ("another", "the CPU") };
            return Err(Error::mismatch("device of k and v", held, got));
        }
        self.held = match host {
            true => Held::OnDevice(BTreeMap::new()),
            false => empty(&self.shape, self.dtype, self.capacity)?,
        };
        Ok(())
    }

    /// Attention over a device's rows, sequence by sequence.
    fn attend_rows(
        &self,
        rows: &BTreeMap<SeqId, Rows>,
        batch: &Batch,
        q: &Tensor,
        mask: Mask<'_>,
    ) -> Result<AttentionState> {
        if let Mask::Entries(ranges) = mask {
            let lens: Vec<_> = batch.seqs().iter().flat_map(|&seq| self.lens_or_zero(seq)).collect();
            ranges.check(&lens)?;
        }
        let kv_heads = self.shape.kv_heads;
        attention::attend_each(batch, q, &self.shape, mask, |i| match rows.get(&batch.seqs()[i]) {
            Some(rows) => match mask {
                Mask::Entries(all) => {
                    rows.selected(&all.heads()[i * kv_heads..(i + 1) * kv_heads])
                }
                _ => rows.held(),
            },
            None => {
                let none = |d| Tensor::zeros((1, kv_heads, 0, d), self.dtype, q.device());
                Ok((none(self.shape.head_dim)?, none(self.shape.value_dim)?))
            }
        })
    }

    fn lens_or_zero(&self, seq: SeqId) -> Vec<usize> {
        match self.lens(seq) {
            lens if lens.is_empty() => vec![0; self.shape.kv_heads],
            lens => lens,
        }
    }
}

fn empty(shape: &AttentionShape, dtype: DType, capacity: usize) -> Result<Held> {
    let AttentionShape { kv_heads, head_dim, value_dim, .. } = *shape;
    Ok(match dtype {
        DType::F32 => Held::F32(Pool::new(kv_heads, head_dim, value_dim, capacity)),
        DType::F16 => Held::F16(Pool::new(kv_heads, head_dim, value_dim, capacity)),
        DType::BF16 => Held::BF16(Pool::new(kv_heads, head_dim, value_dim, capacity)),
        other => return Err(Error::setting("dtype", "f32, f16 or bf16", other.as_str())),
    })
}

impl KvStore for DenseStore {
    fn shape(&self) -> &AttentionShape {
        &self.shape
    }

    fn append(&mut self, batch: &Batch, k: &Tensor, v: &Tensor) -> Result<()> {
        self.settle(batch, k, v)?;
        let (k, v) = (k.to_dtype(self.dtype)?, v.to_dtype(self.dtype)?);
        let all = |tokens: std::ops::Range<usize>, _: usize, _: usize| tokens;
        on_pool!(&mut self.held,
            pool => {
                pool.check_room(batch)?;
                append_pool(pool, self.shape.kv_heads, batch, &k, &v, all)
            },
            rows => append_rows(rows, batch, &k, &v))
    }

    fn append_selected(
        &mut self,
        batch: &Batch,
        k: &Tensor,
        v: &Tensor,
        tokens: &[Selection],
    ) -> Result<()> {
        check_selections(batch, tokens, self.shape.kv_heads)?;
        self.settle(batch, k, v)?;
        let (k, v) = (k.to_dtype(self.dtype)?, v.to_dtype(self.dtype)?);
        let selected = |own: std::ops::Range<usize>, seq: usize, head: usize| {
            let list = tokens[seq].heads()[head].iter();
            list.map(move |&token| own.start + token as usize)
        };
        on_pool!(&mut self.held,
            pool => {
                pool.check_room_for(batch, tokens)?;
                append_pool(pool, self.shape.kv_heads, batch, &k, &v, selected)
            },
            rows => append_selected_rows(rows, batch, &k, &v, tokens))
    }

    fn attend(&self, batch: &Batch, q: &Tensor, mask: Mask<'_>) -> Result<AttentionState> {
        on_pool!(&self.held,
            pool => {
                let pages = masked(&pages(pool, batch, &self.shape), &self.shape, mask)?;
                attention::attend_pages(batch, q, &pages, &self.shape, mask)
            },
            rows => self.attend_rows(rows, batch, q, mask))
    }

    fn attention_sums(
        &self,
        batch: &Batch,
        q: &Tensor,
        lse: &Tensor,
        mask: Mask<'_>,
    ) -> Result<Vec<Vec<f32>>> {
        on_pool!(&self.held,
            pool => {
                let all = pages(pool, batch, &self.shape);
                let pages = masked(&all, &self.shape, mask)?;
                let sums =
                    attention::attention_sums_pages(batch, q, lse, &pages, &self.shape, mask)?;
                Ok(match mask {
                    Mask::Entries(ranges) => scatter(sums, ranges, &all, &self.shape),
                    _ => sums,
                })
            },
            rows => attention_sums_of_rows(rows, batch, q, lse, &self.shape, mask))
    }

    fn retain(&mut self, seq: SeqId, keep: &Selection) -> Result<()> {
        self.check_known(seq)?;
        keep.check(&self.lens(seq))?;
        on_pool!(&mut self.held,
            pool => pool.retain(seq, keep),
            rows => rows.get_mut(&seq).map_or(Ok(()), |rows| rows.retain(keep)))
    }

    fn read(&self, seq: SeqId, kv_head: usize) -> Result<(Tensor, Tensor)> {
        self.check_known(seq)?;
        if kv_head >= self.shape.kv_heads {
            let expected = format!("one of {}", self.shape.kv_heads);
            return Err(Error::mismatch("kv head", expected, kv_head));
        }
        on_pool!(&self.held,
            pool => read_pages(&pool.pages(seq, kv_head), &self.shape),
            rows => {
                let (k, v) = rows[&seq].held()?;
                let of = |x: Tensor| {
                    x.get(0)?.get(kv_head)?.to_dtype(DType::F32)?.to_device(&Device::Cpu)
                };
                Ok((of(k)?, of(v)?))
            })
    }

    fn lens(&self, seq: SeqId) -> Vec<usize> {
        let of = |rows: &Rows| vec![rows.len(); self.shape.kv_heads];
        on_pool!(&self.held,
            pool => pool.lens(seq),
            rows => rows.get(&seq).map_or(Vec::new(), of))
    }

    fn fork(&mut self, from: SeqId, to: SeqId) -> Result<()> {
        self.check_known(from)?;
        if self.known(to) {
            return Err(Error::mismatch("sequence to fork to", "a new one", to));
        }
        on_pool!(&mut self.held,
            pool => pool.fork(from, to),
            rows => {
                let copy = rows[&from].copy()?;
                rows.insert(to, copy);
            });
        Ok(())
    }

    fn check_truncate(&self, seq: SeqId, len: usize) -> Result<()> {
        self.check_known(seq)?;
        match self.lens(seq).into_iter().min() {
            Some(least) if least < len => {
                let what = format!("entries of sequence {seq} to keep");
                Err(Error::mismatch(what, format!("at most {least}"), len))
            }
            _ => Ok(()),
        }
    }

    fn truncate(&mut self, seq: SeqId, len: usize) -> Result<()> {
        self.check_truncate(seq, len)?;
        on_pool!(&mut self.held,
            pool => pool.truncate(seq, len),
            rows => rows.get_mut(&seq).into_iter().for_each(|rows| rows.truncate(len)));
        Ok(())
    }

    fn remove(&mut self, seq: SeqId) -> bool {
        on_pool!(&mut self.held, pool => pool.remove(seq), rows => rows.remove(&seq).is_some())
    }

    fn seqs(&self) -> Vec<SeqId> {
        on_pool!(&self.held, pool => pool.seqs(), rows => rows.keys().copied().collect())
    }

    fn can_append(&self, batch: &Batch) -> bool {
        on_pool!(&self.held, pool => pool.check_room(batch).is_ok(), _rows => true)
    }

    fn footprint(&self) -> Footprint {
        on_pool!(&self.held,
            pool => pool.footprint(),
            rows => rows.values().map(Rows::footprint).sum())
    }

    fn seq_footprint(&self, seq: SeqId) -> Footprint {
        on_pool!(&self.held,
            pool => pool.seq_footprint(seq),
            rows => rows.get(&seq).map_or(Footprint::default(), Rows::footprint))
    }

    fn clear(&mut self) {
        on_pool!(&mut self.held, pool => pool.clear(), rows => rows.clear());
    }
}

/// Appends to each head the rows that `rows` names: given a sequence's tokens, its place in the
/// batch and the head.
fn append_pool<T: Element, R: IntoIterator<Item = usize>>(
    pool: &mut Pool<T>,
    kv_heads: usize,
    batch: &Batch,
    k: &Tensor,
    v: &Tensor,
    rows: impl Fn(std::ops::Range<usize>, usize, usize) -> R,
) -> Result<()> {
    let (d, dv) = (k.dim(2)?, v.dim(2)?);
    attention::with_slice::<T, _>(&k.contiguous()?, |k| {
        attention::with_slice::<T, _>(&v.contiguous()?, |v| {
            let (mut keys, mut values) = (Vec::new(), Vec::new());
            for (i, (seq, tokens)) in batch.iter().enumerate() {
                for head in 0..kv_heads {
                    keys.clear();
                    values.clear();
                    for token in rows(tokens.clone(), i, head) {
                        let row = token * kv_heads + head;
                        keys.extend_from_slice(&k[row * d..(row + 1) * d]);
                        values.extend_from_slice(&v[row * dv..(row + 1) * dv]);
                    }
                    pool.append(seq, head, &keys, &values);
                }
            }
            Ok(())
        })
    })
}

/// The pages of each sequence and kv head.
fn pages<'a, T: Element>(
    pool: &'a Pool<T>,
    batch: &Batch,
    shape: &AttentionShape,
) -> Vec<Vec<Page<'a, T>>> {
    let of_seq = |&seq: &SeqId| (0..shape.kv_heads).map(move |head| pool.pages(seq, head));
    batch.seqs().iter().flat_map(of_seq).collect()
}

/// The pages' entries that a mask of ranges names, or the pages themselves.
fn masked<'a, T: Element>(
    heads: &[Vec<Page<'a, T>>],
    shape: &AttentionShape,
    mask: Mask<'_>,
) -> Result<Vec<Vec<Page<'a, T>>>> {
    let Mask::Entries(ranges) = mask else { return Ok(heads.to_vec()) };
    let len = |pages: &Vec<Page<'a, T>>| {
        pages.iter().map(|page| page.keys.len() / shape.head_dim).sum::<usize>()
    };
    ranges.check(&heads.iter().map(len).collect::<Vec<_>>())?;
    let cut = |(pages, ranges): (&Vec<Page<'a, T>>, &Vec<std::ops::Range<usize>>)| {
        ranges.iter().flat_map(|range| cut(pages, range, shape)).collect()
    };
    Ok(heads.iter().zip(ranges.heads()).map(cut).collect())
}

/// The parts of a head's pages within a range of entries. All pages but the last are full.
fn cut<'a, T: Element>(
    pages: &[Page<'a, T>],
    range: &std::ops::Range<usize>,
    shape: &AttentionShape,
) -> Vec<Page<'a, T>> {
    use super::pool::BLOCK;
    let (d, dv) = (shape.head_dim, shape.value_dim);
    let part = |i: usize| {
        let start = range.start.max(i * BLOCK) - i * BLOCK;
        let end = range.end.min((i + 1) * BLOCK) - i * BLOCK;
        let Page { keys, values } = pages[i];
        Page { keys: &keys[start * d..end * d], values: &values[start * dv..end * dv] }
    };
    (range.start / BLOCK..range.end.div_ceil(BLOCK)).map(part).collect()
}

/// Sums over ranges of entries in their places among all entries; 0 elsewhere.
fn scatter<T: Element>(
    sums: Vec<Vec<f32>>,
    ranges: &EntryRanges,
    heads: &[Vec<Page<'_, T>>],
    shape: &AttentionShape,
) -> Vec<Vec<f32>> {
    let place = |(i, sums): (usize, Vec<f32>)| {
        let head = i / shape.group();
        let len = heads[head].iter().map(|page| page.keys.len() / shape.head_dim).sum();
        let mut all = vec![0.0; len];
        let mut sums = sums.into_iter();
        for range in &ranges.heads()[head] {
            all[range.clone()].iter_mut().zip(&mut sums).for_each(|(place, sum)| *place = sum);
        }
        all
    };
    sums.into_iter().enumerate().map(place).collect()
}

fn read_pages<T: Element>(pages: &[Page<'_, T>], shape: &AttentionShape) -> Result<(Tensor, Tensor)> {
    let (mut keys, mut values, mut scratch) = (Vec::new(), Vec::new(), Vec::new());
    for page in pages {
        keys.extend_from_slice(T::widen(page.keys, &mut scratch));
        values.extend_from_slice(T::widen(page.values, &mut scratch));
    }
    let len = keys.len() / shape.head_dim;
    Ok((
        Tensor::from_vec(keys, (len, shape.head_dim), &Device::Cpu)?,
        Tensor::from_vec(values, (len, shape.value_dim), &Device::Cpu)?,
    ))
}

fn append_rows(
    rows: &mut BTreeMap<SeqId, Rows>,
    batch: &Batch,
    k: &Tensor,
    v: &Tensor,
) -> Result<()> {
    for (seq, tokens) in batch.iter() {
        let of = |x: &Tensor| {
            x.narrow(0, tokens.start, tokens.len())?.transpose(0, 1)?.unsqueeze(0)?.contiguous()
        };
        let (k, v) = (of(k)?, of(v)?);
        match rows.get_mut(&seq) {
            Some(rows) => rows.append(&k, &v)?,
            None => {
                let mut new = Rows::new(&k, &v)?;
                new.append(&k, &v)?;
                rows.insert(seq, new);
            }
        }
    }
    Ok(())
}

fn append_selected_rows(
    rows: &mut BTreeMap<SeqId, Rows>,
    batch: &Batch,
    k: &Tensor,
    v: &Tensor,
    tokens: &[Selection],
) -> Result<()> {
    let even = |selection: &Selection| {
        let heads = selection.heads();
        heads.iter().all(|list| list.len() == heads[0].len())
    };
    if !tokens.iter().all(even) {
        let what = "heads that keep different numbers of entries in a dense store off the CPU";
        return Err(Error::Unsupported(what.into()));
    }
    for ((seq, own), selection) in batch.iter().zip(tokens) {
        let of = |x: &Tensor| -> Result<Tensor> {
            let x = x.narrow(0, own.start, own.len())?.transpose(0, 1)?.unsqueeze(0)?;
            super::rows::gather(&x, selection.heads())
        };
        let (k, v) = (of(k)?, of(v)?);
        let one = Batch::single(seq, k.dim(2)?.max(1))?;
        if k.dim(2)? > 0 {
            let flat = |x: Tensor| x.squeeze(0)?.transpose(0, 1);
            append_rows(rows, &one, &flat(k)?, &flat(v)?)?;
        } else if !rows.contains_key(&seq) {
            rows.insert(seq, Rows::new(&k, &v)?);
        }
    }
    Ok(())
}

/// Sums are taken on the CPU: no kernel of ours takes them on a device yet.
fn attention_sums_of_rows(
    rows: &BTreeMap<SeqId, Rows>,
    batch: &Batch,
    q: &Tensor,
    lse: &Tensor,
    shape: &AttentionShape,
    mask: Mask<'_>,
) -> Result<Vec<Vec<f32>>> {
    let mut host = DenseStore::new(*shape, DType::F32)?;
    for &seq in batch.seqs() {
        if let Some(rows) = rows.get(&seq) {
            let (k, v) = rows.held()?;
            let flat = |x: Tensor| x.squeeze(0)?.transpose(0, 1)?.to_device(&Device::Cpu);
            let (k, v) = (flat(k)?, flat(v)?);
            host.append(&Batch::single(seq, k.dim(0)?)?, &k, &v)?;
        }
    }
    let cpu = |x: &Tensor| x.to_device(&Device::Cpu);
    host.attention_sums(batch, &cpu(q)?, &cpu(lse)?, mask)
}
