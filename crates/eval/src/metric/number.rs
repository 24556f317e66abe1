use std::sync::LazyLock;

use regex::Regex;

/// Returns the share of the prediction's numbers that equal the answer.
pub fn count(prediction: &str, answer: &str) -> f64 {
    // Digits of any script, as in Python.
    static NUMBER: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"\p{Nd}+").expect("the pattern is valid"));
    let (mut right, mut all) = (0, 0);
    for number in NUMBER.find_iter(prediction) {
        right += u32::from(number.as_str() == answer);
        all += 1;
    }
    if all == 0 { 0.0 } else { f64::from(right) / f64::from(all) }
}

/// Returns the share of the prediction's numbers that equal N in the answer's "Paragraph N"; 0 if
/// there is none.
pub fn retrieval(prediction: &str, answer: &str) -> f64 {
    retrieved(answer).map_or(0.0, |number| count(prediction, number))
}

/// Returns N of the first "Paragraph N".
pub fn retrieved(answer: &str) -> Option<&str> {
    static PARAGRAPH: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"Paragraph (\p{Nd}+)").expect("the pattern is valid"));
    Some(PARAGRAPH.captures(answer)?.get(1)?.as_str())
}
