//! GGUF's block formats: unpacking of a block's weights.

/// Weights per part, unpacked at a time.
pub(crate) const PART: usize = 32;

/// A block format. A part of a block has 32 weights w = scale * q + offset.
pub(crate) trait Format: 'static {
    /// Parts per block: 1, or 8 in the K-quants.
    const PARTS: usize = 1;
    const BYTES: usize;
    /// Byte offsets of the f16 numbers in a block.
    const HALVES: &'static [usize];

    /// Returns the scale, the offset and the numbers q of a part.
    fn unpack(block: &[u8], part: usize) -> (f32, f32, [f32; PART]);
}

pub(crate) struct Q4_0;
pub(crate) struct Q4_1;
pub(crate) struct Q5_0;
pub(crate) struct Q5_1;
pub(crate) struct Q8_0;
pub(crate) struct Q4K;
pub(crate) struct Q5K;
pub(crate) struct Q6K;

impl Format for Q4_0 {
    const BYTES: usize = 18;
    const HALVES: &'static [usize] = &[0];

    #[inline(always)]
    fn unpack(block: &[u8], _: usize) -> (f32, f32, [f32; PART]) {
        let scale = half_at(block, 0);
        (scale, -8.0 * scale, nibbles(&block[2..18]))
    }
}

impl Format for Q4_1 {
    const BYTES: usize = 20;
    const HALVES: &'static [usize] = &[0, 2];

    #[inline(always)]
    fn unpack(block: &[u8], _: usize) -> (f32, f32, [f32; PART]) {
        (half_at(block, 0), half_at(block, 2), nibbles(&block[4..20]))
    }
}

impl Format for Q5_0 {
    const BYTES: usize = 22;
    const HALVES: &'static [usize] = &[0];

    #[inline(always)]
    fn unpack(block: &[u8], _: usize) -> (f32, f32, [f32; PART]) {
        let scale = half_at(block, 0);
        (scale, -16.0 * scale, five_bits(&block[2..6], &block[6..22]))
    }
}

impl Format for Q5_1 {
    const BYTES: usize = 24;
    const HALVES: &'static [usize] = &[0, 2];

    #[inline(always)]
    fn unpack(block: &[u8], _: usize) -> (f32, f32, [f32; PART]) {
        (half_at(block, 0), half_at(block, 2), five_bits(&block[4..8], &block[8..24]))
    }
}

impl Format for Q8_0 {
    const BYTES: usize = 34;
    const HALVES: &'static [usize] = &[0];

    #[inline(always)]
    fn unpack(block: &[u8], _: usize) -> (f32, f32, [f32; PART]) {
        let mut q = [0.0; PART];
        for (q, &byte) in q.iter_mut().zip(&block[2..34]) {
            *q = f32::from(byte as i8);
        }
        (half_at(block, 0), 0.0, q)
    }
}

/// Scale and minimum of the block (f16), 12 bytes of 6-bit scales and minima, 128 bytes of weights.
impl Format for Q4K {
    const PARTS: usize = 8;
    const BYTES: usize = 144;
    const HALVES: &'static [usize] = &[0, 2];

    #[inline(always)]
    fn unpack(block: &[u8], part: usize) -> (f32, f32, [f32; PART]) {
        let (scale, offset) = scale_and_offset(block, part);
        let mut q = [0.0; PART];
        let shift = 4 * (part % 2);
        for (q, &byte) in q.iter_mut().zip(&block[16 + part / 2 * PART..][..PART]) {
            *q = f32::from((byte >> shift) & 15);
        }
        (scale, offset, q)
    }
}

/// As Q4_K, with 32 bytes between scales and weights: bit p of byte i is the fifth bit of weight i
/// of part p.
impl Format for Q5K {
    const PARTS: usize = 8;
    const BYTES: usize = 176;
    const HALVES: &'static [usize] = &[0, 2];

    #[inline(always)]
    fn unpack(block: &[u8], part: usize) -> (f32, f32, [f32; PART]) {
        let (scale, offset) = scale_and_offset(block, part);
        let mut q = [0.0; PART];
        let shift = 4 * (part % 2);
        let (high, low) = (&block[16..48], &block[48 + part / 2 * PART..][..PART]);
        for ((q, &low), &high) in q.iter_mut().zip(low).zip(high) {
            *q = f32::from(((low >> shift) & 15) | (((high >> part) & 1) << 4));
        }
        (scale, offset, q)
    }
}

/// 128 bytes with the 4 low bits of the weights, 64 with the 2 high bits, 16 signed scales for 16
/// weights each, and the block's scale.
impl Format for Q6K {
    const PARTS: usize = 8;
    const BYTES: usize = 210;
    const HALVES: &'static [usize] = &[208];

    #[inline(always)]
    fn unpack(block: &[u8], part: usize) -> (f32, f32, [f32; PART]) {
        let (half, quarter) = (part / 4, part % 4);
        let low = &block[64 * half + PART * (quarter % 2)..][..PART];
        let high = &block[128 + PART * half..][..PART];
        let scale = half_at(block, 208);
        let scales = [0, 1].map(|i| scale * f32::from(block[192 + 2 * part + i] as i8));
        let mut q = [0.0; PART];
        let shifts = (4 * (quarter / 2), 2 * quarter);
        for (i, ((q, &low), &high)) in q.iter_mut().zip(low).zip(high).enumerate() {
            let bits = ((low >> shifts.0) & 15) | (((high >> shifts.1) & 3) << 4);
            *q = scales[i / 16] * (f32::from(bits) - 32.0);
        }
        (1.0, 0.0, q)
    }
}

/// Returns scale and offset of a part of Q4_K and Q5_K. For parts 4 to 7, the high two of their six
/// bits are in the bytes of parts 0 to 3.
#[inline(always)]
fn scale_and_offset(block: &[u8], part: usize) -> (f32, f32) {
    let bytes = &block[4..16];
    let (scale, minimum) = match part {
        0..4 => (bytes[part] & 63, bytes[part + 4] & 63),
        _ => {
            let (both, low, high) = (bytes[part + 4], bytes[part - 4], bytes[part]);
            ((both & 15) | ((low >> 6) << 4), (both >> 4) | ((high >> 6) << 4))
        }
    };
    (half_at(block, 0) * f32::from(scale), -half_at(block, 2) * f32::from(minimum))
}

/// Unpacks 16 bytes: weights 0 to 15 are the low nibbles, 16 to 31 the high nibbles.
#[inline(always)]
fn nibbles(bytes: &[u8]) -> [f32; PART] {
    let mut q = [0.0; PART];
    let (low, high) = q.split_at_mut(PART / 2);
    for ((low, high), &byte) in low.iter_mut().zip(high).zip(bytes) {
        *low = f32::from(byte & 15);
        *high = f32::from(byte >> 4);
    }
    q
}

/// Unpacks weights with a fifth bit: bit i of the four bytes `high` belongs to weight i.
#[inline(always)]
fn five_bits(high: &[u8], low: &[u8]) -> [f32; PART] {
    let high = u32::from_le_bytes([high[0], high[1], high[2], high[3]]);
    let mut q = nibbles(low);
    for (i, q) in q.iter_mut().enumerate() {
        *q += (((high >> i) & 1) * 16) as f32;
    }
    q
}

/// Returns a finite f16 as f32, without a branch: the bits are shifted into place, then a
/// multiplication corrects the exponent's bias, which is exact for subnormal numbers too. NaN and
/// infinity have been refused before.
#[inline(always)]
pub(crate) fn half_at(block: &[u8], at: usize) -> f32 {
    let bits = u32::from(u16::from_le_bytes([block[at], block[at + 1]]));
    let sign = (bits & 0x8000) << 16;
    let value = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
    f32::from_bits(value.to_bits() | sign)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_of_every_size_are_exact() {
        for bits in 0..=u16::MAX {
            let half = half::f16::from_bits(bits);
            if half.is_finite() {
                assert_eq!(half_at(&bits.to_le_bytes(), 0).to_bits(), half.to_f32().to_bits());
            }
        }
    }
}
