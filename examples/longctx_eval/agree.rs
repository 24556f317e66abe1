//! Compares a setting with the dense model token by token: perplexity, top-1 agreement, KL
//! divergence.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Error, Result, ensure};
use longctx_eval::{Forced, Setting, report, word_range};
use longctx_examples::output::{check_writable, number};
use longctx_examples::say;

use crate::chosen::{Chosen, MOST};
use crate::method;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    chosen: Chosen,
    /// The text file: the prompt, followed by the words to predict
    #[arg(long)]
    text: PathBuf,
    /// Words of the prompt, which the method compresses
    #[arg(long, default_value_t = 700, value_parser = number::<1, MOST>)]
    prompt_words: usize,
    /// Words to predict after the prompt, fed one token at a time
    #[arg(long, default_value_t = 100, value_parser = number::<1, MOST>)]
    words: usize,
    /// The run's folder; results are appended to its agreement.jsonl
    #[arg(long)]
    out: PathBuf,
}

pub fn agree(args: Args) -> Result<()> {
    check_writable(&args.out)?;
    let models = args.chosen.models(1);
    let methods = method::all(&models, false);
    let text = fs::read_to_string(&args.text).with_context(|| args.text.display().to_string())?;
    let count = text.split_whitespace().count();
    let wanted = args.prompt_words + args.words;
    ensure!(count >= wanted, "{}: expected {wanted} words, got {count}", args.text.display());
    let prompt = word_range(&text, 0, args.prompt_words);
    // The words begin with a space, as in continuous text.
    let words = format!(" {}", word_range(&text, args.prompt_words, wanted));
    let think = |setting: &Setting| {
        methods.open(setting)?.teacher_forced(prompt, &words).map_err(Error::from_boxed)
    };
    let name = args.text.file_name().unwrap_or_default().display();
    let what = format!("{name}, words {} to {wanted}", args.prompt_words);
    let mut dense: Option<(String, Forced)> = None;
    for setting in args.chosen.settings(&methods)? {
        if report::has_agreement(&args.out, &setting.name, &what)? {
            say!("{:28} has a result", setting.name);
            continue;
        }
        let reference = match &dense {
            Some((model, forced)) if *model == setting.model => forced,
            _ => {
                let reference = Setting { method: "dense-f16".into(), ..setting.clone() };
                &dense.insert((setting.model.clone(), think(&reference)?)).1
            }
        };
        let agreement = think(&setting)?.agreement(reference)?;
        report::add_agreement(&args.out, &setting.name, &what, &agreement)?;
        say!(
            "{:28} perplexity {:8.3} (dense {:.3}), top-1 {:5.1} %, KL {:.4} nats",
            setting.name,
            agreement.perplexity,
            agreement.dense_perplexity,
            100.0 * agreement.top1,
            agreement.kl
        );
    }
    Ok(())
}
