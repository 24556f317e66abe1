//! What stayed and what went, in the prompt's own order.

use longctx_core::Compressed;

const KEPT: &str = "\x1b[1;32m";
const GONE: &str = "\x1b[2;9;31m";
const PLAIN: &str = "\x1b[0m";

/// The prompt with what stayed in green and what went struck through.
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
    // White space that went is left plain: struck through it would look like text.
    let plain = text.trim().is_empty();
    let parts = if plain { ["", text, ""] } else { [colour, text, PLAIN] };
    out.extend(parts);
}
