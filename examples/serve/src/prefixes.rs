//! Prefixes of prompts whose keys and values are kept for later requests.

use longctx_core::SeqId;

/// Kept prefixes by their tokens. Each has a sequence of the model with exactly these tokens.
pub struct Prefixes {
    most: usize,
    /// Prefixes in the order of their last use.
    kept: Vec<(Vec<u32>, SeqId)>,
}

impl Prefixes {
    /// Creates an empty set of at most `most` prefixes.
    pub fn new(most: usize) -> Self {
        Self { most, kept: Vec::new() }
    }

    /// Returns the sequence and the length of the longest kept prefix that leaves at least one
    /// token of the prompt to feed, and marks it as used.
    pub fn find(&mut self, prompt: &[u32]) -> Option<(SeqId, usize)> {
        let fits = |tokens: &Vec<u32>| tokens.len() < prompt.len() && prompt.starts_with(tokens);
        let at = (0..self.kept.len())
            .filter(|&i| fits(&self.kept[i].0))
            .max_by_key(|&i| self.kept[i].0.len())?;
        let used = self.kept.remove(at);
        let found = (used.1, used.0.len());
        self.kept.push(used);
        Some(found)
    }

    /// Returns whether a prefix with exactly these tokens is kept.
    pub fn has(&self, tokens: &[u32]) -> bool {
        self.kept.iter().any(|(kept, _)| kept == tokens)
    }

    /// Keeps a prefix. Returns the sequence of the prefix that was removed for it.
    pub fn keep(&mut self, tokens: &[u32], seq: SeqId) -> Option<SeqId> {
        let dropped = (self.kept.len() == self.most).then(|| self.drop_oldest(None)).flatten();
        self.kept.push((tokens.to_vec(), seq));
        dropped
    }

    /// Removes the least recently used prefix. Removes `last` only if there is no other.
    pub fn drop_oldest(&mut self, last: Option<SeqId>) -> Option<SeqId> {
        let at = self.kept.iter().position(|(_, seq)| Some(*seq) != last).unwrap_or(0);
        (at < self.kept.len()).then(|| self.kept.remove(at).1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_prefix_is_found_and_the_least_used_one_goes() {
        let mut prefixes = Prefixes::new(2);
        assert_eq!(prefixes.keep(&[1, 2], 10), None);
        assert_eq!(prefixes.keep(&[1, 2, 3, 4], 11), None);
        assert_eq!(prefixes.find(&[1, 2, 3, 4, 5]), Some((11, 4)));
        // At least one token must remain to be fed.
        assert_eq!(prefixes.find(&[1, 2, 3, 4]), Some((10, 2)));
        assert_eq!(prefixes.find(&[2, 1]), None);
        assert_eq!(prefixes.keep(&[7], 12), Some(11));
        assert!(prefixes.has(&[7]) && !prefixes.has(&[1, 2, 3, 4]));
        assert_eq!(prefixes.drop_oldest(Some(10)), Some(12));
        assert_eq!(prefixes.drop_oldest(Some(10)), Some(10));
        assert_eq!(prefixes.drop_oldest(Some(10)), None);
    }
}
