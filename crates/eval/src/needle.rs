//! The needle test: a pass key hidden in a long text (Mohtashami and Jaggi, arXiv 2305.16300), with
//! the prompts and scores of the paper's longctx_bench (`eval/passkey_utils`).

use rand::prelude::*;
use rand_chacha::ChaCha8Rng;

use crate::haystack::{MAX_WORDS, word_range};
use crate::{Error, Haystack, Result, python};

/// New tokens per answer in the paper.
pub const MAX_NEW_TOKENS: usize = 256;
/// The paper's lengths, from 512 to 20,480 words.
pub const PAPER_WORDS: (usize, usize) = (512, 20_480);

/// The largest number of digits of a key.
const MAX_DIGITS: usize = 10_000;

const INSTRUCTION: &str = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. \
    I will quiz you about the important information there.\n";
const QUESTION: &str = "\nWhat is the pass key? The pass key is ";

/// A key hidden at one depth.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Needle {
    /// Depth: 0 before the text, 1 after it.
    pub depth: f64,
    /// Digits of the key: 7 or 64 in the paper.
    pub digits: usize,
    /// Seed of the key.
    pub seed: u64,
}

/// A prompt, and its right answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// The prompt. It has no chat template: it ends within the sentence of the answer.
    pub prompt: String,
    /// The key.
    pub answer: String,
}

/// How well a prediction matches a key; both values are from 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Score {
    /// 1 if the prediction contains the key, ignoring punctuation and articles; otherwise 0.
    pub exact: f64,
    /// The longest substring of the key that the prediction contains, as a share of the key.
    pub partial: f64,
}

impl Needle {
    /// Hides the key among `words` words of the haystack.
    ///
    /// # Errors
    /// [`Error::Setting`] if the depth is not in 0..=1 or the key has no digits.
    ///
    /// ```
    /// use longctx_eval::{Haystack, needle::Needle};
    ///
    /// let haystack = Haystack::generated(0);
    /// let sample = Needle { depth: 0.25, digits: 64, seed: 3 }.in_words(&haystack, 512)?;
    /// assert_eq!(sample.answer.len(), 64);
    /// # Ok::<(), longctx_eval::Error>(())
    /// ```
    pub fn in_words(&self, haystack: &Haystack, words: usize) -> Result<Sample> {
        check_depth(self.depth)?;
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        let answer = key(&mut rng, self.digits)?;
        let sentence = format!("The pass key is {answer}. Remember it. {answer} is the pass key.");
        let prompt = prompt(&haystack.words(words)?, &[(self.depth, sentence)], QUESTION);
        Ok(Sample { prompt, answer })
    }

    /// Hides the key in the longest prompt that has at most `tokens` tokens, counted by `count`.
    ///
    /// # Errors
    /// [`Error::Setting`] as for [`in_words`](Self::in_words), and if the prompt without background
    /// is longer; errors of `count`.
    ///
    /// ```
    /// use longctx_eval::{Haystack, needle::Needle};
    ///
    /// let bytes = |text: &str| Ok::<_, longctx_eval::Error>(text.len());
    /// let needle = Needle { depth: 0.5, digits: 7, seed: 1 };
    /// let sample = needle.in_tokens(&Haystack::generated(0), 4096, bytes)?;
    /// assert!((4070..=4096).contains(&sample.prompt.len()));
    /// # Ok::<(), longctx_eval::Error>(())
    /// ```
    pub fn in_tokens<E: From<Error>>(
        &self,
        haystack: &Haystack,
        tokens: usize,
        count: impl FnMut(&str) -> Result<usize, E>,
    ) -> Result<Sample, E> {
        longest_sample(tokens, count, |words| self.in_words(haystack, words))
    }
}

/// Several keys, each of a city, hidden in the text. The prompt asks for one of them
/// (longctx_bench's "magic city number").
///
/// The wrong keys are evenly spaced before and after the right one, in proportion to its depth.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MultiNeedle {
    /// The requested key and its depth.
    pub needle: Needle,
    /// Number of wrong keys, 23 at most.
    pub distractors: usize,
}

const CITIES: [&str; 24] = [
    "Chicago",
    "Yangon",
    "Colombo",
    "Almaty",
    "Sydney",
    "Lagos",
    "Amsterdam",
    "Belgrade",
    "Cairo",
    "Kigali",
    "Dakar",
    "Sofia",
    "Tashkent",
    "Mumbai",
    "Barcelona",
    "Toronto",
    "Bratislava",
    "Santiago",
    "Copenhagen",
    "Istanbul",
    "Helsinki",
    "Nairobi",
    "Lisbon",
    "Jakarta",
];

impl MultiNeedle {
    /// Hides the keys among `words` words of the haystack.
    ///
    /// # Errors
    /// [`Error::Setting`] as for [`Needle::in_words`], and for too many distractors.
    pub fn in_words(&self, haystack: &Haystack, words: usize) -> Result<Sample> {
        let Needle { depth, digits, seed } = self.needle;
        check_depth(depth)?;
        if self.distractors >= CITIES.len() {
            let most = format!("at most {}", CITIES.len() - 1);
            return Err(Error::setting("distractors", most, self.distractors));
        }
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let cities = CITIES.choose_multiple(&mut rng, self.distractors + 1).collect::<Vec<_>>();
        let mut keys: Vec<String> = Vec::new();
        while keys.len() < cities.len() {
            let key = key(&mut rng, digits)?;
            if !keys.contains(&key) {
                keys.push(key);
            }
            if digits == 1 && keys.len() == 10 && cities.len() > 10 {
                return Err(Error::setting("digits", "enough for distinct keys", digits));
            }
        }
        let before = (self.distractors as f64 * depth) as usize;
        let after = self.distractors - before;
        let ahead = (1..=before).map(|i| i as f64 * depth / (before + 1) as f64);
        let behind = (1..=after).map(|i| depth + i as f64 * (1.0 - depth) / (after + 1) as f64);
        let depths = ahead.chain([depth]).chain(behind);
        // Number 0 is the right key: it follows the keys before it.
        let order = (1..=before).chain([0]).chain(before + 1..=self.distractors);
        let sentences = depths.zip(order).map(|(depth, i)| {
            (depth, format!("The pass key of {} is {}. Remember it.", cities[i], keys[i]))
        });
        let question = format!(
            "\nWhat is the pass key of {city}? The pass key of {city} is ",
            city = cities[0]
        );
        let prompt = prompt(&haystack.words(words)?, &sentences.collect::<Vec<_>>(), &question);
        Ok(Sample { prompt, answer: keys.swap_remove(0) })
    }

    /// Hides the keys in the longest prompt that has at most `tokens` tokens, counted by `count`.
    ///
    /// # Errors
    /// As for [`Needle::in_tokens`].
    pub fn in_tokens<E: From<Error>>(
        &self,
        haystack: &Haystack,
        tokens: usize,
        count: impl FnMut(&str) -> Result<usize, E>,
    ) -> Result<Sample, E> {
        longest_sample(tokens, count, |words| self.in_words(haystack, words))
    }
}

/// Scores a prediction like longctx_bench's `exact_match` and `partial_match`.
pub fn score(prediction: &str, answer: &str) -> Score {
    let exact = normalize(prediction).contains(&normalize(answer));
    Score { exact: f64::from(exact), partial: partial(prediction, answer) }
}

/// Returns `count` values from `from` to `to`, evenly spaced, both ends included: the paper's
/// lengths (rounded down) and depths.
///
/// ```
/// use longctx_eval::needle::spaced;
///
/// assert_eq!(spaced(0.0, 1.0, 3), [0.0, 0.5, 1.0]);
/// assert_eq!(spaced(512.0, 20_480.0, 10)[1] as usize, 2730);
/// ```
pub fn spaced(from: f64, to: f64, count: usize) -> Vec<f64> {
    match count {
        0 => Vec::new(),
        1 => vec![from],
        _ => (0..count)
            .map(|i| {
                if i + 1 == count { to } else { i as f64 * (to - from) / (count - 1) as f64 + from }
            })
            .collect(),
    }
}

fn check_depth(depth: f64) -> Result<()> {
    if (0.0..=1.0).contains(&depth) {
        Ok(())
    } else {
        Err(Error::setting("depth", "a number from 0 to 1", depth))
    }
}

fn key(rng: &mut impl Rng, digits: usize) -> Result<String> {
    if !(1..=MAX_DIGITS).contains(&digits) {
        return Err(Error::setting("digits", format!("1 to {MAX_DIGITS}"), digits));
    }
    Ok((0..digits).map(|_| char::from(rng.random_range(b'0'..=b'9'))).collect())
}

/// Joins the instruction, the background with each sentence at its depth (increasing), and the
/// question. Parts are joined by one space, even if a part is empty, as in the original.
fn prompt(background: &str, sentences: &[(f64, String)], question: &str) -> String {
    let words = python::split(background).count();
    let mut text = INSTRUCTION.to_owned();
    let mut start = 0;
    for (depth, sentence) in sentences {
        let end = (words as f64 * depth) as usize;
        text.extend([word_range(background, start, end), " ", sentence, " "]);
        start = end;
    }
    text.extend([word_range(background, start, words), " ", question]);
    text
}

/// Returns the sample with the most words whose prompt has at most `limit` tokens, counted by
/// `count`. `sample` makes the sample with a number of words.
fn longest_sample<E: From<Error>>(
    limit: usize,
    mut count: impl FnMut(&str) -> Result<usize, E>,
    sample: impl Fn(usize) -> Result<Sample>,
) -> Result<Sample, E> {
    let mut sample = |words| -> Result<(Sample, usize), E> {
        let sample = sample(words)?;
        let length = count(&sample.prompt)?;
        Ok((sample, length))
    };
    if limit > MAX_WORDS {
        return Err(Error::setting("tokens", format!("at most {MAX_WORDS}"), limit).into());
    }
    let (mut best, least) = sample(0)?;
    if least > limit {
        return Err(Error::setting("tokens", format!("at least {least}"), limit).into());
    }
    // Every word except the needle's is about a token or more.
    let (mut low, mut high) = (0, MAX_WORDS.min(2 * limit));
    let mut next = high / 2;
    for step in 1.. {
        if low + 1 >= high {
            break;
        }
        // Counting tokens of a long text takes long. So the next length follows from the last one's
        // tokens per word, and each fourth step halves the range, which bounds the number of steps
        // for any text.
        let words = match step % 4 {
            0 => low + (high - low) / 2,
            _ => next.clamp(low + 1, high - 1),
        };
        let (candidate, length) = sample(words)?;
        let per_word = (length.saturating_sub(least) as f64 / words as f64).max(0.1);
        let missing = limit as f64 - length as f64;
        next = (words as f64 + (missing / per_word).floor()).max(0.0) as usize;
        if length <= limit {
            (best, low) = (candidate, words);
            next = next.max(low + 1);
        } else {
            high = words;
        }
    }
    Ok(best)
}

/// Converts to lower case, and removes ASCII punctuation, articles and repeated white space.
fn normalize(text: &str) -> String {
    let kept: String = text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
    let kept = python::replace_articles(&kept, "");
    python::split(&kept).collect::<Vec<_>>().join(" ")
}

/// Returns the length of the longest common substring, divided by the answer's length.
fn partial(prediction: &str, answer: &str) -> f64 {
    let answer: Vec<char> = answer.chars().collect();
    if answer.is_empty() {
        return 1.0;
    }
    // runs[j]: the common substring that ends at answer[j - 1] and the prediction's current
    // character.
    let mut runs = vec![0; answer.len() + 1];
    let mut best = 0;
    for c in prediction.chars() {
        for j in (0..answer.len()).rev() {
            runs[j + 1] = if answer[j] == c { runs[j] + 1 } else { 0 };
            best = best.max(runs[j + 1]);
        }
    }
    best as f64 / answer.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_that_fits_is_found_in_a_few_steps() {
        // Words of one to four tokens, longer ones in the second half.
        let tokens: Vec<usize> = (0..60_000).map(|i| 1 + i * 7 % 3 + i / 30_000).collect();
        for limit in [20, 21, 1_000, 8_191, 30_000] {
            let mut steps = 0;
            // The prompt is the number of words.
            let count = |prompt: &str| -> Result<usize> {
                steps += 1;
                let words: usize = prompt.parse().unwrap();
                Ok(20 + tokens[..words].iter().sum::<usize>())
            };
            let sample =
                |words: usize| Ok(Sample { prompt: words.to_string(), answer: String::new() });
            let found = longest_sample(limit, count, sample);
            let sums = tokens.iter().scan(20, |sum, tokens| {
                *sum += tokens;
                Some(*sum)
            });
            let most = sums.take_while(|sum| *sum <= limit).count();
            assert_eq!(found.unwrap().prompt, most.to_string());
            assert!(steps <= 10, "{limit}: {steps} steps");
        }
    }
}
