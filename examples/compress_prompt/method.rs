//! The compressors by name.

use anyhow::Result;
use base_models::{LoadOptions, Pretrained};
use clap::ValueEnum;
use longctx_core::PromptCompressor;
use longctx_examples::subject::dense;
use longctx_examples::{encoder, model, selective_context};
use prompt_compress::baseline::{Extract, RandomDrop, Ranking, TruncateMiddle};
use prompt_compress::{LlmLingua, LlmLingua2, llmlingua, llmlingua2};

/// What the methods that need a model run on.
#[derive(clap::Args)]
pub struct Models {
    /// The causal model of llmlingua, longllmlingua and selective-context: a GGUF file, a folder or
    /// a name of the Hub; by default SmolLM2-135M-Instruct, fetched if need be
    #[arg(long)]
    model: Option<String>,
    /// The encoder of llmlingua2: a folder or a name of the Hub
    #[arg(long, default_value = encoder::PUBLISHED)]
    encoder: String,
    /// What llmlingua2 keeps in any case; by default line ends and . ! ? ,
    #[arg(long, value_delimiter = ' ')]
    force: Option<Vec<String>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Method {
    /// What an encoder wants kept
    Llmlingua2,
    /// What surprises a causal model
    Llmlingua,
    /// What the question makes less surprising
    Longllmlingua,
    /// Words that tell a causal model most
    SelectiveContext,
    /// Sentences that BM25 ranks best
    Bm25,
    /// Sentences that TF-IDF ranks best
    TfIdf,
    /// Both ends of the text
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
