//! The report as one page that needs nothing else.

use super::agreement::Line;
use super::markdown::{Cells, tables};
use super::table::Table;

const STYLE: &str = "body{font:15px/1.45 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;color:#222}\
    h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}\
    .wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}\
    th,td{padding:.25em .7em;text-align:right;border-bottom:1px solid #ddd}th{vertical-align:bottom}\
    th:first-child,td:first-child{text-align:left;white-space:nowrap}tr:hover td{background:#f4f7fb}\
    svg{max-width:100%;height:auto}";

pub(super) fn page(
    facts: &str,
    table: &Table,
    agreements: &[Line],
    pictures: &[(&str, String)],
) -> String {
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>longctx-eval</title>\
         <style>{STYLE}</style></head><body>\n<h1>longctx-eval</h1>\n<p>{}</p>\n",
        escape(facts)
    );
    for (i, cells) in tables(table, agreements).iter().enumerate() {
        out += &section(cells);
        for (_, svg) in pictures.iter().filter(|_| i == 0) {
            out += &format!("<p>{svg}</p>\n");
        }
    }
    out + "</body></html>\n"
}

fn section(cells: &Cells) -> String {
    let row = |tag: &str, cells: &[String]| {
        let cell = |cell: &String| format!("<{tag}>{}</{tag}>", escape(cell));
        format!("<tr>{}</tr>\n", cells.iter().map(cell).collect::<String>())
    };
    let body: String = cells.rows.iter().map(|cells| row("td", cells)).collect();
    format!(
        "<h2>{}</h2>\n<p>{}</p>\n<div class=\"wide\"><table><thead>{}</thead><tbody>{body}</tbody></table></div>\n",
        escape(&cells.title),
        escape(&cells.note),
        row("th", &cells.head)
    )
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
