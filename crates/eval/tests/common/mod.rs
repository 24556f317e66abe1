use longctx_eval::{Category, Record, Score, Timings};

/// Returns a made-up record. Settings other than `dense-f16` hold a quarter of its bytes.
pub fn record(setting: &str, task: &str, category: Category, sample: &str, value: f64) -> Record {
    Record {
        setting: setting.into(),
        task: task.into(),
        category,
        sample: sample.into(),
        group: None,
        question: None,
        predictions: vec!["<b>7 | 8</b>".into()],
        score: Score {
            value,
            partial: (category == Category::Needle).then_some(0.5),
            quarters: None,
        },
        prompt_tokens: 100,
        new_tokens: 3,
        kv_bytes: Some(if setting == "dense-f16" { 1000 } else { 250 }),
        dense_bytes: Some(1000),
        seed: 0,
        version: "0".into(),
        timings: Timings {
            first_token_seconds: 0.5,
            decode_tokens_per_second: Some(40.0),
            model_seconds: 1.0,
            total_seconds: 1.0,
            peak_resident_bytes: Some(2_000_000),
            batch: None,
            settings: None,
        },
    }
}
