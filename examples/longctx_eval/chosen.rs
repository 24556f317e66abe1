//! What the command line chooses: settings and tasks.

mod conditions;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, bail, ensure};
use longctx_eval::needle::spaced;
use longctx_eval::{
    CountTokens, Error, Haystack, Length, Methods, NeedleGrid, Setting, Task, long_generation,
    longbench, setting,
};
use longctx_examples::output::number;
use longctx_examples::place::Place;
use longctx_examples::subject::{Models, Options};
use longctx_examples::{encoder, model};

/// Context of a method that is named without a setting.
const CONTEXT: usize = 7500;
/// The most tokens or words of anything: more than any model reads.
pub const MOST: usize = 10_000_000;
/// Where LongBench's records are looked for if no folder is named.
const DATA: &str = "data/longbench";

#[derive(clap::Args)]
pub struct Chosen {
    /// Settings of the paper or of a file, methods, or all that start with a word: "mistral-7b/*", "h2o-*"
    #[arg(long, value_delimiter = ',', required = true)]
    settings: Vec<String>,
    /// A TOML file that defines more settings
    #[arg(long)]
    settings_file: Option<PathBuf>,
    /// The model for all settings: a GGUF file, a folder in Hugging Face's layout, or a model of the Hub; methods named without a
    /// setting run on SmolLM2-135M-Instruct by default, fetched if need be
    #[arg(long)]
    model: Option<String>,
    #[command(flatten)]
    place: Place,
    /// The most tokens of a prompt, where the setting would allow more; longer ones are cut in the middle
    #[arg(long, value_parser = number::<2, MOST>)]
    context: Option<usize>,
    /// Tokens of a prompt to feed at a time; by default all at once, which attends exactly
    #[arg(long, value_parser = number::<1, MOST>)]
    prefill_chunk: Option<usize>,
    /// The encoder of LLMLingua-2: a folder with a checkpoint, or a name of the Hub
    #[arg(long, default_value = encoder::PUBLISHED)]
    encoder: String,
    /// DuoAttention's score of every kv head, a file like its full_attention_heads.tsv; by default attention to three needles says which
    /// heads look far back
    #[arg(long)]
    heads: Option<PathBuf>,
}

impl Chosen {
    /// What opens the settings' models.
    pub fn models(&self) -> Models {
        Models::new(Options {
            prefill_chunk: self.prefill_chunk,
            encoder: self.encoder.clone(),
            heads: self.heads.clone(),
            place: self.place.clone(),
        })
    }

    /// The settings, in the order asked for.
    pub fn settings(&self, methods: &Methods<'_>) -> Result<Vec<Setting>> {
        let mut known = setting::paper();
        if let Some(path) = &self.settings_file {
            known.extend(setting::from_toml_file(path)?);
        }
        let default = match &self.model {
            Some(model) => model.clone(),
            None => model::smollm2()?.display().to_string(),
        };
        known.extend(methods.names().map(|name| Setting::of(name, &default, CONTEXT)));
        let mut chosen: Vec<Setting> = Vec::new();
        for wanted in &self.settings {
            let fits = |name: &str| match wanted.strip_suffix('*') {
                Some(start) => name.starts_with(start),
                None => name == wanted,
            };
            let found: Vec<_> = known.iter().filter(|setting| fits(&setting.name)).collect();
            ensure!(!found.is_empty(), "no setting or method {wanted:?}: see the command `list`");
            for setting in found {
                if chosen.iter().all(|other| other.name != setting.name) {
                    chosen.push(self.adapted(setting.clone()));
                }
            }
        }
        Ok(chosen)
    }

    fn adapted(&self, setting: Setting) -> Setting {
        let context = setting.context.min(self.context.unwrap_or(usize::MAX));
        let setting = Setting { context, ..setting };
        match &self.model {
            Some(model) if setting.model != *model => setting.on(model),
            _ => setting,
        }
    }
}

#[derive(clap::Args)]
pub struct TaskArgs {
    /// Tasks by name, or "longbench" for its 16, or "long-generation" for the tasks with long answers, or "all"
    #[arg(long, value_delimiter = ',', default_value = "all")]
    tasks: Vec<String>,
    /// LongBench's records: a folder of its JSON lines; by default data/longbench, filled from the Hub's THUDM/LongBench
    #[arg(long)]
    data: Option<PathBuf>,
    /// The needle test's background: a folder of text, or a text file; by default text that the program makes itself
    #[arg(long)]
    haystack: Option<PathBuf>,
    /// Lengths of the needle test, in words; by default the paper's 10
    #[arg(long, value_delimiter = ',', value_parser = number::<0, MOST>)]
    needle_words: Vec<usize>,
    /// Lengths of the needle test in tokens of the first setting's model, instead of words
    #[arg(long, value_delimiter = ',', conflicts_with = "needle_words", value_parser = number::<1, MOST>)]
    needle_tokens: Vec<usize>,
    /// Depths of the needle test, evenly from the start to the end
    #[arg(long, default_value_t = 10, value_parser = number::<1, 1000>)]
    needle_depths: usize,
    /// Keys at each length and depth
    #[arg(long, default_value_t = 3, value_parser = number::<1, 1000>)]
    needle_repeats: usize,
    /// Wrong keys beside each key of the task "multi-needle"
    #[arg(long, default_value_t = 4, value_parser = number::<0, 23>)]
    distractors: usize,
    /// Records, rows, facts or steps in each sample of the tasks with long answers
    #[arg(long, default_value_t = 20, value_parser = number::<1, 100000>)]
    items: usize,
    /// Samples of each of them
    #[arg(long, default_value_t = 10, value_parser = number::<0, 100000>)]
    long_samples: usize,
    /// What tasks that are made begin with
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

/// The needle tests by name.
const NEEDLES: [&str; 3] = ["needle", "needle-64", "multi-needle"];

/// All tasks by name.
pub fn task_names() -> impl Iterator<Item = &'static str> {
    longbench::names().chain(NEEDLES).chain(long_generation::names())
}

impl TaskArgs {
    /// The tasks, in the order asked for.
    pub fn open(&self, models: &Models, settings: &[Setting]) -> Result<Vec<Box<dyn Task>>> {
        let mut names: Vec<&str> = Vec::new();
        for wanted in &self.tasks {
            match wanted.as_str() {
                "all" => names.extend(task_names()),
                "longbench" => names.extend(longbench::names()),
                "long-generation" => names.extend(long_generation::names()),
                name => names.extend(task_names().find(|known| *known == name)),
            }
            let known = ["all", "longbench", "long-generation"].contains(&wanted.as_str());
            if !known && !names.contains(&wanted.as_str()) {
                bail!(
                    "no task {wanted:?}: there are {}",
                    task_names().collect::<Vec<_>>().join(", ")
                );
            }
        }
        let of_longbench = |name: &str| longbench::names().any(|known| known == name);
        let data = self.data.as_deref().unwrap_or(Path::new(DATA));
        if self.data.is_none() && names.iter().any(|name| of_longbench(name)) {
            longbench::download(data)?;
        }
        let mut tasks: Vec<Box<dyn Task>> = Vec::new();
        for name in names {
            if of_longbench(name) {
                tasks.push(Box::new(longbench::task(name, data)?));
            } else if NEEDLES.contains(&name) {
                tasks.push(Box::new(self.needle(name, models, settings)?));
            } else {
                let (items, samples, seed) = (self.items, self.long_samples, self.seed);
                let size = long_generation::Size { items, samples, seed };
                let all = long_generation::tasks(size).into_iter();
                tasks.extend(all.filter(|task| task.name() == name));
            }
        }
        Ok(tasks)
    }

    fn needle(&self, name: &str, models: &Models, settings: &[Setting]) -> Result<NeedleGrid> {
        let haystack = match &self.haystack {
            Some(path) => Haystack::from_path(path)?,
            None => Haystack::generated(self.seed),
        };
        let mut grid = NeedleGrid::paper(haystack, if name == "needle-64" { 64 } else { 7 });
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
            grid.lengths = self.needle_tokens.clone();
            grid.unit = Length::Tokens(count(models, &settings[0].model)?);
        }
        Ok(grid)
    }
}

fn count(models: &Models, model: &str) -> Result<CountTokens> {
    let tokenizer = models.get(model).map_err(anyhow::Error::from_boxed)?.tokenizer;
    Ok(Arc::new(move |text: &str| {
        let tokens = tokenizer.encode(text.trim_end(), true);
        Ok(tokens.map_err(|e| Error::setting("text", "text for the tokenizer", e))?.len())
    }))
}
