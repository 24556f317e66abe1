//! Written here because `strsim` and `similar` measure edit distances. The crate `difflib` 0.4.0
//! differs from Python for texts of 200 characters or more: it keeps the frequent characters and
//! drops the others, the reverse of Python's rule. Its ratio is 32 bits.

use std::collections::HashMap;

/// Returns `ratio()` of Python's `difflib.SequenceMatcher(None, a, b)` over characters (Ratcliff
/// and Obershelp's measure): twice the number of characters in common blocks divided by the number
/// of all characters.
///
/// If `b` has 200 characters or more, a character that makes up more than 1% of it does not start a
/// block, as in Python ("autojunk").
pub fn ratio(a: &str, b: &str) -> f64 {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let total = a.len() + b.len();
    if total == 0 {
        return 1.0;
    }
    let mut places: HashMap<char, Vec<usize>> = HashMap::new();
    for (j, &c) in b.iter().enumerate() {
        places.entry(c).or_default().push(j);
    }
    if b.len() >= 200 {
        places.retain(|_, found| found.len() <= b.len() / 100 + 1);
    }
    let mut common = 0;
    let mut regions = vec![(0, a.len(), 0, b.len())];
    while let Some((a_from, a_to, b_from, b_to)) = regions.pop() {
        let (i, j, length) = longest_block(&a, &b, &places, (a_from, a_to, b_from, b_to));
        if length > 0 {
            common += length;
            regions.push((a_from, i, b_from, j));
            regions.push((i + length, a_to, j + length, b_to));
        }
    }
    2.0 * common as f64 / total as f64
}

/// Returns the start in `a`, the start in `b` and the length of the longest common block in a
/// region. Of equal blocks, the first in `a`, then in `b`.
fn longest_block(
    a: &[char],
    b: &[char],
    places: &HashMap<char, Vec<usize>>,
    (a_from, a_to, b_from, b_to): (usize, usize, usize, usize),
) -> (usize, usize, usize) {
    let (mut best_i, mut best_j, mut best) = (a_from, b_from, 0);
    // lengths[j]: the length of the block that ends at b[j] and the current character of a.
    let mut lengths: HashMap<usize, usize> = HashMap::new();
    for (i, c) in a.iter().enumerate().take(a_to).skip(a_from) {
        let mut next = HashMap::new();
        let found = places.get(c).map_or(&[][..], Vec::as_slice);
        for &j in found.iter().skip_while(|j| **j < b_from).take_while(|j| **j < b_to) {
            let before = if j == 0 { 0 } else { lengths.get(&(j - 1)).copied().unwrap_or(0) };
            next.insert(j, before + 1);
            if before + 1 > best {
                (best_i, best_j, best) = (i - before, j - before, before + 1);
            }
        }
        lengths = next;
    }
    // Characters too frequent to start a block may extend it.
    while best_i > a_from && best_j > b_from && a[best_i - 1] == b[best_j - 1] {
        (best_i, best_j, best) = (best_i - 1, best_j - 1, best + 1);
    }
    while best_i + best < a_to && best_j + best < b_to && a[best_i + best] == b[best_j + best] {
        best += 1;
    }
    (best_i, best_j, best)
}
