//! Tables as Markdown, with the cells that HTML shows too.

use super::agreement::Line;
use super::table::{Table, distinct};
use crate::statistics::Difference;

/// A table as text: a title, a header and rows.
pub(super) struct TextTable {
    pub title: String,
    pub note: String,
    pub head: Vec<String>,
    pub rows: Vec<Vec<String>>,
}

/// Returns the whole report.
pub(super) fn page(facts: &str, table: &Table, agreements: &[Line], pictures: &[&str]) -> String {
    let mut out = format!("# Report\n\n{facts}\n\n");
    for (i, cells) in tables(table, agreements).iter().enumerate() {
        out += &section(cells);
        // The figures follow the most important table.
        for name in pictures.iter().filter(|_| i == 0) {
            out += &format!("![{name}]({name}.svg)\n\n");
        }
    }
    out.trim_end().to_owned() + "\n"
}

fn section(cells: &TextTable) -> String {
    let mut out = format!("## {}\n\n{}\n\n", cells.title, cells.note);
    out += &line(&cells.head);
    let rule = |(i, _): (usize, &String)| if i == 0 { "---" } else { "---:" }.to_owned();
    out += &line(&cells.head.iter().enumerate().map(rule).collect::<Vec<_>>());
    out.extend(cells.rows.iter().map(|row| line(row)));
    out + "\n"
}

/// Returns the tables: category scores with bytes and speed, task scores, costs, agreement.
pub(super) fn tables(table: &Table, agreements: &[Line]) -> Vec<TextTable> {
    let mut all = vec![categories(table), tasks(table), costs(table)];
    let texts = distinct(agreements.iter().map(|line| line.text.as_str()));
    all.extend(texts.iter().map(|text| agreement(text, agreements)));
    all
}

fn categories(table: &Table) -> TextTable {
    let categories = table.categories();
    let first = table.rows.first().map(|row| row.setting.clone()).unwrap_or_default();
    let mut head = vec!["setting".to_owned()];
    head.extend(categories.iter().map(|(_, words)| (*words).to_owned()));
    let more = [
        "mean",
        "better / worse",
        "difference [95 %]",
        "dense / held",
        "first token, s",
        "decode, tokens/s",
    ];
    head.extend(more.map(str::to_owned));
    let row = |row: &super::table::Row| {
        let mut cells = vec![row.setting.clone()];
        cells.extend(categories.iter().map(|(category, _)| number(row.category(*category), 1)));
        cells.push(number(row.overall(), 1));
        cells.push(match row.setting == first {
            true => "–".to_owned(),
            false => format!("{} / {}", row.better, row.worse),
        });
        cells.push(row.difference.map_or_else(
            || "–".to_owned(),
            |Difference { interval, .. }| {
                let [mean, low, high] =
                    [interval.mean, interval.low, interval.high].map(|x| 100.0 * x);
                format!("{mean:+.1} [{low:+.1}, {high:+.1}]")
            },
        ));
        cells.push(number(row.ratio, 2));
        cells.push(number(row.first_token_seconds, 2));
        cells.push(speed(row));
        cells
    };
    TextTable {
        title: "Score by category, bytes and speed".into(),
        note: format!(
            "Percent: the mean of a category's tasks. Better / worse: the number of samples with a \
             higher and a lower score than {first}. Difference: to the dense setting of the same \
             model, paired by sample, with a 95 % bootstrap interval; a difference is significant \
             if the interval excludes 0. Dense / held: bytes of a dense f16 cache divided by the \
             bytes held. Tokens/s: of all sequences of a batch together; their number is in \
             brackets. – means that batch sizes differed."
        ),
        head,
        rows: table.rows.iter().map(row).collect(),
    }
}

fn costs(table: &Table) -> TextTable {
    let head = [
        "setting",
        "samples",
        "prompt, tokens",
        "held, MB",
        "dense / held",
        "first token, s",
        "decode, tokens/s",
        "peak resident, MB",
    ];
    let megabytes = |bytes: f64| bytes / 1e6;
    let row = |row: &super::table::Row| {
        vec![
            row.setting.clone(),
            row.samples.to_string(),
            number(Some(row.prompt_tokens), 0),
            number(row.kv_bytes.map(megabytes), 2),
            number(row.ratio, 2),
            number(row.first_token_seconds, 2),
            speed(row),
            number(row.peak_resident_bytes.map(|bytes| megabytes(bytes as f64)), 0),
        ]
    };
    TextTable {
        title: "Cost of a sample".into(),
        note: "Means over the samples. Peak resident: the maximum of the whole process, \
               including the weights."
            .into(),
        head: head.map(str::to_owned).into(),
        rows: table.rows.iter().map(row).collect(),
    }
}

fn tasks(table: &Table) -> TextTable {
    let partly = |task: &String| {
        let mut scores = table.rows.iter().flat_map(|row| &row.tasks);
        scores.any(|score| score.task == *task && score.partial.is_some())
    };
    let mut head = vec!["setting".to_owned()];
    for task in &table.tasks {
        head.push(task.clone());
        head.extend(partly(task).then(|| format!("{task}, partial")));
    }
    let row = |row: &super::table::Row| {
        let mut cells = vec![row.setting.clone()];
        for task in &table.tasks {
            let found = row.tasks.iter().find(|own| own.task == *task);
            cells.push(number(found.map(|own| own.score), 1));
            if partly(task) {
                cells.push(number(found.and_then(|own| own.partial), 1));
            }
        }
        cells
    };
    TextTable {
        title: "Score by task".into(),
        note: match table.tasks.iter().any(partly) {
            true => "Percent. Partial: the share of the key that was found.".into(),
            false => "Percent.".into(),
        },
        head,
        rows: table.rows.iter().map(row).collect(),
    }
}

fn agreement(text: &str, lines: &[Line]) -> TextTable {
    let head = [
        "setting",
        "dense / held",
        "KL, nats",
        "top-1 agreement, %",
        "perplexity",
        "dense perplexity",
        "tokens",
    ];
    let row = |line: &Line| {
        let own = &line.agreement;
        vec![
            line.setting.clone(),
            number(own.ratio, 2),
            number(Some(own.kl), 4),
            number(Some(100.0 * own.top1), 1),
            number(Some(own.perplexity), 2),
            number(Some(own.dense_perplexity), 2),
            own.tokens.to_string(),
        ]
    };
    TextTable {
        title: "Agreement with the dense model, token by token".into(),
        note: format!(
            "Teacher forcing over {text}. Dense / held: at the end of the text. Dense perplexity: \
             that of the model with a dense f16 cache."
        ),
        head: head.map(str::to_owned).into(),
        rows: lines.iter().filter(|line| line.text == text).map(row).collect(),
    }
}

fn speed(row: &super::table::Row) -> String {
    row.decode.map_or_else(|| "–".to_owned(), |decode| decode.to_string())
}

fn number(x: Option<f64>, digits: usize) -> String {
    x.map_or_else(|| "–".to_owned(), |x| format!("{x:.digits$}"))
}

fn line(cells: &[String]) -> String {
    let escaped: Vec<_> = cells.iter().map(|cell| escaped(cell)).collect();
    format!("| {} |\n", escaped.join(" | "))
}

/// Escapes the text of a cell, which can be a name that the user chose. A backslash before a bar
/// would undo the bar's escape. A new line would end the table.
fn escaped(cell: &str) -> String {
    let one_line = cell.split(['\n', '\r']).collect::<Vec<_>>().join(" ");
    one_line.replace('\\', "\\\\").replace('|', "\\|")
}
