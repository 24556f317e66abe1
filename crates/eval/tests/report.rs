//! Reports of made-up results.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use common::record;
use longctx_eval::statistics::Decode;
use longctx_eval::{Agreement, Category, Record, report};
use tempfile::tempdir;

fn folder(at: &Path) {
    let mut lines = String::new();
    for (setting, better) in [("dense-f16", 1.0), ("h2o-2x", 0.75), ("h2o-4x", 0.5)] {
        for (task, category, sample, value) in [
            ("qasper", Category::SingleDocQa, "1", 0.4),
            ("qasper", Category::SingleDocQa, "2", 0.2),
            ("narrativeqa", Category::SingleDocQa, "1", 0.7),
            ("trec", Category::FewShot, "1", 0.8),
            ("lcc", Category::Code, "1", 0.6),
            ("needle", Category::Needle, "600-words-0.250-0", 0.0),
            ("needle", Category::Needle, "1200-words-0.750-0", 1.0),
        ] {
            let record = record(setting, task, category, sample, value * better);
            lines += &(serde_json::to_string(&record).unwrap() + "\n");
        }
    }
    fs::write(at.join("results-1-of-1.jsonl"), lines).unwrap();
    let run = r#"{"versions": ["0"], "seed": 0, "limits": {"samples": 2, "max_new_tokens": null},
        "settings": {"h2o-4x": {"name": "h2o-4x", "method": "h2o-4x", "model": "/far/small.gguf", "context": 300}},
        "tasks": ["qasper"]}"#;
    fs::write(at.join("run.json"), run).unwrap();
}

/// Returns the cells of a row as Markdown reads it: a bar after a backslash belongs to the cell, and
/// so does a backslash after one.
fn cells(row: &str) -> Vec<String> {
    let mut cells = vec![String::new()];
    let mut characters = row.chars();
    while let Some(character) = characters.next() {
        match character {
            '\\' => cells.last_mut().unwrap().extend(characters.next()),
            '|' => cells.push(String::new()),
            other => cells.last_mut().unwrap().push(other),
        }
    }
    cells.iter().map(|cell| cell.trim().to_owned()).collect()
}

#[test]
fn names_of_settings_do_not_divide_cells_or_rows() {
    let at = tempdir().unwrap();
    let names = ["a|b", r"c\|d", r"e\", "f\ng", "||"];
    let lines = names.map(|name| {
        let record = record(name, "qa|sper", Category::SingleDocQa, "1", 0.5);
        serde_json::to_string(&record).unwrap() + "\n"
    });
    fs::write(at.path().join("results-1-of-1.jsonl"), lines.concat()).unwrap();
    report::write(at.path()).unwrap();
    let page = fs::read_to_string(at.path().join("report.md")).unwrap();
    let tables = page.split("\n\n").filter(|part| part.starts_with("| ")).collect::<Vec<_>>();
    assert_eq!(tables.len(), 3);
    for table in tables {
        let rows: Vec<_> = table.lines().map(cells).collect();
        assert!(rows.iter().all(|row| row.len() == rows[0].len()), "{table}");
        let first: Vec<_> = rows[2..].iter().map(|row| row[1].as_str()).collect();
        assert_eq!(first, names.map(|name| name.replace('\n', " ")));
    }
}

#[test]
fn numbers_are_those_of_the_results() {
    let at = tempdir().unwrap();
    folder(at.path());
    let agreement = Agreement {
        tokens: 9,
        perplexity: 4.5,
        dense_perplexity: 4.25,
        top1: 0.875,
        kl: 0.0625,
        ratio: Some(4.0),
    };
    let none = BTreeMap::new();
    report::add_agreement(at.path(), "h2o-4x", "essay", &none, &Agreement { kl: 9.0, ..agreement })
        .unwrap();
    report::add_agreement(at.path(), "h2o-4x", "essay", &none, &agreement).unwrap();
    let written = report::write(at.path()).unwrap();
    assert_eq!(written.len(), 7, "{written:?}");
    let page = fs::read_to_string(at.path().join("report.md")).unwrap();
    let row = |start: &str| {
        let line = page.lines().find(|line| line.starts_with(start)).unwrap();
        line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>()
    };
    // Single-doc QA is the mean of its tasks' means: (30 + 70) / 2.
    let dense = ["50.0", "80.0", "60.0", "50.0", "60.0", "–", "–", "1.00", "0.50", "40.0"];
    assert_eq!(row("| dense-f16")[1..], dense);
    // Halved scores are lower on all 7 samples except the one with score 0.
    let quarter = ["25.0", "40.0", "30.0", "25.0", "30.0", "0 / 6"];
    let h2o = row("| h2o-4x");
    assert_eq!(h2o[1..7], quarter);
    // The mean of the categories falls by half of 60.
    assert!(h2o[7].starts_with("-30.0 [-") && h2o[7].ends_with(']'), "{}", h2o[7]);
    assert_eq!(h2o[8..], ["4.00", "0.50", "40.0"]);
    // The costs: samples, prompt, bytes held, ratio, speed, peak.
    let cost = "| h2o-4x | 7 | 100 | 0.00 | 4.00 | 0.50 | 40.0 | 2 |";
    assert!(page.contains(cost), "{page}");
    // Tasks by category, then by name.
    assert!(
        page.contains("| setting | narrativeqa | qasper | trec | lcc | needle | needle, partial |"),
        "{page}"
    );
    let facts = "1 settings on small.gguf; 1 tasks, at most 2 samples of each; prompts truncated to 300 tokens";
    assert!(page.contains(facts), "{page}");
    // The newest agreement of a setting.
    assert!(page.contains("| h2o-4x | 4.00 | 0.0625 | 87.5 | 4.50 | 4.25 | 9 |"), "{page}");
    let csv = fs::read_to_string(at.path().join("scores.csv")).unwrap();
    assert_eq!(csv.lines().count(), 1 + 3 * 5);
    let start = "h2o-2x,needle,2,37.5000,50.0000,4.0000,0.5000,40.0000,1,2000000";
    assert!(csv.lines().any(|line| line == start), "{csv}");
}

#[test]
fn the_page_is_self_contained() {
    let at = tempdir().unwrap();
    folder(at.path());
    report::write(at.path()).unwrap();
    let page = fs::read_to_string(at.path().join("report.html")).unwrap();
    for outside in ["src=", "href=", "@import", "http://localhost", "https:"] {
        assert!(!page.contains(outside), "{outside}");
    }
    let data = embedded(&page);
    let of = |setting: &str| {
        let rows = data["rows"].as_array().unwrap();
        rows.iter().find(|row| row["setting"] == setting).unwrap().clone()
    };
    assert!(of("dense-f16")["difference"].is_null());
    let mean = of("h2o-4x")["difference"]["mean"].as_f64().unwrap();
    assert!((mean + 0.3).abs() < 1e-12, "{mean}");
    // 7 samples are too few for a verdict.
    assert_eq!(of("h2o-4x")["difference"]["verdict"], "unsure");
    assert_eq!(of("h2o-4x")["scores"]["qasper"]["samples"], 2);
    let map =
        data["maps"].as_array().unwrap().iter().find(|map| map["setting"] == "h2o-2x").unwrap();
    assert_eq!(map["rows"], serde_json::json!(["depth 25 %", "depth 75 %"]));
    assert_eq!(map["columns"], serde_json::json!(["600 words", "1200 words"]));
    assert_eq!(map["cells"][0], serde_json::json!([[0.5, 1], null]));
    // Each figure names its content.
    for (name, words) in [
        ("quality-against-bytes", vec!["dense-f16", "h2o-2x … 4x", "4x", "score, %"]),
        ("radar", vec!["h2o-2x", "h2o-4x", "Few-shot 80"]),
        ("needle", vec!["dense-f16", "600", "1200", "25 %", "75 %"]),
    ] {
        let svg = fs::read_to_string(at.path().join(format!("{name}.svg"))).unwrap();
        for word in words {
            assert!(svg.contains(word), "{name}: {word}");
        }
    }
}

/// Returns the data of a page.
fn embedded(page: &str) -> serde_json::Value {
    let (_, rest) = page.split_once("id=\"data\">").unwrap();
    serde_json::from_str(rest.split_once("</script>").unwrap().0).unwrap()
}

#[test]
fn texts_of_a_run_cannot_end_the_pages_script() {
    let at = tempdir().unwrap();
    let name = "</script><b>";
    let line = serde_json::to_string(&record(name, "trec", Category::FewShot, "1", 1.0)).unwrap();
    fs::write(at.path().join("results-1-of-1.jsonl"), line + "\n").unwrap();
    report::write(at.path()).unwrap();
    let page = fs::read_to_string(at.path().join("report.html")).unwrap();
    assert!(!page.contains(name));
    assert_eq!(embedded(&page)["rows"][0]["setting"], name);
}

#[test]
fn two_runs_are_compared_setting_by_setting() {
    let (a, b, out) = (tempdir().unwrap(), tempdir().unwrap(), tempdir().unwrap());
    folder(a.path());
    folder(b.path());
    let path = b.path().join("results-1-of-1.jsonl");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("\"value\":0.4,", "\"value\":0.6,")).unwrap();
    let page =
        fs::read_to_string(report::compare(a.path(), b.path(), out.path()).unwrap()).unwrap();
    let data = embedded(&page);
    let of = |setting: &str| {
        let rows = data["rows"].as_array().unwrap();
        rows.iter().find(|row| row["setting"] == setting).unwrap()["difference"].clone()
    };
    assert_eq!(
        (of("dense-f16")["better"].as_u64(), of("dense-f16")["worse"].as_u64()),
        (Some(1), Some(0))
    );
    assert_eq!(of("h2o-2x")["mean"], 0.0);
    let other = tempdir().unwrap();
    let line =
        serde_json::to_string(&record("other", "trec", Category::FewShot, "1", 1.0)).unwrap();
    fs::write(other.path().join("results-1-of-1.jsonl"), line + "\n").unwrap();
    let error = report::compare(a.path(), other.path(), out.path()).unwrap_err().to_string();
    assert!(error.contains("settings and samples"), "{error}");
}

#[test]
fn a_folder_without_results_is_an_error() {
    let at = tempdir().unwrap();
    assert!(report::write(at.path()).unwrap_err().to_string().contains("at least one result"));
}

#[test]
fn invalid_numbers_are_named_by_line() {
    let at = tempdir().unwrap();
    folder(at.path());
    let path = at.path().join("results-1-of-1.jsonl");
    let text = fs::read_to_string(&path).unwrap();
    for (from, to, field) in [
        ("\"value\":0.4", "\"value\":1e9", "score.value"),
        ("\"value\":0.4", "\"value\":-0.5", "score.value"),
        ("\"first_token_seconds\":0.5", "\"first_token_seconds\":-1.0", "first_token_seconds"),
    ] {
        assert!(text.contains(from));
        fs::write(&path, text.replacen(from, to, 1)).unwrap();
        let error = report::write(at.path()).unwrap_err().to_string();
        assert!(error.contains("line 1") && error.contains(field), "{error}");
    }
    fs::write(&path, text).unwrap();
    let agreement = Agreement {
        tokens: 9,
        perplexity: f64::INFINITY,
        dense_perplexity: 4.25,
        top1: 0.875,
        kl: 0.0625,
        ratio: None,
    };
    let none = BTreeMap::new();
    let add = |agreement: &Agreement| {
        report::add_agreement(at.path(), "h2o-4x", "essay", &none, agreement)
    };
    assert!(add(&agreement).unwrap_err().to_string().contains("perplexity"));
    let agreement = Agreement { perplexity: 4.5, kl: f64::NAN, ..agreement };
    assert!(add(&agreement).unwrap_err().to_string().contains("`kl`"));
    // Only files that can be read again were written.
    report::write(at.path()).unwrap();
}

/// Needs `chromium`: cargo test -p longctx-eval --test report -- --ignored
#[test]
#[ignore = "needs chromium"]
fn the_page_sorts_filters_and_draws_in_a_browser() {
    let at = tempdir().unwrap();
    folder(at.path());
    report::write(at.path()).unwrap();
    let page = fs::read_to_string(at.path().join("report.html")).unwrap();
    let watch = "<script>window.faults=[];window.onerror=words=>{faults.push(words)};</script>";
    let act = r##"<script>
        const names = () => [...document.querySelectorAll("#main tbody tr")].map(row => row.children[1].textContent);
        const head = words => [...document.querySelectorAll("#main th")].find(cell => cell.textContent === words);
        const seen = [names()];
        head("score, %").click(); seen.push(names());
        head("score, %").click(); seen.push(names());
        const filter = document.getElementById("filter");
        filter.value = "h2o 4x"; filter.dispatchEvent(new Event("input")); seen.push(names());
        document.querySelector("#main input[type=checkbox]").click();
        document.getElementById("theme").click();
        seen.push([document.querySelectorAll("#scatter circle").length, document.querySelectorAll("#maps h3").length,
            document.querySelectorAll("#radar polygon").length, document.documentElement.dataset.theme]);
        document.body.append(Object.assign(document.createElement("pre"), { id: "seen", textContent: JSON.stringify({ faults, seen }) }));
        </script>"##;
    let page = page
        .replace("<head>", &format!("<head>{watch}"))
        .replace("</body>", &format!("{act}</body>"));
    let path = at.path().join("acted.html");
    fs::write(&path, page).unwrap();
    let output = std::process::Command::new("chromium")
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--virtual-time-budget=3000",
            "--dump-dom",
        ])
        .arg(format!("file://{}?theme=light", path.display()))
        .output()
        .unwrap();
    let dom = String::from_utf8(output.stdout).unwrap();
    let (_, rest) = dom.split_once("<pre id=\"seen\">").expect("the script ran to its end");
    let seen: serde_json::Value =
        serde_json::from_str(rest.split_once("</pre>").unwrap().0).unwrap();
    let expected = serde_json::json!({"faults": [], "seen": [
        ["dense-f16", "h2o-2x", "h2o-4x"],
        ["dense-f16", "h2o-2x", "h2o-4x"],
        ["h2o-4x", "h2o-2x", "dense-f16"],
        ["h2o-4x"],
        // One of three settings is deselected: two maps, two radar charts on four rings.
        [3, 2, 6, "dark"],
    ]});
    assert_eq!(seen, expected);
}

#[test]
fn speeds_of_different_batches_are_not_averaged() {
    let sample = |name| record("a", "qasper", Category::SingleDocQa, name, 0.4);
    let mut records = [sample("0"), sample("1")];
    let speed = |records: &[Record]| {
        let records: Vec<_> = records.iter().collect();
        Decode::of(&records).map(|decode| decode.to_string())
    };
    assert_eq!(speed(&records).as_deref(), Some("40.0"));
    records[1].timings.batch = Some(8);
    assert_eq!(speed(&records), None);
    records[0].timings.batch = Some(8);
    records[0].timings.decode_tokens_per_second = Some(60.0);
    assert_eq!(speed(&records).as_deref(), Some("50.0 (8)"));
}
