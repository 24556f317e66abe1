#![doc = include_str!("../README.md")]
#![cfg(feature = "cuda")]
#![allow(unsafe_code)]

mod argmax;
mod matvec;
mod merge;
pub mod paged;
mod post_attention;
mod prefill;
mod rms_norm;
mod rope;
mod silu_mul;
mod skinny_gemm;
mod tensor_map;
mod top;

pub use argmax::{ArgmaxArgs, argmax};
pub use longctx_cuda::{self, Error, Result};
pub use matvec::{MAX_ROWS, MatVecArgs, matvec};
pub use merge::{MergeArgs, merge_states};
pub use post_attention::{PostAttentionArgs, has_post_attention, post_attention};
pub use prefill::{Half, PAGE, PrefillArgs, has_prefill, prefill};
pub use rms_norm::{RmsNormArgs, rms_norm};
pub use rope::{RopeArgs, RopeTensor, rope};
pub use silu_mul::{SiluMulArgs, silu_mul};
pub use skinny_gemm::{MAX_SKINNY_ROWS, SkinnyGemmArgs, has_skinny_gemm, skinny_gemm};
pub use top::{TopRow, top};
