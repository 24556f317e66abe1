//! Plots quality against bytes: a panel per policy, a line per store.

use std::path::Path;

use anyhow::Result;
use plotters::coord::Shift;
use plotters::element::{DashedPathElement, DynElement, IntoDynElement};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::report::Row;

/// Okabe and Ito's colours, which colour-blind readers can distinguish. Each store also has its own
/// marker, for prints in grey.
const STORES: [(&str, RGBColor); 3] = [
    ("f16", RGBColor(0, 114, 178)),
    ("kivi-4", RGBColor(213, 94, 0)),
    ("kivi-2", RGBColor(0, 158, 115)),
];
const INK: RGBColor = RGBColor(60, 60, 60);
const FAINT: RGBColor = RGBColor(228, 228, 228);
const PANEL: (u32, u32) = (360, 250);
const LEGEND: u32 = 44;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Plots the rows of the longest prompts as an SVG file.
pub fn save(rows: &[Row], path: &Path) -> Result<()> {
    let longest = rows.iter().map(|row| row.tokens).max().unwrap_or(0);
    let rows: Vec<_> = rows.iter().filter(|row| row.tokens == longest).collect();
    let mut policies: Vec<&str> = Vec::new();
    for row in rows.iter().filter(|row| row.policy != "dense") {
        if !policies.contains(&&*row.policy) {
            policies.push(&row.policy);
        }
    }
    let columns = (policies.len() as f64).sqrt().ceil().max(1.0) as usize;
    let lines = policies.len().div_ceil(columns).max(1);
    let size = (PANEL.0 * columns as u32, LEGEND + PANEL.1 * lines as u32);
    let area = SVGBackend::new(path, size).into_drawing_area();
    area.fill(&WHITE)?;
    let (top, below) = area.split_vertically(LEGEND);
    legend(&top, &rows)?;
    for (i, (panel, policy)) in
        below.split_evenly((lines, columns)).iter().zip(&policies).enumerate()
    {
        let outer = Outer { left: i % columns == 0, bottom: i + columns >= policies.len() };
        draw(panel, policy, &rows, outer)?;
    }
    area.present()?;
    println!("Drawn as {}.", path.display());
    Ok(())
}

/// Draws the legend: the stores in the rows, and the dense cache.
fn legend(area: &Area<'_>, rows: &[&Row]) -> Result<()> {
    let text = ("sans-serif", 14).into_font().color(&INK).pos(Pos::new(HPos::Left, VPos::Center));
    let (mut x, y) = (56, 24);
    let there = STORES.iter().filter(|(name, _)| rows.iter().any(|row| row.store == *name));
    for &(name, color) in there {
        area.draw(&PathElement::new([(x, y), (x + 28, y)], color.stroke_width(2)))?;
        area.draw(&marker(name, (x + 14, y), color))?;
        area.draw(&Text::new(name.to_owned(), (x + 35, y), text.clone()))?;
        x += 100;
    }
    area.draw(&DashedPathElement::new([(x, y), (x + 28, y)], 4, 3, INK.stroke_width(1)))?;
    area.draw(&Text::new("dense, f16", (x + 35, y), text))?;
    Ok(())
}

/// The outer sides of a panel, where axes have titles.
struct Outer {
    left: bool,
    bottom: bool,
}

/// Draws the panel of one policy. The axis of bytes is logarithmic, with a tick at each doubling.
fn draw(area: &Area<'_>, policy: &str, rows: &[&Row], outer: Outer) -> Result<()> {
    let bytes = || rows.iter().map(|row| row.bytes as f64 / 1e6);
    let least = bytes().fold(f64::MAX, f64::min) * 0.85;
    let most = bytes().fold(f64::MIN, f64::max) * 1.15;
    let mut chart = ChartBuilder::on(area)
        .caption(policy, ("sans-serif", 15).into_font().color(&INK))
        .margin(8)
        .x_label_area_size(38)
        .y_label_area_size(48)
        .build_cartesian_2d((least..most).log_scale().base(2.0), -0.04..1.04)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(FAINT)
        .axis_style(INK)
        .y_labels(5)
        .x_labels(8)
        .x_label_formatter(&|x| format!("{}", (x * 1e3).round() / 1e3))
        .label_style(("sans-serif", 12).into_font().color(&INK))
        .x_desc(if outer.bottom { "MB held" } else { "" })
        .y_desc(if outer.left { "share of the key found" } else { "" })
        .draw()?;
    if let Some(dense) = rows.iter().find(|row| row.policy == "dense") {
        let ends = [(least, dense.quality()), (most, dense.quality())];
        chart.draw_series([DashedPathElement::new(ends, 4, 3, INK.stroke_width(1))])?;
    }
    for (store, color) in STORES {
        let of_line = rows.iter().filter(|row| row.policy == policy && row.store == store);
        let mut points: Vec<_> =
            of_line.map(|row| (row.bytes as f64 / 1e6, row.quality())).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        chart.draw_series(LineSeries::new(points.iter().copied(), color.stroke_width(2)))?;
        chart.draw_series(points.into_iter().map(|point| marker(store, point, color)))?;
    }
    Ok(())
}

fn marker<'a, C: Clone + 'static>(
    store: &str,
    at: C,
    color: RGBColor,
) -> DynElement<'static, SVGBackend<'a>, C> {
    match store {
        "f16" => Circle::new(at, 4, color.filled()).into_dyn(),
        "kivi-4" => TriangleMarker::new(at, 6, color.filled()).into_dyn(),
        _ => Cross::new(at, 4, color.stroke_width(2)).into_dyn(),
    }
}
