//! A pool's memory: blocks of packed tokens, and pages of tokens in full precision.

use super::slabs::Slabs;
use crate::layout::{Layout, Line};
use crate::packed::{PackedMut, PackedRef};
use crate::{Axis, Format, Result};
use half::f16;

/// Tokens per page in full precision. It divides the number of tokens of every block.
pub const PAGE: usize = 16;

/// The layout of a block: `[codes][scales, zero points, factors]` of the keys, then of the values,
/// each part aligned to a line.
#[derive(Debug, Clone, Copy)]
pub struct BlockLayout {
    pub keys: Layout,
    pub values: Layout,
    key_part: MatrixOffsets,
    value_part: MatrixOffsets,
}

/// The position of a matrix in a block. It is stored, because the divisions to compute it would
/// slow down a block's product.
#[derive(Debug, Clone, Copy)]
struct MatrixOffsets {
    /// First line.
    start: usize,
    /// Number of lines of codes.
    codes: usize,
    scales: usize,
    zero_points: usize,
    factors: usize,
}

#[derive(Debug, Clone)]
pub struct PoolMemory {
    pub layout: BlockLayout,
    pub blocks: Slabs,
    pub key_pages: Slabs,
    pub value_pages: Slabs,
}

/// Blocks and pages taken by a change, or freed if negative.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BlockDelta {
    pub blocks: isize,
    pub key_pages: isize,
    pub value_pages: isize,
}

impl BlockLayout {
    /// # Errors
    /// [`Error::Setting`](crate::Error::Setting) if a dimension is 0.
    pub fn new(format: &Format, head_dim: usize, value_dim: usize) -> Result<Self> {
        let chunk = format.block_tokens();
        let keys = Layout::new(chunk, head_dim, format.keys(), Axis::Tokens)?;
        let values = Layout::new(chunk, value_dim, format.values(), Axis::Channels)?;
        let part = |start, layout: &Layout| MatrixOffsets {
            start,
            codes: layout.lines(),
            scales: layout.scales(),
            zero_points: layout.zero_points(),
            factors: layout.factors(),
        };
        let key_part = part(0, &keys);
        let value_part = part(key_part.end(), &values);
        Ok(Self { keys, values, key_part, value_part })
    }

    fn lines(&self) -> usize {
        self.value_part.end()
    }

    /// Returns the bits of codes, scales, zero points and factors.
    pub fn bits(&self) -> usize {
        let of = |part: &MatrixOffsets| part.codes * 8 * size_of::<Line>() + 8 * part.param_bytes();
        of(&self.key_part) + of(&self.value_part)
    }

    /// Returns the keys of a block with `rows` of them.
    pub fn keys<'a>(&self, block: &'a [Line], rows: usize) -> PackedRef<'a> {
        self.key_part.view(self.keys, block, rows)
    }

    /// Returns the values of a block with `rows` of them.
    pub fn values<'a>(&self, block: &'a [Line], rows: usize) -> PackedRef<'a> {
        self.value_part.view(self.values, &block[self.value_part.start..], rows)
    }

    /// Returns the keys and values of a block with the given numbers of them.
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

impl MatrixOffsets {
    /// Returns the end of the last line.
    fn end(&self) -> usize {
        self.start + self.codes + self.param_bytes().div_ceil(size_of::<Line>())
    }

    fn param_bytes(&self) -> usize {
        (self.scales + self.zero_points + self.factors) * size_of::<f16>()
    }

    /// Returns the matrix in the lines from its first on.
    fn view<'a>(&self, layout: Layout, lines: &'a [Line], rows: usize) -> PackedRef<'a> {
        let (codes, params) = lines.split_at(self.codes);
        let (scales, rest) = bytemuck::cast_slice(params).split_at(self.scales);
        let (zero_points, factors) = rest.split_at(self.zero_points);
        PackedRef { layout, rows, codes, scales, zero_points, factors: &factors[..self.factors] }
    }

    fn view_mut<'a>(&self, layout: Layout, lines: &'a mut [Line], rows: usize) -> PackedMut<'a> {
        let (codes, params) = lines.split_at_mut(self.codes);
        let (scales, rest) = bytemuck::cast_slice_mut(params).split_at_mut(self.scales);
        let (zero_points, factors) = rest.split_at_mut(self.zero_points);
        PackedMut {
            layout,
            rows,
            codes,
            scales,
            zero_points,
            factors: &mut factors[..self.factors],
        }
    }
}

impl PoolMemory {
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

    /// Returns an empty memory with large slabs.
    pub fn with_large_slabs(self) -> Self {
        let Self { layout, blocks, key_pages, value_pages } = Self::new(self.layout);
        Self {
            layout,
            blocks: blocks.with_large_slabs(),
            key_pages: key_pages.with_large_slabs(),
            value_pages: value_pages.with_large_slabs(),
        }
    }

    /// Frees all memory.
    pub fn clear(&mut self) {
        for slabs in [&mut self.blocks, &mut self.key_pages, &mut self.value_pages] {
            slabs.clear();
        }
    }

    pub fn slabs(&self) -> [&Slabs; 3] {
        [&self.blocks, &self.key_pages, &self.value_pages]
    }

    /// Returns the bytes of blocks and pages in use.
    pub fn used(&self) -> usize {
        self.slabs().iter().map(|slabs| slabs.used() * slabs.block_bytes()).sum()
    }

    /// Returns the bytes of blocks and pages; `isize::MAX` for more.
    pub fn bytes(&self, delta: BlockDelta) -> isize {
        let counts = [delta.blocks, delta.key_pages, delta.value_pages];
        let sizes = self.slabs().map(|slabs| slabs.block_bytes() as isize);
        let bytes = counts.iter().zip(sizes).map(|(count, size)| count.saturating_mul(size));
        bytes.fold(0, isize::saturating_add)
    }

    /// Frees memory if much of it is unused.
    pub fn shrink(&mut self) {
        for slabs in [&mut self.blocks, &mut self.key_pages, &mut self.value_pages] {
            slabs.shrink();
        }
    }
}

impl std::ops::AddAssign for BlockDelta {
    fn add_assign(&mut self, other: Self) {
        self.blocks = self.blocks.saturating_add(other.blocks);
        self.key_pages = self.key_pages.saturating_add(other.key_pages);
        self.value_pages = self.value_pages.saturating_add(other.value_pages);
    }
}
