//! Chat templates: format a conversation as the text that a model was trained on.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use crate::gguf_file::GgufFile;
use crate::json::Fields;
use crate::template::Template;
use longctx_checkpoint::files;
use longctx_core::{Error, Result};
use minijinja::Value;
use serde::Serialize;

/// The tokens of `tokenizer_config.json` that a template may use.
const SPECIAL_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Message {
    /// "system", "user" or "assistant".
    pub role: String,
    /// The text of the turn.
    pub content: String,
}

impl Message {
    /// Creates a turn of the user.
    pub fn user(content: impl Into<String>) -> Self {
        Self { role: "user".into(), content: content.into() }
    }

    /// Creates a turn of the model.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self { role: "assistant".into(), content: content.into() }
    }

    /// Creates a system prompt.
    pub fn system(content: impl Into<String>) -> Self {
        Self { role: "system".into(), content: content.into() }
    }
}

/// The variables of a template besides the messages.
///
/// ```
/// use base_models::{ChatOptions, ChatTemplate, Message};
/// use serde_json::json;
///
/// let template = "{% if tools %}{{ tools | tojson }}\n{% endif %}{{ messages[0].content }}\
///                 {% if not enable_thinking %} /no_think{% endif %}";
/// let chat = ChatTemplate::new(template, "", "")?;
/// let tools = json!([{"name": "weather", "parameters": {}}]);
/// let options = ChatOptions::reply().tools(&tools)?.argument("enable_thinking", false)?;
/// let text = chat.render_with(&[Message::user("<Rain?>")], &options)?;
/// assert_eq!(text, "[{\"name\": \"weather\", \"parameters\": {}}]\n<Rain?> /no_think");
/// # Ok::<(), longctx_core::Error>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct ChatOptions {
    reply: bool,
    tools: Option<Value>,
    arguments: BTreeMap<String, Value>,
    /// Size of the tools and arguments in bytes.
    size: usize,
}

impl ChatOptions {
    /// Ends the text with the start of the model's answer (`add_generation_prompt`).
    pub fn reply() -> Self {
        Self { reply: true, ..Self::default() }
    }

    /// Adds tools, a list of JSON schemas. Objects keep the order in which they are serialized.
    ///
    /// # Errors
    /// [`Error::Template`] if serialization fails.
    pub fn tools(self, tools: &impl Serialize) -> Result<Self> {
        let (tools, size) = value("tools", tools)?;
        Ok(Self { tools: Some(tools), size: self.size + size, ..self })
    }

    /// Adds a variable of the template: "enable_thinking", "date_string", "documents".
    ///
    /// # Errors
    /// [`Error::Template`] if serialization of its value fails.
    pub fn argument(mut self, name: &str, argument: impl Serialize) -> Result<Self> {
        let (argument, size) = value(name, &argument)?;
        self.arguments.insert(name.to_owned(), argument);
        self.size += size;
        Ok(self)
    }
}

/// A model's chat template in Jinja, from `tokenizer_config.json` or a GGUF file.
///
/// It is compiled on first use, so that a model with an invalid template can still be used for
/// completion.
///
/// ```
/// use base_models::{ChatTemplate, Message};
///
/// let template = "{% for m in messages %}[{{ m.role }}] {{ m.content.strip() }}\n{% endfor %}\
///                 {% if add_generation_prompt %}[assistant]{% endif %}";
/// let chat = ChatTemplate::new(template, "<s>", "</s>")?;
/// assert_eq!(chat.render(&[Message::user(" Hello ")], true)?, "[user] Hello\n[assistant]");
/// # Ok::<(), longctx_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    chat: Source,
    /// The template for conversations with tools, if the model has a separate one.
    with_tools: Option<Source>,
    /// The texts of special tokens, by their names in templates.
    tokens: BTreeMap<String, String>,
}

/// A template that is compiled once, on first use.
#[derive(Debug, Clone)]
struct Source {
    text: String,
    compiled: Arc<OnceLock<Template>>,
}

impl Source {
    fn new(text: String) -> Self {
        Self { text, compiled: Arc::default() }
    }

    fn compiled(&self) -> Result<&Template> {
        match self.compiled.get() {
            Some(template) => Ok(template),
            None => {
                let template = Template::new(&self.text)?;
                Ok(self.compiled.get_or_init(|| template))
            }
        }
    }
}

impl ChatTemplate {
    /// Compiles a template. `bos` and `eos` are the texts of `bos_token` and `eos_token`.
    ///
    /// # Errors
    /// [`Error::Template`] with the line of a syntax error.
    pub fn new(template: &str, bos: &str, eos: &str) -> Result<Self> {
        let tokens = [("bos_token", bos), ("eos_token", eos)];
        let tokens = tokens.map(|(name, text)| (name.to_owned(), text.to_owned())).into();
        let chat = Source::new(template.to_owned());
        chat.compiled()?;
        Ok(Self { chat, with_tools: None, tokens })
    }

    /// Reads the template of a checkpoint folder: `chat_template.jinja`, or the one in
    /// `tokenizer_config.json`; `None` if there is none.
    pub(crate) fn from_folder(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join("tokenizer_config.json");
        let text = files::read_text_if_present(&path)?.unwrap_or_else(|| "{}".into());
        let json = serde_json::from_str(&text).map_err(|e| Error::file(&path, e))?;
        let config = Fields::new(&path, &json)?;
        let separate = files::read_text_if_present(&folder.join("chat_template.jinja"))?;
        let chat = separate.or_else(|| named_template(&json["chat_template"], "default"));
        let Some(chat) = chat else { return Ok(None) };
        let with_tools = named_template(&json["chat_template"], "tool_use")
            .filter(|_| json["chat_template"].is_array());
        let token = |name: &&str| Some(((*name).to_owned(), config.token(name)?));
        Ok(Some(Self {
            chat: Source::new(chat),
            with_tools: with_tools.map(Source::new),
            tokens: SPECIAL_TOKENS.iter().filter_map(token).collect(),
        }))
    }

    /// Reads the template of a GGUF file; `None` if there is none.
    pub(crate) fn from_gguf(
        file: &GgufFile,
        tokens: BTreeMap<String, String>,
    ) -> Result<Option<Self>> {
        let Some(chat) = file.text("tokenizer.chat_template")? else { return Ok(None) };
        let with_tools = file.text("tokenizer.chat_template.tool_use")?;
        let source = |text: &str| Source::new(text.to_owned());
        Ok(Some(Self { chat: source(chat), with_tools: with_tools.map(source), tokens }))
    }

    /// Formats a conversation. With `reply`, the text ends with the start of the model's answer.
    ///
    /// # Errors
    /// [`Error::Template`] with the template's own error message, or the line of a syntax error.
    pub fn render(&self, messages: &[Message], reply: bool) -> Result<String> {
        self.render_with(messages, &ChatOptions { reply, ..ChatOptions::default() })
    }

    /// Formats a conversation with tools and other variables. Messages are [`Message`]s, or maps
    /// with the fields that the template reads, such as `tool_calls`.
    ///
    /// # Errors
    /// As [`render`](Self::render).
    pub fn render_with<M: Serialize>(
        &self,
        messages: &[M],
        options: &ChatOptions,
    ) -> Result<String> {
        let (messages, size) = value("messages", &messages)?;
        let mut values: BTreeMap<&str, Value> = BTreeMap::new();
        for (name, text) in &self.tokens {
            values.insert(name, Value::from(text.as_str()));
        }
        for (name, argument) in &options.arguments {
            values.insert(name, argument.clone());
        }
        values.insert("messages", messages);
        values.insert("tools", options.tools.clone().unwrap_or(Value::from(())));
        values.entry("documents").or_insert(Value::from(()));
        values.insert("add_generation_prompt", Value::from(options.reply));
        let source = self.with_tools.as_ref().filter(|_| options.tools.is_some());
        let template = source.unwrap_or(&self.chat).compiled()?;
        template.render(Value::from_pairs(values), size + options.size)
    }
}

/// Converts a value for templates, and returns the bytes of its JSON.
fn value(name: &str, of: &impl Serialize) -> Result<(Value, usize)> {
    let failed = |e: &dyn std::fmt::Display| Error::template(format_args!("{name:?}: {e}"));
    let json = serde_json::to_string(of).map_err(|e| failed(&e))?;
    // Converted through JSON text, which limits the depth and keeps the order of fields.
    let value = serde_json::from_str(&json).map_err(|e| failed(&e))?;
    Ok((value, json.len()))
}

/// Returns the template, or the one named `name` if there are several.
fn named_template(value: &serde_json::Value, name: &str) -> Option<String> {
    let named = |list: &Vec<serde_json::Value>| list.iter().find(|t| t["name"] == name).cloned();
    let one = match value.as_array() {
        Some(list) => named(list)?["template"].clone(),
        None => value.clone(),
    };
    one.as_str().map(str::to_owned)
}
