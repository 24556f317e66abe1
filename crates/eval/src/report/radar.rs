//! A radar chart per family: the scores of its settings in each category, with the first setting of
//! the run.

use std::f64::consts::TAU;

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, VPos};

use super::plot::{Area, Drawn, colour, svg, text};
use super::table::{Row, Table, distinct, family};
use crate::{Category, Result};

/// Width and height of one chart, in pixels.
const PANEL: (i32, i32) = (380, 310);
const COLUMNS: usize = 3;
/// The largest number of outlines in one chart.
const MAX_OUTLINES: usize = 4;
const RADIUS: f64 = 88.0;

/// An axis: a category, its name, and the best score of any setting in it.
type Axis = (Category, &'static str, f64);

/// Draws the charts; `None` if there are fewer than three categories.
pub(super) fn draw(table: &Table) -> Result<Option<String>> {
    let best =
        |category| table.rows.iter().filter_map(|row| row.category(category)).fold(0.0, f64::max);
    let axes: Vec<Axis> = table
        .categories()
        .into_iter()
        .map(|(category, words)| (category, words, best(category)))
        .collect();
    let (Some(reference), true) = (table.rows.first(), axes.len() >= 3) else {
        return Ok(None);
    };
    let groups = groups(table);
    let lines = groups.len().div_ceil(COLUMNS);
    let size = (PANEL.0 as u32 * COLUMNS as u32, PANEL.1 as u32 * lines as u32 + 40);
    let panels = |area: &Area<'_>| -> Drawn {
        let title = format!("Score by category, rim: the best of all; grey: {}", reference.setting);
        text(area, &title, (size.0 as i32 / 2, 10), 18, (HPos::Center, VPos::Top), &BLACK)?;
        for (i, rows) in groups.iter().enumerate() {
            let corner = ((i % COLUMNS) as i32 * PANEL.0, (i / COLUMNS) as i32 * PANEL.1 + 40);
            panel(area, corner, reference, rows, &axes)?;
        }
        Ok(())
    };
    svg("radar", size, panels).map(Some)
}

/// Returns the groups of settings that share a chart: those of a family with several settings, and
/// up to [`MAX_OUTLINES`] settings without a family.
fn groups(table: &Table) -> Vec<Vec<&Row>> {
    // The first setting is in every chart, in grey.
    let rows = &table.rows[usize::from(table.rows.len() > 1)..];
    let mut groups: Vec<Vec<&Row>> = Vec::new();
    let mut alone = Vec::new();
    for family in distinct(rows.iter().map(|row| family(&row.setting))) {
        let own: Vec<_> = rows.iter().filter(|row| self::family(&row.setting) == family).collect();
        match own.len() {
            1 => alone.extend(own),
            _ => groups.push(own),
        }
    }
    groups.extend(alone.chunks(MAX_OUTLINES).map(<[_]>::to_vec));
    groups
}

fn panel(
    area: &Area<'_>,
    corner: (i32, i32),
    reference: &Row,
    rows: &[&Row],
    axes: &[Axis],
) -> Drawn {
    let centre = (corner.0 + PANEL.0 / 2, corner.1 + 126);
    let point = |i: usize, share: f64| {
        let angle = i as f64 / axes.len() as f64 * TAU - TAU / 4.0;
        let along = |x: f64| (x * share * RADIUS).round() as i32;
        (centre.0 + along(angle.cos()), centre.1 + along(angle.sin()))
    };
    let ring = |share: f64| (0..=axes.len()).map(|i| point(i, share)).collect::<Vec<_>>();
    let (faint, grey) = (RGBColor(222, 222, 222), RGBColor(110, 110, 110));
    for share in [0.25, 0.5, 0.75, 1.0] {
        area.draw(&PathElement::new(ring(share), faint))?;
    }
    for (i, (_, words, best)) in axes.iter().enumerate() {
        area.draw(&PathElement::new(vec![centre, point(i, 1.0)], faint))?;
        let at = point(i, 1.12);
        let side = match (at.0 - centre.0).signum() * i32::from((at.0 - centre.0).abs() > 12) {
            1 => HPos::Left,
            -1 => HPos::Right,
            _ => HPos::Center,
        };
        text(area, &format!("{words} {best:.0}"), at, 11, (side, VPos::Center), &grey)?;
    }
    let outline = |row: &Row| {
        let share = |(category, _, best): &Axis| match row.category(*category) {
            Some(score) if *best > 0.0 => score / best,
            _ => 0.0,
        };
        (0..=axes.len()).map(|i| point(i, share(&axes[i % axes.len()]))).collect::<Vec<_>>()
    };
    area.draw(&Polygon::new(outline(reference), grey.mix(0.15)))?;
    area.draw(&PathElement::new(outline(reference), grey.mix(0.6)))?;
    for (i, row) in rows.iter().enumerate() {
        area.draw(&PathElement::new(outline(row), colour(i).stroke_width(2)))?;
        // Names below the chart, two per line.
        let at =
            (corner.0 + 14 + (i % 2) as i32 * (PANEL.0 / 2), corner.1 + 250 + (i / 2) as i32 * 18);
        let dash = vec![(at.0, at.1 + 7), (at.0 + 16, at.1 + 7)];
        area.draw(&PathElement::new(dash, colour(i).stroke_width(3)))?;
        text(area, &row.setting, (at.0 + 22, at.1), 12, (HPos::Left, VPos::Top), &BLACK)?;
    }
    Ok(())
}
