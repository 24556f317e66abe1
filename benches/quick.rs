//! Runs a part of the benchmarks that needs neither a model nor a GPU, and prints ratios to other
//! implementations.
//!
//!     cargo bench -p longctx-benches --bench quick

use std::env;
use std::fs::File;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// A benchmark of this package, with the filter of its rows.
struct Part {
    bench: &'static str,
    filter: &'static str,
    pairs: &'static [Pair],
}

/// Two rows to compare: what both do, our row, the other's row.
type Pair = (&'static str, &'static str, &'static str);

const PARTS: [Part; 4] = [
    Part {
        bench: "kv_quant",
        filter: "^decode/(kivi-4|kivi-2|dense f16|flash_attn f16 no mask)$|^peers/tq-kv, 4 bits$",
        pairs: &[
            ("attention over KIVI-4", "decode/kivi-4", "decode/dense f16"),
            ("attention over KIVI-2", "decode/kivi-2", "decode/dense f16"),
            ("attention over KIVI-4", "decode/kivi-4", "decode/flash_attn f16 no mask"),
            ("attention over KIVI-4", "decode/kivi-4", "peers/tq-kv, 4 bits"),
        ],
    },
    Part {
        bench: "paged",
        filter: "^decode, f16/",
        pairs: &[(
            "attention over interleaved blocks",
            "decode, f16/blocks of two sequences by turns",
            "decode, f16/contiguous",
        )],
    },
    Part {
        bench: "token_drop",
        filter: "^decode/(dense-f16|snap-kv-4x|h2o-4x|infllm-4x)$",
        pairs: &[
            ("a decode step, SnapKV 4x", "decode/snap-kv-4x", "decode/dense-f16"),
            ("a decode step, H2O 4x", "decode/h2o-4x", "decode/dense-f16"),
            ("a decode step, InfLLM 4x", "decode/infllm-4x", "decode/dense-f16"),
        ],
    },
    Part {
        bench: "hybrid_models",
        filter: "^mamba-130m/.*(f32|candle)",
        pairs: &[
            (
                "prefill of Mamba-130M, a token",
                "mamba-130m/prefill, ours, f32",
                "mamba-130m/prefill, candle-transformers",
            ),
            (
                "decode of Mamba-130M, a token",
                "mamba-130m/decode, ours, f32",
                "mamba-130m/decode, candle-transformers",
            ),
        ],
    },
];

fn main() -> Result<()> {
    let results = env::temp_dir().join("longctx-quick");
    let mut table = vec![
        "| what | ours | time | other | time | other / ours |".to_owned(),
        "|---|---|---:|---|---:|---:|".to_owned(),
    ];
    for part in &PARTS {
        run(part, &results)?;
        for (what, ours, other) in part.pairs {
            let (a, b) = (seconds(&results, ours)?, seconds(&results, other)?);
            let (a, b, ratio) = (time(a), time(b), b / a);
            table.push(format!("| {what} | {ours} | {a} | {other} | {b} | {ratio:.2} |"));
        }
    }
    println!("\n{}", table.join("\n"));
    Ok(())
}

/// Runs the rows of a benchmark that its filter selects. criterion writes to the folder `results`.
fn run(part: &Part, results: &Path) -> Result<()> {
    let mut cargo = Command::new(env::var_os("CARGO").context("run this program with cargo")?);
    cargo.args(["bench", "--quiet", "--package", "longctx-benches", "--bench", part.bench]);
    cargo.args(["--", part.filter]).env("CRITERION_HOME", results);
    let started = Instant::now();
    let status = cargo.status().context("cargo bench")?;
    ensure!(status.success(), "the benchmark {}: {status}", part.bench);
    println!("{}: {:.0} s with compilation\n", part.bench, started.elapsed().as_secs_f64());
    Ok(())
}

/// Returns the median time of a row, per element if the row counts elements.
fn seconds(results: &Path, row: &str) -> Result<f64> {
    let folder = results.join(row).join("new");
    let read = |file: &str| -> Result<Value> {
        let path = folder.join(file);
        let file = File::open(&path).with_context(|| path.display().to_string())?;
        Ok(serde_json::from_reader(file)?)
    };
    let Some(nanoseconds) = read("estimates.json")?["median"]["point_estimate"].as_f64() else {
        bail!("{row}: criterion's estimates have no median");
    };
    let elements = read("benchmark.json")?["throughput"]["Elements"].as_f64().unwrap_or(1.0);
    Ok(nanoseconds / 1e9 / elements)
}

/// Formats seconds in the largest unit that gives at least 1.
fn time(seconds: f64) -> String {
    match seconds {
        s if s >= 1.0 => format!("{s:.2} s"),
        s if s >= 1e-3 => format!("{:.2} ms", s * 1e3),
        s => format!("{:.1} µs", s * 1e6),
    }
}
