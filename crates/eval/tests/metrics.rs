//! Scores against the original Python programs (`fixtures/make_metrics.py`).

use std::collections::HashMap;
use std::path::PathBuf;

use longctx_eval::metric::{self, Metric};
use longctx_eval::{Sample, longbench};
use proptest::prelude::*;
use serde::Deserialize;

#[derive(Deserialize)]
struct Fixture {
    classes: Vec<String>,
    pairs: HashMap<String, Vec<(String, String, f64)>>,
}

#[test]
fn made_pairs_score_as_in_python() {
    let fixture: Fixture = serde_json::from_str(include_str!("fixtures/metrics.json")).unwrap();
    assert_eq!(fixture.pairs.len(), 6);
    for (name, pairs) in &fixture.pairs {
        let metric = match name.as_str() {
            "qa_f1" => Metric::QaF1,
            "rouge_l" => Metric::RougeL,
            "retrieval" => Metric::Retrieval,
            "count" => Metric::Count,
            "code_similarity" => Metric::CodeSimilarity,
            "classification" => Metric::Classification,
            other => panic!("no metric {other}"),
        };
        for (prediction, answer, want) in pairs {
            let got = metric.score(prediction, answer, &fixture.classes);
            assert!(
                (got - want).abs() < 1e-6,
                "{name} of {prediction:?} for {answer:?}: {got} for {want}"
            );
        }
    }
}

/// Returns the folder of LongBench's questions: `LONGCTX_LONGBENCH`, or `shared/longbench-mini`
/// beside the checkout.
fn questions() -> PathBuf {
    std::env::var_os("LONGCTX_LONGBENCH").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/longbench-mini")),
        PathBuf::from,
    )
}

#[test]
fn a_models_answers_score_as_in_python() {
    let folder = questions();
    if !folder.is_dir() {
        println!("skipped: no LongBench questions at {} (LONGCTX_LONGBENCH)", folder.display());
        return;
    }
    let mut compared = 0;
    for task in longbench::tasks(&folder) {
        let samples = task.samples().unwrap().samples;
        let by_id: HashMap<&str, &Sample> = samples
            .iter()
            .map(|sample| (sample.id.split_once('-').map_or("", |(_, id)| id), sample))
            .collect();
        for row in include_str!("fixtures/model_scores.tsv").lines() {
            let cells: Vec<&str> = row.split('\t').collect();
            let [name, id, want, prediction] = cells[..] else { panic!("{row}") };
            if name != task.name() {
                continue;
            }
            let prediction: String = serde_json::from_str(prediction).unwrap();
            let want: f64 = want.parse().unwrap();
            let got = task.score(by_id[id], std::slice::from_ref(&prediction)).unwrap().value;
            assert!((got - want).abs() < 1e-6, "{name} {id} {prediction:?}: {got} for {want}");
            compared += 1;
        }
    }
    assert!(compared >= 1000, "only {compared} answers");
}

proptest! {
    #[test]
    fn scores_keep_to_their_range(prediction in "\\PC{0,60}", answer in "\\PC{0,60}") {
        for metric in [Metric::QaF1, Metric::RougeL, Metric::Retrieval, Metric::Count, Metric::CodeSimilarity] {
            let score = metric.score(&prediction, &answer, &[]);
            prop_assert!((0.0..=1.0).contains(&score), "{metric:?}: {score}");
        }
    }

    #[test]
    fn the_similarity_of_equal_texts_is_1(text in "[a-z(). ]{0,400}") {
        let short = &text[..text.len().min(199)];
        prop_assert_eq!(metric::ratio(short, short), 1.0);
        prop_assert_eq!(metric::code_similarity(&text, &text), 1.0);
    }
}
