//! A model by name, transformer or recurrent.

use crate::methods::Method;
use crate::place::Place;
use anyhow::{Result, bail};
use base_models::Message;
use longctx_core::{CausalLm, KvCache, LayerSpec};

/// A model and its tokenizer.
pub enum Llm {
    /// Every layer has a cache.
    Transformer(Box<base_models::Pretrained>),
    /// Mamba, RWKV and their kin: attention layers, if any, have caches, the others states.
    Recurrent(Box<hybrid_models::Pretrained>),
}

impl Llm {
    /// Opens a GGUF file, a folder in Hugging Face's layout, or a model of the Hub, of any family
    /// that the workspace knows.
    pub fn open(name: &str, place: &Place) -> Result<Self> {
        let as_transformer = match base_models::Pretrained::open(name, &place.transformer()) {
            Ok(llm) => return Ok(Self::Transformer(Box::new(llm))),
            Err(error) => error,
        };
        if name.ends_with(".gguf") {
            return Err(as_transformer.into());
        }
        match hybrid_models::Pretrained::open(name, &place.recurrent()) {
            Ok(llm) => Ok(Self::Recurrent(Box::new(llm))),
            Err(error) => bail!(
                "{name} can't be opened. As a transformer: {as_transformer}. As a recurrent model: {error}."
            ),
        }
    }

    /// A session whose attention layers have caches that `make` builds.
    pub fn session<C: KvCache + 'static>(
        &self,
        make: impl Fn(&LayerSpec) -> longctx_core::Result<C>,
    ) -> Result<Box<dyn CausalLm + Send>> {
        Ok(match self {
            Self::Transformer(llm) => Box::new(llm.model.session(make)?),
            Self::Recurrent(llm) => Box::new(llm.model.session(make)?),
        })
    }

    /// A session whose attention layers have a method's caches, with at most `capacity` bytes of
    /// keys and values in all.
    pub fn session_with(
        &self,
        method: &str,
        capacity: Option<usize>,
    ) -> Result<Box<dyn CausalLm + Send>> {
        let method = Method::named(method)?;
        self.session(|spec| {
            method.cache_within(spec, capacity.map(|bytes| bytes / spec.num_layers))
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

    /// The tokens of a conversation in the model's template, up to where the model answers.
    ///
    /// # Errors
    /// If the model has no chat template, or the template refuses the conversation.
    pub fn encode_chat(&self, messages: &[Message]) -> Result<Vec<u32>> {
        match self {
            Self::Transformer(llm) => match &llm.chat {
                // The template writes the tokens that begin a text itself.
                Some(chat) => Ok(llm.tokenizer.encode(&chat.render(messages, true)?, false)?),
                None => bail!("the model has no chat template: ask it for completions"),
            },
            Self::Recurrent(_) => bail!("recurrent models have no chat template"),
        }
    }

    /// The text of tokens.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        Ok(match self {
            Self::Transformer(llm) => llm.tokenizer.decode(tokens)?,
            Self::Recurrent(llm) => llm.tokenizer.decode(tokens)?,
        })
    }
}
