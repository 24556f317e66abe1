//! The table, and the same as JSON and CSV.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use longctx_examples::say;
use serde::Serialize;

/// What one method did.
#[derive(Debug, Serialize)]
pub struct Row {
    pub method: String,
    /// Keys looked for.
    pub tried: usize,
    /// Keys found whole.
    pub exact: f64,
    /// The mean share of a key that was found.
    pub partial: f64,
    /// Tokens of the longest prompt.
    pub longest_prompt: usize,
    /// Bytes of the caches after the longest prompt and its answer.
    pub kv_bytes: usize,
    /// Against dense f16, if that was run.
    pub ratio: Option<f64>,
    pub prefill_tokens_per_second: f64,
    pub decode_tokens_per_second: f64,
    /// Of the whole process while this method ran, weights included.
    pub peak_resident_bytes: Option<u64>,
}

/// Width of the methods' column; of each other.
const WIDTHS: (usize, usize) = (24, 14);

fn line(method: &str, cells: [&str; 7]) {
    let (first, other) = WIDTHS;
    let cells = cells.map(|cell| format!("{cell:>other$}")).concat();
    say!("{method:first$}{cells}");
}

/// The table's head.
pub fn heading() {
    let columns =
        ["exact", "partial", "KV bytes", "ratio", "prefill tok/s", "decode tok/s", "peak memory"];
    line("method", columns);
}

/// A line of the table.
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
