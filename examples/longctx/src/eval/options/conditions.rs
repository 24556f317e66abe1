//! The conditions of a run's manifest: values besides the settings that affect questions and
//! answers. Only those on which the selected settings and tasks depend are included, so that a run
//! can be extended by others.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use longctx_eval::{Category, Setting, Task, content_hash, ruler};
use longctx_examples::methods::Compress;
use longctx_examples::place::Place;

use super::{DATA, LONGBENCH_V2, NEEDLES, SettingOptions, TaskOptions};

type Conditions = BTreeMap<String, String>;

impl SettingOptions {
    /// Returns the conditions of the settings: the prefill chunk, the content of the models, and
    /// the methods' arguments.
    pub fn conditions(&self, settings: &[Setting]) -> Result<Conditions> {
        let mut all = Conditions::new();
        let chunk = self.prefill_chunk.map_or("all at once".into(), |chunk| chunk.to_string());
        all.insert("prefill_chunk".into(), chunk);
        // Runs from before a condition existed used its default.
        if self.compress != Compress::default() {
            all.insert("compress".into(), format!("{:?}", self.compress).to_lowercase());
        }
        if self.place.describe() != Place::default().describe() {
            all.insert("device and format".into(), self.place.describe());
        }
        for setting in settings {
            match &setting.server {
                None => all.insert(format!("model {}", setting.model), content(&setting.model)?),
                Some(server) => {
                    all.insert(format!("server of {}", setting.name), server.label.clone())
                }
            };
        }
        let uses = |method: &str| settings.iter().any(|setting| setting.method.starts_with(method));
        if uses("llmlingua2") {
            let content = content(&self.encoder)?;
            all.insert("encoder".into(), format!("{}: {content}", self.encoder));
        }
        if uses("duo-attention") {
            let heads = self.heads.as_deref().map(content_hash).transpose()?;
            all.insert("heads".into(), heads.unwrap_or_else(|| "measured".into()));
        }
        Ok(all)
    }
}

impl TaskOptions {
    /// Returns the conditions of the tasks: the content of data and haystack, and values that
    /// samples' ids do not contain.
    pub fn conditions(&self, tasks: &[Box<dyn Task>], settings: &[Setting]) -> Result<Conditions> {
        let mut all = Conditions::new();
        let data = self.data.as_deref().unwrap_or(Path::new(DATA));
        let ours = [Category::Needle, Category::Ruler, Category::LongGeneration];
        for task in tasks.iter().filter(|task| !ours.contains(&task.category())) {
            let file = match task.category() {
                Category::MultipleChoice => data.join(LONGBENCH_V2),
                _ => data.join(format!("{}.jsonl", task.name())),
            };
            all.insert(format!("data {}", task.name()), content_hash(&file)?);
        }
        let of_ruler = |task: &dyn Task| ruler::names().any(|name| name == task.name());
        if tasks.iter().any(|task| of_ruler(task.as_ref()) || NEEDLES.contains(&task.name())) {
            let haystack = self.haystack.as_deref().map(content_hash).transpose()?;
            all.insert("haystack".into(), haystack.unwrap_or_else(|| "generated".into()));
            if let (Some(first), false) = (settings.first(), self.needle_tokens.is_empty()) {
                all.insert("needle_tokens counted by".into(), first.model.clone());
            }
        }
        if tasks.iter().any(|task| task.name() == "multi-needle") {
            all.insert("distractors".into(), self.distractors.to_string());
        }
        Ok(all)
    }
}

/// Returns the digest of a file or folder. The content of models of the Hub is not read.
fn content(name: &str) -> Result<String> {
    let path = Path::new(name);
    match path.exists() {
        true => Ok(content_hash(path)?),
        false => Ok("as the Hub has it".into()),
    }
}
