//! The 65 settings of arXiv 2407.01527, with the models and limits of longctx_bench's
//! `config/pipeline_config`.

use super::{Setting, Template};

/// The vicuna template of LongChat's authors, for one question.
const VICUNA: &str = "A chat between a curious user and an artificial intelligence assistant. \
    The assistant gives helpful, detailed, and polite answers to the user's questions.\
    {% for m in messages %}\
    {% if m.role == 'user' %} USER: {{ m.content }}{% else %} ASSISTANT: {{ m.content }}</s>{% endif %}\
    {% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}";

/// Gemma's chat template.
const GEMMA: &str = "<bos>{% for m in messages %}<start_of_turn>\
    {{ 'user' if m.role == 'user' else 'model' }}\n{{ m.content }}<end_of_turn>\n{% endfor %}\
    {% if add_generation_prompt %}<start_of_turn>model\n{% endif %}";

/// Zephyr's chat template, which Mamba-Chat was trained with.
const ZEPHYR: &str = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|endoftext|>\n{% endfor %}\
    {% if add_generation_prompt %}<|assistant|>\n{% endif %}";

/// Short name, model, context limit.
const TRANSFORMERS: [(&str, &str, usize); 3] = [
    ("llama-3-8b", "meta-llama/Meta-Llama-3-8B-Instruct", 7500),
    ("mistral-7b", "mistralai/Mistral-7B-Instruct-v0.2", 31_500),
    ("longchat-7b", "lmsys/longchat-7b-v1.5-32k", 31_500),
];

/// RWKV's chat template, with the white space of longctx_bench's `build_chat`.
const RWKV: &str = "User: hi\n\n                Assistant: Hi. I am your assistant and I will provide expert full response in full details. \
    Please feel free to ask any question and I will always answer it.\
    {% for m in messages %}\n\n                \
    {{ 'User' if m.role == 'user' else 'Assistant' }}: {{ m.content }}{% endfor %}\
    {% if add_generation_prompt %}\n\n                Assistant:{% endif %}";

/// Short name, model, context limit, template. The RWKV model is longctx_bench's
/// BlinkDL/rwkv-5-world in Hugging Face's layout.
const RECURRENT: [(&str, &str, usize, Option<&str>); 5] = [
    ("mamba-2.8b", "state-spaces/mamba-2.8b-hf", 1500, None),
    ("mamba-chat", "havenhq/mamba-chat", 1500, Some(ZEPHYR)),
    ("rwkv-5-world", "RWKV/v5-Eagle-7B-HF", 3500, Some(RWKV)),
    ("recurrentgemma-2b", "google/recurrentgemma-2b-it", 7500, Some(GEMMA)),
    ("recurrentgemma-9b", "google/recurrentgemma-9b-it", 7500, Some(GEMMA)),
];

/// Returns all settings. For each transformer: the baseline, KIVI at 2 and 4 bits, FlexGen at 4
/// bits, and H2O, StreamingLLM, InfLLM and LLMLingua-2 at 2x to 8x. Then the linear-time and hybrid
/// models.
///
/// ```
/// let settings = longctx_eval::setting::paper();
/// assert_eq!(settings.len(), 65);
/// assert_eq!(settings[0].name, "llama-3-8b/baseline");
/// ```
pub fn paper() -> Vec<Setting> {
    let mut all = Vec::new();
    for (short, model, context) in TRANSFORMERS {
        let template = match short {
            "longchat-7b" => Template::Jinja(VICUNA.to_owned()),
            _ => Template::Own,
        };
        let setting = |name: &str, method: &str| Setting {
            name: format!("{short}/{name}"),
            template: template.clone(),
            ..Setting::of(method, model, context)
        };
        all.push(setting("baseline", "dense-f16"));
        all.extend(["kivi-2", "kivi-4", "flexgen-4"].map(|method| setting(method, method)));
        for method in ["h2o", "streaming-llm", "infllm", "llmlingua2"] {
            for times in [2, 4, 6, 8] {
                let method = format!("{method}-{times}x");
                all.push(setting(&method, &method));
            }
        }
    }
    all.extend(RECURRENT.map(|(name, model, context, template)| Setting {
        name: name.to_owned(),
        template: template.map_or(Template::Plain, |text| Template::Jinja(text.to_owned())),
        ..Setting::of("recurrent", model, context)
    }));
    all
}
