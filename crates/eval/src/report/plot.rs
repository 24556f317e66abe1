//! Shared code of the figures: an SVG area, colours, small text.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::{Error, Result};

pub(super) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// The result of a drawing function, with any error of the drawing library.
pub(super) type Drawn = std::result::Result<(), Box<dyn std::error::Error>>;

/// Colours that also differ in lightness (Okabe and Ito's, distinguishable with all kinds of colour
/// vision).
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(120, 94, 40),
    RGBColor(90, 90, 90),
];

pub(super) fn colour(number: usize) -> RGBColor {
    COLOURS[number % COLOURS.len()]
}

/// Draws on a white SVG of `size` pixels.
pub(super) fn svg(
    what: &str,
    size: (u32, u32),
    draw: impl FnOnce(&Area<'_>) -> Drawn,
) -> Result<String> {
    let mut out = String::new();
    let drawn = {
        let area = SVGBackend::with_string(&mut out, size).into_drawing_area();
        let white = area.fill(&WHITE).map_err(Into::into);
        white.and_then(|()| draw(&area)).and_then(|()| Ok(area.present()?))
    };
    let failed =
        |e: Box<dyn std::error::Error>| Error::Drawing { what: what.into(), reason: e.to_string() };
    drawn.map_err(failed)?;
    Ok(out)
}

/// Draws text anchored at a point.
pub(super) fn text(
    area: &Area<'_>,
    words: &str,
    at: (i32, i32),
    size: u32,
    anchor: (HPos, VPos),
    colour: &RGBColor,
) -> Drawn {
    let style = ("sans-serif", size).into_text_style(area).color(colour);
    area.draw(&Text::new(words, at, style.pos(Pos::new(anchor.0, anchor.1))))?;
    Ok(())
}
