//! Compares answers over HTTP with those of the same model and cache in this process.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

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
        let mut process = Command::new(env!("CARGO_BIN_EXE_longctx"))
            .args(["serve", "--model", "embedded", "--method", CACHE, "--prefill-chunk", "0"])
            .args(["--address", "127.0.0.1:0"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let (_, url) = line.trim().rsplit_once(" at ").expect("the address");
        Self { process, url: format!("{url}/v1") }
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
