//! Compiles a crate's kernels in its build script.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Machine code for compute capability 8.0 (for all of 8.x) and 9.0a, and PTX for later ones.
const TARGETS: [&str; 3] = [
    "arch=compute_80,code=sm_80",
    "arch=compute_90a,code=sm_90a",
    "arch=compute_90,code=compute_90",
];

/// The variable that limits compilation to one compute capability: 80, 86, 89 or 90. candle reads
/// the same variable.
const CAPABILITY: &str = "CUDA_COMPUTE_CAP";

/// The folder of this crate's own headers.
const INCLUDE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/include");

fn targets() -> Vec<String> {
    println!("cargo:rerun-if-env-changed={CAPABILITY}");
    match std::env::var(CAPABILITY).as_deref() {
        Err(_) => TARGETS.map(String::from).to_vec(),
        Ok("90") => vec![TARGETS[1].into()],
        Ok(other) => vec![format!("arch=compute_{other},code=sm_{other}")],
    }
}

/// Compiles `kernels/NAME.cu` for each name, in parallel processes, to the file that
/// `image!("NAME")` includes.
///
/// # Panics
/// If nvcc is missing, or a kernel does not compile. The build fails with nvcc's message.
pub fn compile(names: &[&str]) {
    println!("cargo:rerun-if-changed=kernels");
    println!("cargo:rerun-if-changed={INCLUDE}");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let nvcc = cudaforge::CudaToolkit::detect().expect("feature `cuda` needs nvcc").nvcc_path;
    let targets = targets();
    std::thread::scope(|scope| {
        for name in names {
            let (nvcc, out, targets) = (&nvcc, &out, &targets);
            scope.spawn(move || compile_one(nvcc, name, targets, out));
        }
    });
}

fn compile_one(nvcc: &Path, name: &str, targets: &[String], out: &Path) {
    let mut command = Command::new(nvcc);
    command.args(["-O3", "-std=c++17", "-fatbin", "-I", INCLUDE]);
    command.args(targets.iter().flat_map(|target| ["-gencode", target]));
    command.arg("-o").arg(out.join(name).with_extension("fatbin"));
    command.arg(Path::new("kernels").join(name).with_extension("cu"));
    let status = command.status().expect("nvcc starts");
    assert!(status.success(), "{command:?}: {status}");
}
