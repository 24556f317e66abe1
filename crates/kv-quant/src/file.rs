//! Sequences in safetensors files: a prefix cache on disk. `docs/formats.md` has the layout.

mod header;
mod read;
mod write;

pub use read::CacheFile;
pub use write::{save, to_bytes};

/// What the metadata's `format` says.
const FORMAT: &str = "kv-quant";
/// The layout's version. A reader also takes [`PLAIN`], and refuses all others.
const VERSION: &str = "2";
/// The version before codes other than asymmetric integers, without tensors of factors.
const PLAIN: &str = "1";

/// The tensors of a head: name, and whether it holds words (u32) or halves (f16).
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

/// The name of a head's tensor.
fn name(layer: usize, head: usize, tensor: &str) -> String {
    format!("{layer}.{head}.{tensor}")
}
