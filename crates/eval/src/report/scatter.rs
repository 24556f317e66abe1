//! Scatter plots of a quantity against bytes: one point per setting, with the settings of a family
//! joined.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, VPos};

use super::agreement::Line;
use super::plot::{Area, Drawn, colour, svg, text};
use super::table::{Table, distinct, family};
use crate::Result;

/// Width and height of a panel in pixels; a single panel is larger.
const PANEL: (i32, i32) = (400, 360);
const ALONE: (i32, i32) = (1100, 720);
const COLUMNS: usize = 3;
/// The largest number of families in a panel; slightly more share one panel.
const MAX_FAMILIES: usize = 6;
/// Margins of the plot area within its panel: left, top, right, bottom.
const MARGIN: (i32, i32, i32, i32) = (62, 34, 14, 52);
/// Height of the title.
const TITLE_HEIGHT: i32 = 44;
/// Line height of a name.
const LINE: i32 = 14;
/// The smallest divergence on the axis, in nats.
const LEAST: f64 = 1e-4;

/// A setting.
struct Dot {
    name: String,
    /// Dense bytes divided by bytes held.
    ratio: f64,
    value: f64,
}

/// The vertical axis.
struct Axis {
    title: String,
    words: &'static str,
    /// Minimum and maximum.
    range: (f64, f64),
    /// Values of the grid lines.
    marks: Vec<f64>,
    logarithmic: bool,
}

impl Axis {
    /// Returns the height of a value, from 0 at the bottom to 1 at the top.
    fn share(&self, value: f64) -> f64 {
        let along = |x: f64| if self.logarithmic { x.ln() } else { x };
        let (low, high) = (along(self.range.0), along(self.range.1));
        (along(value) - low) / (high - low)
    }
}

/// Returns a ratio that can be drawn on a logarithmic axis.
fn drawn(ratio: Option<f64>) -> Option<f64> {
    ratio.filter(|&ratio| ratio > 0.0)
}

/// Draws mean scores against bytes; `None` if no setting reports its bytes.
pub(super) fn scores(table: &Table) -> Result<Option<String>> {
    let dot = |row: &super::table::Row| {
        Some(Dot { name: row.setting.clone(), ratio: drawn(row.ratio)?, value: row.overall()? })
    };
    let dots: Vec<Dot> = table.rows.iter().filter_map(dot).collect();
    let ceiling = dots.iter().map(|dot| dot.value).fold(1.0, f64::max) * 1.1;
    let step = [1.0, 2.0, 5.0, 10.0, 20.0].into_iter().find(|s| ceiling / s <= 8.0).unwrap_or(25.0);
    let axis = Axis {
        title: "Mean score of the categories against memory".into(),
        words: "score, %",
        range: (0.0, ceiling),
        marks: (0..=(ceiling / step) as u32).map(|i| f64::from(i) * step).collect(),
        logarithmic: false,
    };
    draw(&dots, &axis)
}

/// Draws the divergence from the dense model against bytes, over the first text; `None` if there is
/// no text or no setting reports its bytes.
pub(super) fn divergences(lines: &[Line]) -> Result<Option<String>> {
    let Some(first) = lines.first() else { return Ok(None) };
    let of_first = lines.iter().filter(|line| line.text == first.text);
    let dot = |line: &Line| {
        let value = line.agreement.kl;
        Some(Dot { name: line.setting.clone(), ratio: drawn(line.agreement.ratio)?, value })
    };
    let dots: Vec<Dot> = of_first.filter_map(dot).filter(|dot| dot.value >= LEAST).collect();
    let most = dots.iter().map(|dot| dot.value).fold(10.0 * LEAST, f64::max);
    let axis = Axis {
        title: format!("Divergence from the dense model against memory: {}", first.text),
        words: "KL, nats a token (lower is better)",
        range: (LEAST, most * 1.3),
        marks: (-4..=2).map(|power| 10f64.powi(power)).collect(),
        logarithmic: true,
    };
    draw(&dots, &axis)
}

fn draw(dots: &[Dot], axis: &Axis) -> Result<Option<String>> {
    if dots.is_empty() {
        return Ok(None);
    }
    let families = distinct(dots.iter().map(|dot| family(&dot.name)));
    let alone = families.len() <= 2 * MAX_FAMILIES;
    let (panel, most) = if alone { (ALONE, families.len()) } else { (PANEL, MAX_FAMILIES) };
    let groups: Vec<&[String]> = families.chunks(most).collect();
    let columns = COLUMNS.min(groups.len());
    let width = panel.0 * columns as i32;
    let height = panel.1 * groups.len().div_ceil(columns) as i32 + TITLE_HEIGHT;
    let panels = |area: &Area<'_>| -> Drawn {
        text(area, &axis.title, (width / 2, 12), 18, (HPos::Center, VPos::Top), &BLACK)?;
        for (i, group) in groups.iter().enumerate() {
            let (x, y) =
                (panel.0 * (i % columns) as i32, panel.1 * (i / columns) as i32 + TITLE_HEIGHT);
            let corners =
                [x + MARGIN.0, y + MARGIN.1, x + panel.0 - MARGIN.2, y + panel.1 - MARGIN.3];
            Field { corners, axis, dots }.draw(area, group)?;
        }
        Ok(())
    };
    svg("points against bytes", (width as u32, height as u32), panels).map(Some)
}

/// The plot area.
struct Field<'a> {
    /// Left, top, right, bottom.
    corners: [i32; 4],
    axis: &'a Axis,
    dots: &'a [Dot],
}

impl Field<'_> {
    fn at(&self, ratio: f64, value: f64) -> (i32, i32) {
        let [left, top, right, bottom] = self.corners;
        let (least, most) = self.ratios();
        // A factor of two has the same width everywhere.
        let across = (ratio / least).ln() / (most / least).ln();
        let x = left + (across * f64::from(right - left)) as i32;
        (x, bottom - (self.axis.share(value) * f64::from(bottom - top)) as i32)
    }

    fn ratios(&self) -> (f64, f64) {
        let ratios = || self.dots.iter().map(|dot| dot.ratio);
        (ratios().fold(1.0, f64::min) * 0.9, ratios().fold(2.0, f64::max) * 1.15)
    }

    /// Draws the given families in colour and all others in grey.
    fn draw(&self, area: &Area<'_>, families: &[String]) -> Drawn {
        self.rules(area)?;
        let at = |dot: &Dot| self.at(dot.ratio, dot.value);
        let own = |dot: &&Dot| families.iter().any(|name| name == family(&dot.name));
        for dot in self.dots.iter().filter(|dot| !own(dot)) {
            area.draw(&Circle::new(at(dot), 2, RGBColor(205, 205, 205).filled()))?;
        }
        let mut taken: Vec<[i32; 4]> =
            self.dots.iter().filter(own).map(|dot| around(at(dot))).collect();
        for (i, name) in families.iter().enumerate() {
            let mut own: Vec<_> =
                self.dots.iter().filter(|dot| family(&dot.name) == name).collect();
            own.sort_by(|a, b| a.ratio.total_cmp(&b.ratio));
            let (Some(first), Some(last)) = (own.first(), own.last()) else { continue };
            let path: Vec<_> = own.iter().map(|dot| at(dot)).collect();
            area.draw(&PathElement::new(path.clone(), colour(i).mix(0.6)))?;
            for &point in &path {
                area.draw(&Circle::new(point, 4, colour(i).filled()))?;
            }
            let words = match own.len() {
                1 => first.name.clone(),
                _ => format!("{} … {}", first.name, size(&last.name)),
            };
            let place = self.label_box(&words, at(last), &taken);
            taken.push(place);
            name_point(area, &words, at(last), place, &colour(i))?;
        }
        Ok(())
    }

    fn rules(&self, area: &Area<'_>) -> Drawn {
        let [left, top, right, bottom] = self.corners;
        let (least, most) = self.ratios();
        let grey = RGBColor(110, 110, 110);
        for ratio in [1, 2, 3, 4, 6, 8, 12, 16, 24, 32].map(f64::from) {
            if (least..=most).contains(&ratio) {
                let x = self.at(ratio, self.axis.range.0).0;
                rule(area, (x, top), (x, bottom))?;
                let words = format!("{ratio}x");
                text(area, &words, (x, bottom + 6), 12, (HPos::Center, VPos::Top), &grey)?;
            }
        }
        let (low, high) = self.axis.range;
        for &mark in self.axis.marks.iter().filter(|mark| (low..=high).contains(mark)) {
            let y = self.at(1.0, mark).1;
            rule(area, (left, y), (right, y))?;
            let at = (left - 6, y);
            text(area, &mark.to_string(), at, 12, (HPos::Right, VPos::Center), &grey)?;
        }
        let words = "times fewer bytes than dense f16";
        let at = ((left + right) / 2, bottom + 26);
        text(area, words, at, 12, (HPos::Center, VPos::Top), &grey)?;
        let at = (left - MARGIN.0 + 8, top - 24);
        text(area, self.axis.words, at, 12, (HPos::Left, VPos::Top), &grey)
    }

    /// Returns the nearest free box beside a point for a name.
    fn label_box(&self, name: &str, at: (i32, i32), taken: &[[i32; 4]]) -> [i32; 4] {
        let (width, height) = (name.chars().count() as i32 * 7, LINE);
        let [left, top, right, bottom] = self.corners;
        let free = |b: &[i32; 4]| {
            let meets = |t: &[i32; 4]| b[0] < t[2] && t[0] < b[2] && b[1] < t[3] && t[1] < b[3];
            let inside = b[0] >= left && b[2] <= right && b[1] >= top && b[3] <= bottom;
            inside && !taken.iter().any(meets)
        };
        let boxed = |x: i32, y: i32| [x, y, x + width, y + height];
        let rings = (0..60).flat_map(|ring| {
            let far = ring * LINE / 2;
            let (before, behind) = (-8 - width - far / 3, 8 + far / 3);
            let middle = -width / 2;
            [
                (behind, -far),
                (behind, far),
                (before, -far),
                (before, far),
                (middle, -far),
                (middle, far),
            ]
        });
        rings
            .map(|(dx, dy)| boxed(at.0 + dx, at.1 - height / 2 + dy))
            .find(free)
            .unwrap_or_else(|| boxed(at.0 + 8, at.1 - height / 2))
    }
}

/// Draws a point's name in its box, with a line to the point if they are apart.
fn name_point(
    area: &Area<'_>,
    words: &str,
    point: (i32, i32),
    place: [i32; 4],
    colour: &RGBColor,
) -> Drawn {
    let near = (point.0.clamp(place[0], place[2]), point.1.clamp(place[1], place[3]));
    if (near.0 - point.0).abs().max((near.1 - point.1).abs()) > 12 {
        area.draw(&PathElement::new(vec![point, near], colour.mix(0.4)))?;
    }
    text(area, words, (place[0], place[1]), 12, (HPos::Left, VPos::Top), colour)
}

/// Returns the part of a name after its family.
fn size(name: &str) -> &str {
    name.rsplit('-').next().unwrap_or(name)
}

fn rule(area: &Area<'_>, from: (i32, i32), to: (i32, i32)) -> Drawn {
    area.draw(&PathElement::new(vec![from, to], RGBColor(228, 228, 228)))?;
    Ok(())
}

fn around((x, y): (i32, i32)) -> [i32; 4] {
    [x - 5, y - 5, x + 5, y + 5]
}
