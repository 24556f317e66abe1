//! Complete runs of `longctx eval` with the model in the repository, started by the cluster script
//! and as a command.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};

use longctx_eval::statistics::{Difference, Verdict};
use longctx_eval::{Agreement, Record, records};

const NEEDLES: [&str; 10] = [
    "--needle-words",
    "60",
    "--needle-depths",
    "3",
    "--needle-repeats",
    "2",
    "--max-new",
    "12",
    "--model",
    "embedded",
];

const LONGCTX: &str = env!("CARGO_BIN_EXE_longctx");

fn eval(subcommand: &str) -> Command {
    let mut command = Command::new(LONGCTX);
    command.args(["eval", subcommand]);
    command
}

/// Calls `run` with more arguments and returns its output.
fn run(out: &Path, more: &[&str]) -> String {
    succeed(eval("run").arg("--out").arg(out).args(NEEDLES).args(more))
}

fn succeed(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    said
}

/// Returns answers and scores by setting, task and sample.
fn answers(folder: &Path) -> BTreeMap<String, String> {
    let mut answers = BTreeMap::new();
    for record in records(folder).unwrap() {
        let key = format!("{} {} {}", record.setting, record.task, record.sample);
        let answer = format!("{:?} {:?}", record.predictions, record.score);
        assert!(answers.insert(key.clone(), answer).is_none(), "{key} twice");
    }
    answers
}

#[test]
fn tasks_of_an_array_job_give_the_results_of_one_process() {
    if Command::new("bash").arg("--version").stdout(Stdio::null()).status().is_err() {
        println!("skipped: no bash");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (whole, shards) = (folder.path().join("whole"), folder.path().join("shards"));
    let settings = "dense-f16,kivi-2";
    run(&whole, &["--settings", settings, "--tasks", "needle,multi-needle"]);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/cluster/slurm.sh");
    let task = |task: usize| {
        let mut command = Command::new("bash");
        command.arg(script).env("SLURM_ARRAY_TASK_ID", task.to_string());
        command.env("SLURM_ARRAY_TASK_COUNT", "3").env("LONGCTX", LONGCTX).env("OUT", &shards);
        command.env("SERVE", "").env("SETTINGS", settings).env("FILE", "");
        command.env("TASKS", "needle,multi-needle").env("MORE", NEEDLES.join(" "));
        command.stdout(Stdio::null()).spawn().unwrap()
    };
    // The second task is killed and submitted again.
    let mut killed = task(2);
    let others = [task(1), task(3)];
    std::thread::sleep(std::time::Duration::from_millis(500));
    killed.kill().unwrap();
    killed.wait().unwrap();
    for mut task in others {
        assert!(task.wait().unwrap().success());
    }
    // The script's process has ended, but its child may hold the shard's lock a little longer.
    let mut again = task(2);
    for _ in 0..100 {
        if again.wait().unwrap().success() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(200));
        again = task(2);
    }
    assert_eq!(answers(&shards), answers(&whole));
    assert_eq!(answers(&whole).len(), 2 * 2 * 6);
}

#[test]
fn samples_are_added_until_the_difference_is_sure() {
    let folder = tempfile::tempdir().unwrap();
    let settings = ["dense-f16", "dense-f32", "streaming-llm-8x"];
    let names = settings.join(",");
    let arguments = ["--settings", &names, "--tasks", "needle", "--samples", "2", "--until-sure"];
    let said = run(folder.path(), &arguments);
    assert!(said.contains("4 samples a task, for "), "{said}");
    let records = records(folder.path()).unwrap();
    let count = |name: &str| records.iter().filter(|record| record.setting == name).count();
    for name in &settings[1..] {
        let difference = Difference::between(&records, name, "dense-f16").unwrap();
        let sure = difference.verdict(0.02) != Verdict::Unsure;
        assert!(sure || count(name) == 6, "{name}: {} samples, {difference:?}", count(name));
    }
    assert!(count("dense-f16") >= settings[1..].iter().map(|name| count(name)).max().unwrap());
    // A second run has nothing to do.
    let said = run(folder.path(), &arguments);
    let passes: Vec<_> = said.lines().filter(|line| line.contains(" samples answered")).collect();
    assert!(passes.iter().all(|line| line.starts_with("0 ")) && !passes.is_empty(), "{said}");
}

/// Returns a command with one setting of each kind, a task of one turn and a task of several turns,
/// and prompts that every method compresses.
fn of_every_kind(out: &Path, more: &[&str]) -> Command {
    let mut command = eval("run");
    command.args(["--model", "embedded", "--out"]).arg(out);
    command.args(["--settings", "dense-f16,kivi-4,h2o-4x,snap-kv-4x", "--max-new", "12"]);
    command.args(["--tasks", "needle,recall", "--long-samples", "2", "--items", "12"]);
    command.args(["--needle-words", "200", "--needle-depths", "4", "--needle-repeats", "1"]);
    command.args(more);
    command
}

/// Returns answers, scores and counts in the order of the file, and the batch sizes.
fn lines(folder: &Path) -> (Vec<String>, Vec<Option<usize>>) {
    let records = records(folder).unwrap();
    let line = |record: &Record| {
        let mut value = serde_json::to_value(record).unwrap();
        value.as_object_mut().unwrap().remove("timings");
        value.to_string()
    };
    let batches = records.iter().map(|record| record.timings.batch).collect();
    (records.iter().map(line).collect(), batches)
}

#[test]
fn batches_give_the_results_of_single_samples() {
    let folder = tempfile::tempdir().unwrap();
    let [alone, batched, shards] =
        ["alone", "batched", "shards"].map(|name| folder.path().join(name));
    succeed(&mut of_every_kind(&alone, &[]));
    let (expected, batches) = lines(&alone);
    assert_eq!(batches, vec![None; 4 * (4 + 2)]);
    succeed(&mut of_every_kind(&batched, &["--batch", "4"]));
    assert_eq!(lines(&batched), (expected, vec![Some(4); 4 * (4 + 2)]));

    // One prefill for all settings with an exact prefill.
    let shared = folder.path().join("shared");
    succeed(&mut of_every_kind(&shared, &["--batch", "6", "--share-prefill"]));
    assert_eq!(answers(&shared), answers(&alone));
    let bytes = |folder: &Path, setting: &str| {
        let records = records(folder).unwrap().into_iter();
        let own = records.filter(|record| record.setting == setting);
        own.map(|record| record.kv_bytes.unwrap()).sum::<usize>() as f64
    };
    for setting in ["kivi-4", "h2o-4x", "snap-kv-4x"] {
        // Block tables of forks have other lengths.
        assert!(
            (bytes(&shared, setting) / bytes(&alone, setting) - 1.0).abs() < 0.002,
            "{setting}"
        );
    }
    for record in records(&shared).unwrap() {
        let together = (record.setting != "dense-f16").then_some(3);
        assert_eq!(record.timings.settings, together, "{}", record.setting);
    }

    // A shard is killed within a batch and resumed with another batch size.
    let first = shards.join("results-1-of-2.jsonl");
    let mut killed = of_every_kind(&shards, &["--batch", "3", "--shard", "1/2", "--share-prefill"])
        .spawn()
        .unwrap();
    while std::fs::read_to_string(&first).map_or(0, |text| text.lines().count()) < 3 {
        assert!(killed.try_wait().unwrap().is_none(), "ended before it was killed");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    killed.kill().unwrap();
    killed.wait().unwrap();
    let said = succeed(&mut of_every_kind(&shards, &["--batch", "2", "--shard", "1/2"]));
    let resumed = said.contains(" answered before") && !said.contains(", 0 answered before");
    assert!(resumed, "{said}");
    succeed(&mut of_every_kind(&shards, &["--batch", "8", "--shard", "2/2"]));
    assert_eq!(answers(&shards), answers(&alone));
}

/// One run over three passages side by side is the mean of three runs over one passage each.
#[test]
fn agreement_over_passages_is_the_mean_of_each() {
    let folder = tempfile::tempdir().unwrap();
    let words: Vec<_> =
        (0..240).map(|i| format!("{}{}", ["the", "a", "of"][i % 3], i * i)).collect();
    let agree = |words: &[String], passages: &str| -> Agreement {
        let text = folder.path().join(format!("{passages}-{}.txt", words[0]));
        std::fs::write(&text, words.join(" ")).unwrap();
        let out = text.with_extension("out");
        let mut command = eval("agree");
        command.args(["--model", "embedded", "--settings", "kivi-2"]);
        command.args(["--prompt-words", "60", "--words", "20", "--batch", "3"]);
        command.args(["--passages", passages]);
        succeed(command.arg("--text").arg(&text).arg("--out").arg(&out));
        let lines = std::fs::read_to_string(out.join("agreement.jsonl")).unwrap();
        let line: serde_json::Value = serde_json::from_str(lines.trim()).unwrap();
        serde_json::from_value(line).unwrap()
    };
    let together = agree(&words, "3");
    let alone: Vec<_> = words.chunks(80).map(|words| agree(words, "1")).collect();
    let mean = Agreement::mean(&alone).unwrap();
    assert_eq!(together.tokens, mean.tokens);
    assert!(together.kl > 1e-3, "{}", together.kl);
    for (got, want) in [
        (together.kl, mean.kl),
        (together.perplexity, mean.perplexity),
        (together.dense_perplexity, mean.dense_perplexity),
        (together.top1, mean.top1),
    ] {
        assert!((got / want - 1.0).abs() < 1e-4, "{got} {want}");
    }
}

/// A setting is compared with the dense model under its own limit of the prompt.
#[test]
fn agreement_is_with_the_same_prompt() {
    let folder = tempfile::tempdir().unwrap();
    let [text, settings, out] = ["text", "settings.toml", "out"].map(|n| folder.path().join(n));
    std::fs::write(&text, "the cat and a dog saw one of the birds ".repeat(20)).unwrap();
    let setting = |name: &str, context: usize| {
        format!(
            "[[setting]]\nname = {name:?}\nmethod = \"dense-f16\"\nmodel = \"\"\ncontext = {context}\n"
        )
    };
    std::fs::write(&settings, setting("short", 20) + &setting("long", 4000)).unwrap();
    let mut command = eval("agree");
    command.args(["--model", "embedded", "--settings", "short,long", "--settings-file"]);
    command.arg(&settings).args(["--prompt-words", "100", "--words", "20", "--text"]);
    succeed(command.arg(&text).arg("--out").arg(&out));
    // A result is not taken for that of another setting with the same name.
    std::fs::write(&settings, setting("short", 30) + &setting("long", 4000)).unwrap();
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("short: setting"), "{said}");
    let lines = std::fs::read_to_string(out.join("agreement.jsonl")).unwrap();
    for line in lines.lines() {
        let agreement: Agreement = serde_json::from_str(line).unwrap();
        assert!(agreement.kl < 1e-9, "{line}");
    }
    assert_eq!(lines.lines().count(), 2);
}

/// Array jobs and scripts see by the exit code that samples have no result.
#[test]
fn a_run_with_failures_exits_with_1_and_names_them() {
    let folder = tempfile::tempdir().unwrap();
    let (out, file) = (folder.path().join("out"), folder.path().join("settings.toml"));
    let server = "[[setting]]\nname = \"served\"\nmethod = \"http\"\nmodel = \"m\"\n\
                  context = 4000\n[setting.server]\nurl = \"http://127.0.0.1:9/v1\"\ntries = 1\n";
    std::fs::write(&file, server).unwrap();
    let command = |settings: &str| {
        let mut command = eval("run");
        command.args(["--tasks", "needle", "--settings", settings]).args(NEEDLES);
        command.arg("--settings-file").arg(&file).arg("--out").arg(&out);
        command
    };
    let output = command("served,dense-f16").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("no result for: served, needle, "), "{said}");
    assert_eq!(answers(&out).len(), 6);
    // The setting without failures is complete.
    succeed(&mut command("dense-f16"));
}
