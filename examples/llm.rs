//! A model by name, transformer or recurrent.

use anyhow::{Result, bail};
use longctx_core::{CausalLm, KvCache, LayerShape};

/// A model and its tokenizer.
pub enum Llm {
    /// Every layer remembers through a cache.
    Transformer(Box<base_models::Pretrained>),
    /// Mamba, RWKV and their kin: attention layers, in those that have any, remember through caches, the others in a state.
    Recurrent(Box<hybrid_models::Pretrained>),
}

impl Llm {
    /// Opens a GGUF file, a folder in Hugging Face's layout, or a model of the Hub, of any family that the workspace knows.
    pub fn open(name: &str) -> Result<Self> {
        let as_transformer = match base_models::Pretrained::open(name, &Default::default()) {
            Ok(llm) => return Ok(Self::Transformer(Box::new(llm))),
            Err(error) => error,
        };
        if name.ends_with(".gguf") {
            return Err(as_transformer.into());
        }
        match hybrid_models::Pretrained::open(name, &Default::default()) {
            Ok(llm) => Ok(Self::Recurrent(Box::new(llm))),
            Err(error) => bail!(
                "{name} can't be opened. As a transformer: {as_transformer}. As a recurrent model: {error}."
            ),
        }
    }

    /// A session whose attention layers remember through caches that `make` builds.
    pub fn session<C: KvCache + 'static>(
        &self,
        make: impl Fn(&LayerShape) -> longctx_core::Result<C>,
    ) -> Result<Box<dyn CausalLm>> {
        Ok(match self {
            Self::Transformer(llm) => Box::new(llm.model.session(make)?),
            Self::Recurrent(llm) => Box::new(llm.model.session(make)?),
        })
    }

    /// Whether a cache of the caller's choice changes anything.
    pub fn has_attention(&self) -> bool {
        match self {
            Self::Transformer(_) => true,
            Self::Recurrent(llm) => llm.model.has_attention(),
        }
    }

    /// The longest context that the model was made for, in tokens; `None` if it has no bound.
    pub fn context_length(&self) -> Option<usize> {
        match self {
            Self::Transformer(llm) => Some(llm.model.config().context_length),
            Self::Recurrent(_) => None,
        }
    }

    /// The tokens that end a text.
    pub fn eos(&self) -> &[u32] {
        match self {
            Self::Transformer(llm) => &llm.model.config().eos,
            Self::Recurrent(llm) => llm.model.eos(),
        }
    }

    /// The tokens of a text, with what the model expects around it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(match self {
            Self::Transformer(llm) => llm.tokenizer.encode(text, true)?,
            Self::Recurrent(llm) => llm.tokenizer.encode(text, true)?,
        })
    }

    /// The text of tokens.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        Ok(match self {
            Self::Transformer(llm) => llm.tokenizer.decode(tokens)?,
            Self::Recurrent(llm) => llm.tokenizer.decode(tokens)?,
        })
    }
}
