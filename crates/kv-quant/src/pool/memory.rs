//! A pool's memory: blocks of packed tokens, and pages of tokens in full precision.

use super::slabs::Slabs;
use crate::layout::{Layout, Line};
use crate::packed::{PackedMut, PackedRef};
use crate::{Axis, Format, Result};
use half::f16;

/// Tokens of a page in full precision. It divides every block's number of tokens.
pub const PAGE: usize = 16;

/// A block's keys and values: `[codes][scales, zeros, factors]` of the keys, then of the values, each
/// part at a whole line.
#[derive(Debug, Clone, Copy)]
pub struct BlockLayout {
    pub keys: Layout,
    pub values: Layout,
    key_part: Part,
    value_part: Part,
}

/// Where a matrix lies in a block. Kept, since the divisions that it takes would show in the time of
/// a block's product.
#[derive(Debug, Clone, Copy)]
struct Part {
    /// The first line.
    start: usize,
    /// Lines of codes.
    codes: usize,
    scales: usize,
    zeros: usize,
    factors: usize,
}

#[derive(Debug, Clone)]
pub struct Memory {
    pub layout: BlockLayout,
    pub blocks: Slabs,
    pub key_pages: Slabs,
    pub value_pages: Slabs,
}

/// Blocks and pages that a change takes (or gives back, if negative).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Need {
    pub blocks: isize,
    pub key_pages: isize,
    pub value_pages: isize,
}

impl BlockLayout {
    /// # Errors
    /// [`Error::Setting`](crate::Error::Setting) for no channels.
    pub fn new(format: &Format, head_dim: usize, value_dim: usize) -> Result<Self> {
        let chunk = format.chunk();
        let keys = Layout::new(chunk, head_dim, format.keys(), Axis::Tokens)?;
        let values = Layout::new(chunk, value_dim, format.values(), Axis::Channels)?;
        let part = |start, layout: &Layout| Part {
            start,
            codes: layout.lines(),
            scales: layout.scales(),
            zeros: layout.zeros(),
            factors: layout.factors(),
        };
        let key_part = part(0, &keys);
        let value_part = part(key_part.end(), &values);
        Ok(Self { keys, values, key_part, value_part })
    }

    fn lines(&self) -> usize {
        self.value_part.end()
    }

    /// Bits of codes, scales, zeros and factors.
    pub fn bits(&self) -> usize {
        let of = |part: &Part| part.codes * 8 * size_of::<Line>() + 8 * part.param_bytes();
        of(&self.key_part) + of(&self.value_part)
    }

    /// The keys of a block that holds `rows` of them.
    pub fn keys<'a>(&self, block: &'a [Line], rows: usize) -> PackedRef<'a> {
        self.key_part.view(self.keys, block, rows)
    }

    /// The values of a block that holds `rows` of them.
    pub fn values<'a>(&self, block: &'a [Line], rows: usize) -> PackedRef<'a> {
        self.value_part.view(self.values, &block[self.value_part.start..], rows)
    }

    /// The keys and values of a block, which holds so many of them.
    pub fn parts_mut<'a>(
        &self,
        block: &'a mut [Line],
        keys: usize,
        values: usize,
    ) -> (PackedMut<'a>, PackedMut<'a>) {
        let (key_lines, value_lines) = block.split_at_mut(self.value_part.start);
        (
            self.key_part.view_mut(self.keys, key_lines, keys),
            self.value_part.view_mut(self.values, value_lines, values),
        )
    }
}

impl Part {
    /// The line after the last.
    fn end(&self) -> usize {
        self.start + self.codes + self.param_bytes().div_ceil(size_of::<Line>())
    }

    fn param_bytes(&self) -> usize {
        (self.scales + self.zeros + self.factors) * size_of::<f16>()
    }

    /// The matrix in the lines from its first on.
    fn view<'a>(&self, layout: Layout, lines: &'a [Line], rows: usize) -> PackedRef<'a> {
        let (codes, params) = lines.split_at(self.codes);
        let (scales, rest) = bytemuck::cast_slice(params).split_at(self.scales);
        let (zeros, factors) = rest.split_at(self.zeros);
        PackedRef { layout, rows, codes, scales, zeros, factors: &factors[..self.factors] }
    }

    fn view_mut<'a>(&self, layout: Layout, lines: &'a mut [Line], rows: usize) -> PackedMut<'a> {
        let (codes, params) = lines.split_at_mut(self.codes);
        let (scales, rest) = bytemuck::cast_slice_mut(params).split_at_mut(self.scales);
        let (zeros, factors) = rest.split_at_mut(self.zeros);
        PackedMut { layout, rows, codes, scales, zeros, factors: &mut factors[..self.factors] }
    }
}

impl Memory {
    pub fn new(layout: BlockLayout) -> Self {
        let page = |columns: usize| {
            Slabs::new((PAGE * columns * size_of::<f16>()).div_ceil(size_of::<Line>()))
        };
        Self {
            layout,
            blocks: Slabs::new(layout.lines()),
            key_pages: page(layout.keys.columns),
            value_pages: page(layout.values.columns),
        }
    }

    /// The same, empty, with large slabs.
    pub fn with_large_slabs(self) -> Self {
        let Self { layout, blocks, key_pages, value_pages } = Self::new(self.layout);
        Self {
            layout,
            blocks: blocks.with_large_slabs(),
            key_pages: key_pages.with_large_slabs(),
            value_pages: value_pages.with_large_slabs(),
        }
    }

    /// Gives all memory back.
    pub fn clear(&mut self) {
        for slabs in [&mut self.blocks, &mut self.key_pages, &mut self.value_pages] {
            slabs.clear();
        }
    }

    pub fn slabs(&self) -> [&Slabs; 3] {
        [&self.blocks, &self.key_pages, &self.value_pages]
    }

    /// Bytes of the blocks and pages in use.
    pub fn used(&self) -> usize {
        self.slabs().iter().map(|slabs| slabs.used() * slabs.block_bytes()).sum()
    }

    /// Bytes of blocks and pages.
    pub fn bytes(&self, need: Need) -> isize {
        let counts = [need.blocks, need.key_pages, need.value_pages];
        let sizes = self.slabs().map(|slabs| slabs.block_bytes() as isize);
        counts.iter().zip(sizes).map(|(count, size)| count * size).sum()
    }

    /// Gives memory back if much is free.
    pub fn shrink(&mut self) {
        for slabs in [&mut self.blocks, &mut self.key_pages, &mut self.value_pages] {
            slabs.shrink();
        }
    }
}

impl std::ops::AddAssign for Need {
    fn add_assign(&mut self, other: Self) {
        self.blocks += other.blocks;
        self.key_pages += other.key_pages;
        self.value_pages += other.value_pages;
    }
}
