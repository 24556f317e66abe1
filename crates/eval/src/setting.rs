//! Settings by name: a method, a model, the context limit, and the chat template.

mod paper;

use std::collections::BTreeSet;
use std::path::Path;

pub use paper::paper;

use crate::{Error, Result};

/// One row of a comparison: a method on a model.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Setting {
    /// Unique and stable name: "mistral-7b/kivi-2".
    pub name: String,
    /// The registered method: "kivi-2".
    pub method: String,
    /// A model of the Hub ("org/name"), a folder or a file.
    pub model: String,
    /// The largest number of prompt tokens; longer prompts are truncated in the middle.
    pub context: usize,
    /// The chat template.
    #[serde(default)]
    pub template: Template,
    /// The server that answers, instead of a model in this process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub server: Option<ServerSetting>,
}

/// A server with OpenAI's API: vLLM, SGLang, TensorRT-LLM, llama.cpp, mistral.rs, …
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServerSetting {
    /// The base URL including the version: "http://127.0.0.1:8000/v1".
    pub url: String,
    /// The API to use.
    #[serde(default)]
    pub api: Api,
    /// The server's cache options, as given to the server: "--kv-cache-dtype fp8". Recorded, not
    /// sent.
    #[serde(default)]
    pub label: String,
    /// The environment variable that holds the API key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_env: Option<String>,
    /// Number of concurrent requests.
    #[serde(default = "ServerSetting::default_concurrency")]
    pub concurrency: usize,
    /// Number of attempts per sample, with increasing waits between them.
    #[serde(default = "ServerSetting::default_tries")]
    pub tries: u32,
    /// Time-out of an attempt in seconds.
    #[serde(default = "ServerSetting::default_timeout")]
    pub timeout_seconds: u64,
    /// A model whose tokenizer counts and truncates prompts, and whose template formats prompts of
    /// the completions API. Without it prompts are sent unchanged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<String>,
    /// Whether prompts of the completions API are sent as token ids of `tokenizer`, exactly as a
    /// model in this process gets them, instead of text.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub token_ids: bool,
    /// Further fields of each request, for options that the server's API sets by request:
    /// `{ repeat_penalty = 1.0 }`.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub extra_body: serde_json::Map<String, serde_json::Value>,
    /// Bytes that the server's cache holds for a token, for ratios.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_token: Option<f64>,
    /// Bytes per token of a dense f16 cache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dense_bytes_per_token: Option<f64>,
}

/// OpenAI's APIs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Api {
    /// `/completions`: the prompt is text.
    #[default]
    Completions,
    /// `/chat/completions`: the server applies its chat template.
    Chat,
}

impl ServerSetting {
    fn default_concurrency() -> usize {
        4
    }
    fn default_tries() -> u32 {
        6
    }
    fn default_timeout() -> u64 {
        600
    }
}

/// The chat template of prompts.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Template {
    /// The template of the model; none if the model has none.
    #[default]
    Own,
    /// No template: the model continues the prompt.
    Plain,
    /// This Jinja template, with `messages`, `add_generation_prompt`, `bos_token` and `eos_token`.
    Jinja(String),
}

/// Parses the settings of a TOML file, each a `[[setting]]`:
///
/// ```
/// use longctx_eval::setting;
///
/// let settings = setting::from_toml(r#"
/// [[setting]]
/// name = "qwen-0.5b/kivi-2"
/// method = "kivi-2"
/// model = "Qwen/Qwen2.5-0.5B-Instruct"
/// context = 16000
///
/// [[setting]]
/// name = "mine"
/// method = "my-cache"
/// model = "models/mine.gguf"
/// context = 4000
/// template = { jinja = "{{ messages[-1].content }} ANSWER:" }
/// "#)?;
/// assert_eq!(settings[1].method, "my-cache");
/// # Ok::<(), longctx_eval::Error>(())
/// ```
///
/// # Errors
/// [`Error::SettingsFile`] with the line of a syntax error, an unknown or missing field, a value
/// that is out of range, or a duplicate name.
pub fn from_toml(text: &str) -> Result<Vec<Setting>> {
    parse(text, "settings")
}

/// Reads the settings of a TOML file.
///
/// # Errors
/// If the file cannot be read; as [`from_toml`].
pub fn from_toml_file(path: &Path) -> Result<Vec<Setting>> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    parse(&text, &path.display().to_string())
}

/// Parses the settings of a text. `file` is its name in errors.
fn parse(text: &str, file: &str) -> Result<Vec<Setting>> {
    #[derive(serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct File {
        #[serde(rename = "setting")]
        settings: Vec<toml::Spanned<Setting>>,
    }
    let mistake = |at: usize, fault: String| {
        let line = 1 + text.bytes().take(at).filter(|&byte| byte == b'\n').count();
        Error::SettingsFile { file: file.to_owned(), line, fault }
    };
    let all: File = toml::from_str(text).map_err(|error| {
        let at = error.span().map_or(0, |span| span.start);
        mistake(at, error.message().to_owned())
    })?;
    let mut names = BTreeSet::new();
    for setting in &all.settings {
        let at = setting.span().start;
        let setting = setting.as_ref();
        setting.check().map_err(|error| mistake(at, error.to_string()))?;
        if !names.insert(&setting.name) {
            let error = Error::setting("name", "another for each setting", &setting.name);
            return Err(mistake(at, error.to_string()));
        }
    }
    Ok(all.settings.into_iter().map(toml::Spanned::into_inner).collect())
}

impl Setting {
    /// Creates a setting of a method on a model, named after both.
    pub fn of(method: &str, model: &str, context: usize) -> Self {
        Self {
            name: method.to_owned(),
            method: method.to_owned(),
            model: model.to_owned(),
            context,
            template: Template::Own,
            server: None,
        }
    }

    /// Checks the numbers that have a range.
    fn check(&self) -> Result<()> {
        if self.context < 2 {
            return Err(Error::setting("context", "at least 2 tokens", self.context));
        }
        let Some(server) = &self.server else { return Ok(()) };
        let sizes = [
            ("server.bytes_per_token", server.bytes_per_token),
            ("server.dense_bytes_per_token", server.dense_bytes_per_token),
        ];
        for (name, size) in sizes {
            // TOML has nan and inf.
            if let Some(size) = size.filter(|size| !(size.is_finite() && *size > 0.0)) {
                return Err(Error::setting(name, "a finite number above 0", size));
            }
        }
        Ok(())
    }

    /// Returns the setting on another model, with that model's own template. The name does not
    /// change.
    #[must_use]
    pub fn on(self, model: &str) -> Self {
        Self { model: model.to_owned(), template: Template::Own, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_paper_has_65_settings_by_distinct_names() {
        let all = paper();
        let names: BTreeSet<_> = all.iter().map(|setting| setting.name.as_str()).collect();
        assert_eq!((all.len(), names.len()), (65, 65));
        let count = |part: &str| all.iter().filter(|setting| setting.name.contains(part)).count();
        let parts = ["baseline", "kivi-", "flexgen-4", "h2o-", "streaming-llm-", "infllm-"];
        assert_eq!(parts.map(count), [3, 6, 3, 12, 12, 12]);
        assert_eq!([count("llmlingua2-"), count("mamba-"), count("rwkv")], [12, 2, 1]);
        let llama = all.iter().find(|setting| setting.name == "llama-3-8b/h2o-4x").unwrap();
        assert_eq!((llama.method.as_str(), llama.context), ("h2o-4x", 7500));
    }

    #[test]
    fn another_model_has_its_own_template() {
        let moved = paper().pop().unwrap().on("models/small.gguf");
        assert_eq!((moved.model.as_str(), moved.template), ("models/small.gguf", Template::Own));
    }

    #[test]
    fn mistakes_in_a_file_are_named() {
        let setting = |rest: &str| format!("[[setting]]\nname = \"a\"\nmethod = \"m\"\n{rest}");
        let whole = "model = \"x\"\ncontext = 9\n";
        assert_eq!(from_toml(&setting(whole)).unwrap().len(), 1);
        let twice = setting(whole) + &setting(whole);
        assert!(from_toml(&twice).unwrap_err().to_string().contains("`name`"));
        let misspelt = setting("model = \"x\"\ncontext = 9\nmodle = 1");
        assert!(from_toml(&misspelt).unwrap_err().to_string().contains("modle"));
        let short = setting("model = \"x\"\ncontext = 1");
        assert!(from_toml(&short).unwrap_err().to_string().contains("at least 2"));
    }

    #[test]
    fn mistakes_in_a_file_name_the_file_and_the_line() {
        let first = "[[setting]]\nname = \"a\"\nmethod = \"m\"\nmodel = \"x\"\ncontext = 9\n\n";
        let server = "[[setting]]\nname = \"b\"\nmethod = \"http\"\nmodel = \"x\"\ncontext = 9\n\
            server = { url = \"u\", bytes_per_token = nan }\n";
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mine.toml");
        for (rest, line, expected) in [
            ("[[setting]]\nname = 3\n", 8, "expected a string"),
            ("[[setting]]\nnome = \"b\"\n", 8, "expected one of `name`"),
            ("[[setting]]\nname = \"b\"\n", 7, "missing field `method`"),
            ("[[setting]\n", 7, "expected `]`"),
            (&first.replace('9', "1").replace("\"a\"", "\"b\""), 7, "at least 2 tokens"),
            (first, 7, "another for each setting, got a"),
            (server, 7, "a finite number above 0, got NaN"),
        ] {
            std::fs::write(&path, first.to_owned() + rest).unwrap();
            let error = from_toml_file(&path).unwrap_err();
            assert!(matches!(error, Error::SettingsFile { .. }), "{error}");
            let words = error.to_string();
            let place = format!("{}, line {line}: ", path.display());
            assert!(words.starts_with(&place) && words.contains(expected), "{words}");
        }
    }
}
