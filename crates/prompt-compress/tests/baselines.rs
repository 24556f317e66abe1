//! The baselines satisfy the properties of compressors that copy bytes, and rank sentences like
//! public packages.

use longctx_core::{Prompt, PromptCompressor, Rate};
use prompt_compress::baseline::{Extract, RandomDrop, Ranking, TruncateMiddle, bm25, tf_idf};
use prompt_compress::{StructuredPrompt, words};
use proptest::prelude::*;
use serde::Deserialize;

fn compressor() -> impl Strategy<Value = usize> {
    0..4usize
}

fn make(which: usize) -> Box<dyn PromptCompressor> {
    match which {
        0 => Box::new(RandomDrop { seed: 7 }),
        1 => Box::new(TruncateMiddle),
        2 => Box::new(Extract { ranking: Ranking::Bm25 }),
        _ => Box::new(Extract { ranking: Ranking::TfIdf }),
    }
}

fn text() -> impl Strategy<Value = String> {
    prop_oneof!["[a-d .!?\n]{1,200}", "(\\w{1,5}[ ,.]{1,2}){1,30}", ".{1,60}"]
        .prop_filter("text", |text| !text.trim().is_empty())
}

proptest! {
    #[test]
    fn keeps_a_subsequence_at_the_rate(which in compressor(), text in text(), rate in 0.01..1.0f64, ask in any::<bool>()) {
        let rate = Rate::new(rate).unwrap();
        let mut prompt = Prompt::new(&text).unwrap();
        if ask {
            prompt = prompt.with_question("a b c");
        }
        let short = make(which).compress(prompt, rate).unwrap();
        short.check(&text).unwrap();
        prop_assert_eq!(short.kept_text(&text), short.text.as_str());
        prop_assert!(short.pieces.windows(2).all(|p| p[0].source.end < p[1].source.start));
        // The pieces consist of whole words; their number matches the rate, within one.
        let all = words(&text);
        let inside = |word: &&std::ops::Range<usize>| {
            short.pieces.iter().any(|p| p.source.start <= word.start && word.end <= p.source.end)
        };
        let kept = all.iter().filter(inside).count();
        prop_assert_eq!(all.iter().filter(inside).map(|w| w.len()).sum::<usize>(), short.text.len());
        prop_assert!((kept as f64 - rate.get() * all.len() as f64).abs() <= 1.0, "{} of {}", kept, all.len());
    }

    #[test]
    fn rate_one_changes_nothing(which in compressor(), text in text()) {
        let short = make(which).compress(Prompt::new(&text).unwrap(), Rate::ONE).unwrap();
        prop_assert_eq!(short.pieces.len(), 1);
        prop_assert_eq!(short.text, text);
    }

    #[test]
    fn protected_sections_are_unchanged(which in compressor(), head in ".{0,20}", body in text(), tail in ".{0,20}") {
        let prompt = StructuredPrompt::new().keep(&*head).compress(&*body).keep(&*tail);
        let short = prompt.compress_with(&mut make(which), Rate::new(0.3).unwrap()).unwrap();
        short.check(&prompt.text()).unwrap();
        prop_assert!(short.text.starts_with(&head) && short.text.ends_with(&tail));
        prop_assert_eq!(short.kept_text(&prompt.text()), short.text);
    }
}

#[derive(Deserialize)]
struct Ranked {
    documents: Vec<Vec<String>>,
    query: Vec<String>,
    bm25: Vec<f64>,
    tf_idf: Vec<f64>,
}

#[test]
fn ranks_as_rank_bm25_and_scikit_learn() {
    let cases: Vec<Ranked> = serde_json::from_str(include_str!("fixtures/rank.json")).unwrap();
    assert!(cases.len() >= 4);
    for case in &cases {
        let close = |a: &f64, b: &f64| (a - b).abs() <= 1e-9 * (1.0 + b.abs());
        let got = bm25(&case.documents, &case.query);
        assert!(got.iter().zip(&case.bm25).all(|(a, b)| close(a, b)), "{got:?} {:?}", case.bm25);
        let got = tf_idf(&case.documents, &case.query);
        assert!(
            got.iter().zip(&case.tf_idf).all(|(a, b)| close(a, b)),
            "{got:?} {:?}",
            case.tf_idf
        );
    }
}

#[test]
fn extraction_finds_the_sentence_that_answers() {
    let text = "Cats sleep all day. The magic number is 7421. Dogs bark at night. Birds sing.";
    let prompt = Prompt::new(text).unwrap().with_question("What is the magic number?");
    for ranking in [Ranking::Bm25, Ranking::TfIdf] {
        let short = Extract { ranking }.compress(prompt, Rate::new(0.35).unwrap()).unwrap();
        assert!(short.text.contains("The magic number is 7421."), "{}", short.text);
    }
}
