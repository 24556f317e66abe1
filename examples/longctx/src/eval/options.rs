//! The command-line options that select settings and tasks.

mod conditions;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, bail, ensure};
use longctx_eval::needle::spaced;
use longctx_eval::{
    CountTokens, Error, Haystack, Length, LongBenchV2, Methods, NeedleGrid, Setting, Task,
    long_generation, longbench, ruler, setting,
};
use longctx_examples::methods::Compress;
use longctx_examples::output::number;
use longctx_examples::place::Place;
use longctx_examples::subject::{Models, Options};
use longctx_examples::{encoder, model};

use crate::MAX_COUNT;

/// The default context limit of a method named without a setting, in tokens.
const CONTEXT: usize = 7500;
/// The default folder of LongBench's records.
const DATA: &str = "data/longbench";
/// The name of LongBench-v2's file in that folder.
const LONGBENCH_V2: &str = "longbench-v2.json";

#[derive(clap::Args)]
pub struct SettingOptions {
    /// Names of settings of the paper or of --settings-file, or of methods; a final star matches
    /// any rest: "mistral-7b/*", "h2o-*"
    #[arg(long, value_delimiter = ',', required = true)]
    settings: Vec<String>,
    /// A TOML file that defines more settings
    #[arg(long)]
    settings_file: Option<PathBuf>,
    /// The model of all settings: smollm2, gemma3, embedded, a GGUF file, a folder in Hugging
    /// Face's layout, or a model of the Hub; by default the settings' own models, and for methods
    /// SmolLM2-135M-Instruct, downloaded if it is missing
    #[arg(long)]
    model: Option<String>,
    #[command(flatten)]
    place: Place,
    /// The largest number of tokens of a prompt; longer prompts are truncated in the middle. A
    /// setting's own context is an upper limit; the default for methods is 7500
    #[arg(long, value_parser = number::<2, MAX_COUNT>)]
    context: Option<usize>,
    /// Tokens of a prompt to feed at a time; by default the whole prompt, whose attention is then
    /// exact
    #[arg(long, value_parser = number::<1, MAX_COUNT>)]
    prefill_chunk: Option<usize>,
    /// The tokens that packed formats and eviction policies compress
    #[arg(long, value_enum, default_value_t)]
    compress: Compress,
    /// The encoder of LLMLingua-2: a folder with a checkpoint, or a model of the Hub
    #[arg(long, default_value = encoder::PUBLISHED)]
    encoder: String,
    /// DuoAttention's scores of kv heads, a file in the format of its full_attention_heads.tsv; by
    /// default scores are measured as the attention to three needles
    #[arg(long)]
    heads: Option<PathBuf>,
}

impl SettingOptions {
    /// Returns the settings' models, which decode `batch` samples at a time.
    pub fn models(&self, batch: usize) -> Models {
        Models::new(Options {
            batch,
            prefill_chunk: self.prefill_chunk,
            compress: self.compress,
            encoder: self.encoder.clone(),
            heads: self.heads.clone(),
            place: self.place.clone(),
        })
    }

    /// Returns the settings, in the order of the command line.
    pub fn settings(&self, methods: &Methods<'_>) -> Result<Vec<Setting>> {
        let mut known = setting::paper();
        if let Some(path) = &self.settings_file {
            known.extend(setting::from_toml_file(path)?);
        }
        // The default model is downloaded only if a method needs it.
        let names = || methods.names().any(|name| self.settings.iter().any(|w| fits(w, name)));
        let model = match self.model.is_some() || names() {
            true => Some(model::named(self.model.as_deref())?),
            false => None,
        };
        if let Some(model) = &model {
            let context = self.context.unwrap_or(CONTEXT);
            known.extend(methods.names().map(|name| Setting::of(name, model, context)));
        }
        let named = model.filter(|_| self.model.is_some());
        let mut selected: Vec<Setting> = Vec::new();
        for wanted in &self.settings {
            let found: Vec<_> = known.iter().filter(|one| fits(wanted, &one.name)).collect();
            ensure!(!found.is_empty(), "no setting or method {wanted:?}: see `longctx eval list`");
            for setting in found {
                if selected.iter().all(|other| other.name != setting.name) {
                    selected.push(self.adapted(setting.clone(), named.as_deref()));
                }
            }
        }
        Ok(selected)
    }

    /// Replaces the model by the command line's, if it has one, and applies the context limit.
    fn adapted(&self, setting: Setting, model: Option<&str>) -> Setting {
        let context = setting.context.min(self.context.unwrap_or(usize::MAX));
        let setting = Setting { context, ..setting };
        match model.filter(|model| setting.model != *model) {
            Some(model) => setting.on(model),
            None => setting,
        }
    }
}

/// Returns whether `name` equals `wanted`, or starts with the part before its final star.
fn fits(wanted: &str, name: &str) -> bool {
    match wanted.strip_suffix('*') {
        Some(start) => name.starts_with(start),
        None => name == wanted,
    }
}

#[derive(clap::Args)]
pub struct TaskOptions {
    /// Names of tasks or groups: "longbench" (16 tasks), "longbench-e" (13, grouped by length),
    /// "ruler" (13), "long-generation" (tasks with long answers), "all" (longbench, the needle
    /// tests and long-generation)
    #[arg(long, value_delimiter = ',', default_value = "all")]
    tasks: Vec<String>,
    /// The folder of LongBench's JSON lines; by default data/longbench, downloaded from the Hub's
    /// THUDM/LongBench if it is missing
    #[arg(long)]
    data: Option<PathBuf>,
    /// The background text of the needle test and of RULER's essays: a folder of text files, or a
    /// text file; by default generated text
    #[arg(long)]
    haystack: Option<PathBuf>,
    /// Lengths of the needle test, in words; by default the paper's 10 lengths
    #[arg(long, value_delimiter = ',', value_parser = number::<0, MAX_COUNT>)]
    needle_words: Vec<usize>,
    /// Lengths of the needle test in tokens of the first setting's model, instead of words
    #[arg(long, value_delimiter = ',', conflicts_with = "needle_words", value_parser = number::<1, MAX_COUNT>)]
    needle_tokens: Vec<usize>,
    /// Number of depths of the needle test, evenly spaced from the start to the end
    #[arg(long, default_value_t = 10, value_parser = number::<1, 1000>)]
    needle_depths: usize,
    /// Samples at each length and depth
    #[arg(long, default_value_t = 3, value_parser = number::<1, 1000>)]
    needle_repeats: usize,
    /// Wrong keys for each key of the task "multi-needle"
    #[arg(long, default_value_t = 4, value_parser = number::<0, 23>)]
    distractors: usize,
    /// Items (records, rows, facts or steps) in each sample of the tasks with long answers
    #[arg(long, default_value_t = 20, value_parser = number::<1, 100000>)]
    items: usize,
    /// Samples of each task with long answers
    #[arg(long, default_value_t = 10, value_parser = number::<0, 100000>)]
    long_samples: usize,
    /// RULER's lengths, in tokens of prompt and answer, by the first setting's tokenizer
    #[arg(long, value_delimiter = ',', default_value = "4096", value_parser = number::<1, MAX_COUNT>)]
    ruler_lengths: Vec<usize>,
    /// Samples of each RULER task and length; the original has 500
    #[arg(long, default_value_t = 50, value_parser = number::<1, 100000>)]
    ruler_samples: usize,
    /// The folder of squad.json and hotpotqa.json for RULER's questions; without it, "ruler" skips
    /// qa_1 and qa_2
    #[arg(long)]
    ruler_data: Option<PathBuf>,
    /// The random seed of RULER's samples
    #[arg(long, default_value_t = 42)]
    ruler_seed: u32,
    /// The random seed of other generated tasks
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// The names of the needle tests.
const NEEDLES: [&str; 3] = ["needle", "needle-64", "multi-needle"];

/// Returns the groups of tasks by name.
pub fn task_groups() -> [(&'static str, Vec<String>); 6] {
    let names = |names: &mut dyn Iterator<Item = &'static str>| names.map(String::from).collect();
    [
        ("longbench", names(&mut longbench::names())),
        ("needles", names(&mut NEEDLES.into_iter())),
        ("long-generation", names(&mut long_generation::names())),
        ("ruler", names(&mut ruler::names())),
        ("longbench-e", longbench::names_e().collect()),
        ("longbench-v2", vec!["longbench-v2".into()]),
    ]
}

/// The groups of "all".
const ALL: [&str; 3] = ["longbench", "needles", "long-generation"];

impl TaskOptions {
    /// Returns the tasks, in the order of the command line.
    pub fn open(&self, models: &Models, settings: &[Setting]) -> Result<Vec<Box<dyn Task>>> {
        let names = self.names()?;
        let of_longbench = |name: &str| {
            longbench::names().any(|known| known == name)
                || longbench::names_e().any(|known| known == name)
        };
        let data = self.data.as_deref().unwrap_or(Path::new(DATA));
        let fetched: Vec<&str> =
            names.iter().map(String::as_str).filter(|name| of_longbench(name)).collect();
        if self.data.is_none() && !fetched.is_empty() {
            longbench::download(data, &fetched)?;
        }
        let ruler = match names.iter().any(|name| ruler::names().any(|known| known == name)) {
            true => Some(Arc::new(self.ruler(models, settings)?)),
            false => None,
        };
        let mut tasks: Vec<Box<dyn Task>> = Vec::new();
        for name in &names {
            if of_longbench(name) {
                tasks.push(Box::new(longbench::task(name, data)?));
            } else if name == "longbench-v2" {
                tasks.push(Box::new(LongBenchV2 { file: data.join(LONGBENCH_V2) }));
            } else if NEEDLES.contains(&name.as_str()) {
                tasks.push(Box::new(self.needle(name, models, settings)?));
            } else if let (Some(source), true) = (&ruler, ruler::names().any(|known| known == name))
            {
                tasks.push(Box::new(ruler::task(name, source)?));
            } else {
                let (items, samples, seed) = (self.items, self.long_samples, self.seed);
                let size = long_generation::Size { items, samples, seed };
                let all = long_generation::tasks(size).into_iter();
                tasks.extend(all.filter(|task| task.name() == name));
            }
        }
        Ok(tasks)
    }

    /// Returns the names of the tasks, with groups expanded.
    fn names(&self) -> Result<Vec<String>> {
        let groups = task_groups();
        let of_group = |name: &str| groups.iter().find(|(group, _)| *group == name);
        let mut names: Vec<String> = Vec::new();
        for wanted in &self.tasks {
            match (wanted.as_str(), of_group(wanted)) {
                ("all", _) => names.extend(
                    ALL.iter().filter_map(|name| of_group(name)).flat_map(|group| group.1.clone()),
                ),
                ("ruler", Some((_, tasks))) if self.ruler_data.is_none() => {
                    names.extend(tasks.iter().filter(|name| !name.starts_with("qa_")).cloned());
                }
                (_, Some((_, tasks))) => names.extend(tasks.clone()),
                (name, None)
                    if groups.iter().any(|(_, tasks)| tasks.iter().any(|task| task == name)) =>
                {
                    names.push(name.to_owned());
                }
                _ => bail!("no task {wanted:?}: see `longctx eval list`"),
            }
        }
        let mut seen = std::collections::HashSet::new();
        names.retain(|name| seen.insert(name.clone()));
        Ok(names)
    }

    fn ruler(&self, models: &Models, settings: &[Setting]) -> Result<ruler::Source> {
        check_lengths("RULER's", &self.ruler_lengths, settings)?;
        Ok(ruler::Source {
            lengths: self.ruler_lengths.clone(),
            count: count(models, &settings[0], false)?,
            reserved: 0,
            essays: self.background()?,
            folder: self.ruler_data.clone(),
            samples: self.ruler_samples,
            seed: self.ruler_seed,
        })
    }

    fn background(&self) -> Result<Haystack> {
        Ok(match &self.haystack {
            Some(path) => Haystack::from_path(path)?,
            None => Haystack::generated(self.seed),
        })
    }

    fn needle(&self, name: &str, models: &Models, settings: &[Setting]) -> Result<NeedleGrid> {
        let mut grid =
            NeedleGrid::paper(self.background()?, if name == "needle-64" { 64 } else { 7 });
        grid.name = name.to_owned();
        grid.depths = spaced(0.0, 1.0, self.needle_depths);
        grid.repeats = self.needle_repeats;
        grid.seed = self.seed;
        if name == "multi-needle" {
            grid.distractors = self.distractors;
        }
        if !self.needle_words.is_empty() {
            grid.lengths = self.needle_words.clone();
        }
        if !self.needle_tokens.is_empty() {
            check_lengths("the needle test's", &self.needle_tokens, settings)?;
            grid.lengths = self.needle_tokens.clone();
            grid.unit = Length::Tokens(count(models, &settings[0], true)?);
        }
        Ok(grid)
    }
}

/// Returns an error if a setting would truncate prompts of one of these lengths.
fn check_lengths(whose: &str, lengths: &[usize], settings: &[Setting]) -> Result<()> {
    let longest = lengths.iter().max().copied().unwrap_or(0);
    for Setting { name, context, .. } in settings {
        ensure!(
            longest <= *context,
            "setting {name} truncates prompts to {context} tokens, {whose} have {longest}: pass a larger --context, and a setting that allows it"
        );
    }
    Ok(())
}

/// Returns a function that counts tokens with the setting's tokenizer. `special` adds the tokens
/// that begin a prompt.
fn count(models: &Models, setting: &Setting, special: bool) -> Result<CountTokens> {
    let model = match &setting.server {
        None => &setting.model,
        Some(server) => match &server.tokenizer {
            Some(tokenizer) => tokenizer,
            None => {
                bail!("setting {}: lengths in tokens need its server's `tokenizer`", setting.name)
            }
        },
    };
    let tokenizer = models.get(model).map_err(anyhow::Error::from_boxed)?.tokenizer;
    Ok(Arc::new(move |text: &str| {
        let text = if special { text.trim_end() } else { text };
        let tokens = tokenizer.encode(text, special);
        Ok(tokens.map_err(|e| Error::setting("text", "text for the tokenizer", e))?.len())
    }))
}
