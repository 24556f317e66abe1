//! Coarse selection by perplexity: documents and sentences.

use std::ops::Range;

use super::documents::KeptRanges;
use super::{LlmLingua, Order, QuestionPosition, Rank, Sentences};
use crate::loss::{count, encode, mean};
use longctx_core::{CausalLm, Error, Result};

/// LongLLMLingua's suffix of a question, so that the model estimates whether the documents contain
/// the answer.
const QUESTION_SUFFIX: &str = " We can get the answer to this question in the given documents.";

impl<M: CausalLm> LlmLingua<M> {
    /// Returns the mean loss of a text, of the question after the text, or of the text after the
    /// question.
    fn mean_loss(&mut self, text: &str, question: &str) -> Result<f32> {
        let (whole, first) = match self.settings.rank {
            Rank::Perplexity => (text.to_owned(), 0),
            Rank::Question(QuestionPosition::After) => {
                (format!("{text}{question}"), count(&self.tokenizer, text)? - 1)
            }
            Rank::Question(QuestionPosition::Before) => {
                (format!("{question}{text}"), count(&self.tokenizer, question)? - 1)
            }
        };
        let mut ids = encode(&self.tokenizer, &whole, true)?.ids;
        ids.truncate(self.loss_model.context_length());
        let losses = self.loss_model.losses(&ids, 0)?;
        Ok(mean(losses.get(first..).unwrap_or(&[])))
    }

    /// Returns the indices of texts, best first: the highest loss, or the lowest loss of the
    /// question.
    fn rank(&self, mean_losses: &[f32]) -> Vec<usize> {
        let key = |&i: &usize| match self.settings.rank {
            Rank::Perplexity => -mean_losses[i],
            Rank::Question(_) => mean_losses[i],
        };
        let mut order: Vec<usize> = (0..mean_losses.len()).collect();
        order.sort_by(|a, b| key(a).total_cmp(&key(b)));
        order
    }

    /// Returns the documents that fit the budget.
    pub(super) fn select_documents(
        &mut self,
        documents: &[Range<usize>],
        source: &str,
        question: &str,
        target: f64,
    ) -> Result<Vec<KeptRanges>> {
        let asked = format!("{question}{QUESTION_SUFFIX}");
        let mut mean_losses = Vec::with_capacity(documents.len());
        for document in documents {
            mean_losses.push(self.mean_loss(&source[document.clone()], &asked)?);
        }
        let target = if target < 0.0 { 100.0 } else { target };
        let mut left = self.settings.document_budget.of(target);
        let mut used = self.settings.force_documents.clone();
        if let Some(&bad) = used.iter().find(|&&i| i >= documents.len()) {
            let expected = format!("numbers below {}", documents.len());
            return Err(Error::setting("force_documents", expected, bad));
        }
        for i in self.rank(&mean_losses) {
            left -= count(&self.tokenizer, &source[documents[i].clone()])? as f64;
            if !used.contains(&i) {
                used.push(i);
            }
            if left < 0.0 {
                break;
            }
        }
        let offsets = ratio_offsets(used.len(), self.settings.dynamic_ratio);
        let mut ranked: Vec<(usize, f64)> = used.into_iter().zip(offsets).collect();
        match self.settings.order {
            Order::Original => ranked.sort_by_key(|&(i, _)| i),
            Order::Ranked => {}
            Order::BestAtBothEnds => {
                let every_other = |from| ranked.iter().copied().skip(from).step_by(2);
                let mut last: Vec<_> = every_other(1).collect();
                last.reverse();
                ranked = every_other(0).chain(last).collect();
            }
        }
        let kept = |(i, ratio_offset): (usize, f64)| KeptRanges {
            ranges: vec![documents[i].clone()],
            ratio_offset,
        };
        Ok(ranked.into_iter().map(kept).collect())
    }

    /// Returns the sentences that fit the budget.
    pub(super) fn select_sentences(
        &mut self,
        documents: Vec<KeptRanges>,
        source: &str,
        question: &str,
        target: f64,
        sentences: &Sentences,
    ) -> Result<Vec<KeptRanges>> {
        let cut = |document: &KeptRanges| -> Vec<Range<usize>> {
            let whole = document.ranges[0].clone();
            let cut = (sentences.split)(&source[whole.clone()]);
            cut.into_iter().map(|r| whole.start + r.start..whole.start + r.end).collect()
        };
        let of_documents: Vec<Vec<Range<usize>>> = documents.iter().map(cut).collect();
        let all: Vec<&Range<usize>> = of_documents.iter().flatten().collect();
        if all.len() == 1 {
            return Ok(documents);
        }
        let asked = match self.settings.rank {
            Rank::Perplexity => format!("{question}{QUESTION_SUFFIX}"),
            Rank::Question(_) => question.to_owned(),
        };
        let mut mean_losses = Vec::with_capacity(all.len());
        for sentence in &all {
            mean_losses.push(self.mean_loss(&source[(*sentence).clone()], &asked)?);
        }
        if let Rank::Question(_) = self.settings.rank {
            let (first, last) = (sentences.first.min(all.len()), sentences.last.min(all.len()));
            mean_losses[..first].iter_mut().for_each(|s| *s += sentences.bonus);
            let from = all.len() - last;
            mean_losses[from..].iter_mut().for_each(|s| *s += sentences.bonus);
        }
        let target = if target < 0.0 { 100.0 } else { target };
        let mut left = target * sentences.budget;
        let mut stays = vec![false; all.len()];
        for i in self.rank(&mean_losses) {
            left -= count(&self.tokenizer, &source[all[i].clone()])? as f64;
            stays[i] = true;
            if left < 0.0 {
                break;
            }
        }
        let mut stays = stays.into_iter();
        let keep = |(document, sentences): (KeptRanges, Vec<Range<usize>>)| {
            let ranges = sentences.into_iter().zip(&mut stays).filter(|(_, stays)| *stays);
            KeptRanges { ranges: ranges.map(|(range, _)| range).collect(), ..document }
        };
        Ok(documents.into_iter().zip(of_documents).map(keep).collect())
    }
}

/// Returns the additions to the ratios of the documents, best first: from `spread` down to
/// `-spread`.
fn ratio_offsets(count: usize, spread: f64) -> Vec<f64> {
    if count < 2 || spread <= 0.0 {
        return vec![0.0; count];
    }
    let step = spread / (count - 1) as f64;
    (0..count).map(|i| (count as f64 - 1.0 - 2.0 * i as f64) * step).collect()
}
