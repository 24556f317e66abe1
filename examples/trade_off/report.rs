//! The table of results, as text, JSON and CSV.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use comfy_table::{CellAlignment, Table, presets::UTF8_FULL_CONDENSED};
use longctx_core::Footprint;
use longctx_eval::needle::Score;
use serde::{Deserialize, Serialize};

use crate::cell::Cell;

/// The results of one cell of the sweep.
#[derive(Debug, Serialize, Deserialize)]
pub struct Row {
    pub tokens: usize,
    pub policy: String,
    pub store: String,
    pub share: f64,
    /// Largest number of entries per kv head.
    pub budget: usize,
    pub tried: usize,
    /// Keys found exactly.
    pub exact: f64,
    /// The sum over keys of the share of digits that was found.
    pub partial: f64,
    /// Bytes held after the last answer, without memory allocated for future tokens.
    pub bytes: usize,
    /// The bytes of the policy's metadata, which are part of `bytes`.
    pub bookkeeping: usize,
}

impl Row {
    pub fn new(cell: &Cell, tokens: usize) -> Self {
        Self {
            tokens,
            policy: cell.policy.clone(),
            store: cell.store.name().into(),
            share: cell.share,
            budget: cell.budget.min(tokens),
            tried: 0,
            exact: 0.0,
            partial: 0.0,
            bytes: 0,
            bookkeeping: 0,
        }
    }

    pub fn add(&mut self, score: Score, held: Footprint) {
        self.tried += 1;
        self.exact += score.exact;
        self.partial += score.partial;
        self.bytes = held.total() - held.slack;
        self.bookkeeping = held.bookkeeping;
    }

    /// Returns the mean share of a key's digits that was found.
    pub fn quality(&self) -> f64 {
        self.partial / self.tried.max(1) as f64
    }
}

pub fn print(rows: &[Row]) {
    let mut table = Table::new();
    table
        .load_preset(UTF8_FULL_CONDENSED)
        .set_header(["policy", "store", "share", "tokens", "bytes", "exact", "partial"]);
    for row in rows {
        table.add_row([
            row.policy.clone(),
            row.store.clone(),
            format!("{:.4}", row.share),
            row.budget.to_string(),
            format!("{:.2} MB", row.bytes as f64 / 1e6),
            format!("{} of {}", row.exact, row.tried),
            format!("{:.2}", row.quality()),
        ]);
    }
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    println!("{table}");
}

/// Writes `NAME.json` and `NAME.csv`.
pub fn save(rows: &[Row], name: &Path) -> Result<()> {
    if let Some(folder) = name.parent() {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    fs::write(name.with_extension("json"), serde_json::to_string_pretty(rows)? + "\n")?;
    let mut csv = csv::Writer::from_path(name.with_extension("csv"))?;
    rows.iter().try_for_each(|row| csv.serialize(row))?;
    csv.flush()?;
    Ok(())
}

/// Reads the rows of a `NAME.json`.
pub fn open(path: &Path) -> Result<Vec<Row>> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    serde_json::from_str(&text).with_context(|| path.display().to_string())
}
