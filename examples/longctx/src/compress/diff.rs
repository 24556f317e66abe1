//! A coloured diff of a prompt and its compressed text.

use longctx_core::Compressed;

const KEPT: &str = "\x1b[1;32m";
const GONE: &str = "\x1b[2;9;31m";
const PLAIN: &str = "\x1b[0m";

/// Returns the prompt with kept text in green and removed text struck through.
pub fn coloured(prompt: &str, compressed: &Compressed) -> String {
    let mut kept: Vec<_> = compressed.pieces.iter().map(|piece| piece.source.clone()).collect();
    kept.sort_by_key(|range| range.start);
    let mut out = String::new();
    let mut at = 0;
    for range in kept {
        paint(&mut out, GONE, &prompt[at..range.start]);
        paint(&mut out, KEPT, &prompt[range.clone()]);
        at = range.end;
    }
    paint(&mut out, GONE, &prompt[at..]);
    out
}

fn paint(out: &mut String, colour: &str, text: &str) {
    // Removed white space is not struck through, because it would look like text.
    let plain = text.trim().is_empty();
    let parts = if plain { ["", text, ""] } else { [colour, text, PLAIN] };
    out.extend(parts);
}
