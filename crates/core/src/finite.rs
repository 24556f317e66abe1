//! Checks that a CPU tensor holds only finite numbers, also after conversion to another dtype.

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
    if finite {
        return Ok(());
    }
    let (value, position) = first(x, x)?;
    Err(Error::NotFinite { what: name.into(), value, position })
}

/// Converts `x` `[tokens, heads, channels]` to `dtype`. On devices other than the CPU the numbers
/// are not checked.
///
/// # Errors
/// [`Error::Mismatch`] naming the first number that `dtype` cannot represent.
pub fn convert(name: &str, x: &Tensor, dtype: DType) -> Result<Tensor> {
    let converted = x.to_dtype(dtype)?;
    if x.dtype() == dtype || check(name, &converted).is_ok() {
        return Ok(converted);
    }
    let (value, position) = first(&converted, x)?;
    let expected = format!("a number within the range of {}", dtype.as_str());
    Err(Error::mismatch(format!("{name} at {position}"), expected, value))
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

/// Finds the first number of `x` that is not finite. Returns the number at the same position of
/// `of`, and the position.
fn first(x: &Tensor, of: &Tensor) -> Result<(f32, String)> {
    let (_, heads, channels) = x.dims3()?;
    let numbers = |x: &Tensor| x.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
    let at = numbers(x)?.iter().position(|x| !x.is_finite()).unwrap_or(0);
    let (row, channel) = (at / channels, at % channels);
    let position = format!("token {}, head {}, channel {channel}", row / heads, row % heads);
    Ok((numbers(of)?[at], position))
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

    #[test]
    fn names_the_first_number_beyond_a_dtype() {
        let mut numbers = vec![-65504f32; 3 * 2 * 4];
        let convert = |numbers: &[f32], dtype: DType| {
            convert("k", &Tensor::from_slice(numbers, (3, 2, 4), &Device::Cpu).unwrap(), dtype)
        };
        assert_eq!(convert(&numbers, DType::F16).unwrap().dtype(), DType::F16);
        numbers[13] = 1e5;
        let error = convert(&numbers, DType::F16).unwrap_err().to_string();
        let place = "k at token 1, head 1, channel 1";
        assert_eq!(
            error,
            format!("{place}: expected a number within the range of f16, got 100000")
        );
        assert!(convert(&numbers, DType::BF16).is_ok() && convert(&numbers, DType::F32).is_ok());
    }
}
