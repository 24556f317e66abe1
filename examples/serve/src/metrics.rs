//! Prometheus metrics.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

/// A sum of seconds.
pub type Seconds = Counter<f64, AtomicU64>;

/// The server's metrics.
pub struct Metrics {
    registry: Registry,
    /// Requests that were answered completely.
    pub done: Counter,
    /// Requests that failed.
    pub failed: Counter,
    /// Requests whose client disconnected before their end.
    pub cancelled: Counter,
    /// Prompt tokens that the model processed.
    pub prompt_tokens: Counter,
    /// Prompt tokens taken from kept prefixes.
    pub cached_tokens: Counter,
    /// Tokens generated.
    pub written_tokens: Counter,
    /// Running requests.
    pub running: Gauge,
    /// Requests that have not started: they wait for the current step, or for memory.
    pub waiting: Gauge,
    /// Sequences of the model, including kept prefixes.
    pub sequences: Gauge,
    /// Bytes of the sequences' keys and values.
    pub kv_bytes: Gauge,
    /// Seconds from a request to its first token.
    pub first_token: Histogram,
    /// Steps of the model.
    pub steps: Counter,
    /// Seconds of all steps until the model has returned: on a GPU, until all its work is queued.
    pub forward_seconds: Seconds,
    /// Seconds of all steps from then until their tokens are known: on a GPU, the wait for its
    /// work.
    pub sample_seconds: Seconds,
}

impl Default for Metrics {
    /// Creates metrics with all values zero.
    fn default() -> Self {
        let mut registry = Registry::with_prefix("longctx");
        let counter = |registry: &mut Registry, name: &str, help: &str| {
            let counter = Counter::default();
            registry.register(name, help, counter.clone());
            counter
        };
        let gauge = |registry: &mut Registry, name: &str, help: &str| {
            let gauge = Gauge::default();
            registry.register(name, help, gauge.clone());
            gauge
        };
        let done = counter(&mut registry, "requests_done", "Requests answered to their end");
        let failed = counter(&mut registry, "requests_failed", "Requests that failed");
        let cancelled = counter(&mut registry, "requests_cancelled", "Requests whose client left");
        let prompt_tokens = counter(&mut registry, "prompt_tokens", "Tokens of prompts fed");
        let cached_tokens =
            counter(&mut registry, "cached_tokens", "Tokens of prompts from kept prefixes");
        let written_tokens = counter(&mut registry, "written_tokens", "Tokens written");
        let running = gauge(&mut registry, "requests_running", "Requests at work");
        let waiting = gauge(&mut registry, "requests_waiting", "Requests that have not started");
        let sequences = gauge(&mut registry, "sequences", "Sequences held, prefixes included");
        let kv_bytes = gauge(&mut registry, "kv_bytes", "Bytes of the sequences' keys and values");
        let first_token = Histogram::new(exponential_buckets(0.01, 2.0, 14));
        let help = "Seconds from a request to its first token";
        registry.register("first_token_seconds", help, first_token.clone());
        let steps = counter(&mut registry, "steps", "Steps of the model");
        let [forward_seconds, sample_seconds] = [
            ("forward_seconds", "Seconds of steps until the model has returned"),
            ("sample_seconds", "Seconds of steps from then until their tokens are known"),
        ]
        .map(|(name, help)| {
            let seconds = Seconds::default();
            registry.register(name, help, seconds.clone());
            seconds
        });
        Self {
            registry,
            done,
            failed,
            cancelled,
            prompt_tokens,
            cached_tokens,
            written_tokens,
            running,
            waiting,
            sequences,
            kv_bytes,
            first_token,
            steps,
            forward_seconds,
            sample_seconds,
        }
    }
}

impl Metrics {
    /// Returns the metrics in Prometheus' text format.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}
