//! Chat templates against `transformers`, and their limits. `fixtures/make_chat.py` made the texts.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use base_models::{ChatOptions, ChatTemplate, LoadOptions, Message, Pretrained};
use common::fixture;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

#[derive(Deserialize)]
struct Case {
    name: String,
    template: String,
    messages: Vec<Value>,
    tools: Option<Value>,
    arguments: BTreeMap<String, Value>,
    reply: bool,
    tokens: BTreeMap<String, String>,
    text: Option<String>,
    error: Option<String>,
}

fn render(case: &Case) -> Result<String, String> {
    let mut options = if case.reply { ChatOptions::reply() } else { ChatOptions::default() };
    if let Some(tools) = &case.tools {
        options = options.tools(tools).unwrap();
    }
    for (name, value) in &case.arguments {
        options = options.argument(name, value).unwrap();
    }
    let token = |name: &str| case.tokens.get(name).map_or("", String::as_str);
    let chat = ChatTemplate::new(&case.template, token("bos_token"), token("eos_token"));
    let rendered = chat.and_then(|chat| chat.render_with(&case.messages, &options));
    rendered.map_err(|e| e.to_string())
}

fn check(path: &Path) {
    let cases: Vec<Case> = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let mut wrong = 0;
    for case in &cases {
        let got = render(case);
        let right = match (&case.text, &case.error) {
            (Some(text), _) => got.as_ref() == Ok(text),
            (_, Some(error)) => match &got {
                // Only errors raised by a template itself have the same text.
                Err(got) => !error.contains("please") || got.contains(error),
                Ok(_) => false,
            },
            _ => false,
        };
        if !right {
            wrong += 1;
            println!(
                "{}: reply {}\n{got:?}\n{:?} {:?}\n",
                case.name, case.reply, case.text, case.error
            );
        }
    }
    println!("{} of {} differ", wrong, cases.len());
    assert_eq!(wrong, 0);
}

#[test]
fn conversations_render_as_with_transformers() {
    check(&fixture("chat.json"));
}

#[test]
#[ignore = "needs the file of fixtures/make_chat.py with public templates"]
fn public_templates_render_as_with_transformers() {
    let path = std::env::var_os("LONGCTX_CHATS").expect("LONGCTX_CHATS names a file");
    check(Path::new(&path));
}

#[test]
fn tools_keep_the_order_in_which_they_serialize() {
    #[derive(Serialize)]
    struct Tool {
        name: &'static str,
        arguments: &'static str,
    }
    let chat = ChatTemplate::new("{{ tools | tojson }}", "", "").unwrap();
    let tools = [Tool { name: "weather", arguments: "<city>" }];
    let options = ChatOptions::default().tools(&tools).unwrap();
    let text = chat.render_with::<Message>(&[], &options).unwrap();
    assert_eq!(text, r#"[{"name": "weather", "arguments": "<city>"}]"#);
}

#[test]
fn dates_follow_the_clock() {
    let chat = ChatTemplate::new("{{ strftime_now('%Y-%m-%d') }}", "", "").unwrap();
    let date = chat.render(&[], false).unwrap();
    let parts: Vec<_> = date.split('-').map(|part| part.parse::<u32>().unwrap()).collect();
    assert!(parts[0] >= 2026 && (1..=12).contains(&parts[1]) && (1..=31).contains(&parts[2]));
    let bad = ChatTemplate::new("{{ strftime_now('%') }}", "", "").unwrap();
    assert!(bad.render(&[], false).unwrap_err().to_string().contains("strftime_now"));
}

/// Returns the fixture "llama" with a tokenizer and the given tokenizer configuration.
fn model(config: &Value) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(fixture("llama").join(file), folder.path().join(file)).unwrap();
    }
    let template = json!({"type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}});
    let token = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    let tokenizer = json!({
        "version": "1.0", "normalizer": null, "pre_tokenizer": null, "post_processor": template, "decoder": null,
        "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "<unk>"},
        "added_tokens": [token(1, "<s>"), token(2, "</s>")],
        "model": {"type": "BPE", "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}, "merges": [], "unk_token": "<unk>"},
    });
    fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    folder
}

fn open(folder: &Path) -> Pretrained {
    Pretrained::from_folder(folder, &LoadOptions::default()).unwrap()
}

#[test]
fn truncation_and_padding_of_a_tokenizer_are_switched_off() {
    let llm = open(model(&json!({})).path());
    assert_eq!(llm.tokenizer.encode("abab", true).unwrap(), [1, 3, 4, 3, 4]);
    assert_eq!(llm.tokenizer.encode("a", true).unwrap(), [1, 3]);
}

#[test]
fn a_conversation_has_one_token_at_its_beginning() {
    let template =
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}";
    let folder = model(
        &json!({"chat_template": template, "bos_token": {"content": "<s>"}, "eos_token": "</s>"}),
    );
    let llm = open(folder.path());
    assert_eq!(llm.encode_chat(&[Message::user("ab")]).unwrap(), [1, 3, 4, 2]);
    let llm = open(model(&json!({})).path());
    let message = llm.encode_chat(&[Message::user("ab")]).unwrap_err().to_string();
    assert!(message.contains("no chat template"), "{message}");
}

#[test]
fn a_model_whose_template_does_not_compile_can_complete_text() {
    let folder = model(&json!({"chat_template": "{% no such thing %}"}));
    let llm = open(folder.path());
    assert_eq!(llm.tokenizer.encode("ab", true).unwrap(), [1, 3, 4]);
    let message = llm.encode_chat(&[Message::user("ab")]).unwrap_err().to_string();
    assert!(message.contains("chat template: syntax error"), "{message}");
}

#[test]
fn a_template_for_tools_is_used_with_tools() {
    let templates =
        json!([{"name": "tool_use", "template": "ab"}, {"name": "default", "template": "a"}]);
    let llm = open(model(&json!({"chat_template": templates})).path());
    assert_eq!(llm.encode_chat(&[Message::user("")]).unwrap(), [3]);
    let options = ChatOptions::reply().tools(&json!([{"name": "x"}])).unwrap();
    assert_eq!(llm.encode_chat_with(&[Message::user("")], &options).unwrap(), [3, 4]);
}

#[test]
fn all_end_tokens_of_the_generation_config_stop() {
    let folder = model(&json!({}));
    assert_eq!(open(folder.path()).model.config().eos, [2]);
    fs::write(folder.path().join("generation_config.json"), r#"{"eos_token_id": [2, 4]}"#).unwrap();
    assert_eq!(open(folder.path()).model.config().eos, [2, 4]);
    fs::write(folder.path().join("generation_config.json"), r#"{"do_sample": true}"#).unwrap();
    assert_eq!(open(folder.path()).model.config().eos, [2]);
}

/// Templates that would not end, fill the memory, or overflow a stack.
#[test]
fn hostile_templates_are_stopped() {
    let repeat = |part: &str| part.repeat((100 << 10) / part.len());
    let ranges = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}x{% endfor %}{% endfor %}{% endfor %}";
    let doubled = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x | length }}";
    let listed = "{% set ns = namespace(x='a' * 1000000, all=[]) %}{% for i in range(90000) %}{% set ns.all = ns.all + [ns.x ~ i] %}{% endfor %}";
    let nested = "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% for j in range(99) %}{% set ns.x = [ns.x] %}{% endfor %}{% endfor %}{{ ns.x | tojson }}";
    let recursive = "{% macro m(x) %}{{ m(x) }}{{ m(x) }}{% endmacro %}{{ m(1) }}";
    let replaced = "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x.replace('a', 'aaaaaaaaaa') %}{% endfor %}";
    let joined = "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x, ns.x, ns.x] | join(ns.x) %}{% endfor %}";
    let mut templates: Vec<String> =
        [ranges, doubled, listed, nested, recursive, replaced, joined].map(str::to_owned).into();
    for part in [
        "-",
        "- ",
        "(",
        "[",
        "{'a':",
        "not ",
        "a.",
        "a|",
        "a[",
        "a+",
        "a~",
        "a and ",
        "a if b else ",
        "a==",
        "a**",
        "f(",
    ] {
        templates.push(format!("{{{{ {}a }}}}", repeat(part)));
    }
    for part in [
        "|upper",
        ".a",
        "[0]",
        "()",
        "+a",
        "~a",
        " and a",
        " == a",
        " if a else b",
        " is defined",
        "**a",
        "*a",
    ] {
        templates.push(format!("{{{{ a{} }}}}", repeat(part)));
    }
    for part in [
        "{% if a %}",
        "{% for a in b %}",
        "{% set a %}",
        "{% macro a() %}",
        "{{ a }}",
        "{%",
        "{#",
        "{{",
        "{% raw %}",
        "{% generation %}",
        "{% if a %}{% elif b %}",
    ] {
        templates.push(repeat(part));
    }
    // Namespaces that contain themselves, printed, compared and sorted.
    for part in [
        "{% set a.x = a %}{{ a }}",
        "{% set a.x = [a] %}{% set b.x = [b] %}{{ a.x == b.x }}",
        "{%- set a.x, b.x = {'k': [b]}, a -%}{{ a.x | sort }}",
        "{% set c = [a] %}{% set a . x = c %}{{ a ~ c }}",
        "{% set a.x = b %}{% set b.x = a %}{{ a.x in [b] }}",
        "{% raw %}{% set a %}{% endraw %}{% set a.x = ('=' , a) +%}{{ a | string }}",
    ] {
        templates.push(format!("{{% set a = namespace() %}}{{% set b = namespace() %}}{part}"));
    }
    // Many expressions of the maximum length.
    for part in ["(", "not ", "a+", "a|", "a if b else ", "a[", "a.", "a==", "a and "] {
        templates.push(repeat(&format!("{{{{ {}a }}}}", part.repeat(3900 / part.len()))));
    }
    templates.push("x".repeat(1 << 20));
    templates.push(format!("{{{{ {} }}}}", "-".repeat(1 << 20)));
    for template in templates {
        let shown: String = template.chars().take(60).collect();
        let start = Instant::now();
        let chat = ChatTemplate::new(&template, "", "");
        let done = chat.and_then(|chat| chat.render(&[Message::user("a")], true));
        let took = start.elapsed();
        println!(
            "{took:?} {} {shown:?} {}",
            done.is_ok(),
            done.map_or_else(|e| e.to_string(), |t| format!("{} bytes", t.len()))
                .chars()
                .take(90)
                .collect::<String>()
        );
        assert!(took < Duration::from_secs(10), "{shown}: {took:?}");
    }
}
