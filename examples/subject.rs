//! Models as subjects of an evaluation: weights are opened once; each setting has its own session.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::PathBuf;
use std::rc::Rc;

use crate::encoder;
use crate::heads::Heads;
use crate::llm::replayed;
use crate::methods::{Compress, Method};
use crate::place::Place;
use crate::shared_prefill::SharedPrefill;
use base_models::{ChatTemplate, Message, Pretrained, Session};
use candle_core::DType;
use longctx_core::{Batch, CausalLm, DenseCache, KvCache, LayerSpec, Logits};
use longctx_eval::{Reader, Setting, SubjectError, Template, Text};

/// The open transformer and its head scores, which settings of the same model share.
#[derive(Default)]
pub struct Models {
    open: RefCell<HashMap<String, Pretrained>>,
    heads: RefCell<HashMap<String, Rc<Heads>>>,
    options: Options,
}

/// Options of models and methods.
pub struct Options {
    /// Samples that a reader decodes as one batch.
    pub batch: usize,
    /// Tokens of a prompt to feed at a time; `None` for the whole prompt.
    pub prefill_chunk: Option<usize>,
    /// The tokens that packed formats and eviction policies compress.
    pub compress: Compress,
    /// LLMLingua-2's encoder: a folder, or a model of the Hub.
    pub encoder: String,
    /// The file of DuoAttention's scores; `None` to measure them.
    pub heads: Option<PathBuf>,
    /// Device and dtype of models.
    pub place: Place,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            batch: 1,
            prefill_chunk: None,
            compress: Compress::default(),
            encoder: encoder::PUBLISHED.into(),
            heads: None,
            place: Place::default(),
        }
    }
}

impl Models {
    /// Creates it without an open model.
    pub fn new(options: Options) -> Self {
        Self { options, ..Self::default() }
    }

    /// Returns the tokens that packed formats and eviction policies compress.
    pub fn compress(&self) -> Compress {
        self.options.compress
    }

    /// Returns the name of LLMLingua-2's encoder.
    pub fn encoder(&self) -> &str {
        &self.options.encoder
    }

    /// Returns DuoAttention's scores of a model's heads.
    pub fn heads(&self, model: &str) -> Result<Rc<Heads>, SubjectError> {
        if let Some(heads) = self.heads.borrow().get(model) {
            return Ok(heads.clone());
        }
        let heads = Rc::new(match &self.options.heads {
            Some(path) => Heads::read(path)?,
            None => Heads::measure(&self.get(model)?)?,
        });
        self.heads.borrow_mut().insert(model.to_owned(), heads.clone());
        Ok(heads)
    }

    /// Opens the transformer `name`.
    pub fn get(&self, name: &str) -> Result<Pretrained, SubjectError> {
        let mut open = self.open.borrow_mut();
        if let Some(llm) = open.get(name) {
            return Ok(llm.clone());
        }
        // Weights are large, so only one model is open at a time.
        open.clear();
        let llm = Pretrained::open(name, &self.options.place.transformer())?;
        open.insert(name.to_owned(), llm.clone());
        Ok(llm)
    }

    /// Returns a reader with the setting's transformer, in which each layer has a cache that `make`
    /// creates. A cache that the model's device does not support is an error.
    pub fn reader<C: KvCache + 'static>(
        &self,
        setting: &Setting,
        make: impl Fn(&LayerSpec) -> longctx_core::Result<C>,
    ) -> Result<Reader, SubjectError> {
        self.checked(self.unchecked_reader(setting, make)?)
    }

    fn unchecked_reader<C: KvCache + 'static>(
        &self,
        setting: &Setting,
        make: impl Fn(&LayerSpec) -> longctx_core::Result<C>,
    ) -> Result<Reader, SubjectError> {
        let llm = self.get(&setting.model)?;
        let session = replayed(llm.model.session(make)?)?;
        let reader = Reader::new(session, text(&llm, &setting.template)?, setting.context);
        Ok(self.reading(reader).with_dense_bytes(dense_bytes(&llm)?))
    }

    /// Returns one reader for settings of the same transformer, which prefills each prompt once.
    pub fn shared_reader(&self, settings: &[Setting]) -> Result<Reader, SubjectError> {
        let compress = self.options.compress;
        let method = |setting: &Setting| Ok(Method::named(&setting.method)?.compressing(compress));
        let methods = settings.iter().map(method);
        let methods = methods.collect::<anyhow::Result<Vec<_>>>()?;
        let reader = self.unchecked_reader(&settings[0], |spec| {
            let caches = methods.iter().map(|method| method.cache(spec));
            Ok(SharedPrefill::new(spec.clone(), caches.collect::<longctx_core::Result<_>>()?))
        })?;
        self.checked(reader.with_shared_prefill(settings.len()))
    }

    /// Warms up a reader on a device other than the CPU, where a format may have no kernels.
    fn checked(&self, reader: Reader) -> Result<Reader, SubjectError> {
        if self.options.place.is_cpu() { Ok(reader) } else { reader.warm_up() }
    }

    /// Returns the tokenizer and the template of the setting's transformer.
    pub fn text(&self, setting: &Setting) -> Result<impl Text + Send + Sync + use<>, SubjectError> {
        text(&self.get(&setting.model)?, &setting.template)
    }

    /// Returns a reader with a recurrent or hybrid model. Its attention layers, if any, have dense
    /// f16 caches.
    pub fn recurrent(&self, setting: &Setting) -> Result<Reader, SubjectError> {
        let options = self.options.place.recurrent();
        let llm = hybrid_models::Pretrained::open(&setting.model, &options)?;
        let session = llm.model.session(|spec| DenseCache::new(spec.clone(), DType::F16))?;
        let chat = match &setting.template {
            Template::Jinja(template) => Some(ChatTemplate::new(template, "", "")?),
            Template::Own | Template::Plain => None,
        };
        let first = llm.tokenizer.encode("", true)?.first().copied();
        let bos = match &llm.tokenizer {
            hybrid_models::Tokenizer::Json(inner) => first.and_then(|id| inner.id_to_token(id)),
            hybrid_models::Tokenizer::World(_) => None,
        };
        let stop = llm.model.eos().to_vec();
        let text = RecurrentText { tokenizer: llm.tokenizer, chat, stop, bos };
        Ok(self.reading(Reader::new(session, text, setting.context)))
    }

    /// Applies the common options to a reader.
    fn reading(&self, reader: Reader) -> Reader {
        reader.with_batch(self.options.batch).with_prefill_chunk(self.options.prefill_chunk)
    }
}

/// Returns a session with dense f16 caches, the reference for bytes.
pub fn dense(llm: &Pretrained) -> longctx_core::Result<Session> {
    llm.model.session(|spec| DenseCache::new(spec.clone(), DType::F16))
}

/// Returns a function from a number of tokens to the bytes of a dense cache. Bytes are counted with
/// a few tokens and extrapolated: each layer grows by the same bytes per token, up to its sliding
/// window.
fn dense_bytes(llm: &Pretrained) -> longctx_core::Result<impl Fn(usize) -> usize + Send + use<>> {
    const TOKENS: usize = 8;
    let mut session = dense(llm)?;
    session.forward(&Batch::single(0, TOKENS)?, &[0; TOKENS], Logits::Last)?;
    let counted = session.footprint();
    let config = llm.model.config();
    let window = |layer| config.windows.get(layer).copied().flatten().unwrap_or(usize::MAX);
    let windows: Vec<usize> = (0..config.layers).map(window).collect();
    let held = move |tokens: usize| windows.iter().map(|window| tokens.min(*window)).sum::<usize>();
    let each = (counted.total() - counted.slack) as f64 / held(TOKENS) as f64;
    Ok(move |tokens| (each * held(tokens) as f64) as usize)
}

fn text(llm: &Pretrained, template: &Template) -> Result<TransformerText, SubjectError> {
    let config = llm.model.config();
    let chat = match template {
        Template::Own => llm.chat.clone(),
        Template::Plain => None,
        Template::Jinja(template) => {
            let token = |id: Option<u32>| id.and_then(|id| llm.tokenizer.token(id));
            let (bos, eos) = (token(config.bos), token(config.eos.first().copied()));
            Some(ChatTemplate::new(template, &bos.unwrap_or_default(), &eos.unwrap_or_default())?)
        }
    };
    let first = llm.tokenizer.encode("", true)?.first().copied();
    let bos = first.and_then(|id| llm.tokenizer.token(id));
    Ok(TransformerText { tokenizer: llm.tokenizer.clone(), chat, stop: config.eos.clone(), bos })
}

struct TransformerText {
    tokenizer: base_models::Tokenizer,
    chat: Option<ChatTemplate>,
    stop: Vec<u32>,
    bos: Option<String>,
}

struct RecurrentText {
    tokenizer: hybrid_models::Tokenizer,
    chat: Option<ChatTemplate>,
    stop: Vec<u32>,
    bos: Option<String>,
}

/// Implements `Text`; both tokenizers have the same methods.
macro_rules! impl_text {
    ($type:ty) => {
        impl Text for $type {
            fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, SubjectError> {
                Ok(self.tokenizer.encode(text, special)?)
            }
            fn decode(&self, tokens: &[u32]) -> Result<String, SubjectError> {
                Ok(self.tokenizer.decode(tokens)?)
            }
            fn chat(&self, conversation: &[String]) -> Result<Option<String>, SubjectError> {
                let message = |(i, said): (usize, &String)| match i % 2 {
                    0 => Message::user(said),
                    _ => Message::assistant(said),
                };
                let messages: Vec<_> = conversation.iter().enumerate().map(message).collect();
                Ok(self.chat.as_ref().map(|chat| chat.render(&messages, true)).transpose()?)
            }
            fn stop(&self) -> &[u32] {
                &self.stop
            }
            fn bos(&self) -> Option<&str> {
                self.bos.as_deref()
            }
        }
    };
}

impl_text!(TransformerText);
impl_text!(RecurrentText);
