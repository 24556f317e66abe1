//! Opens a transformer or a recurrent model by name.

use crate::methods::Method;
use crate::place::Place;
use anyhow::{Result, bail};
use base_models::{Message, Session};
use longctx_core::{CausalLm, KvCache, LayerSpec};

/// The largest number of sequences of a step in a CUDA graph. With more sequences the kernels are
/// faster when they are launched one by one (`docs/cuda.md`).
#[cfg(feature = "cuda")]
const MAX_REPLAYED: usize = 8;

/// A model and its tokenizer.
pub enum Llm {
    /// A transformer, in which every layer has a cache.
    Transformer(Box<base_models::Pretrained>),
    /// A recurrent or hybrid model such as Mamba or RWKV. Attention layers, if any, have caches;
    /// other layers have states.
    Recurrent(Box<hybrid_models::Pretrained>),
}

impl Llm {
    /// Opens a GGUF file, a folder in Hugging Face's layout, or a model of the Hub, of any
    /// supported architecture.
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

    /// Returns a session whose attention layers have the caches that `make` creates.
    pub fn session<C: KvCache + 'static>(
        &self,
        make: impl Fn(&LayerSpec) -> longctx_core::Result<C>,
    ) -> Result<Box<dyn CausalLm + Send>> {
        Ok(match self {
            Self::Transformer(llm) => Box::new(replayed(llm.model.session(make)?)?),
            Self::Recurrent(llm) => {
                let session = llm.model.session(make)?;
                #[cfg(feature = "cuda")]
                let session = match llm.model.device().is_cuda() {
                    true => session.with_cuda_graphs(MAX_REPLAYED)?,
                    false => session,
                };
                Box::new(session)
            }
        })
    }

    /// Returns a session whose attention layers have a method's caches, with at most `capacity`
    /// bytes of keys and values in total.
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

    /// Returns whether the model has attention layers, and so caches.
    pub fn has_attention(&self) -> bool {
        match self {
            Self::Transformer(_) => true,
            Self::Recurrent(llm) => llm.model.has_attention(),
        }
    }

    /// Returns the context length of the model in tokens; `None` if it has no limit.
    pub fn context_length(&self) -> Option<usize> {
        match self {
            Self::Transformer(llm) => Some(llm.model.config().context_length),
            Self::Recurrent(_) => None,
        }
    }

    /// Returns the tokens that end a text.
    pub fn eos(&self) -> &[u32] {
        match self {
            Self::Transformer(llm) => &llm.model.config().eos,
            Self::Recurrent(llm) => llm.model.eos(),
        }
    }

    /// Tokenizes a text, with the model's special tokens around it.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(match self {
            Self::Transformer(llm) => llm.tokenizer.encode(text, true)?,
            Self::Recurrent(llm) => llm.tokenizer.encode(text, true)?,
        })
    }

    /// Formats a conversation with the model's chat template and tokenizes it, up to the start of
    /// the model's answer.
    ///
    /// # Errors
    /// If the model has no chat template, or the template rejects the conversation.
    pub fn encode_chat(&self, messages: &[Message]) -> Result<Vec<u32>> {
        match self {
            Self::Transformer(llm) => match &llm.chat {
                // The template contains the tokens that begin a text.
                Some(chat) => Ok(llm.tokenizer.encode(&chat.render(messages, true)?, false)?),
                None => bail!("the model has no chat template: ask it for completions"),
            },
            Self::Recurrent(_) => bail!("recurrent models have no chat template"),
        }
    }

    /// Decodes tokens.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        Ok(match self {
            Self::Transformer(llm) => llm.tokenizer.decode(tokens)?,
            Self::Recurrent(llm) => llm.tokenizer.decode(tokens)?,
        })
    }
}

/// Returns a session that replays decode steps from CUDA graphs, if it is on a CUDA device.
pub fn replayed(session: Session) -> Result<Session> {
    #[cfg(feature = "cuda")]
    if session.model().device().is_cuda() {
        return Ok(session.with_cuda_graphs(MAX_REPLAYED)?);
    }
    Ok(session)
}
