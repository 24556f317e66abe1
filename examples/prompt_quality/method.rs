//! The compared compressors.

use anyhow::{Result, bail};
use base_models::Pretrained;
use longctx_core::PromptCompressor;
use longctx_examples::{encoder, selective_context};
use prompt_compress::baseline::{Extract, RandomDrop, Ranking, TruncateMiddle};
use prompt_compress::llmlingua::{Order, Settings};
use prompt_compress::{LlmLingua, llmlingua2};

type Named = (&'static str, Box<dyn PromptCompressor>);

/// The reference.
pub const RANDOM: &str = "random words";

/// Returns the compressors with these names, or all.
pub fn some(names: &[String], llm: &Pretrained, encoder: Option<&str>) -> Result<Vec<Named>> {
    let mut all = all(llm, encoder)?;
    let unknown = names.iter().find(|name| all.iter().all(|(known, _)| known != name));
    if let Some(name) = unknown {
        let known: Vec<&str> = all.iter().map(|(name, _)| *name).collect();
        bail!("no method {name:?}; there are {}", known.join(", "));
    }
    all.retain(|(name, _)| names.is_empty() || names.iter().any(|wanted| wanted == name));
    Ok(all)
}

/// Returns all compressors by name.
fn all(llm: &Pretrained, encoder: Option<&str>) -> Result<Vec<Named>> {
    let tokenizer = llm.tokenizer.inner().clone();
    let selective = selective_context::on(llm, crate::session(llm)?)?;
    let plain = Settings::llmlingua();
    let lingua = LlmLingua::new(crate::session(llm)?, tokenizer.clone(), plain)?;
    let long = Settings { order: Order::Original, ..Settings::long() };
    let long = LlmLingua::new(crate::session(llm)?, tokenizer, long)?;
    let mut all: Vec<Named> = vec![
        (RANDOM, Box::new(RandomDrop { seed: 0 })),
        ("middle left out", Box::new(TruncateMiddle)),
        ("BM25 sentences", Box::new(Extract { ranking: Ranking::Bm25 })),
        ("TF-IDF sentences", Box::new(Extract { ranking: Ranking::TfIdf })),
        ("Selective-Context", Box::new(selective)),
        ("LLMLingua", Box::new(lingua)),
        ("LongLLMLingua", Box::new(long.with_second(crate::session(llm)?))),
    ];
    if let Some(name) = encoder {
        let model = encoder::open(name, llmlingua2::Settings::paper())?;
        all.push(("LLMLingua-2", Box::new(model)));
    }
    Ok(all)
}
