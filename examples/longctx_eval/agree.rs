//! Token by token beside the dense model: perplexity, top-1 agreement, divergence.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Error, Result, ensure};
use longctx_eval::{Setting, TeacherForced, report, word_range};
use longctx_examples::output::{check_writable, number};
use longctx_examples::say;

use crate::chosen::{Chosen, MAX_COUNT};
use crate::method;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    chosen: Chosen,
    /// The text: what a setting reads first, and then the words that it is asked about
    #[arg(long)]
    text: PathBuf,
    /// Words read first, which the method compresses
    #[arg(long, default_value_t = 700, value_parser = number::<1, MAX_COUNT>)]
    prompt_words: usize,
    /// Words after them, read one token at a time
    #[arg(long, default_value_t = 100, value_parser = number::<1, MAX_COUNT>)]
    words: usize,
    /// The run's folder, where agreement.jsonl is added to
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
    ensure!(count >= wanted, "{}: {count} words, {wanted} wanted", args.text.display());
    let prompt = word_range(&text, 0, args.prompt_words);
    // The words begin with the space before them, as they would in the running text.
    let words = format!(" {}", word_range(&text, args.prompt_words, wanted));
    let think = |setting: &Setting| {
        methods.open(setting)?.teacher_forced(prompt, &words).map_err(Error::from_boxed)
    };
    let name = args.text.file_name().unwrap_or_default().display();
    let what = format!("{name}, words {} to {wanted}", args.prompt_words);
    let mut dense: Option<(String, TeacherForced)> = None;
    for setting in args.chosen.settings(&methods)? {
        if report::has_agreement(&args.out, &setting.name, &what)? {
            say!("{:28} done before", setting.name);
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
