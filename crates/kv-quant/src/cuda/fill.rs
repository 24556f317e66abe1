//! Tokens on their way in: into the ring, and from there into records.

use super::CudaStore;
use super::args::QuantizeArgs;
use super::held::{NO_RING, Place, kind, move_tokens, with_address};
use super::kernels::TILE;
use super::wrap;
use candle_core::Tensor;
use candle_core::cuda::cudarc::driver::DevicePtr;
use longctx_core::{Error, Result};

impl CudaStore {
    /// Puts tokens that [fit](Self::fits) into the ring, and packs nothing yet: [`pack`](Self::pack) does.
    ///
    /// # Errors
    /// As [`KvStore::append`].
    pub fn extend(&mut self, k: &Tensor, v: &Tensor) -> Result<()> {
        let (k, v) = self.prepare(k, v)?;
        let tokens = k.dim(2)?;
        if !self.fits(tokens) {
            return Err(Error::mismatch("tokens for the residual", "fewer", tokens));
        }
        let stream = self.device.cuda_stream();
        let (kernels, pieces) = (self.kernels.clone(), self.shape.head_dim / 8);
        let held = self.held_mut(&k)?;
        with_address(&k, &v, &stream, |k, v| {
            let from = Place { k, v, pitch: tokens, start: 0, ring: NO_RING };
            let to = held.in_ring(&stream, held.len);
            // SAFETY: both sides have room for `tokens` tokens of each row.
            unsafe { move_tokens(&kernels, &stream, from, to, tokens, held.rows, pieces) }
        })?;
        held.len += tokens;
        Ok(())
    }

    /// Packs what the format no longer keeps in full precision.
    ///
    /// # Errors
    /// If the device runs out of memory.
    pub fn pack(&mut self) -> Result<()> {
        let stream = self.device.cuda_stream();
        let Some(held) = &self.held else { return Ok(()) };
        let from = held.in_ring(&stream, held.values);
        let rounded = (held.ring_k.device_ptr(&stream).0, held.keys_ahead(self.format));
        self.pack_from(from, if rounded.1 { rounded.0 } else { 0 })
    }

    /// Packs from a source that begins with the first token not read from records.
    fn pack_from(&mut self, from: Place, rounded: u64) -> Result<()> {
        let (layout, stream) = (self.layout, self.device.cuda_stream());
        let (group, format) = (layout.group, self.format);
        let held = self.held.as_mut().ok_or_else(|| Error::mismatch("store", "tokens", "none"))?;
        let (keys, values) = held.goal(format);
        let tiles = values.div_ceil(TILE);
        if keys == held.keys && tiles <= held.tiles {
            held.values = values;
            return Ok(());
        }
        held.reserve(&self.device, layout, keys.max(tiles * TILE).div_ceil(group))?;
        let args = QuantizeArgs {
            k: from.k,
            v: from.v,
            packed: held.packed.device_ptr(&stream).0,
            rounded,
            status: self.status.address(),
            packed_stride: (held.capacity * layout.record()) as i64,
            pitch: from.pitch as i64,
            start: from.start as i32,
            ring: from.ring,
            key_offset: (held.keys - held.values) as i32,
            key_record: (held.keys / group) as i32,
            key_records: ((keys - held.keys) / group) as i32,
            value_offset: (held.tiles * TILE - held.values) as i32,
            value_tile: held.tiles as i32,
            value_tiles: (tiles - held.tiles) as i32,
            kind: kind(held.dtype),
        };
        // SAFETY: the source holds the tokens from `values` up to `len`, and there are records for all that is packed.
        unsafe { self.kernels.quantize(&stream, &args, held.rows)? };
        (held.keys, held.values, held.tiles) = (keys, values, tiles);
        Ok(())
    }

    /// Takes in more tokens than the ring holds.
    pub(super) fn append_many(&mut self, k: &Tensor, v: &Tensor) -> Result<()> {
        let tokens = k.dim(2)?;
        let stream = self.device.cuda_stream();
        let (kernels, d, format) = (self.kernels.clone(), self.shape.head_dim, self.format);
        let group = self.layout.group;
        let held = self.held_mut(k)?;
        let (rows, residual, before) = (held.rows, held.len - held.values, held.values);
        if residual > 0 {
            // What the ring holds and what is new, in one piece.
            let total = residual + tokens;
            // SAFETY: all of both is written below, before it is read.
            let both = unsafe {
                [stream.alloc::<u16>(rows * total * d), stream.alloc::<u16>(rows * total * d)]
            };
            let [whole_k, whole_v] = both;
            let (whole_k, whole_v) = (whole_k.map_err(wrap)?, whole_v.map_err(wrap)?);
            let (wk, wv) = (whole_k.device_ptr(&stream), whole_v.device_ptr(&stream));
            let whole = Place { k: wk.0, v: wv.0, pitch: total, start: 0, ring: NO_RING };
            let old = held.in_ring(&stream, held.values);
            with_address(k, v, &stream, |k, v| {
                let new = Place { k, v, pitch: tokens, start: 0, ring: NO_RING };
                let after = Place { start: residual, ..whole };
                // SAFETY: `whole` has room for both.
                unsafe {
                    move_tokens(&kernels, &stream, old, whole, residual, rows, d / 8)?;
                    move_tokens(&kernels, &stream, new, after, tokens, rows, d / 8)
                }
            })?;
            held.len += tokens;
            let rounded = if held.keys_ahead(format) { whole.k } else { 0 };
            self.pack_from(whole, rounded)?;
            let held = self.held_mut(k)?;
            let tail = Place { start: held.values - before, ..whole };
            let to = held.in_ring(&stream, held.values);
            // SAFETY: fewer tokens are left than the ring has places.
            return unsafe {
                move_tokens(&kernels, &stream, tail, to, held.len - held.values, rows, d / 8)
            };
        }
        held.len += tokens;
        with_address(k, v, &stream, |k, v| {
            let new = Place { k, v, pitch: tokens, start: 0, ring: NO_RING };
            self.pack_from(new, 0)?;
            let (status, record) = (self.status.address(), self.layout.record());
            let held = self.held_mut_known()?;
            // Keys packed ahead of their values lie in the ring too, as their codes have them: from whole groups.
            let first = (held.values / group * group).max(before);
            let tail = Place { start: first - before, ..new };
            let ring = held.in_ring(&stream, first);
            let args = QuantizeArgs {
                k: ring.k,
                v: ring.v,
                packed: held.packed.device_ptr(&stream).0,
                rounded: ring.k,
                status,
                packed_stride: (held.capacity * record) as i64,
                pitch: ring.pitch as i64,
                start: ring.start as i32,
                ring: ring.ring,
                key_record: (first / group) as i32,
                key_records: ((held.keys - first) / group) as i32,
                kind: kind(held.dtype),
                ..Default::default()
            };
            // SAFETY: the ring has places for the tokens from `first` on, and there are records for all packed keys.
            unsafe {
                move_tokens(&kernels, &stream, tail, ring, held.len - first, rows, d / 8)?;
                self.kernels.quantize(&stream, &args, rows)
            }
        })
    }
}
