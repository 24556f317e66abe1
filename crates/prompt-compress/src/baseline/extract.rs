//! Extraction of the best-ranked sentences.

use super::rank::{bm25, tf_idf};
use crate::units::{sentences, terms, words};
use longctx_core::{Compressed, Prompt, PromptCompressor, Rate, Result};

/// How sentences are ranked. Without a question, each sentence is compared with the whole text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ranking {
    /// Okapi BM25.
    Bm25,
    /// Cosine of TF-IDF vectors.
    TfIdf,
}

/// Keeps the best-ranked sentences in text order. The last sentence within the budget is cut after
/// a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extract {
    /// How sentences are ranked.
    pub ranking: Ranking,
}

impl PromptCompressor for Extract {
    fn compress(&mut self, prompt: Prompt<'_>, rate: Rate) -> Result<Compressed> {
        let sentences = sentences(prompt.text);
        let documents: Vec<_> = sentences.iter().map(|r| terms(&prompt.text[r.clone()])).collect();
        let query = terms(prompt.question.unwrap_or(prompt.text));
        let scores = match self.ranking {
            Ranking::Bm25 => bm25(&documents, &query),
            Ranking::TfIdf => tf_idf(&documents, &query),
        };
        let mut order: Vec<usize> = (0..sentences.len()).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));

        let words = words(prompt.text);
        let mut budget = rate.apply(words.len());
        let mut kept = Vec::new();
        for i in order {
            // The words that begin in the sentence: white space is never a word.
            let first = words.partition_point(|word| word.start < sentences[i].start);
            let end = words.partition_point(|word| word.start < sentences[i].end);
            let fitting = &words[first..end.min(first + budget)];
            kept.extend(fitting.iter().cloned());
            budget -= fitting.len();
        }
        kept.sort_by_key(|range| range.start);
        Compressed::copy(prompt.text, kept)
    }
}
