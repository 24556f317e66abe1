//! A run's report: tables as Markdown, CSV and HTML, and figures.

mod agreement;
mod heat_map;
mod html;
mod markdown;
mod plot;
mod radar;
mod scatter;
mod table;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

pub use agreement::{add_agreement, has_agreement};

use self::table::{Table, distinct, family};
use crate::{Error, Manifest, Result, records};

/// Writes `report.md`, `scores.csv`, `report.html` (self-contained) and the figures of `folder`'s
/// results to the folder. Returns the paths of the files.
///
/// Figures without data are skipped.
///
/// # Errors
/// If the results cannot be read or are empty, or a file cannot be written.
pub fn write(folder: &Path) -> Result<Vec<PathBuf>> {
    let records = records(folder)?;
    if records.is_empty() {
        let got = folder.display();
        return Err(Error::setting("folder", "a run's, with at least one result", got));
    }
    let table = Table::new(&records);
    let mut agreements = agreement::read(folder)?;
    // Families in the order of the results, the settings of each by increasing compression.
    let families = distinct(table.rows.iter().map(|row| family(&row.setting)));
    agreements.sort_by(|a, b| {
        let rank = |line: &agreement::Line| {
            families.iter().position(|name| name == family(&line.setting)).unwrap_or(families.len())
        };
        let ratio = |line: &agreement::Line| line.agreement.ratio.unwrap_or(0.0);
        rank(a).cmp(&rank(b)).then(ratio(a).total_cmp(&ratio(b)))
    });
    let pictures: Vec<(&str, String)> = [
        ("quality-against-bytes", scatter::scores(&table)?),
        ("divergence-against-bytes", scatter::divergences(&agreements)?),
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
    let facts = facts(folder)?;
    save("report.md", &markdown::page(&facts, &table, &agreements, &names))?;
    save("report.html", &html::page(&facts, &records, &table, &agreements)?)?;
    save("scores.csv", &table.csv()?)?;
    Ok(written)
}

/// Writes `compare.html` to `folder`: each setting of the run in `second` compared with the setting
/// of the same name in `first`, sample by sample.
///
/// # Errors
/// If results cannot be read, the runs have no common setting and sample, or the file cannot be
/// written.
pub fn compare(first: &Path, second: &Path, folder: &Path) -> Result<PathBuf> {
    let (ours, theirs) = (records(second)?, records(first)?);
    let keys: BTreeSet<_> = theirs.iter().map(crate::Record::key).collect();
    if !ours.iter().any(|record| keys.contains(&record.key())) {
        let expected = format!("settings and samples of {}", first.display());
        return Err(Error::setting("folder", expected, second.display()));
    }
    let facts = format!("First run: {} Second run: {}", facts(first)?, facts(second)?);
    let page = html::comparison(&facts, &theirs, &ours)?;
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let path = folder.join("compare.html");
    fs::write(&path, page).map_err(Error::io(&path))?;
    Ok(path)
}

/// Describes the run from `run.json`, in a sentence.
fn facts(folder: &Path) -> Result<String> {
    let Some(run) = Manifest::of(folder)? else { return Ok("No run.json.".into()) };
    let all = |words: &mut dyn Iterator<Item = String>| {
        let words: BTreeSet<String> = words.collect();
        words.into_iter().collect::<Vec<_>>().join(", ")
    };
    let file = |model: &str| match Path::new(model).file_name() {
        Some(name) if Path::new(model).is_absolute() => name.to_string_lossy().into_owned(),
        _ => model.to_owned(),
    };
    let models = all(&mut run.settings.values().map(|setting| file(&setting.model)));
    let contexts = all(&mut run.settings.values().map(|setting| setting.context.to_string()));
    let versions = all(&mut run.versions.iter().cloned());
    let samples = match run.limits.samples {
        Some(limit) => format!("at most {limit} samples of each"),
        None => "all samples of each".to_owned(),
    };
    let answers = match run.limits.max_new_tokens {
        Some(limit) => format!("limited to {limit} tokens per turn or, if lower, the task's limit"),
        None => "limited by the task".to_owned(),
    };
    Ok(format!(
        "{} settings on {models}; {} tasks, {samples}; prompts truncated to {contexts} tokens, \
         answers {answers}; seed {}; longctx-eval {versions}.",
        run.settings.len(),
        run.tasks.len(),
        run.seed,
    ))
}
