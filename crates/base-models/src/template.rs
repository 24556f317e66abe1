//! Runs Jinja templates as `transformers` does, with bounds on time and memory.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use crate::python_json;
use crate::template_source::{NAMESPACE_FILTER, prepare};
use jiff::Zoned;
use longctx_core::{Error, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, ErrorKind, State};

/// Base number of steps of a template. Each byte of a string that it creates costs a step.
const FUEL: u64 = 4_000_000;
/// Additional steps for each byte of input.
const FUEL_PER_BYTE: u64 = 64;
/// Stack size for parsing and rendering: an expression may be as deep as the template is long.
const STACK: usize = 512 << 20;

/// A compiled template.
#[derive(Debug, Clone)]
pub(crate) struct Template {
    environment: Environment<'static>,
}

impl Template {
    /// # Errors
    /// [`Error::Template`] with the line of a syntax error.
    pub fn new(source: &str) -> Result<Self> {
        let source = prepare(source)?;
        let environment = with_deep_stack(|| {
            let mut environment = environment()?;
            environment.add_template_owned("chat", source)?;
            Ok(environment)
        })?;
        Ok(Self { environment })
    }

    /// Renders the template for `values`, whose JSON has `input` bytes.
    ///
    /// # Errors
    /// [`Error::Template`] with the template's own error message, or if it runs for too long.
    pub fn render(&self, values: Value, input: usize) -> Result<String> {
        with_deep_stack(|| {
            let mut environment = self.environment.clone();
            let fuel = FUEL.saturating_add(FUEL_PER_BYTE.saturating_mul(input as u64));
            environment.set_fuel(Some(fuel));
            let steps = AtomicU64::new(fuel);
            environment.add_filter(NAMESPACE_FILTER, move |value: Value| {
                stored_in_namespace(value, &steps)
            });
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

/// Checks a value before it is stored in a namespace. A value that contains a namespace is refused:
/// a namespace could then contain itself, and printing or comparing it would not end.
fn stored_in_namespace(value: Value, steps: &AtomicU64) -> Result<Value, minijinja::Error> {
    let refused = |what: &'static str| minijinja::Error::new(ErrorKind::InvalidOperation, what);
    let mut all = vec![value.clone()];
    while let Some(part) = all.pop() {
        let take = |n: u64| n.checked_sub(1);
        if steps.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_err() {
            return Err(refused("the values stored in namespaces are too large"));
        }
        if part.as_object().is_some_and(|object| object.type_name().ends_with("::Namespace")) {
            return Err(refused("a namespace can't be stored in a namespace"));
        }
        match part.kind() {
            ValueKind::Seq | ValueKind::Iterable => all.extend(part.try_iter()?),
            ValueKind::Map => {
                for key in part.try_iter()? {
                    all.push(part.get_item(&key)?);
                }
            }
            _ => {}
        }
    }
    Ok(value)
}

/// Runs a function on a large stack that deeply nested expressions or values do not overflow. Its
/// captures are dropped there too.
fn with_deep_stack<T: Send>(run: impl FnOnce() -> Result<T, minijinja::Error> + Send) -> Result<T> {
    thread::scope(|scope| {
        let run = || run().map_err(Error::template);
        let thread = thread::Builder::new().stack_size(STACK).spawn_scoped(scope, run);
        // A line of more than 65,535 characters makes the engine's parser panic.
        thread
            .map_err(Error::template)?
            .join()
            .unwrap_or_else(|_| Err(Error::template("the engine panicked")))
    })
}
