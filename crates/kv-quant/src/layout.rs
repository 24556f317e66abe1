//! The layout of the codes, scales and zero points of a packed matrix. `docs/formats.md` describes
//! it bit by bit.

use crate::format::Plane;
use crate::{Axis, Codes, Error, Result, Scheme};

/// Lanes per panel: two lines.
pub(crate) const PANEL: usize = 32;

/// One 32-bit word of codes for each of 16 lanes: the widest vector register.
pub(crate) type Line = [u32; 16];

/// The shape of a packed matrix: rows are tokens, columns are channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layout {
    pub scheme: Scheme,
    /// The axis in lanes.
    pub lanes: Axis,
    /// Capacity in rows.
    pub capacity: usize,
    pub columns: usize,
}

impl Layout {
    /// # Errors
    /// [`Error::Setting`] for an inconsistent scheme, or no columns.
    pub fn new(capacity: usize, columns: usize, scheme: Scheme, lanes: Axis) -> Result<Self> {
        let scheme = scheme.checked()?;
        if columns == 0 {
            return Err(Error::setting("columns", "at least 1", columns));
        }
        Ok(Self { scheme, lanes, capacity, columns })
    }

    /// Returns the number of lines of codes.
    pub fn lines(&self) -> usize {
        self.scheme.bits.planes().iter().map(|&plane| self.plane_lines(plane)).sum()
    }

    /// Returns the number of groups.
    pub fn groups(&self) -> usize {
        match self.scheme.axis {
            Axis::Tokens => self.capacity.div_ceil(self.scheme.group) * self.columns,
            Axis::Channels => self.columns.div_ceil(self.scheme.group) * self.capacity,
        }
    }

    /// Returns the number of scales: one per group, or 0.
    pub fn scales(&self) -> usize {
        if self.scheme.has_scales() { self.groups() } else { 0 }
    }

    /// Returns the number of zero points: one per group, or 0.
    pub fn zero_points(&self) -> usize {
        if self.scheme.has_zero_points() { self.groups() } else { 0 }
    }

    /// Returns the number of factors of the axis without scales.
    pub fn factors(&self) -> usize {
        match (self.scheme.codes, self.scheme.axis) {
            (Codes::VarianceNormalized { .. }, Axis::Tokens) => self.capacity,
            (Codes::VarianceNormalized { tile }, Axis::Channels) => {
                self.capacity.div_ceil(tile) * self.columns
            }
            _ => 0,
        }
    }

    /// Returns the index of the factor of a row and column: `[token]` or `[tile][channel]`.
    pub fn factor_at(&self, row: usize, column: usize) -> usize {
        match self.scheme.axis {
            Axis::Tokens => row,
            Axis::Channels => row / self.scheme.tokens_together() * self.columns + column,
        }
    }

    /// Returns the index of the scale of a row and column: `[group][position on the other axis]`.
    pub fn param_at(&self, row: usize, column: usize) -> usize {
        match self.scheme.axis {
            Axis::Tokens => row / self.scheme.group * self.columns + column,
            Axis::Channels => column / self.scheme.group * self.capacity + row,
        }
    }

    /// Returns the number of scales of a group: one for each position on the other axis.
    pub fn param_width(&self) -> usize {
        match self.scheme.axis {
            Axis::Tokens => self.columns,
            Axis::Channels => self.capacity,
        }
    }

    /// Returns the index of a lane's word, relative to the plane's first line.
    pub fn line_in_plane(&self, plane: Plane, lane: usize, word: usize) -> usize {
        let panel = lane / PANEL;
        2 * panel * self.words(plane) + word * self.panel_width(panel) + lane % PANEL / 16
    }

    /// Returns the number of words of a lane in a plane.
    pub fn words(&self, plane: Plane) -> usize {
        let steps = match self.lanes {
            Axis::Tokens => self.columns,
            Axis::Channels => self.capacity,
        };
        steps.div_ceil(plane.per_word())
    }

    /// Returns the number of lines of a plane.
    pub fn plane_lines(&self, plane: Plane) -> usize {
        self.lane_count().div_ceil(16) * self.words(plane)
    }

    /// Returns the capacity in lanes.
    pub fn lane_count(&self) -> usize {
        match self.lanes {
            Axis::Tokens => self.capacity,
            Axis::Channels => self.columns,
        }
    }

    /// Returns the lines per word in a panel: two, or one in a last panel of up to 16 lanes.
    pub fn panel_width(&self, panel: usize) -> usize {
        if self.lane_count() - panel * PANEL > 16 { 2 } else { 1 }
    }
}
