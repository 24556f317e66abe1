//! With feature `cuda`, compiles kernels/attend.cu to PTX, which the driver finishes for the device at hand.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    compile();
}

#[cfg(feature = "cuda")]
fn compile() {
    println!("cargo:rerun-if-changed=kernels");
    let out = std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR");
    let nvcc = cudaforge::CudaToolkit::detect().expect("feature `cuda` needs nvcc").nvcc_path;
    let mut command = std::process::Command::new(nvcc);
    command.args(["-O3", "-std=c++17", "-arch=compute_80", "-ptx", "kernels/attend.cu", "-o"]);
    command.arg(std::path::Path::new(&out).join("attend.ptx"));
    let status = command.status().expect("nvcc starts");
    assert!(status.success(), "{command:?}: {status}");
}
