//! Jinja templates as `transformers` runs them, within bounds of time and memory.

use std::thread;

use crate::python_json;
use jiff::Zoned;
use longctx_core::{Error, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, ErrorKind, State};

/// The longest template, in bytes. Those of public models have less than a quarter of it.
const MAX_LENGTH: usize = 128 << 10;
/// The longest tag, in bytes, texts in quotes aside: the parser's time grows with the square of an
/// expression's depth.
const MAX_TAG: usize = 4096;
/// The most signs in a row.
const MAX_SIGNS: usize = 8;
/// Steps of a template, each worth a byte of a string that it makes, beyond those for its input.
const FUEL: u64 = 4_000_000;
/// Steps for each byte of input.
const FUEL_PER_BYTE: u64 = 64;
/// The stack for parsing and running: an expression may be as deep as the template is long.
const STACK: usize = 512 << 20;

/// A compiled template.
#[derive(Debug, Clone)]
pub(crate) struct Template {
    environment: Environment<'static>,
}

impl Template {
    /// # Errors
    /// [`Error::Unsupported`] with the line that does not parse.
    pub fn new(source: &str) -> Result<Self> {
        if source.len() > MAX_LENGTH {
            let what = format!("a chat template of {} bytes (at most {MAX_LENGTH})", source.len());
            return Err(Error::Unsupported(what));
        }
        check_tags(source)?;
        let source = without_generation_tags(source);
        let environment = with_deep_stack(|| {
            let mut environment = environment()?;
            environment.add_template_owned("chat", source)?;
            Ok(environment)
        })?;
        Ok(Self { environment })
    }

    /// The template's text for `values`, which stand for `input` bytes.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with what the template objects to, or if it goes on for too long.
    pub fn render(&self, values: Value, input: usize) -> Result<String> {
        with_deep_stack(|| {
            let mut environment = self.environment.clone();
            let fuel = FUEL.saturating_add(FUEL_PER_BYTE.saturating_mul(input as u64));
            environment.set_fuel(Some(fuel));
            environment.get_template("chat")?.render(values)
        })
    }
}

fn environment() -> Result<Environment<'static>, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_debug(false);
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
    environment.set_syntax(syntax);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |message: String| -> Result<String, _> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", tojson);
    Ok(environment)
}

fn strftime_now(format: &str) -> Result<String, minijinja::Error> {
    let bad = |e| minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {e}"));
    jiff::fmt::strtime::format(format, &Zoned::now()).map_err(bad)
}

fn tojson(_: &State, value: &Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let separators: Option<Vec<String>> = options.get("separators")?;
    let style = python_json::Style {
        ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        indent: options.get("indent")?,
        separators: match separators.as_deref() {
            Some([item, key]) => Some((item.clone(), key.clone())),
            _ => None,
        },
        sorted: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    python_json::to_string(value, &style)
}

/// Refuses expressions that no conversation needs and that the parser takes too long for.
fn check_tags(source: &str) -> Result<()> {
    let mut rest = source;
    while let Some(at) = rest.find("{{").into_iter().chain(rest.find("{%")).min() {
        let tag = &rest[at + 2..];
        let (mut quote, mut length, mut signs) = (None, 0, 0);
        let mut end = tag.len();
        let mut chars = tag.char_indices();
        while let Some((i, c)) = chars.next() {
            match (quote, c) {
                (Some(_), '\\') => drop(chars.next()),
                (Some(open), _) if c == open => quote = None,
                (Some(_), _) => {}
                (None, '"' | '\'') => quote = Some(c),
                (None, '}' | '%') if tag[i + 1..].starts_with('}') => {
                    end = i;
                    break;
                }
                (None, _) => length += c.len_utf8(),
            }
            signs = match c {
                '-' => signs + 1,
                _ if c.is_whitespace() => signs,
                _ => 0,
            };
            if length > MAX_TAG || signs > MAX_SIGNS {
                let what = "a chat template with an expression of inordinate length";
                return Err(Error::Unsupported(what.into()));
            }
        }
        rest = &tag[end..];
    }
    Ok(())
}

/// `{% generation %}` marks the assistant's words for training; here it is a scope of its own,
/// which is all that is left.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out.push_str(before);
        let inner = tag.trim_start_matches(['-', '+']).trim_start();
        let word = inner.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').next();
        let word = word.unwrap_or_default();
        let closes = inner[word.len()..].trim_start().trim_start_matches(['-', '+']);
        let scope = match word {
            "generation" if closes.starts_with("%}") => "with",
            "endgeneration" if closes.starts_with("%}") => "endwith",
            _ => word,
        };
        out.push_str(&tag[..tag.len() - inner.len()]);
        out.push_str(scope);
        rest = &inner[word.len()..];
    }
    out + rest
}

/// Runs a function on a stack that a deeply nested expression or value does not overflow. What it
/// refers to is dropped there, too.
fn with_deep_stack<T: Send>(run: impl FnOnce() -> Result<T, minijinja::Error> + Send) -> Result<T> {
    let failed = |e: &dyn std::fmt::Display| Error::Unsupported(format!("chat template: {e}"));
    thread::scope(|scope| {
        let run = || run().map_err(|e| failed(&e));
        let thread = thread::Builder::new().stack_size(STACK).spawn_scoped(scope, run);
        // A line of more than 65,535 characters makes the engine's parser panic.
        thread
            .map_err(|e| failed(&e))?
            .join()
            .unwrap_or_else(|_| Err(failed(&"the engine panicked")))
    })
}
