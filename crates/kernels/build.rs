//! Compiles kernels/*.cu if the feature `cuda` is enabled.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    longctx_cuda::build::compile(&[
        "argmax",
        "matvec",
        "merge",
        "paged",
        "post_attention",
        "prefill",
        "rms_norm",
        "rope",
        "silu_mul",
        "skinny_gemm",
        "top",
    ]);
}
