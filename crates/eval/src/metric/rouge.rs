//! Written here to reproduce one Python package: it counts distinct words, and the traversal order
//! of a table decides which of several longest common subsequences counts. A standard ROUGE-L gives
//! other numbers.

use std::collections::HashSet;

use crate::python;

/// Returns ROUGE-L's F1 as Python's `rouge` 1.0.1 computes it: by sentences, which end at a full
/// stop, over sets of words.
///
/// A prediction or answer without a sentence scores 0. One difference: the package's traversal is
/// recursive, and two sentences of some thousand words together exceed Python's stack, which
/// LongBench counts as 0; here they get their score.
pub fn rouge_l(prediction: &str, answer: &str) -> f64 {
    let (prediction, answer) = (sentences(prediction), sentences(answer));
    if prediction.is_empty() || answer.is_empty() {
        return 0.0;
    }
    let mut shared = HashSet::new();
    for theirs in &answer {
        for ours in &prediction {
            shared.extend(longest_common(theirs, ours));
        }
    }
    let distinct = |text: &[Vec<&str>]| text.iter().flatten().collect::<HashSet<_>>().len() as f64;
    let recall = shared.len() as f64 / distinct(&answer);
    let precision = shared.len() as f64 / distinct(&prediction);
    2.0 * ((precision * recall) / (precision + recall + 1e-8))
}

/// Returns the words of each sentence. A sentence of only white space has one word, the empty one.
fn sentences(text: &str) -> Vec<Vec<&str>> {
    let words = |sentence| {
        let words: Vec<&str> = python::split(sentence).collect();
        if words.is_empty() { vec![""] } else { words }
    };
    text.split('.').filter(|sentence| !sentence.is_empty()).map(words).collect()
}

/// Returns the words of one longest common subsequence of `x` and `y`: the one found by a traversal
/// from the end that prefers to shorten `y`.
fn longest_common<'a>(x: &[&'a str], y: &[&str]) -> Vec<&'a str> {
    let width = y.len() + 1;
    let mut lengths = vec![0_u32; (x.len() + 1) * width];
    for i in 1..=x.len() {
        for j in 1..=y.len() {
            lengths[i * width + j] = if x[i - 1] == y[j - 1] {
                lengths[(i - 1) * width + j - 1] + 1
            } else {
                lengths[(i - 1) * width + j].max(lengths[i * width + j - 1])
            };
        }
    }
    let (mut i, mut j) = (x.len(), y.len());
    let mut common = Vec::new();
    while i > 0 && j > 0 {
        if x[i - 1] == y[j - 1] {
            common.push(x[i - 1]);
            (i, j) = (i - 1, j - 1);
        } else if lengths[(i - 1) * width + j] > lengths[i * width + j - 1] {
            i -= 1;
        } else {
            j -= 1;
        }
    }
    common
}
