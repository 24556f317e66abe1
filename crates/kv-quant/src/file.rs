//! Sequences in safetensors files: a prefix cache on disk. `docs/formats.md` describes the layout.

mod header;
mod read;
mod write;

pub use read::CacheFile;
pub use write::{save, to_bytes};

/// The value of `format` in the metadata.
const FORMAT: &str = "kv-quant";
/// The version of the layout. A reader also accepts [`PLAIN`], and refuses all others.
const VERSION: &str = "2";
/// The previous version: only asymmetric integers, and no tensors of factors.
const PLAIN: &str = "1";

/// The tensors of a head: name, and whether the elements are words (u32) or f16.
const TENSORS: [(&str, bool); 11] = [
    ("keys.codes", true),
    ("keys.scales", false),
    ("keys.zeros", false),
    ("keys.factors", false),
    ("values.codes", true),
    ("values.scales", false),
    ("values.zeros", false),
    ("values.factors", false),
    ("keys.new", false),
    ("values.new", false),
    ("live", true),
];

/// Returns the name of a head's tensor.
fn name(layer: usize, head: usize, tensor: &str) -> String {
    format!("{layer}.{head}.{tensor}")
}
