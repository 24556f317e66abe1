//! Reports of numbers that cannot be quantized.

/// A group with NaN, an infinity or a range beyond f16's, as [`Kernels::pack`] reports it in the
/// word of [`FillArgs::status`].
///
/// [`Kernels::pack`]: super::Kernels::pack
/// [`FillArgs::status`]: super::FillArgs::status
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// The [tag](super::FillRow::tag) of the row.
    pub tag: u64,
    /// Whether the group contains values instead of keys.
    pub values: bool,
    /// The first slot of the group, modulo 2^24.
    pub slot: usize,
    /// The first channel of the group.
    pub channel: usize,
}

impl Report {
    /// The bits of a word that hold the tag.
    pub const TAG: u64 = (1 << 62) - (1 << 33);

    /// Decodes a word; `None` for 0, if nothing was reported.
    pub fn decode(word: u64) -> Option<Self> {
        (word != 0).then_some(Self {
            tag: word & Self::TAG,
            values: word >> 62 & 1 == 1,
            slot: (word >> 9 & 0xff_ffff) as usize,
            channel: (word & 0x1ff) as usize,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bits are those that `report` in kernels/quantize.cuh writes.
    #[test]
    fn words_are_decoded() {
        assert_eq!(Report::decode(0), None);
        let tag = 5 << 42 | 3 << 33;
        let word = 1 << 63 | 1 << 62 | tag | 4096 << 9 | 96;
        let report = Report { tag, values: true, slot: 4096, channel: 96 };
        assert_eq!(Report::decode(word), Some(report));
    }
}
