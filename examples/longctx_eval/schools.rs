//! Methods by school, with a line on each, for `list`.

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum School {
    Dense,
    Quantization,
    Eviction,
    Retrieval,
    Both,
    Prompt,
    Other,
}

impl School {
    pub fn title(self) -> &'static str {
        match self {
            Self::Dense => "Dense: everything, in full",
            Self::Quantization => "Quantization: everything, in fewer bits",
            Self::Eviction => "Eviction: a part of the tokens stays",
            Self::Retrieval => "Retrieval: everything stays, a part is read",
            Self::Both => "Eviction and quantization",
            Self::Prompt => "Prompt compression: a shorter text",
            Self::Other => "Other models and engines",
        }
    }
}

use School::*;

/// How names begin, the longer before the shorter.
const LINES: [(&str, School, &str); 41] = [
    ("streaming-llm-4x-kivi", Both, "StreamingLLM over KIVI's store"),
    ("snap-kv-4x-kivi", Both, "SnapKV over KIVI's store"),
    ("dense-", Dense, "keys and values as they are, in this type"),
    ("packed-f16", Quantization, "f16 in the packed store: what packing alone costs"),
    ("kivi-before-rope", Quantization, "KIVI whose keys are quantized before RoPE"),
    ("kivi-rolling", Quantization, "KIVI whose newest keys are in full too"),
    ("kivi-", Quantization, "KIVI: keys per channel, values per token, the newest in full"),
    ("flexgen-hadamard", Quantization, "FlexGen after a Hadamard rotation"),
    ("flexgen-", Quantization, "FlexGen: groups within each token"),
    ("turboquant", Quantization, "TurboQuant: codebooks after a rotation"),
    ("kvarn", Quantization, "KVarN: Hadamard and variance normalisation over both axes"),
    ("int3-", Quantization, "3-bit integers within each token, after a Hadamard rotation"),
    ("int4-", Quantization, "4-bit integers within each token, after a Hadamard rotation"),
    ("fp8", Quantization, "8-bit floating point"),
    ("duo-attention", Eviction, "DuoAttention: streaming heads keep sinks and a window"),
    ("streaming-llm", Eviction, "StreamingLLM: attention sinks and the newest tokens"),
    ("random-words", Prompt, "words dropped at random: the floor"),
    ("random", Eviction, "tokens dropped at random: the floor"),
    ("recent", Eviction, "the newest tokens"),
    ("k-norm", Eviction, "the shortest keys stay"),
    ("key-diff", Eviction, "the least common keys stay"),
    ("lag-kv", Eviction, "LagKV: tokens that differ from those after them"),
    ("expected-attention", Eviction, "what coming queries are expected to attend to"),
    ("tova", Eviction, "TOVA: what the newest query attends to"),
    ("h2o", Eviction, "H2O: what all queries attended to"),
    ("wide-snap-kv", Eviction, "SnapKV smoothed over 13 tokens"),
    ("pyramid-snap-kv", Eviction, "SnapKV whose lower layers keep more"),
    ("ada-snap-kv", Eviction, "SnapKV whose heads compete"),
    ("chunk-snap-kv", Eviction, "SnapKV in chunks"),
    ("rerotated-snap-kv", Eviction, "SnapKV at contiguous positions"),
    ("snap-kv", Eviction, "SnapKV: what the last queries of the prompt attend to"),
    ("finch", Eviction, "FINCH: what the question attends to"),
    ("infllm", Retrieval, "InfLLM: the nearest blocks"),
    ("quest", Retrieval, "Quest: the pages with the highest bounds"),
    ("llmlingua2", Prompt, "LLMLingua-2: a classifier of words"),
    ("llmlingua", Prompt, "LLMLingua: the words that a model finds unlikely"),
    ("selective-context", Prompt, "Selective Context: phrases by self-information"),
    ("tf-idf", Prompt, "sentences by TF-IDF"),
    ("bm25", Prompt, "sentences by BM25"),
    ("middle", Prompt, "a cut in the middle"),
    ("http", Other, "a server with OpenAI's API, from a settings file"),
];

fn entry(name: &str) -> Option<&'static (&'static str, School, &'static str)> {
    LINES.iter().find(|(start, _, _)| name.starts_with(start))
}

/// The school; packed formats that have no line of their own quantize.
pub fn school(name: &str) -> School {
    match entry(name) {
        Some((_, school, _)) => *school,
        None if name == "recurrent" => Other,
        None => Quantization,
    }
}

pub fn line(name: &str) -> &'static str {
    match entry(name) {
        Some((_, _, line)) => line,
        None if name == "recurrent" => "Mamba, RWKV and their kin: a state of fixed size",
        None => "",
    }
}
