//! With feature `cuda`, compiles kernels/*.cu for compute capabilities 8.0 and 9.0a, with PTX for
//! all others.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    cuda::compile();
}

#[cfg(feature = "cuda")]
mod cuda {
    use std::path::{Path, PathBuf};
    use std::process::Command;

    const NAMES: [&str; 2] = ["paged", "prefill"];
    const TARGETS: [&str; 2] =
        ["arch=compute_80,code=[sm_80,compute_80]", "arch=compute_90a,code=sm_90a"];

    pub fn compile() {
        println!("cargo:rerun-if-changed=kernels");
        let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
        let nvcc = cudaforge::CudaToolkit::detect().expect("feature `cuda` needs nvcc").nvcc_path;
        std::thread::scope(|scope| {
            for name in NAMES {
                let (nvcc, out) = (&nvcc, &out);
                scope.spawn(move || compile_one(nvcc, name, out));
            }
        });
    }

    fn compile_one(nvcc: &Path, name: &str, out: &Path) {
        let mut command = Command::new(nvcc);
        command.args(["-O3", "-std=c++17", "-fatbin"]);
        command.args(TARGETS.iter().flat_map(|target| ["-gencode", target]));
        command.arg("-o").arg(out.join(format!("{name}.fatbin")));
        command.arg(format!("kernels/{name}.cu"));
        let status = command.status().expect("nvcc starts");
        assert!(status.success(), "{command:?}: {status}");
    }
}
