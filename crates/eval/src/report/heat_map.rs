//! The needle test: the share of the key that is found at each length and depth, one map per
//! setting.

use std::collections::BTreeMap;

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, VPos};

use super::plot::{Area, Drawn, svg, text};
use super::table::distinct;
use crate::{Category, Record, Result};

const PANEL: (i32, i32) = (280, 200);
const COLUMNS: usize = 4;
/// Left, top, right and bottom of a map within its panel, in pixels.
const MAP_BOX: (i32, i32, i32, i32) = (46, 26, 268, 156);
/// Height of the title.
const TITLE_HEIGHT: i32 = 44;

/// Per depth (in thousandths) and length: the sum of the found shares of the key, and their number.
type CellScores = BTreeMap<(u32, u32), (f64, u32)>;

struct Map {
    title: String,
    cells: CellScores,
    /// The unit of the lengths.
    unit: &'static str,
}

/// Draws the maps; `None` if there are no needle results.
pub(super) fn draw(records: &[Record]) -> Result<Option<String>> {
    let needles: Vec<_> = records.iter().filter(|r| r.category == Category::Needle).collect();
    let settings = distinct(needles.iter().map(|r| r.setting.as_str()));
    let tasks = distinct(needles.iter().map(|r| r.task.as_str()));
    let mut maps = Vec::new();
    for task in &tasks {
        for setting in &settings {
            let own = needles.iter().filter(|r| r.task == *task && r.setting == *setting);
            let title =
                if tasks.len() > 1 { format!("{setting}, {task}") } else { setting.clone() };
            maps.extend(map(title, own.copied()));
        }
    }
    if maps.is_empty() {
        return Ok(None);
    }
    let columns = COLUMNS.min(maps.len().max(2));
    let lines = maps.len().div_ceil(columns);
    let size =
        (PANEL.0 as u32 * columns as u32, PANEL.1 as u32 * lines as u32 + TITLE_HEIGHT as u32);
    let panels = |area: &Area<'_>| -> Drawn {
        let title = "Needle test: digits of the key found, %";
        text(area, title, (size.0 as i32 / 2, 12), 18, (HPos::Center, VPos::Top), &BLACK)?;
        for (i, map) in maps.iter().enumerate() {
            let corner =
                ((i % columns) as i32 * PANEL.0, (i / columns) as i32 * PANEL.1 + TITLE_HEIGHT);
            panel(area, corner, map)?;
        }
        Ok(())
    };
    svg("needle test", size, panels).map(Some)
}

fn map<'a>(title: String, records: impl Iterator<Item = &'a Record>) -> Option<Map> {
    let mut cells = CellScores::new();
    let mut unit = None;
    for record in records {
        let Some((depth, length, counted)) = parse_id(&record.sample) else { continue };
        let cell = cells.entry((depth, length)).or_default();
        cell.0 += record.score.partial.unwrap_or(record.score.value);
        cell.1 += 1;
        unit = Some(counted);
    }
    Some(Map { title, cells, unit: unit? })
}

/// Parses depth, length and unit from a sample's id: "600-words-0.111-1".
pub(super) fn parse_id(id: &str) -> Option<(u32, u32, &'static str)> {
    let mut parts = id.split('-');
    let length = parts.next()?.parse().ok()?;
    let unit = ["words", "tokens"].into_iter().find(|unit| parts.clone().next() == Some(unit))?;
    let depth: f64 = parts.nth(1)?.parse().ok()?;
    Some(((depth * 1000.0).round() as u32, length, unit))
}

fn panel(area: &Area<'_>, corner: (i32, i32), map: &Map) -> Drawn {
    let mut depths: Vec<u32> = map.cells.keys().map(|key| key.0).collect();
    let mut lengths: Vec<u32> = map.cells.keys().map(|key| key.1).collect();
    depths.dedup();
    lengths.sort_unstable();
    lengths.dedup();
    let (left, top) = (corner.0 + MAP_BOX.0, corner.1 + MAP_BOX.1);
    let (width, height) = (MAP_BOX.2 - MAP_BOX.0, MAP_BOX.3 - MAP_BOX.1);
    let x = |i: usize| left + width * i as i32 / lengths.len() as i32;
    let y = |i: usize| top + height * i as i32 / depths.len() as i32;
    let grey = RGBColor(90, 90, 90);
    text(area, &map.title, (left, corner.1 + 6), 14, (HPos::Left, VPos::Top), &BLACK)?;
    text(area, "depth", (left - 6, corner.1 + 8), 11, (HPos::Right, VPos::Top), &grey)?;
    for (row, depth) in depths.iter().enumerate() {
        let words = format!("{:.0} %", f64::from(*depth) / 10.0);
        let middle = (y(row) + y(row + 1)) / 2;
        text(area, &words, (left - 6, middle), 11, (HPos::Right, VPos::Center), &grey)?;
        for (column, length) in lengths.iter().enumerate() {
            let Some((sum, count)) = map.cells.get(&(*depth, *length)) else { continue };
            let share = sum / f64::from(*count);
            let corners = [(x(column), y(row)), (x(column + 1) - 1, y(row + 1) - 1)];
            area.draw(&Rectangle::new(corners, shade(share).filled()))?;
            let ink = if share > 0.55 { WHITE } else { BLACK };
            let at = ((corners[0].0 + corners[1].0) / 2, (corners[0].1 + corners[1].1) / 2);
            // Numbers are drawn if they fit.
            if width / lengths.len() as i32 >= 24 && height / depths.len() as i32 >= 14 {
                let words = format!("{:.0}", 100.0 * share);
                text(area, &words, at, 11, (HPos::Center, VPos::Center), &ink)?;
            }
        }
    }
    // Every other label if they would overlap.
    let each = 1 + lengths.len() / 7;
    for (column, length) in lengths.iter().enumerate().step_by(each) {
        let at = ((x(column) + x(column + 1)) / 2, top + height + 4);
        text(area, &length.to_string(), at, 11, (HPos::Center, VPos::Top), &grey)?;
    }
    text(area, map.unit, (left - 6, top + height + 4), 11, (HPos::Right, VPos::Top), &grey)
}

/// Returns a colour from nearly white to deep blue.
fn shade(share: f64) -> RGBColor {
    let mix = |from: f64, to: f64| (from + (to - from) * share.clamp(0.0, 1.0)) as u8;
    RGBColor(mix(238.0, 8.0), mix(243.0, 48.0), mix(248.0, 107.0))
}
