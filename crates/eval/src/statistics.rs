//! Statistical significance of differences between settings: paired differences, sample by sample,
//! with bootstrap intervals.

use std::collections::{HashMap, HashSet};

use rand::prelude::*;
use rand_chacha::ChaCha8Rng;

use crate::Record;

/// Number of bootstrap resamples.
const RESAMPLES: usize = 2000;
/// With fewer samples, a verdict is [`Verdict::Unsure`].
pub const MIN_SAMPLES: usize = 10;

/// A mean with its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
#[non_exhaustive]
pub struct Interval {
    /// The mean.
    pub mean: f64,
    /// 2.5 % of the resampled means are below this.
    pub low: f64,
    /// 2.5 % of the resampled means are above this.
    pub high: f64,
}

/// Returns the weighted mean of `values`, each with its weight, and its percentile interval over
/// resamples with replacement.
///
/// The same values give the same interval. `None` if the weights sum to 0.
pub fn bootstrap(values: &[(f64, f64)]) -> Option<Interval> {
    let mean = |sum: f64, weight: f64| (weight > 0.0).then(|| sum / weight);
    let add = |(sum, weight): (f64, f64), &(w, x): &(f64, f64)| (sum + w * x, weight + w);
    let (sum, weight) = values.iter().fold((0.0, 0.0), add);
    let whole = mean(sum, weight)?;
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let mut resample = || {
        let drawn = (0..values.len()).map(|_| &values[rng.random_range(0..values.len())]);
        let (sum, weight) = drawn.fold((0.0, 0.0), add);
        mean(sum, weight).unwrap_or(whole)
    };
    let mut means: Vec<f64> = (0..RESAMPLES).map(|_| resample()).collect();
    means.sort_unstable_by(f64::total_cmp);
    let at = |share: f64| means[((RESAMPLES - 1) as f64 * share).round() as usize];
    Some(Interval { mean: whole, low: at(0.025), high: at(0.975) })
}

/// The decoding speed of a setting.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
#[non_exhaustive]
pub struct Decode {
    /// Mean over samples; in a batch, the throughput of all its sequences.
    pub tokens_per_second: f64,
    /// Largest number of sequences in a step.
    pub batch: usize,
}

impl Decode {
    /// Returns the speed of a setting's samples; `None` if no sample has one, or if batch sizes
    /// differ.
    pub fn of(records: &[&Record]) -> Option<Self> {
        let told = |record: &&Record| {
            let timings = record.timings;
            Some((timings.decode_tokens_per_second?, timings.batch.unwrap_or(1)))
        };
        let speeds: Vec<_> = records.iter().filter_map(told).collect();
        let batch = speeds.first()?.1;
        let sum = |speeds: &[(f64, usize)]| speeds.iter().map(|(speed, _)| speed).sum::<f64>();
        let tokens_per_second = sum(&speeds) / speeds.len() as f64;
        speeds.iter().all(|speed| speed.1 == batch).then_some(Self { tokens_per_second, batch })
    }
}

impl std::fmt::Display for Decode {
    /// "41.2", and in a batch "317.0 (8)".
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.1}", self.tokens_per_second)?;
        if self.batch > 1 {
            write!(f, " ({})", self.batch)?;
        }
        Ok(())
    }
}

/// A setting compared with another on the samples that both answered.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
#[non_exhaustive]
pub struct Difference {
    /// The setting's score minus the other's, from -1 to 1. Tasks have equal weights within a
    /// category, and categories have equal weights.
    pub interval: Interval,
    /// Samples that both answered.
    pub samples: usize,
    /// Samples on which the setting's score is higher.
    pub better: usize,
    /// Samples on which it is lower.
    pub worse: usize,
}

/// The interpretation of a difference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Verdict {
    /// The interval is above 0.
    Better,
    /// The interval is below 0.
    Worse,
    /// The interval is within the margin.
    Same,
    /// None of these, or too few samples.
    Unsure,
}

impl Difference {
    /// Returns the differences of `setting` to `reference`; `None` if they have no common sample.
    pub fn between(records: &[Record], setting: &str, reference: &str) -> Option<Self> {
        Self::between_runs(&of_setting(records, setting), &of_setting(records, reference))
    }

    /// Returns the differences between results of two runs.
    pub fn between_runs(own: &[&Record], theirs: &[&Record]) -> Option<Self> {
        let key = |record: &Record| (record.task.clone(), record.sample.clone());
        let other: HashMap<_, &Record> =
            theirs.iter().map(|record| (key(record), *record)).collect();
        let pairs: Vec<(&Record, f64)> = own
            .iter()
            .filter_map(|record| Some((*record, other.get(&key(record))?.score.value)))
            .collect();
        let records: Vec<&Record> = pairs.iter().map(|(record, _)| *record).collect();
        let differences = pairs.iter().map(|(record, theirs)| record.score.value - theirs);
        let values: Vec<_> = weights(&records).into_iter().zip(differences).collect();
        let count = |fits: fn(f64) -> bool| values.iter().filter(|(_, x)| fits(*x)).count();
        Some(Self {
            interval: bootstrap(&values)?,
            samples: values.len(),
            better: count(|x| x > 0.0),
            worse: count(|x| x < 0.0),
        })
    }

    /// Returns the verdict. Differences within `margin` count as equal.
    pub fn verdict(&self, margin: f64) -> Verdict {
        let Interval { low, high, .. } = self.interval;
        match () {
            () if self.samples < MIN_SAMPLES => Verdict::Unsure,
            () if low > 0.0 => Verdict::Better,
            () if high < 0.0 => Verdict::Worse,
            () if -margin <= low && high <= margin => Verdict::Same,
            () => Verdict::Unsure,
        }
    }
}

/// Returns a setting's results.
pub fn of_setting<'a>(records: &'a [Record], setting: &str) -> Vec<&'a Record> {
    records.iter().filter(|record| record.setting == setting).collect()
}

/// Returns a setting's mean score and its interval. Tasks have equal weights within a category, and
/// categories have equal weights.
pub fn score(records: &[&Record]) -> Option<Interval> {
    let values = records.iter().map(|record| record.score.value);
    bootstrap(&weights(records).into_iter().zip(values).collect::<Vec<_>>())
}

/// Returns the weight of each record in a mean over categories of means over tasks.
fn weights(records: &[&Record]) -> Vec<f64> {
    let mut samples: HashMap<_, usize> = HashMap::new();
    let mut tasks: HashMap<_, HashSet<&str>> = HashMap::new();
    for record in records {
        *samples.entry((record.category, record.task.as_str())).or_default() += 1;
        tasks.entry(record.category).or_default().insert(&record.task);
    }
    let weight = |record: &&Record| {
        let of_task = samples[&(record.category, record.task.as_str())];
        1.0 / (of_task * tasks[&record.category].len()) as f64
    };
    records.iter().map(weight).collect()
}

/// Returns the setting that others are compared with: the dense setting of the same model, named
/// `baseline` or `dense-f16` after the last slash; otherwise the first setting of the results.
pub fn reference<'a>(settings: &'a [String], setting: &str) -> Option<&'a str> {
    let parts = |name: &str| match name.rsplit_once('/') {
        Some((group, method)) => (group.to_owned(), method.to_owned()),
        None => (String::new(), name.to_owned()),
    };
    let group = parts(setting).0;
    let mut same = settings.iter().filter(|name| parts(name).0 == group);
    let first = same.clone().next();
    let dense = ["dense-f16", "baseline"];
    same.find(|name| dense.contains(&parts(name).1.as_str())).or(first).map(String::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// About 95 % of 200 intervals of the mean of 60 draws contain the true mean.
    #[test]
    fn intervals_contain_the_mean_at_their_nominal_rate() {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let mut draw = || {
            let values: Vec<_> =
                (0..60).map(|_| (1.0, f64::from(u8::from(rng.random_bool(0.3))))).collect();
            let interval = bootstrap(&values).unwrap();
            interval.low <= 0.3 && 0.3 <= interval.high
        };
        let held = (0..200).filter(|_| draw()).count();
        assert!((180..=199).contains(&held), "{held}");
    }

    /// The normal approximation, for many draws.
    #[test]
    fn the_width_of_intervals_follows_the_standard_error() {
        let values: Vec<_> = (0..1000).map(|i| (1.0, f64::from(i % 10) / 10.0)).collect();
        let Interval { mean, low, high } = bootstrap(&values).unwrap();
        let deviation =
            (values.iter().map(|(_, x)| (x - mean).powi(2)).sum::<f64>() / 1000.0).sqrt();
        let wide = 2.0 * 1.96 * deviation / 1000_f64.sqrt();
        assert!((mean - 0.45).abs() < 1e-12 && ((high - low) / wide - 1.0).abs() < 0.1);
    }

    #[test]
    fn the_reference_is_the_dense_setting_of_the_same_model() {
        let names = ["a/kivi-2", "a/baseline", "b/h2o-4x", "kivi-4", "dense-f16"].map(String::from);
        assert_eq!(reference(&names, "a/kivi-2"), Some("a/baseline"));
        assert_eq!(reference(&names, "b/h2o-4x"), Some("b/h2o-4x"));
        assert_eq!(reference(&names, "kivi-4"), Some("dense-f16"));
        assert_eq!(reference(&names, "c/x"), None);
    }
}
