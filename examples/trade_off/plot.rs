//! Quality against bytes, one line per policy and store.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use plotters::prelude::*;

use crate::report::Row;

/// Draws the rows of the longest prompts as an SVG file.
pub fn save(rows: &[Row], path: &Path) -> Result<()> {
    let longest = rows.iter().map(|row| row.tokens).max().unwrap_or(0);
    let mut lines: BTreeMap<(&str, &str), Vec<(f64, f64)>> = BTreeMap::new();
    for row in rows.iter().filter(|row| row.tokens == longest) {
        let line = lines.entry((&row.policy, row.store)).or_default();
        line.push((row.bytes as f64 / 1e6, row.quality()));
    }
    let bytes = || lines.values().flatten().map(|point| point.0);
    let (least, most) = (bytes().fold(f64::MAX, f64::min), bytes().fold(0.0, f64::max));
    let area = SVGBackend::new(path, (900, 560)).into_drawing_area();
    area.fill(&WHITE)?;
    let title = format!("Needle test, {longest} tokens: share of the key found");
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(50)
        .build_cartesian_2d((least * 0.9..most * 1.1).log_scale(), 0.0..1.02)?;
    chart.configure_mesh().x_desc("MB of keys and values held").y_desc("share found").draw()?;
    let policies: Vec<&str> = {
        let mut names: Vec<_> = lines.keys().map(|(policy, _)| *policy).collect();
        names.dedup();
        names
    };
    for ((policy, store), mut points) in lines {
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        let number = policies.iter().position(|name| *name == policy).unwrap_or(0);
        let color = Palette99::pick(number).to_rgba();
        // Fewer bits, larger dots.
        let size = match store {
            "kivi-2" => 7,
            "kivi-4" => 5,
            _ => 3,
        };
        chart
            .draw_series(LineSeries::new(points.iter().copied(), color.stroke_width(1)))?
            .label(format!("{policy}, {store}"))
            .legend(move |(x, y)| Circle::new((x + 8, y), size, color.stroke_width(1)));
        let dots = points.iter().map(|&point| Circle::new(point, size, color.stroke_width(1)));
        chart.draw_series(dots)?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .draw()?;
    area.present()?;
    println!("Drawn as {}.", path.display());
    Ok(())
}
