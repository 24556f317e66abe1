//! Properties for every text: the model-based compressors keep a subsequence, report its source,
//! and meet the rate. Invalid input gives an error that names it.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::LazyLock;

use base_models::{LoadOptions, Session, Transformer};
use candle_core::{DType, Device, Tensor};
use longctx_core::{
    Batch, CausalLm, Compressed, DenseCache, Footprint, Logits, Prompt, PromptCompressor, Rate,
    Result, SeqId,
};
use prompt_compress::llmlingua::{self, Documents};
use prompt_compress::llmlingua2::{Request, Settings};
use prompt_compress::{
    LlmLingua, LlmLingua2, SelectiveContext, StructuredPrompt, Target, Unit, cl100k_tokens,
};
use proptest::prelude::*;
use proptest::string::string_regex;
use tokenizers::Tokenizer;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

const XLM_ROBERTA: &str = "tiny-xlm-roberta-large";
const BERT: &str = "tiny-bert-base-multilingual-cased";

fn llmlingua2(name: &str, settings: Settings) -> LlmLingua2 {
    LlmLingua2::from_folder(&fixture(name), settings, &Device::Cpu).unwrap()
}

static TINY: LazyLock<[LlmLingua2; 4]> = LazyLock::new(|| {
    [
        llmlingua2(XLM_ROBERTA, Settings::default()),
        llmlingua2(BERT, Settings::default()),
        llmlingua2(XLM_ROBERTA, Settings::paper()),
        llmlingua2(BERT, Settings::paper()),
    ]
});

fn llama() -> (Session, Tokenizer) {
    let folder = fixture("tiny-llama");
    let model = Transformer::from_folder(&folder, &LoadOptions::default()).unwrap();
    let session = model.session(|layer| DenseCache::new(layer.clone(), DType::F32)).unwrap();
    (session, Tokenizer::from_file(folder.join("tokenizer.json")).unwrap())
}

/// Non-ASCII letters that are in both tiny vocabularies and that no tokenizer normalises.
const KNOWN: &str = "我们今天讨论产品规划веирт";

fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        "([a-z]{1,6}[ ,.!?\n]{1,2}){1,200}",
        string_regex(&format!("([{KNOWN}]{{1,4}}[a-z]{{0,2}}[ ,.!?]{{1,2}}){{1,60}}")).unwrap(),
        "(\\w{1,5}[ ,.]{1,2}){1,40}",
        ".{1,80}"
    ]
    .prop_filter("text", |text| !text.trim().is_empty())
}

/// Returns whether the pieces of the output are in the source, in the same order.
fn is_in_order(compressed: &Compressed) -> bool {
    compressed.pieces.windows(2).all(|pair| pair[0].source.end <= pair[1].source.start)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn llmlingua2_keeps_a_subsequence(which in 0..4usize, text in text(), rate in 0.05..0.95f64) {
        let scored = TINY[which].score(&[&text]).unwrap();
        let got = scored.compress(&Request::rate(Rate::new(rate).unwrap())).unwrap();
        prop_assert_eq!(got.original_tokens, cl100k_tokens(&text));
        let Some((0, compressed)) = got.contexts.first() else { panic!("one context") };
        compressed.check(&text).unwrap();
        prop_assert!(is_in_order(compressed));
        prop_assert_eq!(got.compressed_tokens, cl100k_tokens(&compressed.text));
        let is_plain = |c: char| c.is_ascii() && (c == '\n' || !c.is_control());
        if text.chars().all(|c| is_plain(c) || KNOWN.contains(c)) {
            // Without characters that normalisation changes, pieces equal the bytes of the source.
            for piece in &compressed.pieces {
                prop_assert_eq!(&text[piece.source.clone()], &compressed.text[piece.output.clone()]);
            }
            let spaces = |text: &str| text.split_whitespace().collect::<String>();
            prop_assert_eq!(spaces(&compressed.kept_text(&text)), spaces(&compressed.text));
        }
    }

    #[test]
    fn llmlingua2_meets_the_rate(which in 0..2usize, text in "([a-z]{1,6} ){20,90}", rate in 0.05..0.95f64) {
        // One window without forced tokens: the kept share of tokens is that of a whole percentile,
        // within one word. The package rounds the percentile up, and counts XLM-RoBERTa's words
        // with the mark before them.
        let scored = TINY[which].score(&[&text]).unwrap();
        let got = scored.compress(&Request::rate(Rate::new(rate).unwrap())).unwrap();
        let mark = ["▁", ""][which];
        let weights = |kept: fn(bool) -> bool| -> Vec<usize> {
            let words = got.labels.iter().filter(|label| kept(label.kept));
            words.map(|label| cl100k_tokens(&format!("{mark}{}", label.word))).collect()
        };
        let all = weights(|_| true);
        let (total, longest) = (all.iter().sum::<usize>() as f64, all.into_iter().max().unwrap_or(0));
        let kept = weights(|kept| kept).iter().sum::<usize>() as f64;
        let (least, most) = ((rate - 0.01) * total - longest as f64, rate * total + longest as f64);
        prop_assert!((least..=most).contains(&kept), "{kept} of {total} at {rate}");
    }

    #[test]
    fn rate_one_changes_nothing(which in 0..2usize, text in text()) {
        let mut model = llmlingua2([XLM_ROBERTA, BERT][which], Settings::paper());
        let same = model.compress(Prompt::new(&text).unwrap(), Rate::ONE).unwrap();
        prop_assert_eq!(same.text, text);
    }

    #[test]
    fn causal_compressors_keep_a_subsequence(text in text(), rate in 0.1..0.9f64, segment in 8..40usize) {
        let prompt = Prompt::new(&text).unwrap().with_question("what is it?");
        let rate = Rate::new(rate).unwrap();
        let (model, tokenizer) = llama();
        let long = llmlingua::Settings { segment, ..llmlingua::Settings::long() };
        let plain = llmlingua::Settings { segment, ..llmlingua::Settings::llmlingua() };
        let mut compressors: Vec<Box<dyn PromptCompressor>> = vec![
            Box::new(LlmLingua::new(llama().0, tokenizer.clone(), plain).unwrap()),
            Box::new(LlmLingua::new(llama().0, tokenizer.clone(), long).unwrap()),
            Box::new(SelectiveContext::new(model, tokenizer, 0, Unit::Word)),
        ];
        for (i, compressor) in compressors.iter_mut().enumerate() {
            let short = compressor.compress(prompt, rate).unwrap();
            short.check(&text).unwrap();
            for piece in &short.pieces {
                prop_assert_eq!(&text[piece.source.clone()], &short.text[piece.output.clone()]);
            }
            prop_assert!(i == 1 || is_in_order(&short));
            prop_assert_eq!(compressor.compress(prompt, Rate::ONE).unwrap().text, text.clone());
        }
    }

    #[test]
    fn selective_context_meets_the_rate(text in "([a-z]{1,6}[ ,.!]{1,2}){2,80}", rate in 0.05..1.0f64) {
        let (model, tokenizer) = llama();
        let mut selective = SelectiveContext::new(model, tokenizer, 0, Unit::Word);
        let short = selective.compress(Prompt::new(&text).unwrap(), Rate::new(rate).unwrap()).unwrap();
        let words = |text: &str| text.split_whitespace().count() as f64;
        prop_assert!((words(&short.text) - rate * words(&text)).abs() <= 1.0 + 1e-9);
        prop_assert_eq!(short.kept_text(&text), short.text);
    }

    #[test]
    fn protected_sections_are_unchanged(which in 0..5usize, head in kept(), first in text(), middle in kept(), second in text(), tail in kept()) {
        let prompt = StructuredPrompt::new().keep(&*head).compress(&*first).keep(&*middle).compress(&*second).keep(&*tail);
        let (rate, question) = (Rate::new(0.3).unwrap(), "what is it?");
        let mut model = make(which);
        let short = prompt.question(question).compress_with(&mut model, rate).unwrap();
        short.check(&[&*head, &first, &middle, &second, &tail].concat()).unwrap();
        let mut alone = |text| model.compress(Prompt::new(text).unwrap().with_question(question), rate).unwrap().text;
        prop_assert_eq!(short.text, [&*head, &alone(&first), &middle, &alone(&second), &tail].concat());
    }
}

/// Characters of three bytes each, and of three tokens each in the tiny vocabulary.
const FOREIGN: &str = "天地玄黃宇宙洪荒日月盈昃辰宿列張いろはにほへとちりぬるをわかよたれそつねならむうゐのおくやま가나다라마바사아자차카타파하";

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn characters_of_several_tokens_are_kept_or_dropped_whole(
        text in string_regex(&format!("([{FOREIGN}]{{1,9}}[a-zé😀]{{0,3}}[ ,。\n]{{0,2}}){{4,60}}")).unwrap(),
        rate in 0.1..0.9f64,
        segment in 2..60usize,
        long in any::<bool>(),
    ) {
        let settings = if long { llmlingua::Settings::long() } else { llmlingua::Settings::llmlingua() };
        let settings = llmlingua::Settings { segment, ..settings };
        let (model, tokenizer) = llama();
        let mut lingua = LlmLingua::new(model, tokenizer, settings).unwrap();
        let prompt = Prompt::new(&text).unwrap().with_question("何ですか?");
        let short = lingua.compress(prompt, Rate::new(rate).unwrap()).unwrap();
        prop_assert!(!short.text.contains('\u{fffd}'), "{}", short.text);
        // The output has only characters of the text, in its order within a paragraph, and a piece
        // for each.
        if !long {
            let mut rest = text.chars();
            let missing = short.text.chars().find(|&c| !rest.any(|own| own == c));
            prop_assert_eq!(missing, None, "{} from {}", short.text, text);
        }
        short.check(&text).unwrap();
    }
}

#[test]
fn half_of_121_characters_keeps_about_half_of_them_whole() {
    let text: String = FOREIGN.chars().cycle().take(121).collect();
    for settings in [llmlingua::Settings::llmlingua(), llmlingua::Settings::long()] {
        let compress = |settings| {
            let (model, tokenizer) = llama();
            let mut lingua = LlmLingua::new(model, tokenizer, settings).unwrap();
            let prompt = Prompt::new(&text).unwrap().with_question("何?");
            lingua.compress(prompt, Rate::new(0.5).unwrap()).unwrap().text
        };
        let short = compress(settings.clone());
        assert!(short.chars().all(|c| FOREIGN.contains(c)), "{short}");
        assert!((40..=80).contains(&short.chars().count()), "{short}");
        // With `published`, halves of characters are left.
        let published = compress(llmlingua::Settings { published: true, ..settings });
        assert!(published.contains('\u{fffd}'), "{published}");
    }
}

#[test]
fn at_least_one_word_is_kept() {
    for name in [XLM_ROBERTA, BERT] {
        for settings in [Settings::default(), Settings::paper()] {
            let mut model = llmlingua2(name, settings.clone());
            for text in ["word", "time", "two words", "a.", "1"] {
                for rate in [0.5, 0.125, 0.01] {
                    let prompt = Prompt::new(text).unwrap();
                    let short = model.compress(prompt, Rate::new(rate).unwrap()).unwrap();
                    assert!(!short.text.trim().is_empty(), "{name}: {text} at {rate}");
                    short.check(text).unwrap();
                }
            }
            let published = llmlingua2(name, Settings { published: true, ..settings });
            let scored = published.score(&["word"]).unwrap();
            let short = scored.compress(&Request::rate(Rate::new(0.5).unwrap())).unwrap();
            assert_eq!(short.text(), "", "{name}");
        }
    }
}

/// Text that a prompt keeps: anything, including chat templates.
fn kept() -> impl Strategy<Value = String> {
    prop_oneof![
        ".{0,20}",
        Just("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n".to_owned()),
        Just("<|im_end|>\n<|im_start|>assistant\n".to_owned()),
    ]
}

/// Returns the compressors that need a model.
fn make(which: usize) -> Box<dyn PromptCompressor> {
    let lingua = |settings| Box::new(LlmLingua::new(llama().0, llama().1, settings).unwrap());
    match which {
        0 => Box::new(llmlingua2(XLM_ROBERTA, Settings::paper())),
        1 => Box::new(llmlingua2(BERT, Settings::paper())),
        2 => lingua(llmlingua::Settings::llmlingua()),
        3 => lingua(llmlingua::Settings::long()),
        _ => Box::new(SelectiveContext::new(llama().0, llama().1, 0, Unit::Word)),
    }
}

#[test]
fn short_texts_are_cut_too() {
    // Fewer tokens than one segment of the package; compressed to about the rate all the same.
    let text = "The council met at nine, and Mayor Ortiz opened with the budget of the harbour. "
        .repeat(3);
    let rate = Rate::new(0.5).unwrap();
    for settings in [llmlingua::Settings::llmlingua(), llmlingua::Settings::long()] {
        let (model, tokenizer) = llama();
        let count = |text: &str| tokenizer.encode(text, false).unwrap().len() as f64;
        let mut lingua = LlmLingua::new(model, tokenizer.clone(), settings).unwrap();
        let prompt = Prompt::new(&text).unwrap().with_question("who?");
        let short = lingua.compress(prompt, rate).unwrap();
        let share = count(&short.text) / count(&text);
        assert!((0.35..0.65).contains(&share), "{share}");
    }
}

#[test]
fn white_space_has_no_pieces() {
    let (model, tokenizer) = llama();
    let settings = llmlingua::Settings { segment: 8, ..llmlingua::Settings::llmlingua() };
    let mut lingua = LlmLingua::new(model, tokenizer, settings).unwrap();
    let short = lingua.compress(Prompt::new("0\u{b}").unwrap(), Rate::new(0.1).unwrap()).unwrap();
    assert_eq!(short, Compressed::default());
}

#[test]
fn a_text_longer_than_the_context_is_compressed() {
    // The tiny model's context is 4,096 tokens: the text has about three times as many, and the
    // kept text exceeds the context too.
    let text: String =
        (0..3000).map(|i| format!("the {} of item {i}, ", ["cat", "dog", "key"][i % 3])).collect();
    let (model, tokenizer) = llama();
    let tokens = tokenizer.encode(text.as_str(), false).unwrap().len();
    assert!(tokens > 12_000, "{tokens}");
    let settings = llmlingua::Settings { segment: 400, ..llmlingua::Settings::llmlingua() };
    let mut lingua = LlmLingua::new(model, tokenizer, settings).unwrap();
    let short = lingua.compress(Prompt::new(&text).unwrap(), Rate::new(0.6).unwrap()).unwrap();
    short.check(&text).unwrap();
    assert!(is_in_order(&short));
    assert_eq!(short.kept_text(&text), short.text);
    let share = short.text.len() as f64 / text.len() as f64;
    assert!((0.4..0.8).contains(&share), "{share}");
}

/// A model that counts the tokens fed to it.
struct Counting(Session, Rc<Cell<usize>>);

impl CausalLm for Counting {
    fn forward(&mut self, batch: &Batch, ids: &[u32], logits: Logits) -> Result<Tensor> {
        self.1.set(self.1.get() + ids.len());
        self.0.forward(batch, ids, logits)
    }

    fn fork(&mut self, from: SeqId, to: SeqId) -> Result<()> {
        self.0.fork(from, to)
    }

    fn check_truncate(&self, seq: SeqId, len: usize) -> Result<()> {
        self.0.check_truncate(seq, len)
    }

    fn truncate(&mut self, seq: SeqId, len: usize) -> Result<()> {
        self.0.truncate(seq, len)
    }

    fn remove(&mut self, seq: SeqId) -> bool {
        self.0.remove(seq)
    }

    fn seqs(&self) -> Vec<SeqId> {
        self.0.seqs()
    }

    fn seen(&self, seq: SeqId) -> usize {
        self.0.seen(seq)
    }

    fn can_append(&self, batch: &Batch) -> bool {
        self.0.can_append(batch)
    }

    fn footprint(&self) -> Footprint {
        self.0.footprint()
    }

    fn seq_footprint(&self, seq: SeqId) -> Footprint {
        self.0.seq_footprint(seq)
    }

    fn clear(&mut self) {
        self.0.clear();
    }

    fn vocab_size(&self) -> usize {
        self.0.vocab_size()
    }

    fn model_type(&self) -> &str {
        self.0.model_type()
    }

    fn device(&self) -> &Device {
        self.0.device()
    }

    fn context_length(&self) -> Option<usize> {
        self.0.context_length()
    }
}

#[test]
fn segments_reuse_the_cache() {
    // Forty segments of which half is kept: if each read the text again, it would be read about
    // twelve times.
    let text = "The council met at nine, and Mayor Ortiz opened with the budget. ".repeat(60);
    for (settings, readings) in
        [(llmlingua::Settings::llmlingua(), 1.0), (llmlingua::Settings::long(), 2.0)]
    {
        let fed = Rc::new(Cell::new(0));
        let tokenizer = llama().1;
        let tokens = tokenizer.encode(text.as_str(), false).unwrap().len();
        let settings = llmlingua::Settings { segment: tokens / 40, ..settings };
        let counting = || Counting(llama().0, fed.clone());
        let mut lingua =
            LlmLingua::new(counting(), tokenizer, settings).unwrap().with_second(counting());
        let prompt = Prompt::new(&text).unwrap().with_question("who?");
        lingua.compress(prompt, Rate::new(0.5).unwrap()).unwrap();
        // The whole text once, for its threshold, then each segment once more with as many tokens
        // of the kept text before it.
        let times = fed.get() as f64 / tokens as f64;
        assert!((1.5 * readings..4.0 * readings).contains(&times), "read {times} times");
    }
}

#[test]
fn batches_do_not_change_answers() {
    let text = "The council met at nine. Nobody was late, and the budget was read! ".repeat(120);
    let labels = |batch| {
        let model = llmlingua2(BERT, Settings { batch, ..Settings::paper() });
        let got = model.score(&[&text]).unwrap();
        got.compress(&Request::rate(Rate::new(0.5).unwrap())).unwrap().labels
    };
    assert_eq!(labels(1), labels(8));
}

#[test]
fn broken_requests_are_named() {
    let model = llmlingua2(BERT, Settings::paper());
    let message = |contexts: &[&str]| model.score(contexts).unwrap_err().to_string();
    assert!(message(&[]).contains("at least one"));
    assert!(message(&["a b", " \n"]).contains("nothing but white space"));
    let scored = model.score(&["One. Two! Three, four? Five.", "Six. Seven."]).unwrap();
    let message = |request: &Request| scored.compress(request).unwrap_err().to_string();
    assert!(message(&Request::tokens(0)).contains("at least 1 token"));
    let forced = message(&Request::tokens(2));
    assert!(forced.contains("what the forced tokens take, got 2"), "{forced}");
    let filter = prompt_compress::llmlingua2::ContextTarget::Auto;
    let request = Request::rate(Rate::new(0.5).unwrap()).with_filter(filter, vec![2]);
    assert!(message(&request).contains("numbers below 2, got 2"));
    for (tokens, expected) in
        [(vec!["x".into(); 101], "at most 100"), (vec![String::new()], "at least one character")]
    {
        let model = llmlingua2(BERT, Settings { force_tokens: tokens, ..Settings::default() });
        assert!(model.score(&["a b"]).unwrap_err().to_string().contains(expected));
    }
    assert!(Rate::new(1.5).is_err() && Rate::new(0.0).is_err());
    let settings = Settings { batch: 0, ..Settings::default() };
    let error = LlmLingua2::from_folder(&fixture(BERT), settings, &Device::Cpu).unwrap_err();
    assert!(error.to_string().contains("at least 1 window"));
}

#[test]
fn causal_requests_are_checked() {
    let (model, tokenizer) = llama();
    let mut lingua = LlmLingua::new(model, tokenizer.clone(), llmlingua::Settings::long()).unwrap();
    let prompt = Prompt::new("one two three").unwrap();
    let error = lingua.compress(prompt, Rate::new(0.5).unwrap()).unwrap_err();
    assert!(error.to_string().contains("a question"));
    let error = lingua.compress_documents(&Documents::default(), "", "q", Target::Tokens(5));
    assert!(error.unwrap_err().to_string().contains("at least one"));
    let long = "why ".repeat(4000);
    let error = lingua.compress(prompt.with_question(&long), Rate::new(0.5).unwrap()).unwrap_err();
    assert!(error.to_string().contains("a question of at most"), "{error}");
    let settings = llmlingua::Settings { segment: 0, ..llmlingua::Settings::long() };
    assert!(LlmLingua::new(llama().0, tokenizer.clone(), settings).is_err());
    let mut selective = SelectiveContext::new(llama().0, tokenizer, 0, Unit::Word)
        .sentence_by_sentence(|text| vec![0..1, 1..text.len()]);
    let error = selective.compress(Prompt::new("é").unwrap(), Rate::new(0.5).unwrap()).unwrap_err();
    assert!(error.to_string().contains("sentence: expected character boundaries"), "{error}");
}

/// Returns a copy of a checkpoint that a test may modify.
fn copy(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        std::fs::copy(fixture(name).join(file), folder.path().join(file)).unwrap();
    }
    folder
}

#[test]
fn broken_checkpoints_are_named() {
    let open = |folder: &tempfile::TempDir| {
        LlmLingua2::from_folder(folder.path(), Settings::paper(), &Device::Cpu)
    };
    let message = |folder: &tempfile::TempDir| open(folder).unwrap_err().to_string();
    for file in ["config.json", "tokenizer.json", "model.safetensors"] {
        let folder = copy(BERT);
        std::fs::remove_file(folder.path().join(file)).unwrap();
        assert!(message(&folder).contains(file));
        std::fs::write(folder.path().join(file), "{").unwrap();
        assert!(message(&folder).contains(file));
    }
    let folder = copy(BERT);
    let path = folder.path().join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 100]).unwrap();
    assert!(message(&folder).contains("the header describes"));

    let rewrite = |name: &str, tensor: Option<Tensor>| {
        let folder = copy(BERT);
        let path = folder.path().join("model.safetensors");
        let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
        tensors.remove(name);
        tensors.extend(tensor.map(|tensor| (name.to_owned(), tensor)));
        candle_core::safetensors::save(&tensors, &path).unwrap();
        folder
    };
    let zeros = |shape: &[usize]| Some(Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap());
    let three = message(&rewrite("classifier.weight", zeros(&[3, 32])));
    assert!(three.contains("two classes") && three.contains("[3, 32]"), "{three}");
    assert!(message(&rewrite("classifier.weight", None)).contains("two classes"));
    assert!(message(&rewrite("bert.embeddings.LayerNorm.bias", None)).contains("LayerNorm.bias"));
    let config = |from: &str, to: &str| {
        let folder = copy(BERT);
        let path = folder.path().join("config.json");
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains(from));
        std::fs::write(&path, text.replace(from, to)).unwrap();
        message(&folder)
    };
    assert!(config("\"gelu\"", "\"relu\"").contains("relu"));
    assert!(config("\"absolute\"", "\"relative_key\"").contains("relative_key"));
    assert!(config("\"model_type\": \"bert\"", "\"model_type\": \"gpt2\"").contains("gpt2"));
    assert!(
        config("\"max_position_embeddings\": 512", "\"max_position_embeddings\": 64")
            .contains("at least 512")
    );

    // A checkpoint without rows for added tokens has no placeholders for tokens that its vocabulary
    // lacks.
    let path = fixture(BERT).join("model.safetensors");
    let words = "bert.embeddings.word_embeddings.weight";
    let all = candle_core::safetensors::load(&path, &Device::Cpu).unwrap().remove(words).unwrap();
    let rows = all.dim(0).unwrap() - 100;
    let folder = rewrite(words, Some(all.narrow(0, 0, rows).unwrap().contiguous().unwrap()));
    let path = folder.path().join("config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let vocab = |rows| format!("\"vocab_size\": {rows}");
    std::fs::write(&path, text.replace(&vocab(rows + 100), &vocab(rows))).unwrap();
    let error = open(&folder).unwrap().score(&["a b\nc"]).unwrap_err().to_string();
    assert!(error.contains("none for added tokens"), "{error}");
}

#[test]
fn tensors_and_settings_that_are_not_read_are_named() {
    let with = |name: &str| {
        let folder = copy(BERT);
        let path = folder.path().join("model.safetensors");
        let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
        let zeros = Tensor::zeros(4, DType::F32, &Device::Cpu).unwrap();
        tensors.insert(name.to_owned(), zeros);
        candle_core::safetensors::save(&tensors, &path).unwrap();
        LlmLingua2::from_folder(folder.path(), Settings::paper(), &Device::Cpu)
    };
    for name in [
        "bert.encoder.layer.2.output.dense.weight",
        "bert.encoder.layer.0.attention.self.query.lora_A.weight",
        "bert.encoder.layer.0.attention.self.query.weight_scale",
    ] {
        let error = with(name).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("model.safetensors"), "{error}");
    }
    for name in ["bert.embeddings.position_ids", "bert.pooler.dense.bias", "cls.predictions.bias"] {
        with(name).unwrap();
    }
    for field in ["\"is_decoder\": true", "\"quantization_config\": {}"] {
        let folder = copy(BERT);
        let path = folder.path().join("config.json");
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replacen('{', &format!("{{{field},"), 1)).unwrap();
        let opened = LlmLingua2::from_folder(folder.path(), Settings::paper(), &Device::Cpu);
        let error = opened.unwrap_err().to_string();
        assert!(error.contains(field.split('"').nth(1).unwrap()), "{error}");
    }
}

#[test]
fn a_truncated_tokenizer_is_an_error() {
    let folder = copy(BERT);
    let path = folder.path().join("tokenizer.json");
    let text = std::fs::read(&path).unwrap();
    let at = text.windows(9).position(|part| part == b"\"decoder\"").unwrap();
    for end in at + 9..at + 90 {
        std::fs::write(&path, &text[..end]).unwrap();
        let opened = LlmLingua2::from_folder(folder.path(), Settings::paper(), &Device::Cpu);
        assert!(opened.unwrap_err().to_string().contains("tokenizer.json"));
    }
}

#[test]
fn a_text_that_exceeds_the_limit_of_a_pattern_is_an_error() {
    let pattern = r#"{"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": false}"#;
    let json = format!(
        r#"{{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": {pattern}, "post_processor": null, "decoder": null,
            "model": {{"type": "BPE", "vocab": {{"x": 0, "y": 1}}, "merges": []}}}}"#
    );
    let tokenizer = Tokenizer::from_bytes(json).unwrap();
    let text = "x".repeat(60);
    let (prompt, rate) = (Prompt::new(&text).unwrap(), Rate::new(0.5).unwrap());
    let settings = llmlingua::Settings::llmlingua();
    let mut lingua = LlmLingua::new(llama().0, tokenizer.clone(), settings).unwrap();
    let mut selective = SelectiveContext::new(llama().0, tokenizer, 0, Unit::Word);
    for error in [lingua.compress(prompt, rate), selective.compress(prompt, rate)] {
        assert!(error.unwrap_err().to_string().contains("retry"));
    }
}
