//! Selective Context with a transformer.

use anyhow::{Context, Result};
use base_models::{Pretrained, Session};
use prompt_compress::{SelectiveContext, Unit};

/// Creates a compressor that selects words. `session` is a session of `llm`.
pub fn on(llm: &Pretrained, session: Session) -> Result<SelectiveContext<Session>> {
    let config = llm.model.config();
    let first = config.bos.or(config.eos.first().copied());
    let first = first.context("the model has no token to begin a text with")?;
    let tokenizer = llm.tokenizer.inner().clone();
    Ok(SelectiveContext::new(session, tokenizer, first, Unit::Word))
}
