//! Compares a setting with the dense model token by token: perplexity, top-1 agreement, KL
//! divergence.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Error, Result, ensure};
use longctx_eval::{Agreement, Passage, Setting, Subject, TeacherForced, report, word_range};
use longctx_examples::output::{check_writable, number};
use longctx_examples::say;

use super::method;
use super::options::SettingOptions;
use crate::MAX_COUNT;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    options: SettingOptions,
    /// The text file. It is divided into passages: a prompt, followed by the words to predict
    #[arg(long)]
    text: PathBuf,
    /// Words of a passage's prompt, which the method compresses
    #[arg(long, default_value_t = 700, value_parser = number::<1, MAX_COUNT>)]
    prompt_words: usize,
    /// Words to predict after the prompt, fed one token at a time
    #[arg(long, default_value_t = 100, value_parser = number::<1, MAX_COUNT>)]
    words: usize,
    /// The number of passages
    #[arg(long, default_value_t = 1, value_parser = number::<1, MAX_COUNT>)]
    passages: usize,
    /// Passages that are read side by side
    #[arg(long, default_value_t = 1, value_parser = number::<1, MAX_COUNT>)]
    batch: usize,
    /// The run's folder; results are appended to its agreement.jsonl
    #[arg(long)]
    out: PathBuf,
}

/// The logits of the last dense model.
struct Dense {
    setting: Setting,
    forced: Vec<Vec<TeacherForced>>,
}

impl Dense {
    /// Returns whether another dense setting reads the same prompts with the same model.
    fn gives_prompts_of(&self, other: &Setting) -> bool {
        *other == Setting { name: other.name.clone(), ..self.setting.clone() }
    }
}

pub fn agree(args: Args) -> Result<()> {
    check_writable(&args.out)?;
    let models = args.options.models(1);
    let methods = method::all(&models, false);
    let text = fs::read_to_string(&args.text).with_context(|| args.text.display().to_string())?;
    let count = text.split_whitespace().count();
    let wanted = args.passages * (args.prompt_words + args.words);
    ensure!(count >= wanted, "{}: expected {wanted} words, got {count}", args.text.display());
    let texts = passages(&text, &args);
    let read = |setting: &Setting| Ok::<_, Error>(methods.open(setting)?);
    let what = format!(
        "{}, {} passages of {} words after {}",
        args.text.file_name().unwrap_or_default().display(),
        args.passages,
        args.words,
        args.prompt_words
    );
    let mut dense: Option<Dense> = None;
    for setting in args.options.settings(&methods)? {
        let mut conditions = args.options.conditions(std::slice::from_ref(&setting))?;
        conditions.insert("setting".into(), serde_json::to_string(&setting)?);
        if report::has_agreement(&args.out, &setting.name, &what, &conditions)? {
            say!("{:28} has a result", setting.name);
            continue;
        }
        let of_setting = Setting { method: "dense-f16".into(), ..setting.clone() };
        let reference = match &dense {
            Some(known) if known.gives_prompts_of(&of_setting) => &known.forced,
            _ => {
                let mut subject = read(&of_setting)?;
                let parts = texts.chunks(args.batch).map(|part| force(&mut *subject, part));
                let forced = parts.collect::<Result<_>>()?;
                &dense.insert(Dense { setting: of_setting, forced }).forced
            }
        };
        let mut subject = read(&setting)?;
        let mut parts = Vec::new();
        for (texts, reference) in texts.chunks(args.batch).zip(reference) {
            parts.extend(compare(&force(&mut *subject, texts)?, reference)?);
        }
        let agreement = Agreement::mean(&parts).context("no passages")?;
        report::add_agreement(&args.out, &setting.name, &what, &conditions, &agreement)?;
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

/// Returns the prompt and the words of each passage. The words begin with a space, as in continuous
/// text.
fn passages(text: &str, args: &Args) -> Vec<(String, String)> {
    let starts = (0..args.passages).map(|i| i * (args.prompt_words + args.words));
    let passage = |start: usize| {
        let middle = start + args.prompt_words;
        let words = word_range(text, middle, middle + args.words);
        (word_range(text, start, middle).to_owned(), format!(" {words}"))
    };
    starts.map(passage).collect()
}

fn force(subject: &mut dyn Subject, texts: &[(String, String)]) -> Result<Vec<TeacherForced>> {
    let passages: Vec<_> = texts.iter().map(|(prompt, text)| Passage { prompt, text }).collect();
    subject.teacher_forced(&passages).map_err(Error::from_boxed)
}

/// Compares each passage with the dense model's. One thread per passage.
fn compare(texts: &[TeacherForced], dense: &[TeacherForced]) -> Result<Vec<Agreement>> {
    std::thread::scope(|scope| {
        let pairs = texts.iter().zip(dense);
        let threads: Vec<_> =
            pairs.map(|(one, dense)| scope.spawn(|| one.agreement(dense))).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, _>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        Ok(threads.into_iter().map(join).collect::<longctx_eval::Result<_>>()?)
    })
}
