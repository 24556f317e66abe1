//! Requests and responses of the OpenAI API, as far as the server answers them.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use base_models::Message;
use longctx_core::Sampling;
use serde::{Deserialize, Serialize};
use serde_json::json;

/// `POST /v1/completions`. Other fields, the model's name among them, are ignored.
#[derive(Debug, Deserialize)]
pub struct Completion {
    /// The text to continue.
    pub prompt: Prompt,
    /// The most tokens to write.
    pub max_tokens: Option<usize>,
    #[serde(flatten)]
    pub common: Common,
}

/// A prompt as text or as tokens.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub enum Prompt {
    /// Text.
    Text(String),
    /// Token ids.
    Tokens(Vec<u32>),
    /// A list of one text.
    Texts(Vec<String>),
}

/// `POST /v1/chat/completions`. Other fields, the model's name among them, are ignored.
#[derive(Debug, Deserialize)]
pub struct Chat {
    /// The conversation.
    pub messages: Vec<Turn>,
    /// The most tokens to write.
    pub max_tokens: Option<usize>,
    /// Its newer name.
    pub max_completion_tokens: Option<usize>,
    #[serde(flatten)]
    pub common: Common,
}

/// One message of a conversation.
#[derive(Debug, Deserialize)]
pub struct Turn {
    /// "system", "user" or "assistant".
    pub role: String,
    /// Its text.
    pub content: Content,
}

/// A message's text, whole or in parts.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub enum Content {
    /// Whole.
    Text(String),
    /// In parts.
    Parts(Vec<Part>),
}

/// A part of a message.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Part {
    /// Text; other kinds of parts are refused.
    Text {
        /// The text.
        text: String,
    },
}

impl Turn {
    /// As the chat template takes it.
    pub fn message(&self) -> Message {
        let content = match &self.content {
            Content::Text(text) => text.clone(),
            Content::Parts(parts) => {
                parts.iter().map(|Part::Text { text }| text.as_str()).collect()
            }
        };
        Message { role: self.role.clone(), content }
    }
}

/// What both kinds of requests have.
#[derive(Debug, Deserialize)]
pub struct Common {
    /// 0 is greedy.
    pub temperature: Option<f32>,
    /// Nucleus sampling.
    pub top_p: Option<f32>,
    /// The same seed gives the same tokens.
    pub seed: Option<u64>,
    /// Strings that end the text.
    pub stop: Option<Stop>,
    /// Whether the answer comes as server-sent events.
    #[serde(default)]
    pub stream: bool,
    /// What a stream adds.
    pub stream_options: Option<StreamOptions>,
    /// Answers to one prompt; only 1.
    pub n: Option<usize>,
}

/// What a stream adds.
#[derive(Debug, Deserialize)]
pub struct StreamOptions {
    /// A last event with the numbers of tokens.
    #[serde(default)]
    pub include_usage: bool,
}

/// One stop string or several.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum Stop {
    /// One.
    One(String),
    /// Several.
    Several(Vec<String>),
}

impl Common {
    /// How tokens are chosen. Without a seed, each request has the given one.
    pub fn sampling(&self, seed: u64) -> Sampling {
        match self.temperature {
            Some(temperature) if temperature <= 0.0 => Sampling::Greedy,
            temperature => Sampling::Random {
                temperature: temperature.unwrap_or(1.0),
                top_k: None,
                top_p: self.top_p,
                seed: self.seed.unwrap_or(seed),
            },
        }
    }

    /// The strings that end the text.
    pub fn stops(&self) -> Vec<String> {
        match self.stop.clone() {
            None => Vec::new(),
            Some(Stop::One(one)) => vec![one],
            Some(Stop::Several(several)) => several,
        }
    }

    /// Whether a stream ends with the numbers of tokens.
    pub fn include_usage(&self) -> bool {
        self.stream_options.as_ref().is_some_and(|options| options.include_usage)
    }
}

/// Tokens that a request took.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Usage {
    /// Of the prompt.
    pub prompt_tokens: usize,
    /// Written.
    pub completion_tokens: usize,
    /// Both.
    pub total_tokens: usize,
    /// More on the prompt's.
    pub prompt_tokens_details: PromptTokens,
}

/// More on a prompt's tokens.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct PromptTokens {
    /// Tokens that an earlier request's memory gave.
    pub cached_tokens: usize,
}

/// An error as the API has it.
#[derive(Debug)]
pub struct Failure {
    /// The status of the response.
    pub status: StatusCode,
    /// What was expected and what came.
    pub message: String,
}

impl Failure {
    /// A request that can't be answered as it is.
    pub fn bad_request(message: impl std::fmt::Display) -> Self {
        Self { status: StatusCode::BAD_REQUEST, message: message.to_string() }
    }

    /// A server that can't answer now.
    pub fn unavailable(message: impl std::fmt::Display) -> Self {
        Self { status: StatusCode::SERVICE_UNAVAILABLE, message: message.to_string() }
    }

    /// The body of the response.
    pub fn body(&self) -> serde_json::Value {
        let kind = match self.status.is_client_error() {
            true => "invalid_request_error",
            false => "server_error",
        };
        let code = self.status.as_u16();
        json!({ "error": { "message": self.message, "type": kind, "param": null, "code": code } })
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.status, Json(self.body())).into_response()
    }
}
