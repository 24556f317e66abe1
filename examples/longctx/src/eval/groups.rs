//! Groups of methods, with a description of each method, for `list`.

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    Dense,
    Quantization,
    Eviction,
    Retrieval,
    Both,
    Prompt,
    Other,
}

impl Group {
    pub fn title(self) -> &'static str {
        match self {
            Self::Dense => "Dense: all tokens, uncompressed",
            Self::Quantization => "Quantization: all tokens, in fewer bits",
            Self::Eviction => "Eviction: keeps a part of the tokens",
            Self::Retrieval => "Retrieval: keeps all tokens, reads a part",
            Self::Both => "Eviction and quantization",
            Self::Prompt => "Prompt compression: a shorter text",
            Self::Other => "Other models and engines",
        }
    }
}

use Group::*;

/// Prefixes of methods' names, longer ones before shorter ones.
const DESCRIPTIONS: [(&str, Group, &str); 41] = [
    ("streaming-llm-4x-kivi", Both, "StreamingLLM over KIVI's store"),
    ("snap-kv-4x-kivi", Both, "SnapKV over KIVI's store"),
    ("dense-", Dense, "keys and values in this dtype"),
    ("packed-f16", Quantization, "f16 in the packed store, for comparison"),
    ("kivi-before-rope", Quantization, "KIVI whose keys are quantized before RoPE"),
    ("kivi-rolling", Quantization, "KIVI with the newest keys in full precision too"),
    ("kivi-", Quantization, "KIVI: keys per channel, values per token, newest in full precision"),
    ("flexgen-hadamard", Quantization, "FlexGen after a Hadamard rotation"),
    ("flexgen-", Quantization, "FlexGen: groups within each token"),
    ("turboquant", Quantization, "TurboQuant: codebooks after a rotation"),
    ("kvarn", Quantization, "KVarN: Hadamard and variance normalisation over both axes"),
    ("int3-", Quantization, "3-bit integers within each token, after a Hadamard rotation"),
    ("int4-", Quantization, "4-bit integers within each token, after a Hadamard rotation"),
    ("fp8", Quantization, "8-bit floating point"),
    ("duo-attention", Eviction, "DuoAttention: streaming heads keep sinks and a window"),
    ("streaming-llm", Eviction, "StreamingLLM: attention sinks and the newest tokens"),
    ("random-words", Prompt, "words dropped at random, as a lower bound"),
    ("random", Eviction, "tokens dropped at random, as a lower bound"),
    ("recent", Eviction, "the newest tokens"),
    ("k-norm", Eviction, "keeps keys with the smallest norm"),
    ("key-diff", Eviction, "keeps keys that differ most from the mean key"),
    ("lag-kv", Eviction, "LagKV: tokens that differ from those after them"),
    ("expected-attention", Eviction, "keeps tokens that future queries are expected to attend to"),
    ("tova", Eviction, "TOVA: keeps tokens that the newest query attends to"),
    ("h2o", Eviction, "H2O: keeps tokens with the largest accumulated attention"),
    ("wide-snap-kv", Eviction, "SnapKV smoothed over 13 tokens"),
    ("pyramid-snap-kv", Eviction, "PyramidKV: SnapKV with larger budgets in lower layers"),
    ("ada-snap-kv", Eviction, "AdaKV: SnapKV with one budget for all heads of a layer"),
    ("chunk-snap-kv", Eviction, "SnapKV in chunks"),
    ("rerotated-snap-kv", Eviction, "SnapKV at contiguous positions"),
    ("snap-kv", Eviction, "SnapKV: keeps tokens that the last queries of the prompt attend to"),
    ("finch", Eviction, "FINCH: keeps tokens that the question attends to"),
    ("infllm", Retrieval, "InfLLM: reads the most similar blocks"),
    ("quest", Retrieval, "Quest: reads the pages with the highest upper bounds of scores"),
    ("llmlingua2", Prompt, "LLMLingua-2: a classifier of words"),
    ("llmlingua", Prompt, "LLMLingua: keeps words with a high loss under a model"),
    ("selective-context", Prompt, "Selective Context: phrases by self-information"),
    ("tf-idf", Prompt, "sentences by TF-IDF"),
    ("bm25", Prompt, "sentences by BM25"),
    ("middle", Prompt, "truncation in the middle"),
    ("http", Other, "a server with OpenAI's API, from a settings file"),
];

fn entry(name: &str) -> Option<&'static (&'static str, Group, &'static str)> {
    DESCRIPTIONS.iter().find(|(start, _, _)| name.starts_with(start))
}

/// Returns a method's group. Packed formats without an entry are quantization.
pub fn group(name: &str) -> Group {
    match entry(name) {
        Some((_, group, _)) => *group,
        None if name == "recurrent" => Other,
        None => Quantization,
    }
}

pub fn description(name: &str) -> &'static str {
    match entry(name) {
        Some((_, _, line)) => line,
        None if name == "recurrent" => "Mamba, RWKV and others: a state of fixed size",
        None => "",
    }
}
