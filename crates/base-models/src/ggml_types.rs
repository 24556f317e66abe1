//! ggml's tensor types by number.

use candle_core::quantized::GgmlDType;

/// Returns ggml's name of a type, the weights per block, the bytes per block, and candle's type if
/// products are supported.
pub(crate) fn tensor_type(id: u32) -> (&'static str, usize, usize, Option<GgmlDType>) {
    let known = |name, dtype: GgmlDType| (name, dtype.block_size(), dtype.type_size(), Some(dtype));
    let name = match id {
        0 => return known("F32", GgmlDType::F32),
        1 => return known("F16", GgmlDType::F16),
        2 => return known("Q4_0", GgmlDType::Q4_0),
        3 => return known("Q4_1", GgmlDType::Q4_1),
        6 => return known("Q5_0", GgmlDType::Q5_0),
        7 => return known("Q5_1", GgmlDType::Q5_1),
        8 => return known("Q8_0", GgmlDType::Q8_0),
        10 => return known("Q2_K", GgmlDType::Q2K),
        11 => return known("Q3_K", GgmlDType::Q3K),
        12 => return known("Q4_K", GgmlDType::Q4K),
        13 => return known("Q5_K", GgmlDType::Q5K),
        14 => return known("Q6_K", GgmlDType::Q6K),
        30 => return known("BF16", GgmlDType::BF16),
        4 => "Q4_2",
        5 => "Q4_3",
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        31 => "Q4_0_4_4",
        32 => "Q4_0_4_8",
        33 => "Q4_0_8_8",
        34 => "TQ1_0",
        35 => "TQ2_0",
        36 => "IQ4_NL_4_4",
        37 => "IQ4_NL_4_8",
        38 => "IQ4_NL_8_8",
        39 => "MXFP4",
        40 => "NVFP4",
        41 => "Q1_0",
        42 => "Q2_0",
        _ => "unknown to this reader",
    };
    (name, 1, 1, None)
}
