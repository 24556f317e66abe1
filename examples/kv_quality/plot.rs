//! Plots perplexity against bits, from printed tables.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

const INK: RGBColor = RGBColor(60, 60, 60);
const FAINT: RGBColor = RGBColor(228, 228, 228);
const LINE: RGBColor = RGBColor(0, 114, 178);
const SIZE: (u32, u32) = (820, 520);
/// The lower end of the logarithmic axis, in percent. Smaller losses are drawn here.
const MIN_LOSS: f64 = 0.02;

/// A method's row.
#[derive(Debug, Clone, PartialEq)]
struct Point {
    method: String,
    bits: f64,
    /// Increase of perplexity over f16, in percent.
    loss: f64,
}

/// Plots the rows of tables as an SVG file, and prints the methods on the Pareto front: no other
/// method has a lower loss at as many bits or fewer.
pub fn draw(tables: &[PathBuf], path: &Path) -> Result<()> {
    let mut points = Vec::new();
    for table in tables {
        let text = std::fs::read_to_string(table).with_context(|| table.display().to_string())?;
        points.extend(text.lines().filter_map(point));
    }
    ensure!(!points.is_empty(), "no rows of perplexity in the tables");
    let best = pareto(&mut points);
    for point in &best {
        println!("{:.2} bits: {} {:+.2}%", point.bits, point.method, point.loss);
    }
    save(&points, &best, path)
}

/// Parses a row of a table printed by `teacher_forced`; `None` for other lines and for f16.
fn point(line: &str) -> Option<Point> {
    let cells: Vec<_> = line.trim().trim_matches('|').split('|').map(str::trim).collect();
    let [method, bits, _, loss, ..] = cells.as_slice() else { return None };
    let (bits, loss) = (bits.parse().ok()?, loss.strip_suffix('%')?.parse().ok()?);
    (*method != crate::REFERENCE).then(|| Point { method: (*method).into(), bits, loss })
}

/// Sorts points by bits and returns those with a lower loss than all points before them.
fn pareto(points: &mut Vec<Point>) -> Vec<Point> {
    points.sort_by(|a, b| a.bits.total_cmp(&b.bits).then(a.loss.total_cmp(&b.loss)));
    points.dedup();
    let mut best: Vec<Point> = Vec::new();
    for point in points.iter() {
        if best.last().is_none_or(|last| point.loss < last.loss) {
            best.push(point.clone());
        }
    }
    best
}

fn save(points: &[Point], best: &[Point], path: &Path) -> Result<()> {
    let at = |point: &Point| (point.bits, point.loss.max(MIN_LOSS));
    let most = points.iter().map(|point| at(point).1).fold(1.0, f64::max) * 1.6;
    let bits = || points.iter().map(|point| point.bits);
    let (first, last) = (bits().fold(f64::MAX, f64::min), bits().fold(0.0, f64::max));
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(first - 0.3..last + 1.2, (MIN_LOSS * 0.7..most).log_scale())?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(FAINT)
        .axis_style(INK)
        .label_style(("sans-serif", 13).into_font().color(&INK))
        .x_desc("bits per number held, everything counted")
        .y_desc("perplexity over f16, %")
        .draw()?;
    chart.draw_series(LineSeries::new(best.iter().map(at), LINE.stroke_width(2)))?;
    let dot = |point: &Point, color: RGBColor| Circle::new(at(point), 4, color.filled());
    chart.draw_series(points.iter().map(|point| dot(point, RGBColor(170, 170, 170))))?;
    chart.draw_series(best.iter().map(|point| dot(point, LINE)))?;
    // Labels on the Pareto front are placed first; other labels move up or down to avoid them.
    let others = points.iter().filter(|point| !best.contains(point));
    let mut placed: Vec<(i32, i32)> = Vec::new();
    for point in best.iter().chain(others) {
        let (x, y) = chart.backend_coord(&at(point));
        let clear =
            |y: &i32| placed.iter().all(|at| (at.0 - x).abs() > 110 || (at.1 - y).abs() > 10);
        let Some(y) = [0, -11, 11, -22, 22].into_iter().map(|move_by| y + move_by).find(clear)
        else {
            continue;
        };
        placed.push((x, y));
        let (color, size) = if best.contains(point) { (LINE, 13) } else { (INK, 10) };
        let pos = Pos::new(HPos::Left, VPos::Center);
        let style = ("sans-serif", size).into_font().color(&color).pos(pos);
        area.draw(&Text::new(point.method.clone(), (x + 8, y), style))?;
    }
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_read_and_the_best_at_their_bits_named() {
        let table = "\
| method | bits per number | perplexity | over f16 | 95 % | compression | seconds |
|---|---|---|---|---|---|---|
| dense-f16 | 16.01 | 22.966 | +0.00% | +0.00 to +0.00 | 1.00x | 23 |
| a | 4.00 | 25.0 | +9.00% | +8 to +10 | 4x | 1 |
| b | 5.00 | 26.0 | +12.50% | +8 to +10 | 3x | 1 |
| c | 5.50 | 23.0 | -0.10% | +8 to +10 | 3x | 1 |
| d | not supported: no kernel | | | | | |";
        let mut points: Vec<_> = table.lines().filter_map(point).collect();
        assert_eq!(points.len(), 3);
        let best = pareto(&mut points);
        let names: Vec<_> = best.iter().map(|point| (&*point.method, point.loss)).collect();
        assert_eq!(names, [("a", 9.0), ("c", -0.1)]);
    }
}
