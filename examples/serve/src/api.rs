//! Requests and responses of the supported part of the OpenAI API.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use base_models::Message;
use longctx_core::Sampling;
use serde::{Deserialize, Serialize};
use serde_json::json;

/// `POST /v1/completions`. Other fields are ignored, such as the model's name.
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
#[serde(untagged, expecting = "expected a text, a list of one text, or a list of token ids")]
pub enum Prompt {
    /// Text.
    Text(String),
    /// Token ids.
    Tokens(Vec<u32>),
    /// A list of one text.
    Texts(Vec<String>),
}

/// `POST /v1/chat/completions`. Other fields are ignored, such as the model's name.
#[derive(Debug, Deserialize)]
pub struct Chat {
    /// The conversation.
    pub messages: Vec<Turn>,
    /// The most tokens to write.
    pub max_tokens: Option<usize>,
    /// The newer name of `max_tokens`.
    pub max_completion_tokens: Option<usize>,
    #[serde(flatten)]
    pub common: Common,
}

/// One message of a conversation.
#[derive(Debug, Deserialize)]
pub struct Turn {
    /// "system", "user" or "assistant".
    pub role: String,
    /// The text of the message.
    pub content: Content,
}

/// A message's text, whole or in parts.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a text, or a list of parts of type \"text\"")]
pub enum Content {
    /// One text.
    Text(String),
    /// A list of parts.
    Parts(Vec<Part>),
}

/// A part of a message.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Part {
    /// Text; other kinds of parts are an error.
    Text {
        /// The text.
        text: String,
    },
}

impl Turn {
    /// Returns the message for the chat template.
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

/// The fields that both kinds of requests have.
#[derive(Debug, Deserialize)]
pub struct Common {
    /// Temperature of sampling; 0 is greedy.
    pub temperature: Option<f32>,
    /// The probability mass of nucleus sampling.
    pub top_p: Option<f32>,
    /// The random seed; the same seed gives the same tokens.
    pub seed: Option<u64>,
    /// Strings that end the text.
    pub stop: Option<Stop>,
    /// Whether the answer is streamed as server-sent events.
    pub stream: Option<bool>,
    /// What a stream adds.
    pub stream_options: Option<StreamOptions>,
    /// The number of answers per prompt; only 1 is supported.
    pub n: Option<usize>,
}

/// What a stream adds.
#[derive(Debug, Deserialize)]
pub struct StreamOptions {
    /// Whether the last event has the numbers of tokens.
    pub include_usage: Option<bool>,
}

/// One stop string or several.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged, expecting = "stop: expected a text or a list of texts")]
pub enum Stop {
    /// One string.
    One(String),
    /// Several strings.
    Several(Vec<String>),
}

impl Common {
    /// Returns the parameters of sampling. `seed` is the default seed.
    pub fn sampling(&self, seed: u64) -> Sampling {
        match self.temperature {
            Some(0.0) => Sampling::Greedy,
            temperature => Sampling::Random {
                temperature: temperature.unwrap_or(1.0),
                top_k: None,
                top_p: self.top_p,
                seed: self.seed.unwrap_or(seed),
            },
        }
    }

    /// Returns the strings that end the text.
    pub fn stops(&self) -> Vec<String> {
        match self.stop.clone() {
            None => Vec::new(),
            Some(Stop::One(one)) => vec![one],
            Some(Stop::Several(several)) => several,
        }
    }

    /// Returns whether the answer is streamed.
    pub fn streams(&self) -> bool {
        self.stream.unwrap_or(false)
    }

    /// Returns whether a stream ends with the numbers of tokens.
    pub fn include_usage(&self) -> bool {
        let options = self.stream_options.as_ref();
        options.and_then(|options| options.include_usage).unwrap_or(false)
    }
}

/// The numbers of tokens of a request.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens generated.
    pub completion_tokens: usize,
    /// The sum of both.
    pub total_tokens: usize,
    /// Details of the prompt's tokens.
    pub prompt_tokens_details: PromptTokens,
}

/// Details of a prompt's tokens.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct PromptTokens {
    /// Tokens whose keys and values come from an earlier request.
    pub cached_tokens: usize,
}

/// An error response of the API.
#[derive(Debug)]
pub struct Failure {
    /// The status of the response.
    pub status: StatusCode,
    /// The message: what was expected and what was found.
    pub message: String,
}

impl Failure {
    /// Returns the error of an invalid request.
    pub fn bad_request(message: impl std::fmt::Display) -> Self {
        Self { status: StatusCode::BAD_REQUEST, message: message.to_string() }
    }

    /// Returns the error of a server that cannot answer now.
    pub fn unavailable(message: impl std::fmt::Display) -> Self {
        Self { status: StatusCode::SERVICE_UNAVAILABLE, message: message.to_string() }
    }

    /// Returns the body of the response.
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Clients of OpenAI's API send null for options that are not set.
    #[test]
    fn options_can_be_null() {
        let options = ["temperature", "top_p", "seed", "stop", "stream", "stream_options", "n"];
        for option in options.into_iter().chain(["max_tokens"]) {
            let body = json!({ "prompt": "a", option: null });
            let request: Completion = serde_json::from_value(body).unwrap();
            assert!(!request.common.streams() && !request.common.include_usage(), "{option}");
        }
        let body =
            json!({ "prompt": "a", "stream": true, "stream_options": { "include_usage": null } });
        let request: Completion = serde_json::from_value(body).unwrap();
        assert!(request.common.streams() && !request.common.include_usage());
    }
}
