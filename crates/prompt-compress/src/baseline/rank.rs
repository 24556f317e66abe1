//! Lexical scores of documents for a query.

use std::collections::HashMap;

/// Returns Okapi BM25 scores of `documents` for `query`, equal to those of Python's
/// `rank_bm25.BM25Okapi` 0.2.2: k1 = 1.5, b = 0.75. A negative inverse document frequency is
/// replaced by a quarter of the mean.
///
/// Robertson and Zaragoza, *The Probabilistic Relevance Framework: BM25 and Beyond*, 2009.
pub fn bm25(documents: &[Vec<String>], query: &[String]) -> Vec<f64> {
    const K1: f64 = 1.5;
    const B: f64 = 0.75;
    const EPSILON: f64 = 0.25;
    let counts: Vec<_> = documents.iter().map(|document| count(document)).collect();
    let n = documents.len() as f64;
    let mean_len = documents.iter().map(Vec::len).sum::<usize>() as f64 / n;
    let found_in = document_frequency(&counts);
    let idf = |&df: &usize| (n - df as f64 + 0.5).ln() - (df as f64 + 0.5).ln();
    // Summed in sorted order: the order of a hash map would change the last bit from run to run.
    let mut all: Vec<f64> = found_in.values().map(idf).collect();
    all.sort_by(f64::total_cmp);
    let floor = EPSILON * all.iter().sum::<f64>() / all.len().max(1) as f64;
    let weight = |term: &str| {
        found_in.get(term).map(|df| if idf(df) < 0.0 { floor } else { idf(df) }).unwrap_or(0.0)
    };
    let score = |(count, document): (&HashMap<&str, usize>, &Vec<String>)| {
        let norm = K1 * (1.0 - B + B * document.len() as f64 / mean_len);
        let of_term = |term: &String| {
            let tf = count.get(term.as_str()).copied().unwrap_or(0) as f64;
            if tf == 0.0 { 0.0 } else { weight(term) * tf * (K1 + 1.0) / (tf + norm) }
        };
        query.iter().map(of_term).sum()
    };
    counts.iter().zip(documents).map(score).collect()
}

/// Returns the cosine between the TF-IDF vectors of each of `documents` and of `query`, with
/// scikit-learn's defaults: raw counts times ln((1 + n) / (1 + df)) + 1. Words of the query that no
/// document contains are ignored.
///
/// Salton and Buckley, *Term-weighting approaches in automatic text retrieval*, 1988.
pub fn tf_idf(documents: &[Vec<String>], query: &[String]) -> Vec<f64> {
    let counts: Vec<_> = documents.iter().map(|document| count(document)).collect();
    let found_in = document_frequency(&counts);
    let n = documents.len() as f64;
    let weight = |term: &str| {
        found_in.get(term).map_or(0.0, |&df| ((1.0 + n) / (1.0 + df as f64)).ln() + 1.0)
    };
    let norm = |count: &HashMap<&str, usize>| {
        let mut squares: Vec<f64> =
            count.iter().map(|(term, &tf)| (tf as f64 * weight(term)).powi(2)).collect();
        squares.sort_by(f64::total_cmp);
        squares.iter().sum::<f64>().sqrt()
    };
    let query = count(query);
    let mut terms: Vec<_> = query.iter().map(|(&term, &tf)| (term, tf)).collect();
    terms.sort_unstable();
    let query_norm = norm(&query);
    let score = |count: &HashMap<&str, usize>| {
        let of_term = |&(term, tf): &(&str, usize)| {
            let own = count.get(term).copied().unwrap_or(0);
            (own * tf) as f64 * weight(term).powi(2)
        };
        let dot: f64 = terms.iter().map(of_term).sum();
        if dot == 0.0 { 0.0 } else { dot / (norm(count) * query_norm) }
    };
    counts.iter().map(score).collect()
}

fn count(document: &[String]) -> HashMap<&str, usize> {
    let mut counts = HashMap::new();
    for term in document {
        *counts.entry(term.as_str()).or_insert(0) += 1;
    }
    counts
}

fn document_frequency<'a>(counts: &[HashMap<&'a str, usize>]) -> HashMap<&'a str, usize> {
    let mut found_in = HashMap::new();
    for &term in counts.iter().flat_map(HashMap::keys) {
        *found_in.entry(term).or_insert(0) += 1;
    }
    found_in
}
