//! A run's report: tables as Markdown, CSV and HTML, and pictures.

mod agreement;
mod heat_map;
mod html;
mod markdown;
mod plot;
mod radar;
mod scatter;
mod table;

use std::fs;
use std::path::{Path, PathBuf};

pub use agreement::add_agreement;

use self::table::Table;
use crate::{Error, Result, records};

/// Writes `report.md`, `scores.csv`, `report.html` (self-contained) and the pictures of `folder`'s results into it; returns what was written.
///
/// Pictures that the results have nothing for are left out.
///
/// # Errors
/// If the results can't be read, there are none, or a file can't be written.
pub fn write(folder: &Path) -> Result<Vec<PathBuf>> {
    let records = records(folder)?;
    if records.is_empty() {
        let got = folder.display();
        return Err(Error::setting("folder", "a run's, with at least one result", got));
    }
    let table = Table::new(&records);
    let agreements = agreement::read(folder)?;
    let pictures: Vec<(&str, String)> = [
        ("quality-against-bytes", scatter::draw(&table)?),
        ("radar", radar::draw(&table)?),
        ("needle", heat_map::draw(&records)?),
    ]
    .into_iter()
    .filter_map(|(name, svg)| Some((name, svg?)))
    .collect();
    let mut written = Vec::new();
    let mut save = |name: &str, text: &str| {
        let path = folder.join(name);
        fs::write(&path, text).map_err(Error::io(&path))?;
        written.push(path);
        Result::Ok(())
    };
    for (name, svg) in &pictures {
        save(&format!("{name}.svg"), svg)?;
    }
    let names: Vec<&str> = pictures.iter().map(|(name, _)| *name).collect();
    save("report.md", &markdown::page(&table, &agreements, &names))?;
    save("report.html", &html::page(&table, &agreements, &pictures))?;
    save("scores.csv", &table.csv()?)?;
    Ok(written)
}
