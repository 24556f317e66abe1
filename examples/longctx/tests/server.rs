//! Compares answers over HTTP with those of the same model and cache in this process.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::thread;

use longctx_eval::long_generation::{self, Size};
use longctx_eval::{
    Haystack, Limits, Methods, NeedleGrid, Plan, Server, Setting, Shard, Task, records, run,
    setting,
};
use longctx_examples::methods::Method;
use longctx_examples::model;
use longctx_examples::subject::Models;

const CACHE: &str = "kivi-4";

/// A server that is stopped when the test ends.
struct Served {
    process: Child,
    url: String,
}

impl Served {
    fn start() -> Self {
        Self::with(&[])
    }

    fn with(options: &[&str]) -> Self {
        let mut process = Command::new(env!("CARGO_BIN_EXE_longctx"))
            .args(["serve", "--model", "embedded", "--method", CACHE, "--prefill-chunk", "0"])
            .args(["--address", "127.0.0.1:0"])
            .args(options)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let (_, url) = line.trim().rsplit_once(" at ").expect("the address");
        Self { process, url: format!("{url}/v1") }
    }
}

impl Served {
    /// Asks for a completion. Returns the response: status line, headers and body.
    fn ask(&self, body: &str) -> String {
        self.send("POST /v1/completions", "content-type: application/json\r\n", body)
    }

    /// Sends a request: its method and path, further headers, and body.
    fn send(&self, to: &str, headers: &str, body: &str) -> String {
        let host = self.url.trim_start_matches("http://").trim_end_matches("/v1");
        let mut stream = TcpStream::connect(host).unwrap();
        let length = body.len();
        let head = format!(
            "{to} HTTP/1.1\r\nhost: {host}\r\n{headers}content-length: {length}\r\n\
             connection: close\r\n\r\n"
        );
        stream.write_all((head + body).as_bytes()).unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).unwrap();
        response
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Prompts with and without a chat template, of one turn and of several.
fn tasks() -> Vec<Box<dyn Task>> {
    let paper = NeedleGrid::paper(Haystack::generated(0), 7);
    let grid = NeedleGrid { lengths: vec![150], depths: vec![0.1, 0.9], repeats: 1, ..paper };
    let long = long_generation::tasks(Size { items: 6, samples: 2, seed: 0 });
    let chosen = ["recall", "listing"];
    let long = long.into_iter().filter(|task| chosen.contains(&task.name()));
    std::iter::once(Box::new(grid) as Box<dyn Task>).chain(long).collect()
}

#[test]
fn answers_over_http_are_those_in_process() {
    let served = Served::start();
    let model = model::embedded().display().to_string();
    let toml = |name: &str, api: &str| {
        let ids = if api == "completions" { "token_ids = true\n" } else { "" };
        format!(
            "[[setting]]\nname = {name:?}\nmethod = \"http\"\nmodel = \"embedded\"\ncontext = 4000\n\
             [setting.server]\nurl = {:?}\napi = {api:?}\ntokenizer = {model:?}\n{ids}",
            served.url
        )
    };
    let mut settings =
        setting::from_toml(&(toml("completions", "completions") + &toml("chat", "chat"))).unwrap();
    settings.push(Setting { name: "in-process".into(), ..Setting::of(CACHE, &model, 4000) });
    let models = Models::default();
    let cache = Method::named(CACHE).unwrap();
    let mut methods = Methods::default();
    methods
        .register(CACHE, |setting| Ok(Box::new(models.reader(setting, |spec| cache.cache(spec))?)));
    methods.register("http", |setting| {
        let tokenizer = Setting { model: model.clone(), ..setting.clone() };
        Ok(Box::new(Server::new(setting)?.with_text(models.text(&tokenizer)?, setting.context)))
    });
    let folder = tempfile::tempdir().unwrap();
    let tasks = tasks();
    let plan = Plan {
        folder: folder.path().into(),
        settings,
        tasks: &tasks,
        limits: Limits { samples: None, max_new_tokens: Some(16) },
        shard: Shard::WHOLE,
        seed: 0,
        strict: true,
        conditions: Default::default(),
    };
    run(&plan, &methods, &mut |_| {}).unwrap();
    let mut answers: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for record in records(folder.path()).unwrap() {
        // The chat API formats the needle's prompt with the template too.
        if record.setting == "chat" && record.task == "needle" {
            continue;
        }
        let answer = (record.predictions, record.prompt_tokens);
        answers.entry((record.task, record.sample)).or_default().push(answer);
    }
    assert_eq!(answers.len(), 6);
    for (sample, answers) in answers {
        assert!(answers.windows(2).all(|pair| pair[0] == pair[1]), "{sample:?}: {answers:?}");
    }
}

#[test]
fn invalid_requests_are_refused_with_their_reason_and_fail_no_other() {
    let served = Served::start();
    let good = r#"{"prompt": "The sky is", "max_tokens": 40, "temperature": 0}"#;
    let wrong = [
        (r#""prompt": [1, 2, 4096]"#, "token 2: expected an id below 4096, got 4096"),
        (r#""prompt": "a", "max_tokens": 0"#, "max_tokens: expected at least 1, got 0"),
        (r#""prompt": "a", "temperature": -1"#, "`temperature`"),
        (r#""prompt": "a", "temperature": 1e300"#, "`temperature`"),
        (r#""prompt": "a", "top_p": 2"#, "`top_p`"),
        (r#""prompt": 5"#, "expected a text, a list of one text, or a list of token ids"),
        (r#""prompt": "a", "stop": 5"#, "stop: expected a text or a list of texts"),
    ];
    thread::scope(|scope| {
        let answers: Vec<_> = (0..4).map(|_| scope.spawn(|| served.ask(good))).collect();
        for (fields, reason) in wrong {
            let response = served.ask(&format!("{{{fields}}}"));
            assert!(response.starts_with("HTTP/1.1 4"), "{fields}: {response}");
            assert!(response.contains(reason), "{fields}: {response}");
        }
        for answer in answers {
            let answer = answer.join().unwrap();
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        }
    });
}

#[test]
fn more_requests_than_the_queue_holds_are_refused() {
    let served = Served::with(&["--queue", "2", "--cache-mib", "1"]);
    let long = r#"{"prompt": "The sky is", "max_tokens": 400, "temperature": 0}"#;
    let statuses: Vec<String> = thread::scope(|scope| {
        let asked: Vec<_> = (0..30).map(|_| scope.spawn(|| served.ask(long))).collect();
        asked.into_iter().map(|asked| asked.join().unwrap()[9..12].to_owned()).collect()
    });
    let count = |status: &str| statuses.iter().filter(|own| *own == status).count();
    assert!(count("200") > 0 && count("429") > 0, "{statuses:?}");
    assert_eq!(count("200") + count("429"), 30, "{statuses:?}");
}

#[test]
fn every_error_has_the_form_of_openai() {
    let served = Served::with(&["--body-limit", "2000"]);
    let json = "content-type: application/json\r\n";
    let (completions, chat) = ("POST /v1/completions", "POST /v1/chat/completions");
    let long = format!(r#"{{"prompt": "{}"}}"#, "a".repeat(3000));
    for (to, headers, body, status, words) in [
        ("GET /v1/nothing", "", "", 404, "/v1/nothing: expected a path"),
        ("POST /nothing", json, "{}", 404, "/nothing: expected a path"),
        ("GET /v1/completions", "", "", 405, "/v1/completions: the method GET is not allowed"),
        ("DELETE /health", "", "", 405, "/health: the method DELETE is not allowed"),
        (completions, json, r#"{"prompt": "a", "max_tokens": "x"}"#, 400, "max_tokens"),
        (completions, json, r#"{"prompt": {}}"#, 400, "expected a text"),
        (completions, json, r#"{"max_tokens": 1}"#, 400, "missing field `prompt`"),
        (completions, json, r#"{"prompt": "a", "temperature": "hot"}"#, 400, "expected f32"),
        (chat, json, r#"{"messages": "a"}"#, 400, "messages"),
        (completions, json, r#"{"prompt": "#, 400, "JSON"),
        (completions, json, "", 400, "JSON"),
        (completions, "", r#"{"prompt": "a"}"#, 415, "application/json"),
        (completions, json, &long, 413, "limit"),
    ] {
        let response = served.send(to, headers, body);
        assert!(response.starts_with(&format!("HTTP/1.1 {status} ")), "{to} {body}: {response}");
        let (head, body) = response.split_once("\r\n\r\n").unwrap();
        assert!(head.to_lowercase().contains("content-type: application/json"), "{response}");
        let error = &serde_json::from_str::<serde_json::Value>(body).expect(&response)["error"];
        assert_eq!(
            (&error["type"], &error["code"]),
            (&"invalid_request_error".into(), &status.into())
        );
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(words), "{words}: {message}");
        // A 405 lists the allowed methods.
        assert_eq!(head.to_lowercase().contains("\r\nallow: "), status == 405, "{response}");
    }
}
