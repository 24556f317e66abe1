//! The report as one self-contained page: its data as JSON, and a script that draws them.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::json;

use super::agreement::Line;
use super::heat_map::parse_id;
use super::table::{Row, Table, distinct};
use crate::statistics::{Decode, Difference, Interval, Verdict, of_setting, score};
use crate::{Category, Error, Record, Result};

/// Differences of less than a point are treated as equal.
const MARGIN: f64 = 0.01;

/// The text between the two markers of `page.html`.
const METHOD: &str = "Score: the mean over categories of the mean over their tasks. \
    Difference: to the dense setting of the same model, paired by sample, in points, with a 95 % \
    bootstrap interval from 2,000 resamples. Better and worse: the interval excludes 0. The same: \
    it lies within one point. Of 20 settings equal to dense, about one counts as better or worse \
    by chance. Tokens/s: of all sequences of a batch together; their number is in brackets.";

#[derive(Serialize)]
struct Setting {
    setting: String,
    score: Interval,
    difference: Option<DifferenceCell>,
    ratio: Option<f64>,
    kv_bytes: Option<f64>,
    first_token_seconds: Option<f64>,
    decode: Option<Decode>,
    samples: usize,
    /// By task and by category.
    scores: BTreeMap<String, Scored>,
    quarters: Option<[f64; 4]>,
}

#[derive(Serialize)]
struct Scored {
    #[serde(flatten)]
    interval: Interval,
    samples: usize,
}

/// A difference as shown on the page.
#[derive(Serialize)]
struct DifferenceCell {
    #[serde(flatten)]
    interval: Interval,
    samples: usize,
    better: usize,
    worse: usize,
    verdict: Verdict,
}

impl DifferenceCell {
    fn new(difference: Difference) -> Self {
        let verdict = difference.verdict(MARGIN);
        let Difference { interval, samples, better, worse } = difference;
        Self { interval, samples, better, worse, verdict }
    }
}

/// Scores of one setting over two dimensions.
#[derive(Serialize)]
struct Map {
    setting: String,
    title: String,
    rows: Vec<String>,
    columns: Vec<String>,
    /// Mean score and number of samples.
    cells: Vec<Vec<Option<(f64, usize)>>>,
}

pub(super) fn page(
    facts: &str,
    records: &[Record],
    table: &Table,
    agreements: &[Line],
) -> Result<String> {
    let rows: Vec<Setting> =
        table.rows.iter().filter_map(|row| setting(row, table, records)).collect();
    let maps: Vec<Map> = table.rows.iter().flat_map(|row| maps(&row.setting, records)).collect();
    fill("longctx-eval", facts, METHOD, table, &rows, &maps, agreements)
}

/// Returns the page of two runs: each setting of the second compared with the setting of the same
/// name in the first.
pub(super) fn comparison(facts: &str, first: &[Record], second: &[Record]) -> Result<String> {
    let table = Table::new(second);
    let mut rows = Vec::new();
    for row in &table.rows {
        let Some(mut own) = setting(row, &table, second) else { continue };
        let (ours, theirs) = (of_setting(second, &row.setting), of_setting(first, &row.setting));
        own.difference = Difference::between_runs(&ours, &theirs).map(DifferenceCell::new);
        rows.push(own);
    }
    let method = METHOD.replace(
        "to the dense setting of the same model",
        "of the second run to the first, setting by setting",
    );
    fill("longctx-eval: two runs", facts, &method, &table, &rows, &[], &[])
}

fn fill(
    title: &str,
    facts: &str,
    method: &str,
    table: &Table,
    rows: &[Setting],
    maps: &[Map],
    agreements: &[Line],
) -> Result<String> {
    let categories: Vec<_> =
        table.categories().into_iter().map(|(_, words)| (words, words)).collect();
    let data = json!({
        "rows": rows, "tasks": table.tasks, "categories": categories, "maps": maps, "agreement": agreements,
    });
    let data =
        serde_json::to_string(&data).map_err(|e| Error::setting("report", "finite numbers", e))?;
    // A run's text must not contain the end of the script.
    let data = data.replace('<', "\\u003c");
    let parts = [
        ("{title}", escape(title)),
        ("{facts}", escape(facts)),
        ("{method}", escape(method)),
        ("{style}", include_str!("page/style.css").to_owned()),
        ("{script}", include_str!("page/page.js").to_owned()),
        ("{data}", data),
    ];
    let page = include_str!("page/page.html").to_owned();
    Ok(parts.iter().fold(page, |page, (name, text)| page.replace(name, text)))
}

fn setting(row: &Row, table: &Table, records: &[Record]) -> Option<Setting> {
    let own = of_setting(records, &row.setting);
    let part = |fits: &dyn Fn(&Record) -> bool| {
        let own: Vec<&Record> = own.iter().copied().filter(|record| fits(record)).collect();
        Some(Scored { interval: score(&own)?, samples: own.len() })
    };
    let mut scores = BTreeMap::new();
    for task in &table.tasks {
        scores.extend(part(&|record| record.task == *task).map(|scored| (task.clone(), scored)));
    }
    for (category, words) in table.categories() {
        let scored = part(&|record| record.category == category);
        scores.extend(scored.map(|scored| (words.to_owned(), scored)));
    }
    let quarters: Vec<[f64; 4]> = own.iter().filter_map(|record| record.score.quarters).collect();
    let mean = |i: usize| quarters.iter().map(|own| own[i]).sum::<f64>() / quarters.len() as f64;
    Some(Setting {
        setting: row.setting.clone(),
        score: score(&own)?,
        difference: row.difference.map(DifferenceCell::new),
        ratio: row.ratio,
        kv_bytes: row.kv_bytes,
        first_token_seconds: row.first_token_seconds,
        decode: row.decode,
        samples: row.samples,
        scores,
        quarters: (!quarters.is_empty()).then(|| [0, 1, 2, 3].map(mean)),
    })
}

/// Returns the maps of needles by depth and length, and of tasks with groups by group.
fn maps(setting: &str, records: &[Record]) -> Vec<Map> {
    let own = of_setting(records, setting);
    let mut maps = Vec::new();
    let needles = own.iter().filter(|record| record.category == Category::Needle);
    for task in distinct(needles.map(|record| record.task.as_str())) {
        let cell = |record: &&Record| {
            let (depth, length, unit) = parse_id(&record.sample).filter(|_| record.task == task)?;
            let value = record.score.partial.unwrap_or(record.score.value);
            Some((
                (depth, format!("depth {:.0} %", f64::from(depth) / 10.0)),
                (length, format!("{length} {unit}")),
                value,
            ))
        };
        maps.push(map(setting, &format!("{task}, share of the key"), own.iter().filter_map(cell)));
    }
    for (category, title) in
        [(Category::Ruler, "RULER"), (Category::MultipleChoice, "LongBench-v2")]
    {
        let cells = own.iter().filter(|record| record.category == category).filter_map(grouped);
        let cells = cells.map(|(record, group)| {
            let size = group.parse().unwrap_or(0);
            ((0, record.task.clone()), (size, group), record.score.value)
        });
        maps.push(map(setting, title, cells));
    }
    let others = own.iter().filter(|record| {
        ![Category::Needle, Category::Ruler, Category::MultipleChoice].contains(&record.category)
    });
    let cells = others
        .filter_map(grouped)
        .map(|(record, group)| ((0, record.task.clone()), (0, group), record.score.value));
    maps.push(map(setting, "LongBench-E", cells));
    maps.retain(|map| !map.rows.is_empty());
    maps
}

fn grouped<'a>(record: &&'a Record) -> Option<(&'a Record, String)> {
    Some((*record, record.group.clone()?))
}

/// A label and its sort key.
type Place = (u32, String);

fn map(setting: &str, title: &str, cells: impl Iterator<Item = (Place, Place, f64)>) -> Map {
    let mut sums: BTreeMap<(Place, Place), (f64, usize)> = BTreeMap::new();
    for (row, column, value) in cells {
        let sum = sums.entry((row, column)).or_default();
        *sum = (sum.0 + value, sum.1 + 1);
    }
    let places = |part: fn(&(Place, Place)) -> &Place| {
        let mut all: Vec<Place> = sums.keys().map(part).cloned().collect();
        all.sort_unstable();
        all.dedup();
        all
    };
    let (rows, columns) = (places(|key| &key.0), places(|key| &key.1));
    let cell = |row: &Place, column: &Place| {
        let (sum, count) = sums.get(&(row.clone(), column.clone()))?;
        Some((sum / *count as f64, *count))
    };
    let cells = rows.iter().map(|row| columns.iter().map(|column| cell(row, column)).collect());
    Map {
        setting: setting.to_owned(),
        title: title.to_owned(),
        cells: cells.collect(),
        rows: rows.into_iter().map(|(_, name)| name).collect(),
        columns: columns.into_iter().map(|(_, name)| name).collect(),
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
