//! The needle test: how much of the key is found at each length and depth, a map a setting.

use std::collections::BTreeMap;

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, VPos};

use super::plot::{Area, Drawn, svg, text};
use super::table::distinct;
use crate::{Category, Record, Result};

const PANEL: (i32, i32) = (320, 270);
const COLUMNS: usize = 3;
/// Left, top, right, bottom of a map within its panel.
const MAP: (i32, i32, i32, i32) = (56, 34, 306, 220);

/// The mean share of the key by depth (in thousandths) and length.
type Map = BTreeMap<(u32, u32), (f64, u32)>;

/// `None` if no needle was looked for.
pub(super) fn draw(records: &[Record]) -> Result<Option<String>> {
    let needles: Vec<_> = records.iter().filter(|r| r.category == Category::Needle).collect();
    let titles = distinct(needles.iter().map(|r| r.setting.as_str()));
    let tasks = distinct(needles.iter().map(|r| r.task.as_str()));
    let mut maps = Vec::new();
    for task in &tasks {
        for title in &titles {
            let own = needles.iter().filter(|r| r.task == *task && r.setting == *title);
            let mut map = Map::new();
            for record in own {
                let Some(place) = place(&record.sample) else { continue };
                let cell = map.entry(place).or_default();
                cell.0 += record.score.partial.unwrap_or(record.score.value);
                cell.1 += 1;
            }
            let title = if tasks.len() > 1 { format!("{title}, {task}") } else { title.clone() };
            if !map.is_empty() {
                maps.push((title, map));
            }
        }
    }
    if maps.is_empty() {
        return Ok(None);
    }
    let lines = maps.len().div_ceil(COLUMNS);
    let size = (PANEL.0 as u32 * COLUMNS as u32, PANEL.1 as u32 * lines as u32 + 40);
    let panels = |area: &Area<'_>| -> Drawn {
        let title =
            "Needle test: share of the key's digits found, by length (across) and depth (down)";
        text(area, title, (size.0 as i32 / 2, 10), 18, (HPos::Center, VPos::Top), &BLACK)?;
        for (i, (title, map)) in maps.iter().enumerate() {
            let corner = ((i % COLUMNS) as i32 * PANEL.0, (i / COLUMNS) as i32 * PANEL.1 + 40);
            panel(area, corner, title, map)?;
        }
        Ok(())
    };
    svg("needle test", size, panels).map(Some)
}

/// Depth and length from a sample's id: "600x0.111-1".
fn place(id: &str) -> Option<(u32, u32)> {
    let (length, rest) = id.split_once('x')?;
    let (depth, _) = rest.rsplit_once('-')?;
    Some(((depth.parse::<f64>().ok()? * 1000.0).round() as u32, length.parse().ok()?))
}

fn panel(area: &Area<'_>, corner: (i32, i32), title: &str, map: &Map) -> Drawn {
    let mut depths: Vec<u32> = map.keys().map(|key| key.0).collect();
    let mut lengths: Vec<u32> = map.keys().map(|key| key.1).collect();
    depths.dedup();
    lengths.sort_unstable();
    lengths.dedup();
    let (left, top) = (corner.0 + MAP.0, corner.1 + MAP.1);
    let (width, height) = (MAP.2 - MAP.0, MAP.3 - MAP.1);
    let x = |i: usize| left + width * i as i32 / lengths.len() as i32;
    let y = |i: usize| top + height * i as i32 / depths.len() as i32;
    let grey = RGBColor(90, 90, 90);
    text(area, title, (left, corner.1 + 12), 14, (HPos::Left, VPos::Top), &BLACK)?;
    for (row, depth) in depths.iter().enumerate() {
        let words = format!("{:.0} %", f64::from(*depth) / 10.0);
        let middle = (y(row) + y(row + 1)) / 2;
        text(area, &words, (left - 6, middle), 11, (HPos::Right, VPos::Center), &grey)?;
        for (column, length) in lengths.iter().enumerate() {
            let Some((sum, count)) = map.get(&(*depth, *length)) else { continue };
            let share = sum / f64::from(*count);
            let corners = [(x(column), y(row)), (x(column + 1) - 1, y(row + 1) - 1)];
            area.draw(&Rectangle::new(corners, shade(share).filled()))?;
            let ink = if share > 0.55 { WHITE } else { BLACK };
            let at = ((corners[0].0 + corners[1].0) / 2, (corners[0].1 + corners[1].1) / 2);
            // Numbers where they have room.
            if width / lengths.len() as i32 >= 24 && height / depths.len() as i32 >= 14 {
                let words = format!("{:.0}", 100.0 * share);
                text(area, &words, at, 11, (HPos::Center, VPos::Center), &ink)?;
            }
        }
    }
    // Every other length where they would run together.
    let each = 1 + lengths.len() / 7;
    for (column, length) in lengths.iter().enumerate().step_by(each) {
        let at = ((x(column) + x(column + 1)) / 2, top + height + 4);
        text(area, &length.to_string(), at, 11, (HPos::Center, VPos::Top), &grey)?;
    }
    Ok(())
}

/// From nearly white to deep blue.
fn shade(share: f64) -> RGBColor {
    let mix = |from: f64, to: f64| (from + (to - from) * share.clamp(0.0, 1.0)) as u8;
    RGBColor(mix(238.0, 8.0), mix(243.0, 48.0), mix(248.0, 107.0))
}
