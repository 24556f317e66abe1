//! An engine behind HTTP as a subject: any server with OpenAI's completions or chat API.

use std::io::{BufRead, BufReader};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use longctx_core::{PromptCompressor, Rate};
use rand::Rng;
use serde_json::{Value, json};
use ureq::Agent;

use super::reader::Text;
use super::shorten::{Compressor, shorten};
use super::subject::{Answer, Question, Queue, Subject, SubjectError};
use crate::setting::{Api, ServerSetting, Setting};
use crate::{Error, Result};

/// The wait before the second attempt; it doubles with each further attempt.
const FIRST_WAIT: Duration = Duration::from_millis(500);
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// The largest size of a line of a stream, or of an answer that is not streamed, in bytes.
const MAX_BYTES: u64 = 64 << 20;

/// The fields of a request that a setting's `extra_body` cannot have.
const OWN_FIELDS: [&str; 7] =
    ["model", "prompt", "messages", "max_tokens", "temperature", "stream", "stream_options"];

/// A server as a subject: greedy, streamed, with several concurrent requests.
///
/// A failed attempt is repeated after a broken connection, a time-out, status 408, 409, 425, 429 or
/// 5xx, or an invalid answer. The wait between attempts doubles each time, or is the one that the
/// server requests. A sample whose attempts all fail has no result; the next samples then get one
/// attempt each until the server answers again.
pub struct Server {
    agent: Agent,
    model: String,
    setting: ServerSetting,
    key: Option<String>,
    text: Option<(Box<dyn Text + Send + Sync>, usize)>,
    compressor: Option<Compressor>,
    /// Whether all attempts at the last sample failed.
    is_down: AtomicBool,
}

impl Server {
    /// Creates the server of a setting.
    ///
    /// # Errors
    /// [`Error::Setting`] if the setting names no server, a number is 0, the environment variable of
    /// the key is not set, or `extra_body` has a field that every request has.
    pub fn new(setting: &Setting) -> Result<Self> {
        let wrong =
            |expected: &str, got: String| Error::setting(setting.name.clone(), expected, got);
        let server = setting.server.clone();
        let server = server.ok_or_else(|| wrong("a server", "none".into()))?;
        if server.concurrency == 0 || server.tries == 0 || server.timeout_seconds == 0 {
            let got = format!("{server:?}");
            return Err(wrong("a concurrency, tries and a time-out above 0", got));
        }
        if server.token_ids && server.tokenizer.is_none() {
            return Err(wrong("a server's tokenizer, for token ids", "none".into()));
        }
        if let Some(field) = server.extra_body.keys().find(|field| OWN_FIELDS.contains(&&***field))
        {
            let expected = format!("an extra_body without {OWN_FIELDS:?}");
            return Err(wrong(&expected, field.clone()));
        }
        let key = |name: &String| {
            std::env::var(name)
                .map_err(|_| wrong("an API key in the environment", format!("no {name}")))
        };
        let key = server.key_env.as_ref().map(key).transpose()?;
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(Duration::from_secs(server.timeout_seconds)))
            .build()
            .into();
        let model = setting.model.clone();
        let is_down = AtomicBool::new(false);
        Ok(Self { agent, model, setting: server, key, text: None, compressor: None, is_down })
    }

    /// Truncates turns in the middle to `context` tokens of this tokenizer, counts tokens with it,
    /// and formats the prompts of the completions API with its template.
    #[must_use]
    pub fn with_text(mut self, text: impl Text + Send + Sync + 'static, context: usize) -> Self {
        self.text = Some((Box::new(text), context));
        self
    }

    /// Compresses prompts before they are sent. Requires [`with_text`](Self::with_text).
    ///
    /// # Errors
    /// [`Error::Setting`] if there is no tokenizer.
    pub fn with_compressor(
        mut self,
        compressor: Box<dyn PromptCompressor>,
        rate: Rate,
    ) -> Result<Self> {
        if self.text.is_none() {
            return Err(Error::setting("server", "a tokenizer, to compress prompts", "none"));
        }
        self.compressor = Some((compressor, rate));
        Ok(self)
    }

    /// Sends samples to the server concurrently.
    fn answer_each(&mut self, questions: &[Question<'_>]) -> Vec<Result<Answer, SubjectError>> {
        let jobs: Vec<_> = questions.iter().map(|question| self.job(*question)).collect();
        let client = Client {
            agent: &self.agent,
            model: &self.model,
            setting: &self.setting,
            key: self.key.as_deref(),
            text: self.text.as_ref().map(|(text, _)| &**text),
            is_down: &self.is_down,
        };
        let client = &client;
        thread::scope(|scope| {
            let ask = |job| {
                scope.spawn(move || {
                    Result::<_, SubjectError>::and_then(job, |job| client.answer(&job))
                })
            };
            let running: Vec<_> = jobs.into_iter().map(ask).collect();
            let panicked = |_| Err("the request's thread panicked".into());
            running.into_iter().map(|thread| thread.join().unwrap_or_else(panicked)).collect()
        })
    }

    /// Truncates and compresses the turns.
    fn job<'a>(&mut self, question: Question<'a>) -> Result<Requests<'a>, SubjectError> {
        let sample = question.sample;
        let mut job = Requests { question, turns: Vec::new(), spent: Duration::ZERO, saved: 0 };
        for (i, turn) in sample.turns.iter().enumerate() {
            let Some((text, limit)) = &self.text else {
                job.turns.push(turn.clone());
                continue;
            };
            let context = sample.context.as_ref().filter(|_| i == 0);
            let text = (&**text as &dyn Text, *limit);
            let asked = sample.question.as_deref();
            let short = shorten(turn, context, asked, text, self.compressor.as_mut())?;
            job.turns.push(short.text);
            job.spent += short.spent;
            job.saved += short.saved;
        }
        Ok(job)
    }
}

/// The requests of one sample.
struct Requests<'a> {
    question: Question<'a>,
    turns: Vec<String>,
    /// Time within the compressor.
    spent: Duration,
    /// Tokens removed by compression.
    saved: usize,
}

impl Subject for Server {
    fn answer(&mut self, question: &Question<'_>) -> Result<Answer, SubjectError> {
        self.answer_each(std::slice::from_ref(question)).remove(0)
    }

    fn answer_all<'a>(&mut self, queue: &mut dyn Queue<'a>) {
        loop {
            let take = |_| queue.next();
            let (numbers, questions): (Vec<_>, Vec<_>) =
                (0..self.setting.concurrency).map_while(take).unzip();
            if numbers.is_empty() {
                return;
            }
            for (number, answer) in numbers.into_iter().zip(self.answer_each(&questions)) {
                queue.answered(number, answer);
            }
        }
    }
}

/// State shared by the requests.
struct Client<'a> {
    agent: &'a Agent,
    model: &'a str,
    setting: &'a ServerSetting,
    key: Option<&'a str>,
    text: Option<&'a (dyn Text + Send + Sync)>,
    is_down: &'a AtomicBool,
}

/// A prompt as the model reads it.
struct Prompt {
    text: String,
    /// Whether it is in the chat template, which contains the tokens that begin a prompt.
    in_template: bool,
}

/// The answer of one turn.
#[derive(Default)]
struct Completion {
    text: String,
    first: Option<Duration>,
    all: Duration,
    prompt_tokens: Option<usize>,
    new_tokens: Option<usize>,
    /// Number of stream events with text.
    pieces: usize,
}

/// The failure of an attempt.
struct Failure {
    message: String,
    /// Whether another attempt may succeed, and the wait that the server requests.
    retryable: bool,
    wait: Option<Duration>,
}

impl Failure {
    fn transient(message: impl ToString) -> Self {
        Self { message: message.to_string(), retryable: true, wait: None }
    }
}

impl Client<'_> {
    fn answer(&self, job: &Requests<'_>) -> Result<Answer, SubjectError> {
        let sample = job.question.sample;
        let mut done = Answer { model: job.spent, ..Answer::default() };
        let mut conversation: Vec<String> = Vec::new();
        for (i, turn) in job.turns.iter().enumerate() {
            conversation.push(turn.clone());
            let last = i + 1 == job.turns.len();
            let prefix = sample.answer_prefix.as_deref().filter(|_| last).unwrap_or("");
            let prompt = self.prompt(&conversation, prefix, &job.question)?;
            let body = self.body(&conversation, prefix, &prompt, &job.question)?;
            let written = self.attempts(&body, job.question.stops_at_newline)?;
            let count = |text: &str, special: bool| match self.text {
                Some(tokenizer) => tokenizer.encode(text, special).map(|tokens| tokens.len()),
                None => Ok(0),
            };
            let new_tokens = match written.new_tokens {
                Some(count) => count,
                None if self.text.is_none() => written.pieces,
                None => count(&written.text, false)?,
            };
            // A turn's prompt has the conversation before it, with the answers.
            let prompt_tokens = match written.prompt_tokens {
                Some(count) => count,
                None => count(&prompt.text, !prompt.in_template)?,
            };
            done.prompt_tokens = prompt_tokens.saturating_sub(done.new_tokens);
            done.new_tokens += new_tokens;
            if let (0, Some(first)) = (i, written.first) {
                done.first_token = job.spent + first;
            }
            done.decode += written.all.saturating_sub(written.first.unwrap_or(written.all));
            done.decode_steps += new_tokens.saturating_sub(1);
            done.model += written.all;
            conversation.push(written.text.clone());
            done.predictions.push(written.text);
        }
        let tokens = done.prompt_tokens + done.new_tokens;
        let bytes =
            |each: Option<f64>, tokens: usize| each.map(|each| (each * tokens as f64) as usize);
        done.kv_bytes = bytes(self.setting.bytes_per_token, tokens);
        done.dense_bytes = bytes(self.setting.dense_bytes_per_token, tokens + job.saved);
        Ok(done)
    }

    /// Formats a conversation as the model reads it: the chat API always applies the template, if
    /// it is known.
    fn prompt(
        &self,
        conversation: &[String],
        prefix: &str,
        question: &Question<'_>,
    ) -> Result<Prompt, SubjectError> {
        let in_template = match self.text {
            Some(text) if question.sample.chat || self.setting.api == Api::Chat => {
                text.chat(conversation)?
            }
            _ => None,
        };
        let plain = || conversation.join("\n").trim_end_matches(' ').to_owned();
        Ok(Prompt {
            in_template: in_template.is_some(),
            text: in_template.unwrap_or_else(plain) + prefix,
        })
    }

    fn body(
        &self,
        conversation: &[String],
        prefix: &str,
        prompt: &Prompt,
        question: &Question<'_>,
    ) -> Result<Value, SubjectError> {
        let mut body = json!({
            "model": self.model,
            "max_tokens": question.max_new_tokens,
            "temperature": 0,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        for (field, value) in &self.setting.extra_body {
            body[field] = value.clone();
        }
        match self.setting.api {
            Api::Completions => {
                let Prompt { text: prompt, in_template } = prompt;
                body["prompt"] = match self.text {
                    Some(text) if self.setting.token_ids => {
                        json!(text.encode(prompt, !in_template)?)
                    }
                    // The server's tokenizer adds this token itself.
                    Some(text) if *in_template => {
                        json!(text.bos().and_then(|bos| prompt.strip_prefix(bos)).unwrap_or(prompt))
                    }
                    _ => json!(prompt),
                };
            }
            Api::Chat => {
                let message = |(i, text): (usize, &String)| {
                    let role = if i % 2 == 0 { "user" } else { "assistant" };
                    // A server cannot continue a given start of an answer, so the start is appended
                    // to the question.
                    let last = if i + 1 == conversation.len() { prefix } else { "" };
                    json!({"role": role, "content": text.to_owned() + last})
                };
                body["messages"] = conversation.iter().enumerate().map(message).collect();
            }
        }
        Ok(body)
    }

    /// Repeats the request until there is an answer, at most as often as the setting allows.
    fn attempts(&self, body: &Value, stops_at_newline: bool) -> Result<Completion, SubjectError> {
        let tries = if self.is_down.load(Ordering::Relaxed) { 1 } else { self.setting.tries };
        let mut wait = FIRST_WAIT;
        let mut attempt = 1;
        loop {
            let failure = match self.ask(body, stops_at_newline) {
                Ok(written) => {
                    self.is_down.store(false, Ordering::Relaxed);
                    return Ok(written);
                }
                Err(failure) => failure,
            };
            if !failure.retryable {
                return Err(failure.message.into());
            }
            if attempt >= tries {
                self.is_down.store(true, Ordering::Relaxed);
                return Err(format!("{} (attempt {attempt} of {tries})", failure.message).into());
            }
            // A random factor keeps requests that failed together from being repeated together.
            let spread = rand::rng().random_range(0.75..1.25);
            thread::sleep(failure.wait.unwrap_or(wait).min(LONGEST_WAIT).mul_f64(spread));
            wait = (2 * wait).min(LONGEST_WAIT);
            attempt += 1;
        }
    }

    fn ask(&self, body: &Value, stops_at_newline: bool) -> Result<Completion, Failure> {
        let path = match self.setting.api {
            Api::Completions => "completions",
            Api::Chat => "chat/completions",
        };
        let url = format!("{}/{path}", self.setting.url.trim_end_matches('/'));
        let started = Instant::now();
        let mut request = self.agent.post(&url);
        if let Some(key) = self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let failed = |error: ureq::Error| Failure::transient(format!("{url}: {error}"));
        let mut response = request.send_json(body).map_err(failed)?;
        let status = response.status().as_u16();
        if status != 200 {
            let seconds = response
                .headers()
                .get("retry-after")
                .and_then(|text| text.to_str().ok()?.parse().ok());
            let text = response.body_mut().read_to_string().unwrap_or_default();
            return Err(Failure {
                message: format!("{url}: status {status}: {}", start(&text)),
                retryable: matches!(status, 408 | 409 | 425 | 429 | 500..),
                wait: seconds.map(Duration::from_secs),
            });
        }
        let reader = response.body_mut().with_config().limit(MAX_BYTES).reader();
        read(BufReader::new(reader), self.setting.api, started, stops_at_newline)
            .map_err(|message| Failure::transient(format!("{url}: {message}")))
    }
}

/// Returns the start of a text, for an error message.
fn start(text: &str) -> String {
    text.chars().take(200).collect()
}

/// Reads a stream of server-sent events, or one JSON object from a server that does not stream.
fn read(
    mut lines: impl BufRead,
    api: Api,
    started: Instant,
    stops_at_newline: bool,
) -> Result<Completion, String> {
    let mut written = Completion::default();
    let mut finished = false;
    let mut line = String::new();
    loop {
        line.clear();
        let count = lines.read_line(&mut line).map_err(|error| error.to_string())?;
        let data = line.trim();
        let data = match data.strip_prefix("data:").map(str::trim_start) {
            _ if count == 0 => break,
            Some("[DONE]") => {
                finished = true;
                break;
            }
            Some(data) => data,
            None if data.starts_with('{') => data,
            None if data.is_empty() || data.starts_with(':') || is_field(data) => continue,
            None => return Err(format!("expected a completion, got {:?}", start(data))),
        };
        let event: Value = serde_json::from_str(data)
            .map_err(|error| format!("expected JSON, got {:?}: {error}", start(data)))?;
        if let Some(error) = event.get("error").filter(|error| !error.is_null()) {
            return Err(format!("the server says {}", start(&error.to_string())));
        }
        let tokens = |name: &str| event["usage"][name].as_u64().map(|count| count as usize);
        written.prompt_tokens = tokens("prompt_tokens").or(written.prompt_tokens);
        written.new_tokens = tokens("completion_tokens").or(written.new_tokens);
        let choice = &event["choices"][0];
        finished |= choice["finish_reason"].is_string();
        let text = match api {
            Api::Completions => choice["text"].as_str(),
            Api::Chat => choice["delta"]["content"]
                .as_str()
                .or_else(|| choice["message"]["content"].as_str()),
        };
        let Some(text) = text.filter(|text| !text.is_empty()) else { continue };
        written.first.get_or_insert_with(|| started.elapsed());
        written.text += text;
        written.pieces += 1;
        if stops_at_newline && written.pieces > 1 && text.contains('\n') {
            finished = true;
            break;
        }
    }
    written.all = started.elapsed();
    if finished { Ok(written) } else { Err("the answer broke off".into()) }
}

/// Returns whether a line is a field of server-sent events without data.
fn is_field(line: &str) -> bool {
    ["event:", "id:", "retry:"].iter().any(|name| line.starts_with(name))
}
