//! Scalings of the rotary frequencies for long contexts.

use std::f64::consts::PI;

use super::positive;
use crate::{Error, Result};

/// A scaling of the rotary frequencies for contexts longer than in training.
///
/// Frequencies never change while a sequence grows, because the cached keys were rotated with them.
/// If a scaling depends on the sequence length, `length` is the longest length that will be fed.
#[derive(Debug, Clone, PartialEq, Default)]
#[non_exhaustive]
pub enum RopeScaling {
    /// No scaling.
    #[default]
    None,
    /// Positions divided by the factor (position interpolation, arXiv 2306.15595; LongChat).
    Linear(f64),
    /// Dynamic NTK-aware scaling: the base grows with the length beyond the original context.
    Dynamic {
        /// The factor by which the context is extended.
        factor: f64,
        /// The context length, in tokens, before the extension.
        original_context: usize,
        /// The longest sequence, in tokens.
        length: usize,
    },
    /// Llama 3.1's scaling: low frequencies are divided by `factor`, high ones kept, with a ramp
    /// between.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original_context / low_freq_factor` are scaled in full.
        low_freq_factor: f64,
        /// Wavelengths below `original_context / high_freq_factor` are unchanged.
        high_freq_factor: f64,
        /// The context length, in tokens, before the extension.
        original_context: usize,
    },
    /// YaRN (arXiv 2309.00071): low frequencies are divided by `factor`, high ones kept, with a
    /// ramp over the channels between.
    Yarn {
        /// The divisor of low frequencies.
        factor: f64,
        /// The context length, in tokens, before the extension.
        original_context: usize,
        /// The factor of rotated queries and keys.
        attention_factor: f64,
        /// Channels with more turns than this over the original context are unchanged.
        beta_fast: f64,
        /// Channels with fewer turns than this are scaled in full.
        beta_slow: f64,
        /// Whether the ends of the ramp are rounded to whole channels.
        truncate: bool,
    },
    /// LongRoPE (arXiv 2402.13753): each frequency is divided by its own factor.
    LongRope {
        /// The factors for sequences within the original context.
        short: Vec<f64>,
        /// The factors for longer sequences.
        long: Vec<f64>,
        /// The context length, in tokens, before the extension.
        original_context: usize,
        /// The factor of rotated queries and keys.
        attention_factor: f64,
        /// The longest sequence, in tokens.
        length: usize,
    },
}

impl RopeScaling {
    /// Returns YaRN's attention factor for an extension by `factor`, `0.1 * mscale * ln(factor) +
    /// 1`.
    pub fn yarn_attention_factor(factor: f64, mscale: f64) -> f64 {
        if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
    }

    /// Returns LongRoPE's attention factor for an extension by `factor`.
    pub fn long_rope_attention_factor(factor: f64, original_context: usize) -> f64 {
        match factor <= 1.0 {
            true => 1.0,
            false => (1.0 + factor.ln() / (original_context as f64).ln()).sqrt(),
        }
    }

    /// Returns the factor of rotated queries and keys. The model applies it, not
    /// [`Rope`](crate::Rope).
    pub fn attention_factor(&self) -> f64 {
        match self {
            Self::Yarn { attention_factor, .. } | Self::LongRope { attention_factor, .. } => {
                *attention_factor
            }
            _ => 1.0,
        }
    }

    /// Returns the scaling for sequences of at most `tokens` tokens.
    #[must_use]
    pub fn for_length(mut self, tokens: usize) -> Self {
        if let Self::Dynamic { length, .. } | Self::LongRope { length, .. } = &mut self {
            *length = tokens;
        }
        self
    }

    /// Returns the longest sequence, in tokens, for which the frequencies are valid; `None` if they
    /// are valid for any length.
    pub fn longest(&self) -> Option<usize> {
        match self {
            Self::Dynamic { original_context, length, .. } => Some(*length.max(original_context)),
            Self::LongRope { original_context, length, .. } if length <= original_context => {
                Some(*original_context)
            }
            _ => None,
        }
    }

    /// Returns radians per position, one for each pair of the `rotary_dims` channels that rotate.
    pub(super) fn frequencies(&self, theta: f64, rotary_dims: usize) -> Result<Vec<f64>> {
        positive("rope attention factor", self.attention_factor())?;
        let pairs = rotary_dims / 2;
        let plain = |theta: f64| {
            (0..pairs).map(move |i| theta.powf(-((2 * i) as f64) / rotary_dims as f64))
        };
        Ok(match self {
            Self::None => plain(theta).collect(),
            Self::Linear(factor) => {
                let factor = positive("rope factor", *factor)?;
                plain(theta).map(|frequency| frequency / factor).collect()
            }
            Self::Dynamic { factor, original_context, length } => {
                plain(dynamic_theta(theta, rotary_dims, *factor, *original_context, *length)?)
                    .collect()
            }
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let (low, high) = (*low_freq_factor, *high_freq_factor);
                positive("rope factor", *factor)?;
                positive("rope high_freq_factor - low_freq_factor", high - low)?;
                let context = *original_context as f64;
                let keep = |frequency: f64| {
                    let turns = context * frequency / (2.0 * PI);
                    ((turns - low) / (high - low)).clamp(0.0, 1.0)
                };
                plain(theta).map(|f| mix(f, keep(f), *factor)).collect()
            }
            Self::Yarn { factor, original_context, beta_fast, beta_slow, truncate, .. } => {
                positive("rope factor", *factor)?;
                let of = |turns| channel_of(turns, theta, rotary_dims, *original_context);
                let (low, high) = (of(*beta_fast)?, of(*beta_slow)?);
                let (low, high) = match truncate {
                    true => (low.floor(), high.ceil()),
                    false => (low, high),
                };
                let (low, high) = (low.max(0.0), high.min((rotary_dims - 1) as f64));
                let width = if high == low { 0.001 } else { high - low };
                let keep = |i: usize| 1.0 - ((i as f64 - low) / width).clamp(0.0, 1.0);
                plain(theta).enumerate().map(|(i, f)| mix(f, keep(i), *factor)).collect()
            }
            Self::LongRope { short, long, original_context, length, .. } => {
                let factors = if length > original_context { long } else { short };
                divide(plain(theta).collect(), factors)?
            }
        })
    }
}

/// Interpolates between the frequency (weight `keep`) and the frequency divided by the factor.
fn mix(frequency: f64, keep: f64, factor: f64) -> f64 {
    frequency * (keep + (1.0 - keep) / factor)
}

/// Returns the base for sequences of `length` tokens.
fn dynamic_theta(
    theta: f64,
    rotary_dims: usize,
    factor: f64,
    original_context: usize,
    length: usize,
) -> Result<f64> {
    if rotary_dims <= 2 {
        return Err(Error::setting("rotary_dims of a dynamic rope", "at least 4", rotary_dims));
    }
    if original_context == 0 {
        return Err(Error::setting("original context of the rope", "at least 1", 0));
    }
    positive("rope factor", factor)?;
    let times = length.max(original_context) as f64 / original_context as f64;
    let stretch = positive("dynamic stretch of the rope", factor * times - (factor - 1.0))?;
    let dims = rotary_dims as f64;
    positive("rope theta", theta * stretch.powf(dims / (dims - 2.0)))
}

/// Returns the fractional index of the pair of channels that makes `turns` turns over the original
/// context.
fn channel_of(turns: f64, theta: f64, rotary_dims: usize, original_context: usize) -> Result<f64> {
    let turns = positive("rope beta", turns)?;
    let context = positive("original context of the rope", original_context as f64)?;
    let wavelengths = positive("logarithm of rope theta", theta.ln())?;
    Ok(rotary_dims as f64 * (context / (turns * 2.0 * PI)).ln() / (2.0 * wavelengths))
}

/// Divides each frequency by its own factor.
pub(super) fn divide(mut frequencies: Vec<f64>, factors: &[f64]) -> Result<Vec<f64>> {
    if factors.len() != frequencies.len() {
        return Err(Error::mismatch("rope factors", frequencies.len(), factors.len()));
    }
    for (frequency, &factor) in frequencies.iter_mut().zip(factors) {
        *frequency /= positive("rope factor", factor)?;
    }
    Ok(frequencies)
}
