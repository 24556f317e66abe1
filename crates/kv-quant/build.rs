//! Compiles kernels/*.cu if the feature `cuda` is enabled.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    longctx_cuda::build::compile(&[
        "attend22",
        "attend33",
        "attend44",
        "attend88",
        "attend42",
        "attend24",
        "pack",
        "float8",
        "rotated",
        "turboquant",
        "kvarn",
        "kvarn64",
    ]);
}
