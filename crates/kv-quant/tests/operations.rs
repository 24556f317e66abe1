//! Random sequences of operations on a pool, compared with a reference model: vectors of tokens,
//! quantized one by one as specified in `docs/formats.md`.

#![cfg(not(miri))] // too long for an interpreter

mod reference_impl;

use std::collections::BTreeMap;

use half::f16;
use kv_quant::{Axis, Bits, Codes, Flush, Format, Mask, Packed, Pool, Queries, Scheme};
use reference_impl::{Random, formats, shape};

const KV: usize = 2;
const D: usize = 8;
const V: usize = 5;
const HEADS: usize = 4;

/// A token of one kv head: keys and values in full precision, and dequantized once packed.
#[derive(Debug, Clone)]
struct Slot {
    key: Vec<f16>,
    value: Vec<f16>,
    packed_key: Option<Vec<f32>>,
    packed_value: Option<Vec<f32>>,
    held: bool,
}

#[derive(Debug, Clone, Default)]
struct Head {
    slots: Vec<Slot>,
    /// The first slot known in full precision, with a rolling flush.
    start: usize,
}

/// Returns a group's dequantized numbers.
fn group(x: &[f16], bits: Bits) -> Vec<f32> {
    let min = x.iter().copied().fold(f16::INFINITY, f16::min);
    let max = x.iter().copied().fold(f16::NEG_INFINITY, f16::max);
    let largest = bits.max_code() as f32;
    let scale = (max - min) / f16::from_f32(largest);
    let code = |x: f16| match scale == f16::ZERO {
        true => 0.0,
        false => ((x - min) / scale).to_f32().round_ties_even().clamp(0.0, largest),
    };
    x.iter().map(|&x| code(x) * scale.to_f32() + min.to_f32()).collect()
}

/// Quantizes and dequantizes a row with groups along channels.
fn row(x: &[f16], scheme: Scheme) -> Vec<f32> {
    x.chunks(scheme.group).flat_map(|x| group(x, scheme.bits)).collect()
}

/// Quantizes and dequantizes tokens with groups along tokens.
fn columns(rows: &[&[f16]], bits: Bits) -> Vec<Vec<f32>> {
    let mut out = vec![Vec::new(); rows.len()];
    for channel in 0..rows[0].len() {
        let column: Vec<f16> = rows.iter().map(|row| row[channel]).collect();
        out.iter_mut().zip(group(&column, bits)).for_each(|(out, x)| out.push(x));
    }
    out
}

/// Quantizes and dequantizes tokens of one block. Codes other than plain asymmetric integers are
/// compared with public implementations elsewhere; here the codec itself is used.
fn pack(rows: &[&[f16]], scheme: Scheme) -> Vec<Vec<f32>> {
    if scheme.codes == Codes::Asymmetric && !scheme.rotated {
        return match scheme.axis {
            Axis::Tokens => columns(rows, scheme.bits),
            Axis::Channels => rows.iter().map(|x| row(x, scheme)).collect(),
        };
    }
    let width = rows[0].len();
    let packed = Packed::quantize(&rows.concat(), width, scheme, Axis::Channels).unwrap();
    let mut back = vec![0.0; rows.len() * width];
    packed.dequantize(&mut back).unwrap();
    back.chunks(width).map(<[f32]>::to_vec).collect()
}

impl Head {
    fn packed_keys(&self) -> usize {
        self.slots.iter().take_while(|slot| slot.packed_key.is_some()).count()
    }

    fn packed_values(&self) -> usize {
        self.slots.iter().take_while(|slot| slot.packed_value.is_some()).count()
    }

    fn held(&self) -> Vec<usize> {
        (0..self.slots.len()).filter(|&i| self.slots[i].held).collect()
    }

    fn append(&mut self, tokens: impl Iterator<Item = (Vec<f16>, Vec<f16>)>, format: &Format) {
        for (key, value) in tokens {
            self.slots.push(Slot { key, value, packed_key: None, packed_value: None, held: true });
        }
        let (keys, values) =
            (self.slots.len() - self.packed_keys(), self.slots.len() - self.packed_values());
        let size = format.block_tokens();
        let (keys, values) = match format.flush() {
            Flush::Immediate => (keys, values),
            Flush::Never => (0, 0),
            Flush::Staggered(r) => (keys / r * r, values.saturating_sub(r)),
            Flush::Rolling(r) => {
                let whole = |n: usize| n.saturating_sub(r) / size * size;
                (whole(keys), whole(values))
            }
            other => panic!("the reference of {other:?}"),
        };
        let first = self.packed_keys();
        for slots in self.slots[first..first + keys].chunks_mut(size) {
            let rows: Vec<&[f16]> = slots.iter().map(|slot| &*slot.key).collect();
            let packed = pack(&rows, format.keys());
            slots.iter_mut().zip(packed).for_each(|(slot, x)| slot.packed_key = Some(x));
        }
        let first = self.packed_values();
        for slots in self.slots[first..first + values].chunks_mut(size) {
            let rows: Vec<&[f16]> = slots.iter().map(|slot| &*slot.value).collect();
            let packed = pack(&rows, format.values());
            slots.iter_mut().zip(packed).for_each(|(slot, x)| slot.packed_value = Some(x));
        }
        self.start = self.start.max(self.packed_keys().saturating_sub(size));
    }

    fn retain(&mut self, keep: &[u32], format: &Format) {
        let held = self.held();
        if keep.len() == held.len() {
            return;
        }
        let kept: Vec<usize> = keep.iter().map(|&entry| held[entry as usize]).collect();
        for i in held {
            self.slots[i].held = kept.binary_search(&i).is_ok();
        }
        self.slots.retain(|slot| slot.held || slot.packed_key.is_some());
        let size = format.block_tokens();
        let whole = self.packed_keys().min(self.packed_values());
        let mut left = Vec::new();
        for (i, slots) in self.slots.chunks(size).enumerate() {
            if (i + 1) * size > whole || slots.iter().any(|slot| slot.held) {
                left.extend_from_slice(slots);
            }
        }
        self.slots = left;
        let whole = self.packed_keys().min(self.packed_values());
        let held = self.slots[..whole].iter().filter(|slot| slot.held).count();
        if format.keys().axis == Axis::Channels && 2 * held <= whole {
            let rest = self.slots.split_off(whole);
            self.slots.retain(|slot| slot.held);
            self.slots.extend(rest);
        }
        self.start = self.packed_keys();
    }

    fn truncate(&mut self, len: usize, format: &Format) {
        let held = self.held();
        if len == held.len() {
            return;
        }
        // The cut is before the first dropped entry.
        let slots = if len == 0 { 0 } else { held[len] };
        let (packed, size) = (self.packed_keys(), format.block_tokens());
        let mut still_packed = packed;
        if let Flush::Rolling(residual) = format.flush() {
            let missing = (packed + residual).saturating_sub(slots).div_ceil(size) * size;
            still_packed -= missing.min((packed - self.start) / size * size);
        }
        self.slots.truncate(slots);
        self.start = self.start.min(slots);
        if still_packed <= slots {
            if still_packed < packed {
                for slot in &mut self.slots[still_packed..] {
                    (slot.packed_key, slot.packed_value) = (None, None);
                }
            }
        } else if format.keys().axis == Axis::Tokens {
            self.unpack(slots / size * size);
        }
    }

    /// The remaining entries of a block go back to full precision with their quantized values.
    fn unpack(&mut self, first: usize) {
        let half = |x: Vec<f32>| x.into_iter().map(f16::from_f32).collect();
        for slot in &mut self.slots[first..] {
            if let Some(x) = slot.packed_key.take() {
                slot.key = half(x);
            }
            if let Some(x) = slot.packed_value.take() {
                slot.value = half(x);
            }
        }
        let mut i = 0..;
        self.slots.retain(|slot| i.next().is_some_and(|i| i < first) || slot.held);
        self.start = self.start.min(first);
    }

    /// Returns the dequantized keys and values.
    fn read(&self) -> (Vec<f32>, Vec<f32>) {
        let row = |packed: &Option<Vec<f32>>, row: &[f16]| match packed {
            Some(x) => x.clone(),
            None => row.iter().map(|x| x.to_f32()).collect(),
        };
        let held = || self.slots.iter().filter(|slot| slot.held);
        (
            held().flat_map(|slot| row(&slot.packed_key, &slot.key)).collect(),
            held().flat_map(|slot| row(&slot.packed_value, &slot.value)).collect(),
        )
    }
}

/// A pool and its reference model.
struct Fixture {
    pool: Pool,
    model: BTreeMap<u64, Vec<Head>>,
    format: Format,
    random: Random,
}

impl Fixture {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let format = formats()[random.below(formats().len())];
        let pool = Pool::new(shape(KV, D, V), format).unwrap();
        let pool = match random.below(3) {
            0 => pool.with_capacity(20_000 + random.below(200_000)),
            _ => pool,
        };
        Self { pool, model: BTreeMap::new(), format, random }
    }

    /// Returns one of the sequences, if there is any.
    fn any(&mut self) -> Option<u64> {
        let seqs: Vec<u64> = self.model.keys().copied().collect();
        (!seqs.is_empty()).then(|| seqs[self.random.below(seqs.len())])
    }

    fn step(&mut self) {
        match self.random.below(12) {
            0..=3 => self.append(),
            4 | 5 => self.append_selected(),
            6 => self.retain(),
            7 => self.fork(),
            8 | 9 => self.truncate(),
            10 => self.remove(),
            _ => self.attend(),
        }
    }

    /// Returns a batch: its sequences and their `cu_seqlens`.
    fn batch(&mut self, max: usize) -> (Vec<u64>, Vec<usize>) {
        let seqs: Vec<u64> = (0..5).filter(|_| self.random.below(3) == 0).collect();
        let mut cu = vec![0];
        for i in 0..seqs.len() {
            cu.push(cu[i] + self.random.below(max));
        }
        (seqs, cu)
    }

    fn take(
        &mut self,
        seqs: &[u64],
        cu: &[usize],
        keys: &[f32],
        values: &[f32],
        lists: &[Vec<u32>],
    ) {
        for (i, &seq) in seqs.iter().enumerate() {
            let heads = self.model.entry(seq).or_insert_with(|| vec![Head::default(); KV]);
            for (h, head) in heads.iter_mut().enumerate() {
                let row = |x: &[f32], token: u32, size: usize| -> Vec<f16> {
                    let at = ((cu[i] + token as usize) * KV + h) * size;
                    x[at..at + size].iter().map(|&x| f16::from_f32(x)).collect()
                };
                let tokens = lists[i * KV + h].iter();
                let tokens = tokens.map(|&token| (row(keys, token, D), row(values, token, V)));
                head.append(tokens, &self.format);
            }
        }
    }

    fn append(&mut self) {
        let max = [3, 40, 200][self.random.below(3)];
        let (seqs, cu) = self.batch(max);
        let tokens = cu[seqs.len()];
        let (keys, values) =
            (self.random.numbers(tokens * KV * D), self.random.numbers(tokens * KV * V));
        let room = self.pool.can_append(&seqs, &cu);
        let done = self.pool.append(&seqs, &cu, &keys, &values).is_ok();
        assert!(done || !room);
        if done {
            let all = |i: usize| (0..(cu[i + 1] - cu[i]) as u32).collect();
            let lists: Vec<Vec<u32>> = (0..seqs.len() * KV).map(|list| all(list / KV)).collect();
            self.take(&seqs, &cu, &keys, &values, &lists);
        }
    }

    fn append_selected(&mut self) {
        let (seqs, cu) = self.batch(150);
        let tokens = cu[seqs.len()];
        let (keys, values) =
            (self.random.numbers(tokens * KV * D), self.random.numbers(tokens * KV * V));
        let lists: Vec<Vec<u32>> = (0..seqs.len() * KV)
            .map(|list| self.random.some(cu[list / KV + 1] - cu[list / KV]))
            .collect();
        if self.pool.append_selected(&seqs, &cu, &keys, &values, &lists).is_ok() {
            self.take(&seqs, &cu, &keys, &values, &lists);
        }
    }

    fn retain(&mut self) {
        let Some(seq) = self.any() else { return };
        let lens = self.pool.lens(seq).unwrap();
        let runs = self.random.below(2) == 0;
        let keep: Vec<Vec<u32>> = lens
            .iter()
            .map(|&len| match runs {
                true => {
                    let first = self.random.below(len);
                    let last = first + self.random.below(len - first);
                    (0..len as u32).filter(|e| !(first..last).contains(&(*e as usize))).collect()
                }
                false => self.random.some(len),
            })
            .collect();
        if self.pool.retain(seq, &keep).is_ok() {
            let heads = self.model.get_mut(&seq).unwrap();
            heads.iter_mut().zip(&keep).for_each(|(head, keep)| head.retain(keep, &self.format));
        }
    }

    fn fork(&mut self) {
        let Some(from) = self.any() else { return };
        let to = 5 + self.random.below(5) as u64;
        assert_eq!(self.pool.fork(from, to).is_ok(), !self.model.contains_key(&to));
        let copy = self.model[&from].clone();
        self.model.entry(to).or_insert(copy);
    }

    fn truncate(&mut self) {
        let Some(seq) = self.any() else { return };
        let lens = self.pool.lens(seq).unwrap();
        let deep = self.random.below(2) == 0;
        let mut left = |len: usize| match deep {
            true => self.random.below(len + 2),
            false => len.saturating_sub(self.random.below(20)),
        };
        let lens: Vec<usize> = match left(1) {
            0 => lens.into_iter().map(left).collect(),
            _ => vec![left(lens.iter().copied().min().unwrap()); lens.len()],
        };
        let checked = self.pool.check_truncate_heads(seq, &lens);
        let truncated = match lens.iter().all(|len| *len == lens[0]) {
            true => self.pool.truncate(seq, lens[0]),
            false => self.pool.truncate_heads(seq, &lens),
        };
        assert_eq!(truncated, checked);
        if checked.is_ok() {
            let heads = self.model.get_mut(&seq).unwrap();
            let heads = heads.iter_mut().zip(&lens);
            heads.for_each(|(head, &len)| head.truncate(len, &self.format));
        }
    }

    fn remove(&mut self) {
        let Some(seq) = self.any() else { return };
        assert!(self.pool.remove(seq));
        self.model.remove(&seq);
    }

    fn attend(&mut self) {
        let seqs: Vec<u64> =
            self.model.keys().copied().filter(|_| self.random.below(2) == 0).collect();
        let causal = self.random.below(2) == 0;
        let mut cu = vec![0];
        for (i, seq) in seqs.iter().enumerate() {
            let shortest = self.pool.lens(*seq).unwrap().into_iter().min().unwrap();
            let max = if causal { shortest.min(20) } else { 20 };
            cu.push(cu[i] + self.random.below(max + 1));
        }
        let window = causal.then(|| 1 + self.random.below(100));
        let data = self.random.numbers(cu[seqs.len()] * HEADS * D);
        let q = Queries { data: &data, heads: HEADS, scale: 0.4, soft_cap: None, window };
        let mask = if causal { Mask::Causal } else { Mask::Full };
        let got = self.pool.attend(&q, &seqs, &cu, mask).unwrap();
        for (i, seq) in seqs.iter().enumerate() {
            let heads: Vec<_> = self.model[seq].iter().map(Head::read).collect();
            for token in cu[i]..cu[i + 1] {
                for head in 0..HEADS {
                    let held = &heads[head / (HEADS / KV)];
                    let len = held.0.len() / D;
                    let end = if causal { len + token + 1 - cu[i + 1] } else { len };
                    let seen = end.saturating_sub(window.unwrap_or(end))..end;
                    let row = token * HEADS + head;
                    let q = &data[row * D..][..D];
                    let (want, lse) = reference_impl::attend(q, held, V, seen, 0.4, None);
                    assert!(reference_impl::close(&got.out[row * V..][..V], &want));
                    let equal = f64::from(got.lse[row]) == lse;
                    assert!(equal || (f64::from(got.lse[row]) - lse).abs() < 1e-3);
                }
            }
        }
    }

    fn check(&self) {
        assert!(self.pool.seqs().eq(self.model.keys().copied()));
        for (&seq, heads) in &self.model {
            for (h, head) in heads.iter().enumerate() {
                assert_eq!(self.pool.read(seq, h).unwrap(), head.read(), "head {h} of {seq}");
            }
        }
    }
}

#[test]
fn a_pool_equals_its_reference_model_after_random_operations() {
    let cases = if std::env::var_os("LONGCTX_SLOW").is_some() { 10_000 } else { 200 };
    for seed in 0..cases {
        let mut fixture = Fixture::new(seed);
        let run = std::panic::AssertUnwindSafe(|| {
            for _ in 0..25 {
                fixture.step();
                fixture.check();
            }
            for seq in fixture.pool.seqs().collect::<Vec<_>>() {
                fixture.pool.remove(seq);
            }
            assert_eq!(fixture.pool.footprint().total(), 0);
        });
        if let Err(panic) = std::panic::catch_unwind(run) {
            eprintln!("seed {seed}");
            std::panic::resume_unwind(panic);
        }
    }
}
