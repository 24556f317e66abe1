use serde_json::{Map, Value};

use crate::metric::{Metric, retrieved};

/// The fields of a LongBench record that a task needs.
pub(super) struct Record {
    pub id: Option<String>,
    pub context: String,
    pub input: String,
    pub answers: Vec<String>,
    pub all_classes: Vec<String>,
    length: Option<u64>,
}

/// An error in a record.
pub(super) struct SubjectError {
    pub field: &'static str,
    pub message: String,
}

impl Record {
    pub fn parse(line: &[u8]) -> Result<Self, SubjectError> {
        let broken =
            |error: serde_json::Error| fault("(line)", format!("not a JSON object: {error}"));
        let fields: Map<String, Value> = serde_json::from_slice(line).map_err(broken)?;
        let id = match fields.get("_id") {
            None | Some(Value::Null) => None,
            Some(_) => Some(text(&fields, "_id")?),
        };
        Ok(Self {
            id,
            context: text(&fields, "context")?,
            input: text(&fields, "input")?,
            answers: texts(&fields, "answers")?,
            all_classes: match fields.get("all_classes") {
                None | Some(Value::Null) => Vec::new(),
                Some(_) => texts(&fields, "all_classes")?,
            },
            length: fields.get("length").and_then(Value::as_u64),
        })
    }

    /// Returns the number of words of the context, as stored in the record.
    pub fn length(&self) -> Result<u64, SubjectError> {
        self.length.ok_or_else(|| fault("length", "expected a number of words"))
    }

    /// Checks that an answer can be scored.
    pub fn check(&self, metric: Metric) -> Result<(), SubjectError> {
        if self.answers.is_empty() {
            return Err(fault("answers", "expected at least one, got none"));
        }
        if metric == Metric::Classification && self.all_classes.is_empty() {
            return Err(fault("all_classes", "expected the classes to choose from, got none"));
        }
        match self.answers.iter().find(|answer| retrieved(answer).is_none()) {
            Some(answer) if metric == Metric::Retrieval => {
                Err(fault("answers", format!("expected \"Paragraph N\", got {answer:?}")))
            }
            _ => Ok(()),
        }
    }
}

fn fault(field: &'static str, message: impl Into<String>) -> SubjectError {
    SubjectError { field, message: message.into() }
}

fn text(fields: &Map<String, Value>, name: &'static str) -> Result<String, SubjectError> {
    match fields.get(name) {
        Some(Value::String(text)) => Ok(text.clone()),
        other => Err(fault(name, format!("expected a string, got {}", kind(other)))),
    }
}

fn texts(fields: &Map<String, Value>, name: &'static str) -> Result<Vec<String>, SubjectError> {
    let wrong = |got| fault(name, format!("expected a list of strings, got {got}"));
    let Some(Value::Array(items)) = fields.get(name) else {
        return Err(wrong(kind(fields.get(name)).to_owned()));
    };
    let item = |item: &Value| match item {
        Value::String(text) => Ok(text.clone()),
        other => Err(wrong(format!("{} in the list", kind(Some(other))))),
    };
    items.iter().map(item).collect()
}

fn kind(value: Option<&Value>) -> &'static str {
    match value {
        None => "nothing",
        Some(Value::Null) => "null",
        Some(Value::Bool(_)) => "a boolean",
        Some(Value::Number(_)) => "a number",
        Some(Value::String(_)) => "a string",
        Some(Value::Array(_)) => "a list",
        Some(Value::Object(_)) => "an object",
    }
}
