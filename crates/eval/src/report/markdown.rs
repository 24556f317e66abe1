//! Tables as Markdown, and the cells that HTML shows too.

use super::agreement::Line;
use super::table::Table;

/// A table as text: a title, a head and rows.
pub(super) struct Cells {
    pub title: String,
    pub head: Vec<String>,
    pub rows: Vec<Vec<String>>,
}

/// The whole report.
pub(super) fn page(table: &Table, agreements: &[Line], pictures: &[&str]) -> String {
    let mut out = String::new();
    for cells in tables(table, agreements) {
        out += &format!("## {}\n\n", cells.title);
        out += &line(&cells.head);
        let rule = |(i, _): (usize, &String)| if i == 0 { "---" } else { "---:" }.to_owned();
        out += &line(&cells.head.iter().enumerate().map(rule).collect::<Vec<_>>());
        for row in &cells.rows {
            out += &line(row);
        }
        out.push('\n');
    }
    for name in pictures {
        out += &format!("![{name}]({name}.svg)\n\n");
    }
    out.trim_end().to_owned() + "\n"
}

/// Category scores with bytes and speed, task scores, agreement.
pub(super) fn tables(table: &Table, agreements: &[Line]) -> Vec<Cells> {
    let mut all = vec![categories(table), tasks(table)];
    if !agreements.is_empty() {
        all.push(agreement(agreements));
    }
    all
}

fn categories(table: &Table) -> Cells {
    let categories = table.categories();
    let mut head = vec!["setting".to_owned()];
    head.extend(categories.iter().map(|(_, words)| (*words).to_owned()));
    let more = [
        "mean",
        "bytes, dense f16 / held",
        "prompt, tokens",
        "first token, s",
        "decode, tokens/s",
        "peak, MB",
        "samples",
    ];
    head.extend(more.map(str::to_owned));
    let row = |row: &super::table::Row| {
        let mut cells = vec![row.setting.clone()];
        cells.extend(categories.iter().map(|(category, _)| number(row.category(*category), 1)));
        cells.push(number(row.overall(), 1));
        cells.push(number(row.ratio, 2));
        cells.push(number(Some(row.prompt_tokens), 0));
        cells.push(number(Some(row.first_token_seconds), 2));
        cells.push(number(row.decode_tokens_per_second, 1));
        cells.push(number(row.peak_resident_bytes.map(|bytes| bytes as f64 / 1e6), 0));
        cells.push(row.samples.to_string());
        cells
    };
    Cells {
        title: "Score by category (percent, mean of the category's tasks), bytes and speed".into(),
        head,
        rows: table.rows.iter().map(row).collect(),
    }
}

fn tasks(table: &Table) -> Cells {
    let head = std::iter::once("setting".to_owned()).chain(table.tasks.iter().cloned()).collect();
    let row = |row: &super::table::Row| {
        let score = |task: &String| {
            let found = row.tasks.iter().find(|own| own.task == *task);
            number(found.map(|own| own.score), 1)
        };
        std::iter::once(row.setting.clone()).chain(table.tasks.iter().map(score)).collect()
    };
    Cells {
        title: "Score by task (percent)".into(),
        head,
        rows: table.rows.iter().map(row).collect(),
    }
}

fn agreement(lines: &[Line]) -> Cells {
    let head = ["setting", "perplexity", "dense", "top-1 agreement, %", "KL, nats", "tokens"];
    let row = |line: &Line| {
        let own = &line.agreement;
        vec![
            line.setting.clone(),
            format!("{:.3}", own.perplexity),
            format!("{:.3}", own.dense_perplexity),
            format!("{:.1}", 100.0 * own.top1),
            format!("{:.4}", own.kl),
            own.tokens.to_string(),
        ]
    };
    Cells {
        title: "Beside the dense model, token by token (teacher forcing)".into(),
        head: head.map(str::to_owned).into(),
        rows: lines.iter().map(row).collect(),
    }
}

fn number(x: Option<f64>, digits: usize) -> String {
    x.map_or_else(|| "–".to_owned(), |x| format!("{x:.digits$}"))
}

fn line(cells: &[String]) -> String {
    let escaped: Vec<_> = cells.iter().map(|cell| cell.replace('|', "\\|")).collect();
    format!("| {} |\n", escaped.join(" | "))
}
