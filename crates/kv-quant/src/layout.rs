//! Where the codes, scales and zeros of a packed matrix lie. `docs/formats.md` has the layout bit by
//! bit.

use crate::format::Plane;
use crate::{Axis, Codes, Error, Result, Scheme};

/// Lanes of a panel: two lines.
pub(crate) const PANEL: usize = 32;

/// One 32-bit word of codes for each of 16 lanes: a vector register where these are widest.
pub(crate) type Line = [u32; 16];

/// The shape of a packed matrix: rows are tokens, columns are channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layout {
    pub scheme: Scheme,
    /// The axis that lies in lanes.
    pub lanes: Axis,
    /// Rows that there is room for.
    pub capacity: usize,
    pub columns: usize,
}

impl Layout {
    /// # Errors
    /// [`Error::Setting`] for a scheme whose parts do not fit together, or no columns.
    pub fn new(capacity: usize, columns: usize, scheme: Scheme, lanes: Axis) -> Result<Self> {
        let scheme = scheme.checked()?;
        if columns == 0 {
            return Err(Error::setting("columns", "at least 1", columns));
        }
        Ok(Self { scheme, lanes, capacity, columns })
    }

    /// Lines of codes.
    pub fn lines(&self) -> usize {
        self.scheme.bits.planes().iter().map(|&plane| self.plane_lines(plane)).sum()
    }

    /// Groups.
    pub fn groups(&self) -> usize {
        match self.scheme.along {
            Axis::Tokens => self.capacity.div_ceil(self.scheme.group) * self.columns,
            Axis::Channels => self.columns.div_ceil(self.scheme.group) * self.capacity,
        }
    }

    /// Scales: one for each group, or none.
    pub fn scales(&self) -> usize {
        if self.scheme.has_scales() { self.groups() } else { 0 }
    }

    /// Zeros: one for each group, or none.
    pub fn zeros(&self) -> usize {
        if self.scheme.has_zeros() { self.groups() } else { 0 }
    }

    /// Factors of the axis that has no scales.
    pub fn factors(&self) -> usize {
        match (self.scheme.codes, self.scheme.along) {
            (Codes::VarianceNormalized { .. }, Axis::Tokens) => self.capacity,
            (Codes::VarianceNormalized { tile }, Axis::Channels) => {
                self.capacity.div_ceil(tile) * self.columns
            }
            _ => 0,
        }
    }

    /// Where the factor of a row and column lies: `[token]` or `[tile][channel]`.
    pub fn factor_at(&self, row: usize, column: usize) -> usize {
        match self.scheme.along {
            Axis::Tokens => row,
            Axis::Channels => row / self.scheme.tokens_together() * self.columns + column,
        }
    }

    /// Where the scale of a row and column's group lies: `[group][position on the other axis]`.
    pub fn param_at(&self, row: usize, column: usize) -> usize {
        match self.scheme.along {
            Axis::Tokens => row / self.scheme.group * self.columns + column,
            Axis::Channels => column / self.scheme.group * self.capacity + row,
        }
    }

    /// Scales of a group: one for each position on the other axis.
    pub fn param_width(&self) -> usize {
        match self.scheme.along {
            Axis::Tokens => self.columns,
            Axis::Channels => self.capacity,
        }
    }

    /// Where a lane's word lies, counted from the plane's first line.
    pub fn line_in_plane(&self, plane: Plane, lane: usize, word: usize) -> usize {
        let panel = lane / PANEL;
        2 * panel * self.words(plane) + word * self.panel_width(panel) + lane % PANEL / 16
    }

    /// Words of a lane in a plane.
    pub fn words(&self, plane: Plane) -> usize {
        let steps = match self.lanes {
            Axis::Tokens => self.columns,
            Axis::Channels => self.capacity,
        };
        steps.div_ceil(plane.per_word())
    }

    /// Lines of a plane.
    pub fn plane_lines(&self, plane: Plane) -> usize {
        self.lane_count().div_ceil(16) * self.words(plane)
    }

    /// Lanes that there is room for.
    pub fn lane_count(&self) -> usize {
        match self.lanes {
            Axis::Tokens => self.capacity,
            Axis::Channels => self.columns,
        }
    }

    /// Lines of a word in a panel: two, or one in a last panel of up to 16 lanes.
    pub fn panel_width(&self, panel: usize) -> usize {
        if self.lane_count() - panel * PANEL > 16 { 2 } else { 1 }
    }
}
