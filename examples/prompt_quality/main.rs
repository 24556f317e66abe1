//! What a model can still answer from compressed prompts.
//!
//!     cargo run --release --example prompt_quality -- --samples FOLDER
//!
//! FOLDER has LongBench samples in JSON lines. Of each a passage around the answer is taken; the table shows how much of it each method
//! keeps, how many answers it still holds word for word, the perplexity of the right answer after it, and how many pass keys come
//! through whole. LLMLingua-2 joins in with
//! `--encoder`: a folder with a trained checkpoint.

mod method;
mod sample;

use std::path::PathBuf;

use anyhow::{Result, ensure};
use base_models::{Decoder, LoadOptions, Pretrained};
use candle_core::{D, DType, Device, Tensor};
use candle_nn::ops::log_softmax;
use clap::Parser;
use longctx_core::{CausalLm, DenseCache, Logits, Prompt, Rate};
use longctx_eval::Haystack;
use longctx_examples::model;
use prompt_compress::cl100k_tokens;
use sample::{Sample, needles, questions};

#[derive(Parser)]
#[command(about = "Answers after compressed prompts")]
struct Args {
    /// A folder of LongBench samples
    #[arg(long)]
    samples: PathBuf,
    /// A GGUF file, a folder in Hugging Face's layout, or a model of the Hub; by default SmolLM2-135M-Instruct, fetched if need be
    #[arg(long)]
    model: Option<String>,
    /// A folder with an LLMLingua-2 checkpoint
    #[arg(long)]
    encoder: Option<PathBuf>,
    /// Questions of each task
    #[arg(long, default_value_t = 2)]
    per_task: usize,
    /// Words of a passage
    #[arg(long, default_value_t = 400)]
    words: usize,
    /// Pass keys
    #[arg(long, default_value_t = 6)]
    needles: usize,
    /// How much stays
    #[arg(long, value_delimiter = ',', default_values_t = [0.5, 0.25])]
    rates: Vec<f64>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let name = match &args.model {
        Some(name) => name.clone(),
        None => model::smollm2()?.display().to_string(),
    };
    let llm = Pretrained::open(&name, &LoadOptions::default())?;
    let questions = questions(&args.samples, args.per_task, args.words)?;
    ensure!(!questions.is_empty(), "{}: no question with its answer", args.samples.display());
    let needles = needles(&Haystack::generated(0), args.needles, args.words)?;
    let mut reader = Reader { session: session(&llm)?, llm: &llm };
    println!(
        "{} questions, {} pass keys, {} words each",
        questions.len(),
        needles.len(),
        args.words
    );
    println!("| method | rate | kept | answers kept | perplexity of the answer | pass keys |");
    println!("|---|---|---|---|---|---|");
    let whole: Vec<String> = questions.iter().map(|sample| sample.text.clone()).collect();
    let perplexity = reader.perplexity(&questions, &whole)?;
    let all = questions.len();
    println!("| whole passage | 1 | 1.00 | {all}/{all} | {perplexity:.2} | |");
    let nothing = vec![String::new(); questions.len()];
    let perplexity = reader.perplexity(&questions, &nothing)?;
    println!("| no passage | 0 | 0.00 | 0/{all} | {perplexity:.2} | |");
    for &rate in &args.rates {
        let rate = Rate::new(rate)?;
        for (name, mut compressor) in method::all(&llm, args.encoder.as_deref())? {
            let mut shorten = |samples: &[Sample]| -> Result<Vec<String>> {
                let one = |sample: &Sample| {
                    let prompt = Prompt::new(&sample.text)?.with_question(&sample.question);
                    Ok(compressor.compress(prompt, rate)?.text)
                };
                samples.iter().map(one).collect()
            };
            let short = shorten(&questions)?;
            let count = |texts: &[String]| texts.iter().map(|t| cl100k_tokens(t)).sum::<usize>();
            let kept = count(&short) as f64 / count(&whole) as f64;
            let perplexity = reader.perplexity(&questions, &short)?;
            let (answers, keys) =
                (survivors(&questions, &short), survivors(&needles, &shorten(&needles)?));
            let rate = rate.get();
            println!("| {name} | {rate} | {kept:.2} | {answers} | {perplexity:.2} | {keys} |");
        }
    }
    Ok(())
}

/// How many of the answers still stand in the texts, of how many.
fn survivors(samples: &[Sample], texts: &[String]) -> String {
    let stands = |(text, sample): &(&String, &Sample)| text.contains(&sample.answer);
    format!("{}/{}", texts.iter().zip(samples).filter(stands).count(), samples.len())
}

/// Reads passages and answers.
struct Reader<'a> {
    llm: &'a Pretrained,
    session: Decoder,
}

impl Reader<'_> {
    /// The perplexity of all answers' tokens, each answer after its passage and question.
    fn perplexity(&mut self, samples: &[Sample], passages: &[String]) -> Result<f64> {
        let (mut sum, mut count) = (0.0, 0);
        for (sample, passage) in samples.iter().zip(passages) {
            let prompt = format!("{passage}\n\nQuestion: {}\nAnswer:", sample.question);
            let prompt = self.llm.tokenizer.encode(&prompt, true)?;
            let answer = self.llm.tokenizer.encode(&format!(" {}", sample.answer), false)?;
            let all = [prompt.as_slice(), &answer].concat();
            self.session.reset();
            let first = prompt.len() - 1;
            self.session.forward(&row(&all[..first])?, Logits::Last)?;
            let logits = self.session.forward(&row(&all[first..all.len() - 1])?, Logits::All)?;
            let log = log_softmax(&logits.squeeze(0)?, D::Minus1)?.to_vec2::<f32>()?;
            sum -= log.iter().zip(&answer).map(|(l, &id)| f64::from(l[id as usize])).sum::<f64>();
            count += answer.len();
        }
        Ok((sum / count as f64).exp())
    }
}

fn row(ids: &[u32]) -> Result<Tensor> {
    Ok(Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)?)
}

fn session(llm: &Pretrained) -> Result<Decoder> {
    Ok(llm.model.session(|layer| DenseCache::new(layer.attention, DType::F32))?)
}
