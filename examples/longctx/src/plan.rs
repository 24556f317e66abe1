//! Computes how many tokens and sequences fit in a given memory under each method, from counted
//! bytes.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use base_models::Config;
use candle_core::{Device, Tensor};
use comfy_table::{CellAlignment, Table, presets};
use longctx_core::{AttentionShape, Batch, KvCache, LayerSpec, Rope, RopeScaling, Step};
use longctx_examples::methods::{Method, listed};
use longctx_examples::output::number;
use longctx_examples::say;

use crate::MAX_COUNT;

#[derive(clap::Args)]
pub struct Args {
    /// The model: a config.json, a folder with one, or a GGUF file, whose header is read
    #[arg(long)]
    model: PathBuf,
    /// Memory for weights and caches, such as 80GiB or 24GB
    #[arg(long, value_parser = bytes)]
    memory: u64,
    /// Size of the weights, such as 16GB; by default the size of the model's files
    #[arg(long, value_parser = bytes)]
    weights: Option<u64>,
    /// Tokens of each sequence
    #[arg(long, default_value_t = 32768, value_parser = number::<1, MAX_COUNT>)]
    context: usize,
    /// Names of methods; by default all methods that hold keys and values
    #[arg(long, value_delimiter = ',')]
    settings: Vec<String>,
}

/// A layer's bytes are counted at this number of tokens and at half of it. If the layer's window is
/// shorter, it replaces the number.
const COUNTED: usize = 2048;

/// The largest number of channels of a layer's keys whose bytes are counted, more than any model
/// has.
const MAX_CHANNELS: usize = 1 << 17;

/// Bytes of one sequence in a layer: a fixed part, and a part that grows with its tokens up to the
/// window.
#[derive(Debug, Clone, Copy)]
struct Growth {
    fixed: f64,
    per_token: f64,
    window: Option<usize>,
    layers: usize,
}

impl Growth {
    fn of(self, tokens: usize) -> f64 {
        let tokens = tokens.min(self.window.unwrap_or(usize::MAX));
        (self.fixed + self.per_token * tokens as f64) * self.layers as f64
    }
}

/// Returns the bytes of a sequence in all layers.
fn held(layers: &[Growth], tokens: usize) -> f64 {
    layers.iter().map(|layer| layer.of(tokens)).sum()
}

/// Returns the largest number of tokens of a sequence in `room` bytes; `None` if there is no limit.
fn max_tokens(layers: &[Growth], room: f64) -> Option<usize> {
    const NO_END: usize = 1 << 50;
    let (mut low, mut high) = (0, NO_END);
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        if held(layers, middle) <= room { low = middle } else { high = middle - 1 }
    }
    (low < NO_END).then_some(low)
}

pub fn plan(args: Args) -> Result<()> {
    let (config, files) = read(&args.model)?;
    let channels = config.kv_heads.saturating_mul(config.head_dim);
    ensure!(
        channels <= MAX_CHANNELS,
        "{}: expected at most {MAX_CHANNELS} channels of keys in a layer, got {channels}",
        args.model.display()
    );
    let weights = args.weights.unwrap_or(files);
    ensure!(
        args.memory > weights,
        "the weights take {weights} bytes of {}: nothing is left",
        args.memory
    );
    let room = (args.memory - weights) as f64;
    let methods: Vec<Method> = match args.settings.as_slice() {
        [] => listed().collect(),
        names => names.iter().map(|name| Method::named(name)).collect::<Result<_>>()?,
    };
    let dense = growth(&Method::named("dense-f16")?, &config)?;
    say!(
        "{} with {} layers, {} kv heads of {}; {:.2} GB for weights, {:.2} GB for caches.",
        config.family,
        config.layers,
        config.kv_heads,
        config.head_dim,
        weights as f64 / 1e9,
        room / 1e9
    );
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    let sequences = format!("sequences of {}", args.context);
    table.set_header(["setting", "bytes per token", "ratio", "tokens of one sequence", &sequences]);
    for method in methods {
        let own = match growth(&method, &config) {
            Ok(own) => own,
            Err(error) => {
                table.add_row([method.name(), &format!("{error:#}")]);
                continue;
            }
        };
        let bytes = held(&own, args.context);
        let whole = |x: f64| format!("{x:.0}");
        table.add_row([
            method.name().to_owned(),
            whole(bytes / args.context as f64),
            format!("{:.2}", held(&dense, args.context) / bytes),
            max_tokens(&own, room).map_or_else(|| "unlimited".into(), |most| most.to_string()),
            whole((room / bytes).floor()),
        ]);
    }
    (1..5)
        .filter_map(|i| table.column_mut(i).map(|c| c.set_cell_alignment(CellAlignment::Right)))
        .for_each(drop);
    say!("{table}");
    say!(
        "Bytes are counted on layers with {} and {COUNTED} tokens and extrapolated linearly.",
        COUNTED / 2
    );
    Ok(())
}

/// Returns the model's configuration and the bytes of its weight files.
fn read(model: &Path) -> Result<(Config, u64)> {
    let size = |path: &Path| fs::metadata(path).map(|data| data.len()).unwrap_or(0);
    let extension = |path: &Path, wanted: &str| path.extension().is_some_and(|own| own == wanted);
    if model.is_dir() {
        let files = fs::read_dir(model).with_context(|| model.display().to_string())?;
        let weights = files.flatten().map(|file| file.path());
        let weights =
            weights.filter(|path| extension(path, "safetensors") || extension(path, "bin"));
        return Ok((Config::from_folder(model)?, weights.map(|path| size(&path)).sum()));
    }
    if extension(model, "gguf") {
        return Ok((Config::from_gguf(model)?, size(model)));
    }
    if extension(model, "json") {
        return Ok((Config::from_file(model)?, 0));
    }
    bail!("{}: expected a config.json, a folder with one, or a GGUF file", model.display())
}

/// Counts bytes on one layer per window size. For layers without a window it is the middle one,
/// where budgets that differ by layer have their mean.
fn growth(method: &Method, config: &Config) -> Result<Vec<Growth>> {
    let windows: BTreeSet<Option<usize>> = (0..config.layers).map(|i| window(config, i)).collect();
    windows.into_iter().map(|window| layer(method, config, window)).collect()
}

fn window(config: &Config, layer: usize) -> Option<usize> {
    config.windows.get(layer).copied().flatten()
}

fn layer(method: &Method, config: &Config, own: Option<usize>) -> Result<Growth> {
    let layers = (0..config.layers).filter(|&i| window(config, i) == own).count();
    // Query heads do not affect the bytes, so there are as many as kv heads.
    let shape = AttentionShape::new(config.kv_heads, config.kv_heads, config.head_dim)?;
    // A latent is the last part of a key; the part before it is rotated.
    let value_dim = config.latent.map_or(config.head_dim, |latent| latent.rank);
    let rotated = config.latent.map_or(config.head_dim, |latent| latent.rotated);
    let shape = AttentionShape { window: own, value_dim, ..shape };
    // The parameters of the rotary embedding do not affect the bytes.
    let rope = Rope::new(config.head_dim, rotated, 10_000.0, RopeScaling::None)?;
    let spec = LayerSpec::new(shape).with_rope(Arc::new(rope)).at(config.layers / 2, config.layers);
    let spec = if config.latent.is_some() { spec.with_latent()? } else { spec };
    let count = |tokens: usize| -> Result<f64> {
        let mut cache = method.cache(&spec)?;
        let size = (tokens, config.kv_heads, config.head_dim);
        let random = || Tensor::randn(0f32, 1., size, &Device::Cpu);
        let (q, k) = (random()?, random()?);
        let v = match config.latent {
            Some(latent) => k.narrow(2, latent.rotated, latent.rank)?,
            None => random()?,
        };
        cache.attend(&Step { batch: &Batch::single(0, tokens)?, q: &q, k: &k, v: &v })?;
        let held = cache.footprint();
        Ok((held.total() - held.slack) as f64)
    };
    let long = COUNTED.min(own.unwrap_or(COUNTED)).max(2);
    let (less, more) = (count(long / 2)?, count(long)?);
    let per_token = (more - less) / (long - long / 2) as f64;
    let fixed = less - per_token * (long / 2) as f64;
    Ok(Growth { fixed, per_token, window: own, layers })
}

fn bytes(text: &str) -> Result<u64, String> {
    let wrong = || format!("expected a size like 80GiB or 24GB, got {text:?}");
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (count, unit) = text.split_at(split);
    let count: f64 = count.parse().map_err(|_| wrong())?;
    let unit = match unit.trim() {
        "" | "B" => 1.0,
        "MB" => 1e6,
        "GB" => 1e9,
        "TB" => 1e12,
        "MiB" => 1_048_576.0,
        "GiB" => 1_073_741_824.0,
        "TiB" => 1_099_511_627_776.0,
        _ => return Err(wrong()),
    };
    Ok((count * unit) as u64)
}
