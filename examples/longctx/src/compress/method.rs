//! Compressors by name.

use anyhow::Result;
use base_models::{LoadOptions, Pretrained};
use clap::ValueEnum;
use longctx_core::PromptCompressor;
use longctx_examples::subject::dense;
use longctx_examples::{encoder, model, selective_context};
use prompt_compress::baseline::{Extract, RandomDrop, Ranking, TruncateMiddle};
use prompt_compress::{LlmLingua, LlmLingua2, llmlingua, llmlingua2};

/// The models of compressors.
#[derive(clap::Args)]
pub struct Models {
    /// The causal model of llmlingua, longllmlingua and selective-context: a GGUF file, a folder or
    /// a model of the Hub; by default SmolLM2-135M-Instruct, downloaded if it is missing
    #[arg(long)]
    model: Option<String>,
    /// The encoder of llmlingua2: a folder or a model of the Hub
    #[arg(long, default_value = encoder::PUBLISHED)]
    encoder: String,
    /// Strings that llmlingua2 always keeps; by default newlines and . ! ? ,
    #[arg(long, value_delimiter = ' ')]
    force: Option<Vec<String>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Method {
    /// LLMLingua-2: tokens that an encoder classifies as important
    Llmlingua2,
    /// LLMLingua: tokens with a high loss under a causal model
    Llmlingua,
    /// LongLLMLingua: tokens whose loss changes most with the question
    Longllmlingua,
    /// Selective Context: phrases with high self-information under a causal model
    SelectiveContext,
    /// Sentences with the highest BM25 scores
    Bm25,
    /// Sentences with the highest TF-IDF scores
    TfIdf,
    /// The start and the end of the text
    Middle,
    /// Random words
    Random,
}

impl Method {
    pub fn open(self, models: &Models) -> Result<Box<dyn PromptCompressor>> {
        Ok(match self {
            Method::Llmlingua2 => Box::new(models.encoder()?),
            Method::Llmlingua => models.lingua(llmlingua::Settings::llmlingua())?,
            Method::Longllmlingua => models.lingua(llmlingua::Settings::long())?,
            Method::SelectiveContext => {
                let llm = models.causal()?;
                Box::new(selective_context::on(&llm, dense(&llm)?)?)
            }
            Method::Bm25 => Box::new(Extract { ranking: Ranking::Bm25 }),
            Method::TfIdf => Box::new(Extract { ranking: Ranking::TfIdf }),
            Method::Middle => Box::new(TruncateMiddle),
            Method::Random => Box::new(RandomDrop { seed: 0 }),
        })
    }
}

impl Models {
    fn causal(&self) -> Result<Pretrained> {
        let name = model::named(self.model.as_deref())?;
        Ok(Pretrained::open(&name, &LoadOptions::default())?)
    }

    fn lingua(&self, settings: llmlingua::Settings) -> Result<Box<dyn PromptCompressor>> {
        let llm = self.causal()?;
        let tokenizer = llm.tokenizer.inner().clone();
        let lingua = LlmLingua::new(dense(&llm)?, tokenizer, settings)?;
        Ok(Box::new(lingua.with_second(dense(&llm)?)))
    }

    fn encoder(&self) -> Result<LlmLingua2> {
        let mut settings = llmlingua2::Settings::paper();
        if let Some(force) = &self.force {
            settings.force_tokens = force.clone();
        }
        encoder::open(&self.encoder, settings)
    }
}
