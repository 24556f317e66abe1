//! Checks that a CPU tensor holds only finite numbers.

use crate::{Error, Result};
use candle_core::{DType, Storage, Tensor};
use half::{bf16, f16};

/// Checks `x` `[tokens, heads, channels]` on the CPU. Tensors on other devices are not checked.
///
/// # Errors
/// [`Error::NotFinite`] naming the first number that is NaN or infinite.
pub fn check(name: &str, x: &Tensor) -> Result<()> {
    if !x.device().is_cpu() {
        return Ok(());
    }
    let finite = match x.dtype() {
        DType::F32 => all_finite::<f32>(x, |x| x.is_finite())?,
        DType::F16 => all_finite::<f16>(x, |x| x.is_finite())?,
        DType::BF16 => all_finite::<bf16>(x, |x| x.is_finite())?,
        DType::F64 => return check(name, &x.to_dtype(DType::F32)?),
        other => return Err(Error::mismatch(name, "f32, f16 or bf16", other.as_str())),
    };
    if finite { Ok(()) } else { Err(first(name, x)?) }
}

fn all_finite<T: candle_core::WithDType>(
    x: &Tensor,
    finite: impl Fn(&T) -> bool + Copy,
) -> Result<bool> {
    let (storage, layout) = x.storage_and_layout();
    let Storage::Cpu(data) = &*storage else { return Ok(true) };
    let data = data.as_slice::<T>()?;
    // A scan without early exit vectorizes.
    let all = |x: &[T]| x.iter().fold(true, |all, x| all & finite(x));
    if let Some((start, end)) = layout.contiguous_offsets() {
        return Ok(all(&data[start..end]));
    }
    // A view into a wider tensor: runs of channels, or of a token's heads.
    let (&[tokens, heads, channels], &[by_token, by_head, 1]) = (layout.dims(), layout.stride())
    else {
        drop(storage);
        return all_finite(&x.contiguous()?, finite);
    };
    let (runs, run) = if by_head == channels { (1, heads * channels) } else { (heads, channels) };
    let starts = (0..tokens).flat_map(|t| (0..runs).map(move |h| t * by_token + h * by_head));
    Ok(starts.fold(true, |before, at| before & all(&data[layout.start_offset() + at..][..run])))
}

fn first(name: &str, x: &Tensor) -> Result<Error> {
    let (_, heads, channels) = x.dims3()?;
    let numbers = x.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let at = numbers.iter().position(|x| !x.is_finite()).unwrap_or(0);
    let (row, channel) = (at / channels, at % channels);
    let position = format!("token {}, head {}, channel {channel}", row / heads, row % heads);
    Ok(Error::NotFinite { what: name.into(), value: numbers[at], position })
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn names_the_first_number_that_is_not_finite() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let mut numbers = vec![0f32; 3 * 2 * 4];
            let tensor = |numbers: &[f32]| {
                let x = Tensor::from_slice(numbers, (3, 2, 4), &Device::Cpu).unwrap();
                x.to_dtype(dtype).unwrap()
            };
            assert!(check("q", &tensor(&numbers)).is_ok());
            numbers[13] = f32::NAN;
            let error = check("q", &tensor(&numbers)).unwrap_err().to_string();
            assert_eq!(error, "q: NaN at token 1, head 1, channel 1");
            // A view that excludes the number passes; one that includes it fails.
            let x = tensor(&numbers);
            assert!(check("q", &x.narrow(1, 0, 1).unwrap()).is_ok());
            assert!(check("q", &x.narrow(1, 1, 1).unwrap()).is_err());
        }
    }
}
