//! Quality against bytes: one point a setting.

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, VPos};

use super::plot::{Area, Drawn, colour, svg, text};
use super::table::{Table, distinct};
use crate::Result;

const SIZE: (i32, i32) = (980, 600);
/// Left, top, right, bottom of the field.
const FIELD: (i32, i32, i32, i32) = (70, 50, 950, 540);

struct Dot {
    name: String,
    family: usize,
    /// Dense bytes over bytes held.
    ratio: f64,
    score: f64,
}

/// `None` if no setting tells its bytes.
pub(super) fn draw(table: &Table) -> Result<Option<String>> {
    let families = distinct(table.rows.iter().map(|row| row.family()));
    let dot = |row: &super::table::Row| {
        Some(Dot {
            name: row.setting.clone(),
            family: families.iter().position(|family| family == row.family())?,
            ratio: row.ratio?,
            score: row.overall()?,
        })
    };
    let dots: Vec<Dot> = table.rows.iter().filter_map(dot).collect();
    if dots.is_empty() {
        return Ok(None);
    }
    let size = (SIZE.0 as u32, SIZE.1 as u32);
    svg("quality against bytes", size, |area| field(area, &dots)).map(Some)
}

fn field(area: &Area<'_>, dots: &[Dot]) -> Drawn {
    let (left, top, right, bottom) = FIELD;
    let most = dots.iter().map(|dot| dot.ratio).fold(2.0, f64::max) * 1.15;
    let least = dots.iter().map(|dot| dot.ratio).fold(1.0, f64::min) * 0.9;
    let ceiling = dots.iter().map(|dot| dot.score).fold(1.0, f64::max) * 1.1;
    // Halves of the bytes are equally far apart.
    let x = |ratio: f64| {
        left + ((ratio / least).ln() / (most / least).ln() * f64::from(right - left)) as i32
    };
    let y = |score: f64| bottom - (score / ceiling * f64::from(bottom - top)) as i32;
    let grey = RGBColor(110, 110, 110);
    let title = "Mean score of the categories against memory";
    text(area, title, ((left + right) / 2, 12), 18, (HPos::Center, VPos::Top), &BLACK)?;
    for ratio in [1, 2, 3, 4, 6, 8, 12, 16, 24, 32].map(f64::from) {
        if (least..=most).contains(&ratio) {
            line(area, (x(ratio), top), (x(ratio), bottom))?;
            let words = format!("{ratio}x");
            text(area, &words, (x(ratio), bottom + 6), 13, (HPos::Center, VPos::Top), &grey)?;
        }
    }
    let step = [1.0, 2.0, 5.0, 10.0, 20.0].into_iter().find(|s| ceiling / s <= 8.0).unwrap_or(25.0);
    for i in 0..=(ceiling / step) as i32 {
        let score = f64::from(i) * step;
        line(area, (left, y(score)), (right, y(score)))?;
        let words = format!("{score:.0}");
        text(area, &words, (left - 8, y(score)), 13, (HPos::Right, VPos::Center), &grey)?;
    }
    let words = "how many times fewer bytes than dense f16 (counted)";
    text(area, words, ((left + right) / 2, bottom + 28), 14, (HPos::Center, VPos::Top), &grey)?;
    text(area, "score, %", (12, top - 24), 14, (HPos::Left, VPos::Top), &grey)?;
    let mut taken: Vec<[i32; 4]> =
        dots.iter().map(|dot| around(x(dot.ratio), y(dot.score))).collect();
    for dot in dots {
        let (at, colour) = ((x(dot.ratio), y(dot.score)), colour(dot.family));
        area.draw(&Circle::new(at, 5, colour.filled()))?;
        let place = place(&dot.name, at, &taken);
        taken.push(place);
        let corner = (place[0], place[1]);
        if (corner.0 - at.0).abs() > 40 || (corner.1 - at.1).abs() > 24 {
            let end = (place[0].max(at.0.min(place[2])), (place[1] + place[3]) / 2);
            area.draw(&PathElement::new(vec![at, end], colour.mix(0.4)))?;
        }
        text(area, &dot.name, corner, 12, (HPos::Left, VPos::Top), &colour)?;
    }
    Ok(())
}

fn line(area: &Area<'_>, from: (i32, i32), to: (i32, i32)) -> Drawn {
    area.draw(&PathElement::new(vec![from, to], RGBColor(228, 228, 228)))?;
    Ok(())
}

fn around(x: i32, y: i32) -> [i32; 4] {
    [x - 6, y - 6, x + 6, y + 6]
}

/// The nearest box beside a point, for a name, that covers nothing taken.
fn place(name: &str, at: (i32, i32), taken: &[[i32; 4]]) -> [i32; 4] {
    let (width, height) = (name.len() as i32 * 7, 14);
    let free = |b: &[i32; 4]| {
        let meets = |t: &[i32; 4]| b[0] < t[2] && t[0] < b[2] && b[1] < t[3] && t[1] < b[3];
        let inside = b[0] >= FIELD.0 && b[2] <= SIZE.0 && b[1] >= FIELD.1 - 20 && b[3] <= FIELD.3;
        inside && !taken.iter().any(meets)
    };
    let boxed = |x: i32, y: i32| [x, y, x + width, y + height];
    let rings = (0..30).flat_map(|ring| {
        let far = ring * 8;
        [(8, -7 - far), (8, -7 + far), (-8 - width, -7 - far), (-8 - width, -7 + far)]
    });
    rings
        .map(|(dx, dy)| boxed(at.0 + dx, at.1 + dy))
        .find(free)
        .unwrap_or_else(|| boxed(at.0 + 8, at.1 - 7))
}
