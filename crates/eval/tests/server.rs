//! A subject behind HTTP, tested with a small server that fails on request.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use longctx_eval::setting::{self, Api, ServerSetting};
use longctx_eval::{
    Category, Event, Limits, Methods, Plan, Question, Sample, Samples, Score, Server, Setting,
    Shard, Subject, SubjectError, Task, Text, records, run,
};
use serde_json::{Map, Value, json};

/// The server's reaction to a request.
#[derive(Debug, Clone, Copy)]
enum Act {
    Stream,
    /// A stream without token counts.
    NoUsage,
    Whole,
    Status(u16),
    Garbage,
    /// Closes the connection without an answer.
    Nothing,
    /// Closes the connection during the stream.
    BreakOff,
    ErrorEvent,
    Silence,
}

struct Fake {
    url: String,
    /// The reactions to the next requests; all later requests are answered by a stream.
    acts: Arc<Mutex<VecDeque<Act>>>,
    seen: Arc<Mutex<Vec<(String, Value)>>>,
    at_once: Arc<AtomicUsize>,
}

impl Fake {
    fn start(acts: &[Act]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/v1", listener.local_addr().unwrap());
        let acts = Arc::new(Mutex::new(acts.iter().copied().collect::<VecDeque<_>>()));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (now, at_once) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (acts2, seen2, at_once2) = (acts.clone(), seen.clone(), at_once.clone());
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let act = acts2.lock().unwrap().pop_front().unwrap_or(Act::Stream);
                let (seen, now, most) = (seen2.clone(), now.clone(), at_once2.clone());
                thread::spawn(move || {
                    most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    let _ = serve(stream, act, &seen);
                    now.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
        Self { url, acts, seen, at_once }
    }

    fn setting(&self) -> Setting {
        let server = ServerSetting {
            url: self.url.clone(),
            api: Api::Completions,
            label: "--cache q8_0".into(),
            key_env: None,
            concurrency: 3,
            token_ids: false,
            tries: 4,
            timeout_seconds: 2,
            tokenizer: None,
            extra_body: Map::from_iter([("repeat_penalty".into(), json!(1.0))]),
            bytes_per_token: Some(50.0),
            dense_bytes_per_token: Some(100.0),
        };
        Setting { server: Some(server), ..Setting::of("http", "small", 1000) }
    }
}

fn serve(stream: TcpStream, act: Act, seen: &Mutex<Vec<(String, Value)>>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let (mut head, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? < 3 {
            break;
        }
        let lower = line.to_ascii_lowercase();
        if let Some(value) = lower.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        head += &line;
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let body: Value = serde_json::from_slice(&body)?;
    let chat = head.contains("/chat/completions");
    let asked = if chat { &body["messages"][0]["content"] } else { &body["prompt"] };
    let number: usize = asked.as_str().unwrap().split(' ').next().unwrap().parse().unwrap();
    seen.lock().unwrap().push((head, body.clone()));
    thread::sleep(Duration::from_millis(20));
    let mut stream = stream;
    let ok = |kind: &str| {
        format!("HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\nconnection: close\r\n\r\n")
    };
    let choice = |text: String, end: Option<&str>| match chat {
        true => json!({"choices": [{"delta": {"content": text}, "finish_reason": end}]}),
        false => json!({"choices": [{"text": text, "finish_reason": end}]}),
    };
    let usage = json!({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}});
    match act {
        Act::Stream | Act::NoUsage | Act::BreakOff | Act::ErrorEvent => {
            write!(
                stream,
                "{}: hello\n\nevent: x\ndata: {}\n\n",
                ok("text/event-stream"),
                choice(" ".into(), None)
            )?;
            stream.flush()?;
            thread::sleep(Duration::from_millis(20));
            match act {
                Act::BreakOff => return Ok(()),
                Act::ErrorEvent => {
                    return write!(
                        stream,
                        "data: {{\"error\": {{\"message\": \"out of memory\"}}}}\n\n"
                    );
                }
                _ => {}
            }
            write!(stream, "data: {}\n\n", choice((2 * number).to_string(), None))?;
            write!(stream, "data: {}\n\n", choice(String::new(), Some("stop")))?;
            if !matches!(act, Act::NoUsage) {
                write!(stream, "data: {usage}\n\n")?;
            }
            write!(stream, "data: [DONE]\n\n")
        }
        Act::Whole => {
            let text = format!(" {}", 2 * number);
            let answer = json!({"choices": [{"text": text, "finish_reason": "stop"}], "usage": usage["usage"]});
            write!(stream, "{}{answer}", ok("application/json"))
        }
        Act::Status(status) => {
            write!(
                stream,
                "HTTP/1.1 {status} X\r\nretry-after: 0\r\ncontent-length: 5\r\nconnection: close\r\n\r\nsorry"
            )
        }
        Act::Garbage => write!(stream, "{}<html>\u{7}", ok("text/html")),
        Act::Nothing => Ok(()),
        Act::Silence => {
            thread::sleep(Duration::from_secs(4));
            Ok(())
        }
    }
}

struct Doubles(usize);

impl Task for Doubles {
    fn name(&self) -> &str {
        "doubles"
    }
    fn category(&self) -> Category {
        Category::Synthetic
    }
    fn samples(&self) -> longctx_eval::Result<Samples> {
        let sample = |i: usize| Sample {
            id: i.to_string(),
            turns: vec![format!("{i} twice?")],
            answers: vec![(2 * i).to_string()],
            max_new_tokens: 8,
            answer_prefix: Some(" It is".into()),
            ..Sample::default()
        };
        Ok(Samples { samples: (0..self.0).map(sample).collect(), skipped: vec![] })
    }
    fn score(&self, sample: &Sample, predictions: &[String]) -> longctx_eval::Result<Score> {
        let right = predictions[0].trim() == sample.answers[0];
        Ok(Score { value: f64::from(u8::from(right)), ..Score::default() })
    }
}

/// Returns the results of a run: answered, before, failed, and the errors.
fn go(
    folder: &std::path::Path,
    setting: &Setting,
    samples: usize,
) -> (usize, usize, usize, Vec<String>) {
    let mut methods = Methods::default();
    methods.register("http", |setting| Ok(Box::new(Server::new(setting)?)));
    let tasks: [Box<dyn Task>; 1] = [Box::new(Doubles(samples))];
    let plan = Plan {
        folder: folder.into(),
        settings: vec![setting.clone()],
        tasks: &tasks,
        limits: Limits::default(),
        shard: Shard::WHOLE,
        seed: 0,
        strict: false,
        conditions: Default::default(),
    };
    let mut faults = Vec::new();
    let summary = run(&plan, &methods, &mut |event| {
        if let Event::Failed(error) = event {
            faults.push(error.to_string());
        }
    })
    .unwrap();
    (summary.answered, summary.before, summary.failed, faults)
}

#[test]
fn answers_are_streamed_and_concurrent() {
    let (folder, fake) = (tempfile::tempdir().unwrap(), Fake::start(&[]));
    assert_eq!(go(folder.path(), &fake.setting(), 12), (12, 0, 0, vec![]));
    for record in records(folder.path()).unwrap() {
        assert_eq!((record.score.value, record.prompt_tokens, record.new_tokens), (1.0, 5, 2));
        assert_eq!((record.kv_bytes, record.ratio()), (Some(350), Some(2.0)));
        let timings = record.timings;
        // The server waits before each of the two tokens. A busy client may receive both at once.
        assert!(timings.first_token_seconds >= 0.02 && timings.total_seconds >= 0.04);
        assert!(timings.decode_tokens_per_second.unwrap() > 0.0);
    }
    let seen = fake.seen.lock().unwrap();
    let body = &seen[0].1;
    assert_eq!(
        (&body["model"], &body["max_tokens"], &body["temperature"]),
        (&json!("small"), &json!(8), &json!(0))
    );
    assert_eq!(body["repeat_penalty"], 1.0);
    assert!(body["prompt"].as_str().unwrap().ends_with(" twice? It is"), "{body}");
    assert!((2..=3).contains(&fake.at_once.load(Ordering::SeqCst)));
}

/// A tokenizer with one token per byte, and one more that begins a text.
struct Bytes;

impl Text for Bytes {
    fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, SubjectError> {
        Ok(vec![0; text.len() + usize::from(special)])
    }
    fn decode(&self, _: &[u32]) -> Result<String, SubjectError> {
        Ok(String::new())
    }
    fn chat(&self, conversation: &[String]) -> Result<Option<String>, SubjectError> {
        Ok(Some(conversation.iter().map(|said| format!("{said}</s>")).collect()))
    }
    fn stop(&self) -> &[u32] {
        &[]
    }
    fn bos(&self) -> Option<&str> {
        None
    }
}

#[test]
fn tokens_that_a_server_does_not_count_are_those_of_the_formatted_prompt() {
    for (api, chat, prompt) in [
        (Api::Completions, true, "4 twice?</s> It is".len()),
        (Api::Completions, false, "4 twice? It is".len() + 1),
        (Api::Chat, false, "4 twice?</s> It is".len()),
    ] {
        let fake = Fake::start(&[Act::NoUsage]);
        let mut setting = fake.setting();
        server_of(&mut setting).api = api;
        let mut server = Server::new(&setting).unwrap().with_text(Bytes, 100);
        let sample = Doubles(5).samples().unwrap().samples.remove(4);
        let sample = &Sample { chat, ..sample };
        let question = Question { sample, max_new_tokens: 4, stops_at_newline: false, setting: 0 };
        let answer = server.answer(&question).unwrap();
        assert_eq!((answer.prompt_tokens, answer.new_tokens), (prompt, " 8".len()), "{api:?}");
    }
}

#[test]
fn chat_has_messages_and_a_key() {
    let (folder, fake) = (tempfile::tempdir().unwrap(), Fake::start(&[]));
    let mut setting = fake.setting();
    let server = setting.server.as_mut().unwrap();
    // Any environment variable that is set.
    (server.api, server.key_env) = (Api::Chat, Some("CARGO_PKG_NAME".into()));
    assert_eq!(go(folder.path(), &setting, 3).0, 3);
    let seen = fake.seen.lock().unwrap();
    assert!(
        seen[0].0.to_lowercase().contains("authorization: bearer longctx-eval"),
        "{}",
        seen[0].0
    );
    assert_eq!(seen[0].1["messages"][0]["role"], "user");
    setting.server.as_mut().unwrap().key_env = Some("NO_SUCH_VARIABLE".into());
    let error = Server::new(&setting).err().unwrap().to_string();
    assert!(error.contains("NO_SUCH_VARIABLE"), "{error}");
}

#[test]
fn transient_errors_are_retried() {
    for act in [
        Act::Status(429),
        Act::Status(500),
        Act::Garbage,
        Act::Nothing,
        Act::BreakOff,
        Act::ErrorEvent,
        Act::Silence,
    ] {
        let (folder, fake) = (tempfile::tempdir().unwrap(), Fake::start(&[act]));
        assert_eq!(go(folder.path(), &fake.setting(), 3), (3, 0, 0, vec![]), "{act:?}");
        assert_eq!(fake.acts.lock().unwrap().len(), 0);
        assert!(
            records(folder.path()).unwrap().iter().all(|record| record.score.value == 1.0),
            "{act:?}"
        );
    }
    let (folder, fake) = (tempfile::tempdir().unwrap(), Fake::start(&[Act::Whole; 2]));
    assert_eq!(go(folder.path(), &fake.setting(), 2).0, 2);
}

#[test]
fn permanent_errors_are_reported_and_the_run_resumes() {
    for (act, word) in [
        (Act::Status(500), "status 500: sorry (attempt 4 of 4)"),
        (Act::Garbage, "expected a completion"),
        (Act::ErrorEvent, "out of memory"),
        (Act::BreakOff, "broke off"),
    ] {
        let (folder, fake) = (tempfile::tempdir().unwrap(), Fake::start(&[act; 40]));
        let mut setting = fake.setting();
        setting.server.as_mut().unwrap().concurrency = 1;
        let (answered, _, failed, faults) = go(folder.path(), &setting, 3);
        assert_eq!((answered, failed), (0, 3), "{act:?}");
        assert!(faults[0].contains(word) && faults[0].contains("doubles, 0"), "{faults:?}");
        // A server that is down gets one attempt per sample instead of four.
        assert_eq!(fake.seen.lock().unwrap().len(), 4 + 1 + 1);
        fake.acts.lock().unwrap().clear();
        assert_eq!(go(folder.path(), &setting, 3), (3, 0, 0, vec![]));
    }
    // Errors that another attempt cannot fix are not repeated.
    let (folder, fake) = (tempfile::tempdir().unwrap(), Fake::start(&[Act::Status(401)]));
    let (answered, _, failed, faults) = go(folder.path(), &fake.setting(), 1);
    assert!((answered, failed) == (0, 1) && faults[0].contains("status 401"), "{faults:?}");
    assert_eq!(fake.seen.lock().unwrap().len(), 1);
}

#[test]
fn an_unreachable_server_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let mut setting = Fake::start(&[]).setting();
    let server = setting.server.as_mut().unwrap();
    (server.url, server.tries) = ("http://127.0.0.1:9/v1".into(), 1);
    let (_, _, failed, faults) = go(folder.path(), &setting, 1);
    assert!(failed == 1 && faults[0].contains("127.0.0.1:9"), "{faults:?}");
    server_of(&mut setting).concurrency = 0;
    assert!(Server::new(&setting).err().unwrap().to_string().contains("above 0"));
    assert!(Server::new(&Setting::of("http", "small", 10)).is_err());
}

#[test]
fn extra_fields_cannot_replace_those_of_the_evaluation() {
    let toml = |extra: &str| {
        let text = format!(
            "[[setting]]\nname = \"a\"\nmethod = \"http\"\nmodel = \"m\"\ncontext = 100\n\
             [setting.server]\nurl = \"http://127.0.0.1:9/v1\"\nextra_body = {extra}\n"
        );
        setting::from_toml(&text).unwrap().remove(0)
    };
    assert!(Server::new(&toml("{ repeat_penalty = 1.0, stop = [\"x\"] }")).is_ok());
    let error = Server::new(&toml("{ temperature = 1.0 }")).err().unwrap().to_string();
    assert!(error.contains("extra_body") && error.contains("temperature"), "{error}");
}

fn server_of(setting: &mut Setting) -> &mut ServerSetting {
    setting.server.as_mut().unwrap()
}

#[test]
fn one_sample_is_a_batch_of_one() {
    let fake = Fake::start(&[]);
    let sample = Doubles(5).samples().unwrap().samples.remove(4);
    let question =
        Question { sample: &sample, max_new_tokens: 4, stops_at_newline: false, setting: 0 };
    let answer = Server::new(&fake.setting()).unwrap().answer(&question).unwrap();
    assert_eq!(answer.predictions, [" 8"]);
}
