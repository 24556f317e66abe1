//! Compiles kernels/*.cu if the feature `cuda` is enabled.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    longctx_cuda::build::compile(&[
        "attend2",
        "attend3",
        "attend4",
        "attend8",
        "pack",
        "float8",
        "rotated",
        "turboquant",
        "kvarn",
        "kvarn64",
    ]);
}
