//! Runs that are killed, resumed and shared between processes.

use std::cell::RefCell;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use std::{env, fs, thread};

use longctx_eval::{
    Answer, Category, Error, Event, Limits, Methods, Plan, Question, Record, Sample, Samples,
    Score, Setting, Shard, Subject, SubjectError, Summary, Task, records, run,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tempfile::tempdir;

/// A task: sums of two numbers.
struct Sums(&'static str);

impl Task for Sums {
    fn name(&self) -> &str {
        self.0
    }
    fn category(&self) -> Category {
        Category::Synthetic
    }
    fn samples(&self) -> longctx_eval::Result<Samples> {
        let sample = |i: usize| Sample {
            id: format!("{i}"),
            turns: vec![format!("{i} + {i}")],
            context: None,
            question: None,
            answers: vec![format!("{}", 2 * i)],
            classes: vec![],
            max_new_tokens: 10,
            chat: false,
            ..Sample::default()
        };
        Ok(Samples { samples: (0..60).map(sample).collect(), skipped: vec![] })
    }
    fn score(&self, sample: &Sample, predictions: &[String]) -> longctx_eval::Result<Score> {
        let value = f64::from(u8::from(predictions[0] == sample.answers[0]));
        Ok(Score { value, ..Score::default() })
    }
}

/// Answers right if the first number is not divisible by three; slow enough to be killed during a
/// run.
struct Adder;

impl Subject for Adder {
    fn answer(&mut self, question: &Question<'_>) -> Result<Answer, SubjectError> {
        thread::sleep(Duration::from_millis(2));
        let number: usize = question.sample.id.parse()?;
        if number == 59 && question.max_new_tokens == 1 {
            return Err("59 is too much".into());
        }
        let sum = 2 * number + usize::from(number.is_multiple_of(3));
        Ok(Answer { predictions: vec![sum.to_string()], new_tokens: 1, ..Answer::default() })
    }
}

fn plan<'a>(folder: &Path, tasks: &'a [Box<dyn Task>], shard: Shard) -> Plan<'a> {
    Plan {
        folder: folder.into(),
        settings: ["a", "b"].map(|name| Setting::of(name, "none", 100)).into(),
        tasks,
        limits: Limits::default(),
        shard,
        seed: 7,
        strict: false,
        conditions: Default::default(),
    }
}

fn tasks() -> Vec<Box<dyn Task>> {
    vec![Box::new(Sums("sums")), Box::new(Sums("more"))]
}

fn methods() -> Methods<'static> {
    let mut methods = Methods::default();
    for name in ["a", "b"] {
        methods.register(name, |_| Ok(Box::new(Adder)));
    }
    methods
}

fn go(folder: &Path, shard: Shard) -> Summary {
    run(&plan(folder, &tasks(), shard), &methods(), &mut |_| {}).unwrap()
}

/// Returns all lines without the values that differ from run to run.
fn lines(file: &Path) -> Vec<serde_json::Value> {
    let strip = |line: &str| {
        let mut value: serde_json::Value = serde_json::from_str(line).unwrap();
        assert!(value.as_object_mut().unwrap().remove("timings").is_some());
        value
    };
    fs::read_to_string(file).unwrap().lines().map(strip).collect()
}

const FILE: &str = "results-1-of-1.jsonl";
const TOTAL: usize = 2 * 2 * 60;
const CHILD: &str = "LONGCTX_EVAL_TEST_FOLDER";

fn child(folder: &Path) -> Child {
    Command::new(env::current_exe().unwrap())
        .args(["--exact", "a_run_killed_ten_times_writes_the_same_file"])
        .env(CHILD, folder)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

fn answered(folder: &Path) -> usize {
    fs::read_to_string(folder.join(FILE)).map_or(0, |text| text.lines().count())
}

#[test]
fn a_run_killed_ten_times_writes_the_same_file() {
    if let Some(folder) = env::var_os(CHILD) {
        go(Path::new(&folder), Shard::WHOLE);
        return;
    }
    let (undisturbed, killed) = (tempdir().unwrap(), tempdir().unwrap());
    go(undisturbed.path(), Shard::WHOLE);
    let seed = env::var("SEED").map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
    println!("SEED={seed}");
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for kill in 1..=10 {
        let before = answered(killed.path());
        let mut process = child(killed.path());
        let goal = before + rng.random_range(1..18);
        while answered(killed.path()) < goal {
            assert!(process.try_wait().unwrap().is_none(), "ended before kill {kill}");
            thread::sleep(Duration::from_micros(rng.random_range(100..2000)));
        }
        process.kill().unwrap();
        process.wait().unwrap();
        assert!((before + 1..TOTAL).contains(&answered(killed.path())));
    }
    // The last process finds the file as a kill during a write leaves it.
    let path = killed.path().join(FILE);
    let text = fs::read_to_string(&path).unwrap();
    let torn = text.len() - rng.random_range(2..80);
    fs::write(&path, &text[..torn]).unwrap();
    assert!(child(killed.path()).wait().unwrap().success());
    assert_eq!(lines(&path), lines(&undisturbed.path().join(FILE)));
    assert_eq!(lines(&path).len(), TOTAL);
}

#[test]
fn an_incomplete_last_line_is_dropped_with_a_message() {
    let folder = tempdir().unwrap();
    go(folder.path(), Shard::WHOLE);
    let path = folder.path().join(FILE);
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, &text[..text.len() - 20]).unwrap();
    let mut words = Vec::new();
    let mut listen = |event: Event<'_>| {
        if let Event::Dropped(line) = event {
            words.push(line.to_owned());
        }
    };
    let tasks = tasks();
    let summary = run(&plan(folder.path(), &tasks, Shard::WHOLE), &methods(), &mut listen).unwrap();
    assert_eq!((summary.answered, summary.before), (1, TOTAL - 1));
    assert!(words.len() == 1 && words[0].starts_with("{\"setting\":\"b\""), "{words:?}");
    // In the middle of a file, an incomplete line is damage.
    fs::write(&path, format!("{}\n{text}", &text[..30])).unwrap();
    let error = records(folder.path()).unwrap_err().to_string();
    assert!(error.contains("line 1"), "{error}");
}

#[test]
fn shards_share_the_work() {
    let (alone, shared) = (tempdir().unwrap(), tempdir().unwrap());
    go(alone.path(), Shard::WHOLE);
    thread::scope(|scope| {
        for index in 1..=3 {
            let folder = shared.path();
            scope.spawn(move || go(folder, Shard { index, count: 3 }));
        }
    });
    let sorted = |folder: &Path| {
        let mut all = records(folder).unwrap();
        all.sort_by_key(|r| (r.setting.clone(), r.task.clone(), r.sample.clone()));
        all.into_iter()
            .map(|r: Record| (r.setting, r.task, r.sample, r.predictions))
            .collect::<Vec<_>>()
    };
    assert_eq!(sorted(alone.path()), sorted(shared.path()));
    // Another sharding of the same work finds all samples answered.
    assert_eq!(go(shared.path(), Shard::WHOLE).answered, 0);
    // A sample answered by two processes counts once.
    let part = |index| shared.path().join(format!("results-{index}-of-3.jsonl"));
    fs::copy(part(1), part(4)).unwrap();
    assert_eq!(records(shared.path()).unwrap().len(), TOTAL);
}

#[test]
fn a_run_grows_by_samples() {
    let folder = tempdir().unwrap();
    let tasks = tasks();
    let with = |samples, shard| {
        let mut plan = plan(folder.path(), &tasks, shard);
        plan.limits.samples = samples;
        run(&plan, &methods(), &mut |_| {}).unwrap()
    };
    let parts = || (1..=3).map(|index| Shard { index, count: 3 });
    // Each shard keeps its samples when their number grows.
    for (samples, answered) in [(Some(3), 2 * 2 * 3), (Some(20), 2 * 2 * 17), (None, 2 * 2 * 40)] {
        let done: Vec<_> = parts().map(|shard| with(samples, shard)).collect();
        assert_eq!(done.iter().map(|part| part.answered).sum::<usize>(), answered);
        assert!(done.iter().all(|part| part.answered.abs_diff(answered / 3) <= 4), "{done:?}");
    }
    assert_eq!(records(folder.path()).unwrap().len(), TOTAL);
    // More samples exist already.
    assert_eq!(with(Some(5), Shard::WHOLE).answered, 0);
    let manifest = fs::read_to_string(folder.path().join("run.json")).unwrap();
    assert!(manifest.contains("\"samples\": null"), "{manifest}");
}

#[test]
fn a_folder_of_another_run_is_an_error() {
    let folder = tempdir().unwrap();
    go(folder.path(), Shard::WHOLE);
    let tasks = tasks();
    let again = |change: fn(&mut Plan<'_>)| {
        let mut plan = plan(folder.path(), &tasks, Shard::WHOLE);
        change(&mut plan);
        run(&plan, &methods(), &mut |_| {}).unwrap_err()
    };
    let changed = again(|plan| plan.settings[0].context = 50).to_string();
    assert!(changed.contains("`a`") && changed.contains("context: 100"), "{changed}");
    assert!(again(|plan| plan.seed = 8).to_string().contains("seed"));
    let longer = again(|plan| plan.limits.max_new_tokens = Some(5)).to_string();
    assert!(longer.contains("max_new_tokens") && longer.contains("no limit"), "{longer}");
    assert!(again(|plan| plan.shard.index = 2).to_string().contains("1 to 1"));
    let missing = again(|plan| plan.settings[1].method = "c".into());
    assert!(matches!(missing, Error::NotAvailable { .. }), "{missing}");
    assert!(
        missing
            .to_string()
            .contains("one of the 2 registered methods, got `c`; the nearest are a, b")
    );
}

#[test]
fn a_setting_that_does_not_open_stops_only_a_strict_run() {
    let folder = tempdir().unwrap();
    let tasks = tasks();
    let mut plan = plan(folder.path(), &tasks, Shard::WHOLE);
    let mut methods = methods();
    methods.register("a", |_| Err("no such model".into()));
    let mut faults = Vec::new();
    let mut listen = |event: Event<'_>| {
        if let Event::Failed(error) = event {
            faults.push(error.to_string());
        }
    };
    let summary = run(&plan, &methods, &mut listen).unwrap();
    assert_eq!((summary.answered, summary.failed), (TOTAL / 2, TOTAL / 2));
    assert_eq!(faults, ["opening a: no such model"]);
    plan.strict = true;
    assert!(run(&plan, &methods, &mut |_| {}).unwrap_err().to_string().contains("no such model"));
}

#[test]
fn settings_that_open_are_not_affected_by_others_of_their_group() {
    let folder = tempdir().unwrap();
    let tasks = tasks();
    let names = ["a", "bad", "b", "c", "d"];
    let mut plan = plan(folder.path(), &tasks, Shard::WHOLE);
    plan.settings = names.map(|name| Setting::of(name, "none", 100)).into();
    let groups = RefCell::new(Vec::new());
    let mut methods = Methods::default();
    for name in names {
        methods.register(name, |setting| match setting.name.as_str() {
            "bad" => Err("no kernels".into()),
            _ => Ok(Box::new(Adder)),
        });
    }
    methods.share_prefill(
        |_| true,
        |group| {
            let names: Vec<_> = group.iter().map(|setting| setting.name.clone()).collect();
            match names.iter().any(|name| name == "bad") {
                true => Err("no kernels".into()),
                false => {
                    groups.borrow_mut().push(names.join(" "));
                    Ok(Box::new(Adder))
                }
            }
        },
    );
    let mut faults = Vec::new();
    let mut listen = |event: Event<'_>| {
        if let Event::Failed(error) = event {
            faults.push(error.to_string());
        }
    };
    let summary = run(&plan, &methods, &mut listen).unwrap();
    assert_eq!((summary.answered, summary.failed), (2 * TOTAL, TOTAL / 2));
    assert_eq!(faults, ["opening bad: no kernels"]);
    assert_eq!(*groups.borrow(), ["b c d"]);
}

#[test]
fn a_failing_sample_stops_only_a_strict_run() {
    let folder = tempdir().unwrap();
    let tasks = tasks();
    let mut plan = plan(folder.path(), &tasks, Shard::WHOLE);
    plan.limits.max_new_tokens = Some(1);
    let mut faults = Vec::new();
    let mut listen = |event: Event<'_>| {
        if let Event::Failed(error) = event {
            faults.push(error.to_string());
        }
    };
    let summary = run(&plan, &methods(), &mut listen).unwrap();
    assert_eq!((summary.answered, summary.failed), (TOTAL - 4, 4));
    assert_eq!(faults[0], "a, sums, 59: 59 is too much");
    plan.strict = true;
    assert!(run(&plan, &methods(), &mut |_| {}).unwrap_err().to_string().contains("59"));
}

/// A sum with different wordings.
struct Worded(&'static str);

impl Task for Worded {
    fn name(&self) -> &str {
        "worded"
    }
    fn category(&self) -> Category {
        Category::Synthetic
    }
    fn samples(&self) -> longctx_eval::Result<Samples> {
        let mut samples = Sums("sums").samples()?;
        samples.samples.truncate(1);
        samples.samples[0].turns = vec![self.0.to_owned()];
        Ok(samples)
    }
    fn score(&self, _: &Sample, predictions: &[String]) -> longctx_eval::Result<Score> {
        // An invalid score that a custom task may return.
        let value = if predictions[0] == "0" { 1.0 } else { 1e9 };
        Ok(Score { value, ..Score::default() })
    }
}

#[test]
fn another_question_of_the_same_name_is_refused() {
    let folder = tempdir().unwrap();
    let ask = |text| {
        let tasks: [Box<dyn Task>; 1] = [Box::new(Worded(text))];
        run(&plan(folder.path(), &tasks, Shard::WHOLE), &methods(), &mut |_| {})
    };
    assert_eq!(ask("0 + 0").unwrap().failed, 2);
    let mut methods = methods();
    for name in ["a", "b"] {
        methods.register(name, |_| Ok(Box::new(Nought)));
    }
    let ask = |text| {
        let tasks: [Box<dyn Task>; 1] = [Box::new(Worded(text))];
        run(&plan(folder.path(), &tasks, Shard::WHOLE), &methods, &mut |_| {})
    };
    assert_eq!(ask("0 + 0").unwrap().answered, 2);
    assert_eq!(ask("0 + 0").unwrap().before, 2);
    let error = ask("0 plus 0").unwrap_err().to_string();
    assert!(error.contains("task worded, sample 0") && error.contains("SHA-256"), "{error}");
    // Results without a question digest are from an older version.
    let path = folder.path().join(FILE);
    let text = fs::read_to_string(&path).unwrap();
    let without = |line: &str| {
        let mut value: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(
            value.as_object_mut().unwrap().remove("question").unwrap().as_str().unwrap().len(),
            64
        );
        value.to_string() + "\n"
    };
    fs::write(&path, text.lines().map(without).collect::<String>()).unwrap();
    assert_eq!(records(folder.path()).unwrap().len(), 2);
    assert!(ask("0 + 0").unwrap_err().to_string().contains("older version"));
}

/// A subject that answers 0.
struct Nought;

impl Subject for Nought {
    fn answer(&mut self, _: &Question<'_>) -> Result<Answer, SubjectError> {
        Ok(Answer { predictions: vec!["0".into()], ..Answer::default() })
    }
}

#[test]
fn other_conditions_are_refused_by_name() {
    let folder = tempdir().unwrap();
    let tasks = tasks();
    let with = |conditions: &[(&str, &str)]| {
        let mut plan = plan(folder.path(), &tasks, Shard::WHOLE);
        plan.limits.samples = Some(1);
        plan.conditions = conditions
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        run(&plan, &methods(), &mut |_| {})
    };
    with(&[("prefill_chunk", "512"), ("model small", "12ab")]).unwrap();
    for (name, value) in [("prefill_chunk", "all"), ("model small", "34cd")] {
        let error = with(&[(name, value)]).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains(value), "{error}");
        assert!(error.contains("as in the run's folder"), "{error}");
    }
    // Conditions that earlier parts did not depend on can be added, and are recorded.
    with(&[("encoder", "one")]).unwrap();
    assert!(with(&[("encoder", "two")]).is_err());
    let manifest = fs::read_to_string(folder.path().join("run.json")).unwrap();
    assert!(manifest.contains("\"prefill_chunk\": \"512\""), "{manifest}");
}

#[test]
fn a_score_that_is_no_share_is_not_written() {
    let folder = tempdir().unwrap();
    let tasks: [Box<dyn Task>; 1] = [Box::new(Worded("0 + 0"))];
    // The answer is not 0, so the task returns 10^9.
    let mut methods = Methods::default();
    for name in ["a", "b"] {
        methods.register(name, |_| Ok(Box::new(Eager)));
    }
    let mut faults = Vec::new();
    let mut listen = |event: Event<'_>| {
        if let Event::Failed(error) = event {
            faults.push(error.to_string());
        }
    };
    let plan = plan(folder.path(), &tasks, Shard::WHOLE);
    let summary = run(&plan, &methods, &mut listen).unwrap();
    assert_eq!((summary.answered, summary.failed), (0, 2));
    assert!(faults[0].contains("score.value") && faults[0].contains("1000000000"), "{faults:?}");
    assert!(records(folder.path()).unwrap().is_empty());
}

/// A subject that returns too many predictions.
struct Eager;

impl Subject for Eager {
    fn answer(&mut self, _: &Question<'_>) -> Result<Answer, SubjectError> {
        Ok(Answer { predictions: vec!["1".into()], ..Answer::default() })
    }
}

/// A task whose samples must not be requested.
struct Costly;

impl Task for Costly {
    fn name(&self) -> &str {
        "costly"
    }
    fn category(&self) -> Category {
        Category::Synthetic
    }
    fn samples(&self) -> longctx_eval::Result<Samples> {
        panic!("made before the folder was looked at")
    }
    fn score(&self, _: &Sample, _: &[String]) -> longctx_eval::Result<Score> {
        Ok(Score { value: 0.0, ..Score::default() })
    }
}

#[test]
fn an_unwritable_folder_is_an_error_before_questions_are_generated() {
    let folder = tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let tasks: [Box<dyn Task>; 1] = [Box::new(Costly)];
    let result = run(&plan(&file.join("run"), &tasks, Shard::WHOLE), &methods(), &mut |_| {});
    let error = result.unwrap_err();
    assert!(matches!(error, Error::Io { .. }) && error.to_string().contains("file/run"), "{error}");
}
