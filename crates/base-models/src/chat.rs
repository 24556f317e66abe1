//! Chat templates: a conversation as the text that a model was trained on.

use std::path::Path;

use longctx_core::{Error, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, context};
use serde_json::Value;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// "system", "user" or "assistant".
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A turn of the user's.
    pub fn user(content: impl Into<String>) -> Self {
        Self { role: "user".into(), content: content.into() }
    }

    /// A turn of the model's.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self { role: "assistant".into(), content: content.into() }
    }

    /// What the model is told before the conversation.
    pub fn system(content: impl Into<String>) -> Self {
        Self { role: "system".into(), content: content.into() }
    }
}

/// A model's chat template, in Jinja, as `tokenizer_config.json` or a GGUF file carries it.
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
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    /// Compiles a template; `bos` and `eos` are the tokens that it may name.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the line that does not parse.
    pub fn new(template: &str, bos: &str, eos: &str) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(failed)?);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<String, _> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_template_owned("chat", template.to_owned()).map_err(failed)?;
        Ok(Self { environment, bos: bos.into(), eos: eos.into() })
    }

    /// The template of a checkpoint folder: `chat_template.jinja`, or the one in `tokenizer_config.json`. `None` if there is none.
    pub(crate) fn from_folder(folder: &Path) -> Result<Option<Self>> {
        let config = folder.join("tokenizer_config.json");
        let json: Value = match std::fs::read_to_string(&config) {
            Ok(text) => serde_json::from_str(&text).map_err(|e| Error::file(&config, e))?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Value::Null,
            Err(e) => return Err(Error::file(&config, e)),
        };
        let separate = std::fs::read_to_string(folder.join("chat_template.jinja")).ok();
        let Some(template) = separate.or_else(|| named_template(&json["chat_template"])) else {
            return Ok(None);
        };
        Self::new(&template, &token(&json["bos_token"]), &token(&json["eos_token"])).map(Some)
    }

    /// The conversation as text; `reply`: with the words that make the model answer.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with what the template itself objects to.
    pub fn render(&self, messages: &[Message], reply: bool) -> Result<String> {
        let template = self.environment.get_template("chat").map_err(failed)?;
        let turn = |m: &Message| context! { role => &m.role, content => &m.content };
        let values = context! {
            messages => messages.iter().map(turn).collect::<Vec<_>>(),
            add_generation_prompt => reply,
            bos_token => &self.bos,
            eos_token => &self.eos,
        };
        template.render(values).map_err(failed)
    }
}

/// One template, or the one called "default" of several.
fn named_template(value: &Value) -> Option<String> {
    let default = |list: &Vec<Value>| list.iter().find(|t| t["name"] == "default").cloned();
    let one = value.as_array().and_then(default).map_or(value.clone(), |t| t["template"].clone());
    one.as_str().map(str::to_owned)
}

/// A token is written as a string, or as an object with its content.
fn token(value: &Value) -> String {
    value.as_str().or_else(|| value["content"].as_str()).unwrap_or_default().to_owned()
}

fn failed(e: minijinja::Error) -> Error {
    Error::Unsupported(format!("chat template: {e:#}"))
}
