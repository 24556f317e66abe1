//! All methods of the workspace, by name.

use candle_core::DType;
use longctx_core::{DenseCache, DenseStore, PromptCompressor, Rate};
use longctx_eval::{Methods, Server, Setting, SubjectError};
use longctx_examples::methods::{Method, RATIOS, duo_attention, listed};
use longctx_examples::subject::{Models, dense};
use longctx_examples::{encoder, selective_context};
use prompt_compress::baseline::{Extract, RandomDrop, Ranking, TruncateMiddle};
use prompt_compress::{LlmLingua, llmlingua, llmlingua2};

type Compressor = std::result::Result<Box<dyn PromptCompressor>, SubjectError>;
/// Creates a prompt compressor, which may use the setting's model.
type NewCompressor = fn(&Models, &Setting) -> Compressor;

/// Methods that compress the prompt.
const PROMPT_COMPRESSORS: [(&str, NewCompressor); 7] = [
    ("llmlingua2", |models, _| {
        Ok(Box::new(encoder::open(models.encoder(), llmlingua2::Settings::paper())?))
    }),
    ("llmlingua", |models, setting| {
        let llm = models.get(&setting.model)?;
        let tokenizer = llm.tokenizer.inner().clone();
        let lingua = LlmLingua::new(dense(&llm)?, tokenizer, llmlingua::Settings::llmlingua())?;
        Ok(Box::new(lingua.with_second(dense(&llm)?)))
    }),
    ("selective-context", |models, setting| {
        let llm = models.get(&setting.model)?;
        Ok(Box::new(selective_context::on(&llm, dense(&llm)?)?))
    }),
    ("tf-idf", |_, _| Ok(Box::new(Extract { ranking: Ranking::TfIdf }))),
    ("bm25", |_, _| Ok(Box::new(Extract { ranking: Ranking::Bm25 }))),
    ("middle", |_, _| Ok(Box::new(TruncateMiddle))),
    ("random-words", |_, _| Ok(Box::new(RandomDrop { seed: 0 }))),
];

/// Returns all methods, on the models that `models` opens. With `share_prefill`, caches are opened
/// as groups that share prefills.
pub fn all(models: &Models, share_prefill: bool) -> Methods<'_> {
    let mut methods = Methods::default();
    if share_prefill {
        let fits = |setting: &Setting| {
            let method = Method::named(&setting.method);
            setting.server.is_none() && method.is_ok_and(|method| method.has_exact_prefill())
        };
        methods.share_prefill(fits, |group| Ok(Box::new(models.shared_reader(group)?)));
    }
    for method in listed() {
        let method = method.compressing(models.compress());
        methods.register(method.name().to_owned(), move |setting| {
            Ok(Box::new(models.reader(setting, |spec| method.cache(spec))?))
        });
    }
    for times in RATIOS {
        let share = 1.0 / f64::from(times);
        // The streaming heads keep sinks and a window, so the cache is larger than the ratio by
        // these.
        methods.register(format!("duo-attention-{times}x"), move |setting| {
            let streaming = models.heads(&setting.model)?.share(1.0 - share)?;
            let reader = models.reader(setting, |spec| {
                let store = DenseStore::new(spec.shape, DType::F16)?;
                duo_attention(spec.clone(), store, &streaming)
            });
            Ok(Box::new(reader?))
        });
        for (name, compressor) in PROMPT_COMPRESSORS {
            methods.register(format!("{name}-{times}x"), move |setting| {
                if setting.server.is_some() {
                    let compressor = compressor(models, &of_tokenizer(setting))?;
                    let server = server(models, setting)?;
                    return Ok(Box::new(server.with_compressor(compressor, Rate::new(share)?)?));
                }
                let reader =
                    models.reader(setting, |spec| DenseCache::new(spec.clone(), DType::F16))?;
                let compressor = compressor(models, setting)?;
                Ok(Box::new(reader.with_compressor(compressor, Rate::new(share)?)))
            });
        }
    }
    methods.register("http", |setting| Ok(Box::new(server(models, setting)?)));
    methods.register("recurrent", |setting| Ok(Box::new(models.recurrent(setting)?)));
    methods
}

/// Returns the setting's server, with its tokenizer.
fn server(models: &Models, setting: &Setting) -> Result<Server, SubjectError> {
    let server = Server::new(setting)?;
    match setting.server.as_ref().and_then(|server| server.tokenizer.as_ref()) {
        Some(_) => Ok(server.with_text(models.text(&of_tokenizer(setting))?, setting.context)),
        None => Ok(server),
    }
}

/// Returns the same setting on the model of its server's tokenizer, which compresses prompts.
fn of_tokenizer(setting: &Setting) -> Setting {
    let tokenizer = setting.server.as_ref().and_then(|server| server.tokenizer.clone());
    Setting { model: tokenizer.unwrap_or_default(), ..setting.clone() }
}
