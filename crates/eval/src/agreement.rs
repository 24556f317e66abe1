//! Agreement of a method with the dense model, token by token. It distinguishes methods whose task
//! scores differ only by noise.

use crate::{Error, Result};

/// The logits of a subject for a reference text that it reads (teacher forcing).
#[derive(Debug, Clone, PartialEq)]
pub struct TeacherForced {
    /// The tokens of the text.
    pub tokens: Vec<u32>,
    /// For each token, the logits that predict it: `[tokens][vocab]`.
    pub logits: Vec<Vec<f32>>,
    /// Bytes that the method holds at the end; `None` if unknown.
    pub kv_bytes: Option<usize>,
    /// Bytes that a dense f16 cache would hold; `None` if there is no such cache.
    pub dense_bytes: Option<usize>,
}

/// A subject compared with the dense model on the same reference text.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Agreement {
    /// Tokens of the text.
    pub tokens: usize,
    /// The subject's perplexity on the text.
    pub perplexity: f64,
    /// The dense model's perplexity on the text.
    pub dense_perplexity: f64,
    /// The share of tokens for which both models have the same most probable token.
    pub top1: f64,
    /// The mean Kullback-Leibler divergence KL(dense || subject) of the two distributions, in nats.
    pub kl: f64,
    /// Dense bytes divided by bytes held at the end.
    pub ratio: Option<f64>,
}

impl Agreement {
    /// Returns the agreement over several texts, each weighted by its tokens; `None` without any.
    /// The ratio is that of the sums of bytes if all texts have the same dense bytes per token.
    ///
    /// ```
    /// use longctx_eval::Agreement;
    ///
    /// let text = |tokens, kl, ratio| Agreement {
    ///     tokens,
    ///     perplexity: 4.0,
    ///     dense_perplexity: 2.0,
    ///     top1: 0.5,
    ///     kl,
    ///     ratio: Some(ratio),
    /// };
    /// let mean = Agreement::mean(&[text(10, 0.1, 4.0), text(30, 0.3, 4.0)]).unwrap();
    /// assert!((mean.kl - 0.25).abs() < 1e-12 && (mean.perplexity - 4.0).abs() < 1e-12);
    /// assert_eq!((mean.tokens, mean.ratio), (40, Some(4.0)));
    /// ```
    pub fn mean(texts: &[Self]) -> Option<Self> {
        let tokens: usize = texts.iter().map(|text| text.tokens).sum();
        let mean = |of: fn(&Self) -> f64| {
            let sum: f64 = texts.iter().map(|text| text.tokens as f64 * of(text)).sum();
            sum / tokens as f64
        };
        let held = mean(|text| text.ratio.map_or(f64::NAN, |ratio| 1.0 / ratio));
        (tokens > 0).then(|| Self {
            tokens,
            perplexity: mean(|text| text.perplexity.ln()).exp(),
            dense_perplexity: mean(|text| text.dense_perplexity.ln()).exp(),
            top1: mean(|text| text.top1),
            kl: mean(|text| text.kl),
            ratio: held.is_finite().then(|| 1.0 / held),
        })
    }

    /// Checks that every number is in its valid range.
    #[cfg(feature = "report")]
    pub(crate) fn check(&self) -> Result<()> {
        let finite = |x: f64, from: f64| (from..=f64::MAX).contains(&x);
        for (name, value, fits) in [
            ("perplexity", self.perplexity, finite(self.perplexity, 1.0)),
            ("dense_perplexity", self.dense_perplexity, finite(self.dense_perplexity, 1.0)),
            ("top1", self.top1, (0.0..=1.0).contains(&self.top1)),
            ("kl", self.kl, finite(self.kl, 0.0)),
            ("ratio", self.ratio.unwrap_or(1.0), finite(self.ratio.unwrap_or(1.0), 0.0)),
        ] {
            if !fits {
                return Err(Error::setting(name, "a finite number in its range", value));
            }
        }
        Ok(())
    }
}

impl TeacherForced {
    /// Returns the exponential of the mean negative log-likelihood of the text's tokens.
    ///
    /// # Errors
    /// If there are no tokens, the number of logit lists is not that of the tokens, a token is
    /// outside the vocabulary, or a logit is NaN or infinite.
    pub fn perplexity(&self) -> Result<f64> {
        self.check()?;
        let surprise = |(token, logits): (&u32, &Vec<f32>)| -log_softmax(logits)[*token as usize];
        let sum: f64 = self.tokens.iter().zip(&self.logits).map(surprise).sum();
        Ok((sum / self.tokens.len() as f64).exp())
    }

    /// Compares this subject with `dense` on the same text.
    ///
    /// ```
    /// use longctx_eval::TeacherForced;
    ///
    /// let logits = vec![vec![0.0, 3.0], vec![2.0, 1.0]];
    /// let dense = TeacherForced { tokens: vec![1, 0], logits, kv_bytes: None, dense_bytes: None };
    /// let mut other = dense.clone();
    /// assert_eq!(other.agreement(&dense)?.kl, 0.0);
    /// other.logits[1] = vec![1.0, 2.0];
    /// assert_eq!(other.agreement(&dense)?.top1, 0.5);
    /// # Ok::<(), longctx_eval::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`perplexity`](Self::perplexity), and if the two texts or vocabularies differ.
    pub fn agreement(&self, dense: &Self) -> Result<Agreement> {
        let (perplexity, dense_perplexity) = (self.perplexity()?, dense.perplexity()?);
        if self.tokens != dense.tokens {
            return Err(Error::setting("reference text", "the dense model's tokens", "others"));
        }
        let (mut same, mut kl) = (0usize, 0.0);
        for (ours, theirs) in self.logits.iter().zip(&dense.logits) {
            if ours.len() != theirs.len() {
                return Err(Error::setting("vocabulary", theirs.len(), ours.len()));
            }
            same += usize::from(first(ours) == first(theirs));
            kl += divergence(&log_softmax(theirs), &log_softmax(ours));
        }
        let tokens = self.tokens.len();
        let mean = |sum: f64| sum / tokens as f64;
        Ok(Agreement {
            tokens,
            perplexity,
            dense_perplexity,
            top1: mean(same as f64),
            kl: mean(kl),
            ratio: ratio(self.dense_bytes, self.kv_bytes),
        })
    }

    fn check(&self) -> Result<()> {
        if self.tokens.is_empty() || self.tokens.len() != self.logits.len() {
            let expected = format!("one for each of the {} tokens, at least 1", self.tokens.len());
            return Err(Error::setting("lists of logits", expected, self.logits.len()));
        }
        for (i, (&token, logits)) in self.tokens.iter().zip(&self.logits).enumerate() {
            if token as usize >= logits.len() {
                let expected = format!("below the vocabulary's {}", logits.len());
                return Err(Error::setting("token", expected, token));
            }
            if let Some(id) = logits.iter().position(|logit| !logit.is_finite()) {
                let what = format!("logits of token {i} of the text, vocabulary entry {id}");
                return Err(Error::setting(what, "a finite number", logits[id]));
            }
        }
        Ok(())
    }
}

/// Returns dense bytes divided by bytes held.
pub(crate) fn ratio(dense: Option<usize>, held: Option<usize>) -> Option<f64> {
    Some(dense? as f64 / held.filter(|&bytes| bytes > 0)? as f64)
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from(x - max).exp()).sum();
    logits.iter().map(|&x| f64::from(x - max) - sum.ln()).collect()
}

/// Returns KL(p || q) of two distributions of log-probabilities.
fn divergence(p: &[f64], q: &[f64]) -> f64 {
    let kl: f64 = p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum();
    // The divergence is never negative; a sum of rounded terms can be.
    kl.max(0.0)
}

fn first(logits: &[f32]) -> Option<usize> {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]).then(b.cmp(&a)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forced(tokens: Vec<u32>, logits: Vec<Vec<f32>>) -> TeacherForced {
        TeacherForced { tokens, logits, kv_bytes: Some(25), dense_bytes: Some(100) }
    }

    #[test]
    fn perplexity_of_even_odds_is_their_number() {
        let even = forced(vec![0, 3, 1], vec![vec![0.5; 4]; 3]);
        assert!((even.perplexity().unwrap() - 4.0).abs() < 1e-12);
    }

    #[test]
    fn divergence_by_hand() {
        // p = (1/2, 1/2), q = (1/4, 3/4): KL = ln 2 - ln(3) / 2.
        let dense = forced(vec![0], vec![vec![0.0, 0.0]]);
        let other = forced(vec![0], vec![vec![0.0, 3f32.ln()]]);
        let agreement = other.agreement(&dense).unwrap();
        assert!((agreement.kl - (2f64.ln() - 3f64.ln() / 2.0)).abs() < 1e-7);
        assert!((agreement.perplexity - 4.0).abs() < 1e-6);
        assert_eq!((agreement.top1, agreement.ratio), (0.0, Some(4.0)));
    }

    #[test]
    fn unequal_texts_and_stray_tokens_are_errors() {
        let one = forced(vec![0], vec![vec![0.0, 0.0]]);
        let other = TeacherForced { tokens: vec![1], ..one.clone() };
        assert!(other.agreement(&one).unwrap_err().to_string().contains("dense model's tokens"));
        let stray = TeacherForced { tokens: vec![2], ..one };
        assert!(stray.perplexity().unwrap_err().to_string().contains("below the vocabulary's 2"));
    }

    #[test]
    fn logits_that_are_no_numbers_are_named() {
        let dense = forced(vec![0, 1], vec![vec![0.5, 1.5, 2.0]; 2]);
        for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut other = dense.clone();
            other.logits[1][2] = wrong;
            for result in [other.agreement(&dense), dense.agreement(&other)] {
                let error = result.unwrap_err().to_string();
                let place = format!(
                    "token 1 of the text, vocabulary entry 2`: expected a finite number, got {wrong}"
                );
                assert!(error.contains(&place), "{error}");
            }
            assert!(other.perplexity().is_err());
        }
    }
}
