use super::ratio;

/// Returns the similarity of the prediction's first line of code and the answer: `fuzz.ratio` of
/// fuzzywuzzy 0.18.0 without python-Levenshtein, in whole hundredths.
///
/// The first line of code is the first line without a backquote, `#` or `//`, or the empty line if
/// there is none.
pub fn code_similarity(prediction: &str, answer: &str) -> f64 {
    let lines = prediction.trim_start_matches('\n').split('\n');
    let mut code = lines.filter(|line| !line.contains(['`', '#']) && !line.contains("//"));
    let line = code.next().unwrap_or("");
    if line == answer {
        1.0
    } else if line.is_empty() || answer.is_empty() {
        0.0
    } else {
        (100.0 * ratio(line, answer)).round_ties_even() / 100.0
    }
}
