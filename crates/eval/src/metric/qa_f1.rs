use std::collections::HashMap;

use crate::python;

/// Returns the F1 score over words, in lower case and without ASCII punctuation and articles (as in
/// SQuAD).
pub fn qa_f1(prediction: &str, answer: &str) -> f64 {
    let (prediction, answer) = (normalize(prediction), normalize(answer));
    let mut left: HashMap<&str, usize> = HashMap::new();
    let mut answer_words = 0;
    for word in python::split(&answer) {
        *left.entry(word).or_default() += 1;
        answer_words += 1;
    }
    let (mut same, mut prediction_words) = (0, 0);
    for word in python::split(&prediction) {
        prediction_words += 1;
        if let Some(count) = left.get_mut(word).filter(|count| **count > 0) {
            *count -= 1;
            same += 1;
        }
    }
    if same == 0 {
        return 0.0;
    }
    let precision = f64::from(same) / f64::from(prediction_words);
    let recall = f64::from(same) / f64::from(answer_words);
    2.0 * precision * recall / (precision + recall)
}

fn normalize(text: &str) -> String {
    let kept: String = text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
    python::replace_articles(&kept, " ")
}
