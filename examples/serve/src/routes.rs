//! HTTP routes: convert HTTP requests to requests of the scheduler, and its events to responses.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use axum::extract::rejection::JsonRejection;
use axum::extract::{DefaultBodyLimit, Request as HttpRequest, State};
use axum::http::{Method, StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::sse::{Event as SseEvent, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use longctx_core::Sampler;
use longctx_examples::llm::Llm;
use serde_json::{Value, json};
use subtle::ConstantTimeEq;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio_stream::{Stream, StreamExt};

use crate::answer::{Answer, Piece};
use crate::api::{Chat, Common, Completion, Failure, Prompt};
use crate::metrics::Metrics;
use crate::scheduler::Request;

/// The state shared by all routes.
pub struct App {
    /// The tokenizer and the chat template.
    pub llm: Llm,
    /// The model's name in the list of models.
    pub name: String,
    /// The largest number of tokens of a prompt and its answer.
    pub context: usize,
    /// The size of the vocabulary.
    pub vocab_size: usize,
    /// The largest number of tokens of an answer.
    pub max_tokens: usize,
    /// The largest number of waiting requests.
    pub queue: usize,
    /// The key that requests under `/v1` must send; `None` if none is needed.
    pub api_key: Option<String>,
    /// The scheduler's queue.
    pub requests: UnboundedSender<Request>,
    /// The metrics.
    pub metrics: Arc<Metrics>,
    /// The number of the next request.
    pub count: AtomicU64,
}

/// Returns the routes. Bodies of more than `body_limit` bytes are rejected. All errors have the
/// body of [`Failure`].
pub fn router(app: Arc<App>, body_limit: usize) -> Router {
    let api = Router::new()
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/models", get(models))
        .route_layer(middleware::from_fn_with_state(app.clone(), authorize));
    Router::new()
        .merge(api)
        .route("/health", get(|| async { Json(json!({ "status": "ok" })) }))
        .route("/metrics", get(metrics))
        .fallback(unknown_path)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(body_limit))
        .with_state(app)
}

async fn authorize(State(app): State<Arc<App>>, request: HttpRequest, next: Next) -> Response {
    let Some(key) = &app.api_key else { return next.run(request).await };
    let header = request.headers().get(header::AUTHORIZATION);
    let given = header.and_then(|h| h.to_str().ok()).and_then(|h| h.strip_prefix("Bearer "));
    // A comparison in constant time does not reveal how much of a guess was right.
    if given.is_some_and(|given| bool::from(given.as_bytes().ct_eq(key.as_bytes()))) {
        return next.run(request).await;
    }
    let message = "expected the server's API key as a bearer token".into();
    Failure { status: StatusCode::UNAUTHORIZED, message }.into_response()
}

async fn unknown_path(uri: Uri) -> Failure {
    let message = format!("{}: expected a path of the API, such as /v1/completions", uri.path());
    Failure { status: StatusCode::NOT_FOUND, message }
}

async fn wrong_method(method: Method, uri: Uri) -> Failure {
    let message = format!("{}: the method {method} is not allowed", uri.path());
    Failure { status: StatusCode::METHOD_NOT_ALLOWED, message }
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], app.metrics.text()).into_response()
}

async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    let model = json!({ "id": app.name, "object": "model", "created": 0, "owned_by": "longctx" });
    Json(json!({ "object": "list", "data": [model] }))
}

async fn completions(
    State(app): State<Arc<App>>,
    body: Result<Json<Completion>, JsonRejection>,
) -> Result<Response, Failure> {
    let Json(request) = body.map_err(refused)?;
    let text = match request.prompt {
        Prompt::Text(text) => Ok(text),
        Prompt::Tokens(tokens) => Err(tokens),
        Prompt::Texts(mut texts) => match (texts.pop(), texts.is_empty()) {
            (Some(text), true) => Ok(text),
            _ => {
                return Err(Failure::bad_request("prompt: expected one text, got several or none"));
            }
        },
    };
    let prompt = match text {
        Ok(text) => tokenized(&app, move |llm| llm.encode(&text)).await?,
        Err(tokens) => tokens,
    };
    let answer = begin(&app, prompt, request.max_tokens.or(Some(16)), &request.common)?;
    let shape = Shape::new(
        &app,
        "cmpl",
        "text_completion",
        "text_completion",
        |piece| json!({ "text": piece }),
    );
    respond(answer, shape, &request.common).await
}

async fn chat_completions(
    State(app): State<Arc<App>>,
    body: Result<Json<Chat>, JsonRejection>,
) -> Result<Response, Failure> {
    let Json(request) = body.map_err(refused)?;
    let messages: Vec<_> = request.messages.iter().map(|turn| turn.message()).collect();
    let prompt = tokenized(&app, move |llm| llm.encode_chat(&messages)).await?;
    let most = request.max_completion_tokens.or(request.max_tokens);
    let answer = begin(&app, prompt, most, &request.common)?;
    let piece: fn(&str) -> Value = match request.common.streams() {
        true => |piece| json!({ "delta": { "role": "assistant", "content": piece } }),
        false => |piece| json!({ "message": { "role": "assistant", "content": piece } }),
    };
    let shape = Shape::new(&app, "chatcmpl", "chat.completion", "chat.completion.chunk", piece);
    respond(answer, shape, &request.common).await
}

/// Tokenizes a prompt on a thread of its own: a text of megabytes takes seconds, in which the other
/// connections go on.
async fn tokenized(
    app: &Arc<App>,
    encode: impl FnOnce(&Llm) -> anyhow::Result<Vec<u32>> + Send + 'static,
) -> Result<Vec<u32>, Failure> {
    let app = app.clone();
    let tokens = tokio::task::spawn_blocking(move || encode(&app.llm)).await;
    tokens.map_err(Failure::unavailable)?.map_err(Failure::bad_request)
}

/// Returns the error of a body that cannot be read. A field of a wrong type has status 400, as in
/// OpenAI's API, where axum's own status is 422.
fn refused(rejection: JsonRejection) -> Failure {
    let status = match rejection {
        JsonRejection::JsonDataError(_) => StatusCode::BAD_REQUEST,
        _ => rejection.status(),
    };
    Failure { status, message: rejection.body_text() }
}

/// Checks a request and sends it to the scheduler.
fn begin(
    app: &Arc<App>,
    prompt: Vec<u32>,
    max_tokens: Option<usize>,
    common: &Common,
) -> Result<Answer, Failure> {
    if let Some(n) = common.n.filter(|&n| n != 1) {
        return Err(Failure::bad_request(format!("n: expected 1, got {n}")));
    }
    if prompt.is_empty() {
        return Err(Failure::bad_request("prompt: expected at least one token, got none"));
    }
    // The model would refuse the whole batch of a step.
    if let Some((at, id)) = (0..).zip(&prompt).find(|&(_, &id)| id as usize >= app.vocab_size) {
        let expected = format!("an id below {}", app.vocab_size);
        return Err(Failure::bad_request(format!(
            "prompt: token {at}: expected {expected}, got {id}"
        )));
    }
    if max_tokens == Some(0) {
        return Err(Failure::bad_request("max_tokens: expected at least 1, got 0"));
    }
    let number = app.count.fetch_add(1, Ordering::Relaxed);
    let sampling = common.sampling(number);
    Sampler::new(sampling).map_err(Failure::bad_request)?;
    let room = app.context.saturating_sub(prompt.len());
    let most = max_tokens.unwrap_or(app.max_tokens).min(app.max_tokens).min(room);
    if most == 0 {
        let message = format!(
            "prompt and answer: expected at most {} tokens and an answer of at least one, got a prompt of {}",
            app.context,
            prompt.len()
        );
        return Err(Failure::bad_request(message));
    }
    // The scheduler takes requests between steps, so those that it has not seen yet count too.
    let waiting = app.metrics.waiting.inc();
    if waiting >= app.queue as i64 {
        app.metrics.waiting.dec();
        let message = format!("{} requests wait already", app.queue);
        return Err(Failure { status: StatusCode::TOO_MANY_REQUESTS, message });
    }
    let (events, received) = unbounded_channel();
    let prompt_tokens = prompt.len();
    let request =
        Request { prompt, max_tokens: most, sampling, stop: app.llm.eos().to_vec(), events };
    let gone = |_| Failure::unavailable("the server is shutting down");
    app.requests.send(request).map_err(gone)?;
    Ok(answer(app, received, prompt_tokens, common))
}

fn answer(
    app: &Arc<App>,
    received: UnboundedReceiver<crate::scheduler::Event>,
    prompt_tokens: usize,
    common: &Common,
) -> Answer {
    Answer::new(app.clone(), received, prompt_tokens, common.stops(), Instant::now())
}

/// The JSON format of a kind of answer.
struct Shape {
    id: String,
    created: u64,
    model: String,
    whole: &'static str,
    chunk: &'static str,
    piece: fn(&str) -> Value,
}

impl Shape {
    fn new(
        app: &App,
        prefix: &str,
        whole: &'static str,
        chunk: &'static str,
        piece: fn(&str) -> Value,
    ) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let id = format!("{prefix}-{:x}", now.as_nanos());
        Self { id, created: now.as_secs(), model: app.name.clone(), whole, chunk, piece }
    }

    /// Returns a response with one choice.
    fn choice(&self, object: &str, piece: &str, finish: Option<&str>) -> Value {
        let mut choice = (self.piece)(piece);
        choice["index"] = 0.into();
        choice["finish_reason"] = finish.into();
        choice["logprobs"] = Value::Null;
        json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model,
            "choices": [choice],
        })
    }
}

async fn respond(answer: Answer, shape: Shape, common: &Common) -> Result<Response, Failure> {
    if common.streams() {
        let events = stream(answer, shape, common.include_usage());
        return Ok(Sse::new(events).into_response());
    }
    let mut answer = answer;
    let mut text = String::new();
    loop {
        match answer.next().await? {
            Piece::Text(piece) => text += &piece,
            Piece::End(finish) => {
                let mut body = shape.choice(shape.whole, &text, Some(finish));
                body["usage"] = json!(answer.usage());
                return Ok(Json(body).into_response());
            }
        }
    }
}

/// Streams server-sent events: a chunk per piece of text, the finish reason, the usage if
/// requested, and `[DONE]`.
fn stream(
    answer: Answer,
    shape: Shape,
    include_usage: bool,
) -> impl Stream<Item = Result<SseEvent, Infallible>> {
    let (events, received) = tokio::sync::mpsc::channel::<String>(16);
    tokio::spawn(async move {
        // When the client disconnects, the answer is dropped, which cancels the request, even
        // before its first token.
        let mut answer = answer;
        loop {
            let next = tokio::select! {
                next = answer.next() => next,
                () = events.closed() => return,
            };
            let (event, last) = match next {
                Ok(Piece::Text(piece)) => (shape.choice(shape.chunk, &piece, None), false),
                Ok(Piece::End(finish)) => (shape.choice(shape.chunk, "", Some(finish)), true),
                Err(failure) => (failure.body(), true),
            };
            if events.send(event.to_string()).await.is_err() {
                return;
            }
            if last {
                break;
            }
        }
        if include_usage {
            let mut body = shape.choice(shape.chunk, "", None);
            body["choices"] = json!([]);
            body["usage"] = json!(answer.usage());
            let _ = events.send(body.to_string()).await;
        }
        let _ = events.send("[DONE]".into()).await;
    });
    tokio_stream::wrappers::ReceiverStream::new(received)
        .map(|data| Ok(SseEvent::default().data(data)))
}
