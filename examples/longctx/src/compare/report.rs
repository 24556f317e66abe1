//! The table of results, as text, JSON and CSV.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use longctx_examples::say;
use serde::Serialize;

/// The results of one method.
#[derive(Debug, Serialize)]
pub struct Row {
    pub method: String,
    /// Number of keys.
    pub tried: usize,
    /// Keys found exactly.
    pub exact: f64,
    /// The mean share of a key's digits that was found.
    pub partial: f64,
    /// Tokens of the longest prompt.
    pub longest_prompt: usize,
    /// Bytes of the caches after the longest prompt and its answer.
    pub kv_bytes: usize,
    /// Bytes of dense f16 divided by these bytes, if dense f16 was run.
    pub ratio: Option<f64>,
    pub prefill_tokens_per_second: f64,
    pub decode_tokens_per_second: f64,
    /// Peak resident memory of the process while this method ran, including weights.
    pub peak_resident_bytes: Option<u64>,
}

/// Width of the column of methods, and of each other column.
const WIDTHS: (usize, usize) = (24, 14);

fn line(method: &str, cells: [&str; 7]) {
    let (first, other) = WIDTHS;
    let cells = cells.map(|cell| format!("{cell:>other$}")).concat();
    say!("{method:first$}{cells}");
}

/// Prints the table's header.
pub fn heading() {
    let columns =
        ["exact", "partial", "KV bytes", "ratio", "prefill tok/s", "decode tok/s", "peak memory"];
    line("method", columns);
}

/// Prints a row of the table.
pub fn print(row: &Row) {
    let cells = [
        format!("{} of {}", row.exact, row.tried),
        format!("{:.2}", row.partial),
        megabytes(row.kv_bytes as f64),
        row.ratio.map_or("-".into(), |ratio| format!("{ratio:.2}x")),
        format!("{:.0}", row.prefill_tokens_per_second),
        format!("{:.1}", row.decode_tokens_per_second),
        row.peak_resident_bytes.map_or("-".into(), |bytes| megabytes(bytes as f64)),
    ];
    line(&row.method, cells.each_ref().map(String::as_str));
}

/// Writes `compare.json` and `compare.csv`.
pub fn save(rows: &[Row], folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    fs::write(folder.join("compare.json"), serde_json::to_string_pretty(rows)? + "\n")?;
    let mut csv = csv::Writer::from_path(folder.join("compare.csv"))?;
    rows.iter().try_for_each(|row| csv.serialize(row))?;
    csv.flush()?;
    say!("Saved as {0}/compare.json and {0}/compare.csv.", folder.display());
    Ok(())
}

fn megabytes(bytes: f64) -> String {
    format!("{:.1} MB", bytes / 1e6)
}
