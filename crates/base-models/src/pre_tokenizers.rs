//! Pre-tokenizers of byte-level BPE, by the names of `tokenizer.ggml.pre`.
//!
//! The names are those of llama.cpp's build 11434 (`src/llama-vocab.cpp`). The patterns are those
//! of the models' own `tokenizer.json` if llama.cpp cites them, otherwise llama.cpp's.

/// A pre-tokenizer, and the other settings that llama.cpp derives from its name.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PreTokenizer {
    names: &'static [&'static str],
    /// Regular expressions, applied in order. Matches and the text between them become pieces.
    pub splits: &'static [&'static str],
    /// Whether a piece that is a token is kept whole even if no merges produce it.
    pub ignore_merges: bool,
    /// Whether a text begins with the BOS token, unless `tokenizer.ggml.add_bos_token` says
    /// otherwise.
    pub add_bos: bool,
    /// Whether text is first normalized to Unicode NFC. GGUF files do not say this; the model's own
    /// tokenizer does.
    pub nfc: bool,
}

impl PreTokenizer {
    const fn new(names: &'static [&'static str], splits: &'static [&'static str]) -> Self {
        Self { names, splits, ignore_merges: false, add_bos: false, nfc: false }
    }

    const fn ignore_merges(self) -> Self {
        Self { ignore_merges: true, ..self }
    }

    const fn bos(self) -> Self {
        Self { add_bos: true, ..self }
    }

    const fn nfc(self) -> Self {
        Self { nfc: true, ..self }
    }

    /// Returns the pre-tokenizer of a name.
    pub fn named(name: &str) -> Option<&'static Self> {
        TABLE.iter().find(|pre| pre.names.contains(&name))
    }

    /// Returns all supported names.
    pub fn names() -> impl Iterator<Item = &'static str> {
        TABLE.iter().flat_map(|pre| pre.names.iter().copied())
    }
}

/// Names of pre-tokenizers that are not byte-level. No supported architecture uses them.
pub(crate) const NOT_BYTE_LEVEL: [&str; 5] =
    ["gemma4", "granite-embed-multi-311m", "mmbert", "sarvam-moe", "whitespace"];

const GPT2: &str = r#"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"#;
const LLAMA3: &str = r#"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"#;
const QWEN2: &str = r#"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"#;
const GPT4O: &str = r#"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"#;
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
const DEEPSEEK_LETTERS: &str = r#"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"#;

#[rustfmt::skip]
const TABLE: &[PreTokenizer] = &[
    PreTokenizer::new(&["default"], &[
        r#"[\p{P}\$\+<=>\^~\|]+"#,
        GPT2,
        r#"\p{N}+"#,
        r#"[0-9][0-9][0-9]"#,
    ]),
    PreTokenizer::new(&["llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"], &[
        LLAMA3,
    ]).ignore_merges().bos(),
    PreTokenizer::new(&["dbrx", "smaug-bpe", "chatglm-bpe"], &[
        LLAMA3,
    ]),
    PreTokenizer::new(&["glm4", "glm5"], &[
        LLAMA3,
    ]).ignore_merges(),
    PreTokenizer::new(&["jais-2"], &[
        r#"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}"#,
    ]),
    PreTokenizer::new(&["minicpm5"], &[
        r#"\p{N}{1,3}"#,
        r#"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"#,
    ]).ignore_merges(),
    PreTokenizer::new(&["qwen2"], &[
        QWEN2,
    ]).nfc(),
    PreTokenizer::new(&["deepseek-r1-qwen", "kormo", "f2llmv2", "stablelm2", "megrez", "hunyuan", "solar-open", "grok-2"], &[
        QWEN2,
    ]),
    PreTokenizer::new(&["qwen35"], &[
        r#"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"#,
    ]).nfc(),
    PreTokenizer::new(&["ufakzeka"], &[
        r#"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"#,
    ]),
    PreTokenizer::new(&["laguna"], &[
        r#"[^\n]+|[\n]+"#,
        QWEN2,
    ]),
    PreTokenizer::new(&["seed-coder"], &[
        r#"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"#,
    ]),
    PreTokenizer::new(&["bailingmoe", "bailingmoe2", "llada-moe"], &[
        r#"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"#,
    ]),
    PreTokenizer::new(&["exaone-moe"], &[
        r#"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"#,
    ]),
    PreTokenizer::new(&["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"], &[
        GPT4O,
    ]),
    PreTokenizer::new(&["granite-embed-multi-97m"], &[
        GPT4O,
    ]).ignore_merges(),
    PreTokenizer::new(&["tiny_aya", "cohere2moe"], &[
        r#"\d{1,3}(?=(?:\d{3})*\b)"#,
        GPT4O,
    ]),
    PreTokenizer::new(&["tekken"], &[
        r#"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"#,
    ]).ignore_merges().bos(),
    PreTokenizer::new(&["kimi-k2"], &[
        r#"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"#,
    ]),
    PreTokenizer::new(&["youtu"], &[
        r#"[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+"#,
        r#"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"#,
    ]).ignore_merges(),
    PreTokenizer::new(&["deepseek-llm"], &[
        r#"[\r\n]"#,
        DEEPSEEK_LETTERS,
        r#"\s?[!-/:-~！-／：-～‘-‟　-。]+"#,
        r#"\s+$"#,
        r#"[一-龥ࠀ-一가-퟿]+"#,
        r#"\p{N}+"#,
    ]),
    PreTokenizer::new(&["deepseek-coder"], &[
        r#"[\r\n]"#,
        r#"\s?\p{L}+"#,
        r#"\s?\p{P}+"#,
        r#"[一-龥ࠀ-一가-퟿]+"#,
        r#"\p{N}"#,
    ]),
    PreTokenizer::new(&["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"], &[
        r#"\p{N}{1,3}"#,
        r#"[一-龥぀-ゟ゠-ヿ]+"#,
        DEEPSEEK3,
    ]),
    PreTokenizer::new(&["spark2_5"], &[
        r#"\p{N}{1,3}"#,
        r#"[一-龥぀-ゟ゠-ヿ]+"#,
        r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+"##,
        r#"\p{N}"#,
    ]),
    PreTokenizer::new(&["afmoe"], &[
        r#"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"#,
        r#"[一-鿿㐀-䶿豈-﫿぀-ゟ゠-ヿ･-ﾟ⼀-⿟เ-๿຀-໿ក-៿က-႟ꩠ-ꩿꧠ-꧿가-힯ᄀ-ᇿ]+"#,
        DEEPSEEK3,
    ]),
    PreTokenizer::new(&["falcon"], &[
        r#"[\p{P}\$\+<=>\^~\|`]+"#,
        GPT2,
        r#"[0-9][0-9][0-9]"#,
    ]),
    PreTokenizer::new(&["starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"], &[
        r#"\p{N}"#,
        GPT2,
    ]),
    PreTokenizer::new(&["gpt-2", "phi-2", "jina-es", "jina-de", "jina-v1-en", "jina-v2-es", "jina-v2-de", "jina-v2-code", "roberta-bpe", "gigachat", "a.x-4.0", "mellum", "modern-bert", "mpt", "olmo", "jais", "exaone4", "trillion", "granite-docling"], &[
        GPT2,
    ]),
    PreTokenizer::new(&["poro-chat", "bloom", "gpt3-finnish"], &[
        r#" ?[^(\s|.,!?…。，、।۔،)]+"#,
    ]),
    PreTokenizer::new(&["viking"], &[
        r#" ?[^(\s|.,!?…。，、।۔،)]+"#,
        r#"\p{N}"#,
    ]),
    PreTokenizer::new(&["chameleon"], &[
        r#"<sentinel:[0-9]+>"#,
        r#"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z"#,
        r#"([\t\n]|    |  )"#,
        r#"\p{N}"#,
        r#"[\p{P}!-/:-@\[-`{-~]"#,
        GPT2,
    ]).bos(),
    PreTokenizer::new(&["superbpe"], &[
        r#"\p{N}+"#,
        r#"(?=(\d{3})+(?!\d))"#,
    ]),
];
