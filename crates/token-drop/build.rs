//! With feature `cuda`, compiles kernels/*.cu.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    longctx_cuda::build::compile(&["lag_kv"]);
}
