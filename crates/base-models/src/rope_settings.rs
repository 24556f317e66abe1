//! The settings of a rotary embedding, read from `config.json` and from GGUF metadata.

use crate::gguf_settings::Settings;
use crate::json::Fields;
use longctx_core::{Error, Result, Rope, RopeScaling};

/// The settings of a rotary embedding.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RopeSettings {
    /// The base.
    pub theta: f64,
    /// Leading channels of a head that rotate; the others do not.
    pub rotary_dims: usize,
    /// The scaling of the frequencies.
    pub scaling: RopeScaling,
}

impl RopeSettings {
    /// Creates the embedding of heads of `head_dim` channels.
    pub(crate) fn rope(&self, head_dim: usize) -> Result<Rope> {
        Rope::new(head_dim, self.rotary_dims, self.theta, self.scaling.clone())
    }

    /// Reads the settings from `config.json`. Version 5 of `transformers` moved the base and the
    /// scaling to `rope_parameters`; a `rope_scaling` takes precedence.
    pub(crate) fn read(raw: &Fields, defaults: &RopeDefaults) -> Result<Self> {
        let scaling = raw.fields("rope_scaling")?.filter(|fields| !fields.is_empty());
        let fields = match scaling {
            Some(fields) => Some(fields),
            None => raw.fields("rope_parameters")?,
        };
        if let Some(fields) = &fields
            && (fields.has("full_attention") || fields.has("sliding_attention"))
        {
            let what = "rope parameters that differ between layers";
            return Err(Error::Unsupported(what.into()));
        }
        let top = raw.float("rope_theta")?.unwrap_or(defaults.theta);
        Self::of_fields(raw, fields.as_ref(), top, defaults)
    }

    /// Reads one object of parameters, with the base `theta` unless the object has its own.
    pub(crate) fn of_fields(
        raw: &Fields,
        fields: Option<&Fields>,
        theta: f64,
        defaults: &RopeDefaults,
    ) -> Result<Self> {
        let part = match fields.map(|f| f.float("partial_rotary_factor")).transpose()?.flatten() {
            Some(part) => Some(part),
            None => raw.float("partial_rotary_factor")?,
        };
        if let Some(part) = part.filter(|&part| part != 1.0 && !defaults.partial) {
            return Err(Error::Unsupported(format!("partial_rotary_factor {part}")));
        }
        let rotary_dims = (defaults.head_dim as f64 * part.unwrap_or(1.0)) as usize;
        let Some(fields) = fields else {
            return Ok(Self { theta, rotary_dims, scaling: RopeScaling::None });
        };
        let theta = fields.float("rope_theta")?.unwrap_or(theta);
        Ok(Self { theta, rotary_dims, scaling: scaling(raw, fields, defaults)? })
    }

    /// Reads the settings from a GGUF file.
    pub(crate) fn read_gguf(file: &Settings, head_dim: usize, context: usize) -> Result<Self> {
        Ok(Self {
            theta: file.float("rope.freq_base")?.unwrap_or(10_000.0),
            rotary_dims: file.number("rope.dimension_count")?.unwrap_or(head_dim),
            scaling: gguf_scaling(file, context)?,
        })
    }

    /// Applies LongRoPE with the factors that a GGUF file stores as tensors.
    pub(crate) fn with_long_rope(
        self,
        file: &Settings,
        context: usize,
        short: Vec<f64>,
        long: Vec<f64>,
    ) -> Result<Self> {
        let original = file.number("rope.scaling.original_context_length")?.unwrap_or(context);
        let scaling = RopeScaling::LongRope {
            short,
            long,
            original_context: original,
            attention_factor: file.float("rope.scaling.attn_factor")?.unwrap_or(1.0),
            length: context,
        };
        Ok(Self { scaling, ..self })
    }
}

/// An architecture's defaults, for fields that `config.json` lacks.
pub(crate) struct RopeDefaults {
    pub theta: f64,
    pub head_dim: usize,
    pub context: usize,
    /// Whether only a part of the channels may rotate.
    pub partial: bool,
}

/// Returns the scaling of an object of parameters.
fn scaling(raw: &Fields, fields: &Fields, defaults: &RopeDefaults) -> Result<RopeScaling> {
    let kind = match fields.text("rope_type")? {
        Some(kind) => Some(kind),
        None => fields.text("type")?,
    };
    let need = |name: &str| fields.float(name)?.ok_or_else(|| missing(name));
    let context = defaults.context;
    let name = "original_max_position_embeddings";
    let original_context = match raw.number(name)? {
        Some(original) => original,
        None => fields.number(name)?.unwrap_or(context),
    };
    let extension = context as f64 / original_context.max(1) as f64;
    Ok(match kind {
        Some("default") => RopeScaling::None,
        Some("linear") => RopeScaling::Linear(need("factor")?),
        Some("dynamic") => RopeScaling::Dynamic {
            factor: need("factor")?,
            original_context: context,
            length: context,
        },
        Some("llama3") => RopeScaling::Llama3 {
            factor: need("factor")?,
            low_freq_factor: need("low_freq_factor")?,
            high_freq_factor: need("high_freq_factor")?,
            original_context,
        },
        Some("yarn") => yarn(fields, original_context, extension)?,
        Some("longrope") => long_rope(fields, original_context, extension, context)?,
        Some(other) => {
            let known = "default, linear, dynamic, llama3, yarn, longrope";
            return Err(Error::Unsupported(format!("rope scaling {other:?} (known: {known})")));
        }
        None if fields.float("factor")?.is_some_and(|factor| factor != 1.0) => {
            let what = "rope_scaling with a factor and neither \"rope_type\" nor \"type\"";
            return Err(Error::Unsupported(what.into()));
        }
        None => RopeScaling::None,
    })
}

fn missing(name: &str) -> Error {
    Error::setting(format!("rope_scaling.{name}"), "a number", "nothing")
}

/// Returns YaRN's scaling. A `factor` of null is `extension`: the model's context divided by the
/// original one.
fn yarn(fields: &Fields, original_context: usize, extension: f64) -> Result<RopeScaling> {
    let factor = match fields.float("factor")? {
        Some(factor) => factor,
        None if fields.has("factor") => extension,
        None => return Err(missing("factor")),
    };
    let positive = |name| Ok::<_, Error>(fields.float(name)?.filter(|&x| x != 0.0));
    Ok(RopeScaling::Yarn {
        factor,
        original_context,
        attention_factor: yarn_attention_factor(fields, factor)?,
        beta_fast: positive("beta_fast")?.unwrap_or(32.0),
        beta_slow: positive("beta_slow")?.unwrap_or(1.0),
        truncate: fields.switch("truncate")?.unwrap_or(true),
    })
}

/// Returns LongRoPE's scaling for sequences of `length` tokens. Without a `factor` it is
/// `extension`.
fn long_rope(
    fields: &Fields,
    original_context: usize,
    extension: f64,
    length: usize,
) -> Result<RopeScaling> {
    let list = |name: &str| fields.floats(name)?.ok_or_else(|| missing(name));
    let factor = fields.float("factor")?.unwrap_or(extension);
    let attention_factor = fields.float("attention_factor")?;
    Ok(RopeScaling::LongRope {
        short: list("short_factor")?,
        long: list("long_factor")?,
        original_context,
        attention_factor: attention_factor
            .unwrap_or_else(|| RopeScaling::long_rope_attention_factor(factor, original_context)),
        length,
    })
}

/// Returns YaRN's attention factor from the fields `mscale` and `mscale_all_dim` of DeepSeek's
/// configurations.
fn yarn_attention_factor(fields: &Fields, factor: f64) -> Result<f64> {
    if let Some(given) = fields.float("attention_factor")? {
        return Ok(given);
    }
    let of = |mscale| RopeScaling::yarn_attention_factor(factor, mscale);
    let scale = |name| Ok::<_, Error>(fields.float(name)?.filter(|&x| x != 0.0));
    Ok(match (scale("mscale")?, scale("mscale_all_dim")?) {
        (Some(some), Some(all)) => of(some) / of(all),
        _ => of(1.0),
    })
}

/// Returns the scaling of a GGUF file. A factor without a type means linear scaling; the type
/// "none" disables the factor.
fn gguf_scaling(file: &Settings, context: usize) -> Result<RopeScaling> {
    let factor = match file.float("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => file.float("rope.scale_linear")?,
    };
    let factor = factor.filter(|&factor| factor != 0.0);
    match file.text("rope.scaling.type")? {
        // LongRoPE's factors are tensors.
        Some("longrope") => Ok(RopeScaling::None),
        kind @ (None | Some("none" | "linear")) => {
            let name = "rope.scaling.attn_factor";
            if let Some(other) = file.nonzero(name)?.filter(|&x| x != 1.0) {
                return Err(file.refuse(name, other));
            }
            Ok(match factor.filter(|&x| x != 1.0 && kind != Some("none")) {
                None => RopeScaling::None,
                Some(factor) => RopeScaling::Linear(factor),
            })
        }
        Some("yarn") => {
            let factor = factor.ok_or_else(|| file.missing("rope.scaling.factor"))?;
            let given = |name: &str| file.float(&format!("rope.scaling.{name}"));
            let times = given("yarn_attn_factor")?.or(given("attn_factor")?).unwrap_or(1.0);
            let original = file.number("rope.scaling.original_context_length")?;
            Ok(RopeScaling::Yarn {
                factor,
                original_context: original.unwrap_or(context),
                attention_factor: times * RopeScaling::yarn_attention_factor(factor, 1.0),
                beta_fast: given("yarn_beta_fast")?.unwrap_or(32.0),
                beta_slow: given("yarn_beta_slow")?.unwrap_or(1.0),
                truncate: true,
            })
        }
        Some(other) => {
            let what = format!("rope scaling {other:?} (known: none, linear, yarn, longrope)");
            Err(file.unsupported(what))
        }
    }
}
