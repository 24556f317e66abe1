//! Results grouped by setting, category and task.

use std::collections::HashMap;

use crate::statistics::{self, Decode, Difference, of_setting};
use crate::{Category, Error, Record, Result};

/// The paper's categories and those of this crate, with their column headers, in the paper's order.
pub(super) const CATEGORIES: [(Category, &str); 10] = [
    (Category::SingleDocQa, "Single-doc QA"),
    (Category::MultiDocQa, "Multi-doc QA"),
    (Category::Summarization, "Summarization"),
    (Category::FewShot, "Few-shot"),
    (Category::Synthetic, "Synthetic"),
    (Category::Code, "Code"),
    (Category::Needle, "Needle"),
    (Category::LongGeneration, "Long generation"),
    (Category::Ruler, "RULER"),
    (Category::MultipleChoice, "Multiple choice"),
];

/// All settings, in the order of the results.
pub(super) struct Table {
    pub rows: Vec<Row>,
    /// Tasks by category, then by name.
    pub tasks: Vec<String>,
}

/// One setting.
pub(super) struct Row {
    pub setting: String,
    pub tasks: Vec<TaskScore>,
    pub samples: usize,
    /// The number of samples with a higher score than the first setting's. `worse` counts those
    /// with a lower score.
    pub better: usize,
    pub worse: usize,
    /// The difference to the dense setting of the same model; `None` for that setting itself.
    pub difference: Option<Difference>,
    /// Mean bytes held at the end.
    pub kv_bytes: Option<f64>,
    /// Dense bytes divided by bytes held, summed over all samples that report both.
    pub ratio: Option<f64>,
    /// `None` if settings shared the prefill.
    pub first_token_seconds: Option<f64>,
    pub prompt_tokens: f64,
    pub decode: Option<Decode>,
    pub peak_resident_bytes: Option<u64>,
}

/// One setting's mean score on one task, in percent.
pub(super) struct TaskScore {
    pub task: String,
    pub category: Category,
    pub samples: usize,
    pub score: f64,
    pub partial: Option<f64>,
}

impl Table {
    pub fn new(records: &[Record]) -> Self {
        let settings = distinct(records.iter().map(|record| record.setting.as_str()));
        let mut tasks: Vec<_> = records.iter().map(|r| (r.category, r.task.as_str())).collect();
        tasks.sort_unstable();
        let tasks = distinct(tasks.into_iter().map(|(_, task)| task));
        let first = settings.first().map(String::as_str).unwrap_or_default();
        let reference: HashMap<_, _> = records
            .iter()
            .filter(|record| record.setting == first)
            .map(|r| ((r.task.as_str(), r.sample.as_str()), r.score.value))
            .collect();
        let of = |setting: &String| {
            let own: Vec<_> = records.iter().filter(|record| record.setting == *setting).collect();
            let difference = statistics::reference(&settings, setting)
                .filter(|dense| dense != setting)
                .and_then(|dense| Difference::between_runs(&own, &of_setting(records, dense)));
            Row { difference, ..Row::new(setting, &tasks, &own, &reference) }
        };
        Self { rows: settings.iter().map(of).collect(), tasks }
    }

    /// Returns the categories that have results.
    pub fn categories(&self) -> Vec<(Category, &'static str)> {
        let has = |category| {
            self.rows.iter().any(|row| row.tasks.iter().any(|task| task.category == category))
        };
        CATEGORIES.into_iter().filter(|(category, _)| has(*category)).collect()
    }

    /// Returns a CSV table with one line per setting and task.
    pub fn csv(&self) -> Result<String> {
        let mut out = csv::Writer::from_writer(Vec::new());
        let broken = |error: String| Error::setting("scores.csv", "a table", error);
        let head = ["setting", "task", "samples", "score", "partial", "ratio"];
        let more =
            ["first_token_seconds", "decode_tokens_per_second", "batch", "peak_resident_bytes"];
        out.write_record(head.iter().chain(&more)).map_err(|e| broken(e.to_string()))?;
        let number = |x: Option<f64>| x.map_or_else(String::new, |x| format!("{x:.4}"));
        for row in &self.rows {
            for task in &row.tasks {
                let fields = [
                    row.setting.clone(),
                    task.task.clone(),
                    task.samples.to_string(),
                    number(Some(task.score)),
                    number(task.partial),
                    number(row.ratio),
                    number(row.first_token_seconds),
                    number(row.decode.map(|decode| decode.tokens_per_second)),
                    row.decode.map_or_else(String::new, |decode| decode.batch.to_string()),
                    row.peak_resident_bytes.map_or_else(String::new, |bytes| bytes.to_string()),
                ];
                out.write_record(&fields).map_err(|e| broken(e.to_string()))?;
            }
        }
        let bytes = out.into_inner().map_err(|e| broken(e.to_string()))?;
        String::from_utf8(bytes).map_err(|e| broken(e.to_string()))
    }
}

impl Row {
    fn new(
        setting: &str,
        tasks: &[String],
        own: &[&Record],
        reference: &HashMap<(&str, &str), f64>,
    ) -> Self {
        let differences = own.iter().filter_map(|r| {
            Some(r.score.value - reference.get(&(r.task.as_str(), r.sample.as_str()))?)
        });
        let (better, worse) = differences.fold((0, 0), |(better, worse), difference| {
            (better + usize::from(difference > 0.0), worse + usize::from(difference < 0.0))
        });
        let of_task = |task: &String| {
            let own: Vec<_> = own.iter().filter(|record| record.task == *task).collect();
            let first = own.first()?;
            let partial: Vec<f64> = own.iter().filter_map(|record| record.score.partial).collect();
            Some(TaskScore {
                task: task.clone(),
                category: first.category,
                samples: own.len(),
                score: 100.0 * mean(own.iter().map(|record| record.score.value))?,
                partial: mean(partial).map(|share| 100.0 * share),
            })
        };
        let bytes = own.iter().filter_map(|r| Some((r.dense_bytes? as f64, r.kv_bytes? as f64)));
        let (dense, held) = bytes.fold((0.0, 0.0), |sum, x| (sum.0 + x.0, sum.1 + x.1));
        Self {
            setting: setting.to_owned(),
            tasks: tasks.iter().filter_map(of_task).collect(),
            samples: own.len(),
            better,
            worse,
            difference: None,
            kv_bytes: mean(own.iter().filter_map(|r| Some(r.kv_bytes? as f64))),
            ratio: (held > 0.0).then(|| dense / held),
            first_token_seconds: mean(own.iter().map(|r| r.timings.first_token_seconds))
                .filter(|_| own.iter().all(|r| r.timings.settings.is_none())),
            prompt_tokens: mean(own.iter().map(|r| r.prompt_tokens as f64)).unwrap_or(0.0),
            decode: Decode::of(own),
            peak_resident_bytes: own.iter().filter_map(|r| r.timings.peak_resident_bytes).max(),
        }
    }

    /// Returns the mean over the category's tasks, as in the paper.
    pub fn category(&self, category: Category) -> Option<f64> {
        mean(self.tasks.iter().filter(|task| task.category == category).map(|task| task.score))
    }

    /// Returns the mean over the categories.
    pub fn overall(&self) -> Option<f64> {
        mean(CATEGORIES.iter().filter_map(|(category, _)| self.category(*category)))
    }
}

/// Returns a setting's name without its compression, on one model: "h2o" of "h2o-4x".
pub(super) fn family(setting: &str) -> &str {
    let is_size = |part: &str| {
        part.trim_end_matches('x').parse::<u32>().is_ok() || part == "f16" || part == "f32"
    };
    match setting.rsplit_once('-') {
        Some((family, size)) if is_size(size) => family,
        _ => setting,
    }
}

fn mean(numbers: impl IntoIterator<Item = f64>) -> Option<f64> {
    let (sum, count) = numbers.into_iter().fold((0.0, 0u32), |(sum, n), x| (sum + x, n + 1));
    (count > 0).then(|| sum / f64::from(count))
}

/// Returns the distinct names in their order.
pub(super) fn distinct<'a>(names: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    for name in names {
        if all.iter().all(|other| other != name) {
            all.push(name.to_owned());
        }
    }
    all
}
