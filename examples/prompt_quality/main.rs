//! Measures how many questions a model can answer from compressed prompts.
//!
//!     cargo run --release --example prompt_quality -- --samples FOLDER
//!
//! FOLDER has LongBench samples in JSON lines. Each method compresses a passage around the answer.
//! The table shows the share of tokens kept, the number of passages that still contain the answer
//! (ignoring case and punctuation), the perplexity of the right answer after the passage, the
//! number of questions for which the answer is more probable than after random words, and the
//! number of pass keys that are kept.
//!
//! LLMLingua-2 is included with `--encoder`, a folder with a trained checkpoint: a published one,
//! or a substitute trained by `stand_in.py`.

mod method;
mod sample;
mod trial;

use std::path::PathBuf;

use anyhow::{Result, ensure};
use base_models::{LoadOptions, Pretrained, Session};
use candle_core::DType;
use clap::Parser;
use longctx_core::{DenseCache, Prompt, Rate};
use longctx_eval::Haystack;
use longctx_examples::model;
use sample::{Sample, needles, questions};
use trial::Trial;

#[derive(Parser)]
#[command(about = "Answers after compressed prompts")]
struct Args {
    /// A folder of LongBench samples
    #[arg(long)]
    samples: PathBuf,
    /// smollm2, gemma3, a GGUF file, a folder in Hugging Face's layout, or a model of the Hub; by
    /// default SmolLM2-135M-Instruct, downloaded if it is missing
    #[arg(long)]
    model: Option<String>,
    /// The encoder of LLMLingua-2: a folder with a checkpoint, or a model of the Hub
    #[arg(long)]
    encoder: Option<String>,
    /// Questions per task
    #[arg(long, default_value_t = 2)]
    per_task: usize,
    /// Words per passage
    #[arg(long, default_value_t = 400)]
    words: usize,
    /// Number of pass keys
    #[arg(long, default_value_t = 6)]
    needles: usize,
    /// Shares of tokens to keep
    #[arg(long, value_delimiter = ',', default_values_t = [0.5, 0.25])]
    rates: Vec<f64>,
    /// Names of methods to run; by default all
    #[arg(long, value_delimiter = ',')]
    methods: Vec<String>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let name = model::named(args.model.as_deref())?;
    let llm = Pretrained::open(&name, &LoadOptions::default())?;
    let questions = questions(&args.samples, args.per_task, args.words)?;
    ensure!(!questions.is_empty(), "{}: no question with its answer", args.samples.display());
    let keys = needles(&Haystack::generated(0), args.needles, args.words)?;
    // Errors in names and in the encoder are reported before the long work.
    method::some(&args.methods, &llm, args.encoder.as_deref())?;
    println!("{} questions, {} pass keys, {} words each", questions.len(), keys.len(), args.words);
    let mut trial = Trial { questions, keys, llm: &llm, session: session(&llm)? };
    println!("| method | rate | {} |", trial::COLUMNS.join(" | "));
    println!("|{}", "---|".repeat(2 + trial::COLUMNS.len()));
    let whole = trial.run(|sample| Ok(sample.text.clone()))?;
    println!("| whole passage | 1 | {} |", whole.row(None));
    println!("| no passage | 0 | {} |", trial.run(|_| Ok(String::new()))?.row(None));
    for &rate in &args.rates {
        let rate = Rate::new(rate)?;
        let mut random = None;
        for (name, mut compressor) in method::some(&args.methods, &llm, args.encoder.as_deref())? {
            let outcome = trial.run(|sample: &Sample| {
                let prompt = Prompt::new(&sample.text)?.with_question(&sample.question);
                Ok(compressor.compress(prompt, rate)?.text)
            })?;
            println!("| {name} | {} | {} |", rate.get(), outcome.row(random.as_ref()));
            if name == method::RANDOM {
                random = Some(outcome);
            }
        }
    }
    Ok(())
}

fn session(llm: &Pretrained) -> Result<Session> {
    Ok(llm.model.session(|spec| DenseCache::new(spec.clone(), DType::F32))?)
}
