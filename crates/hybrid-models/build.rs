//! With feature `cuda`, compiles kernels/*.cu for compute capabilities 8.0 and 9.0, with PTX for newer ones.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    cuda::compile();
}

#[cfg(feature = "cuda")]
mod cuda {
    use std::path::{Path, PathBuf};
    use std::process::Command;

    /// sm_90a is 9.0 with its own instructions, for the kernels that have another way without them.
    const TARGETS: [&str; 3] = [
        "arch=compute_80,code=sm_80",
        "arch=compute_90a,code=sm_90a",
        "arch=compute_90,code=compute_90",
    ];

    /// Bytes of shared memory and of scratch that kernels/args.cuh says.
    const SIZES: [&str; 12] = [
        "SCAN_SHARED",
        "SCAN_FEW_SHARED",
        "SSD_SHARED_64",
        "SSD_SHARED_128",
        "SSD_WGMMA_SHARED_64",
        "SSD_WGMMA_SHARED_128",
        "SSD_PACKET_64",
        "SSD_PACKET_128",
        "WKV_SHARED",
        "WKV_MAKER_SHARED",
        "WKV7_SHARED",
        "WKV7_HALF_SHARED",
    ];

    /// Writes `images.rs`, an array of the compiled kernels, and `sizes.rs`, the constants of [`SIZES`], into the folder that cargo gives.
    pub fn compile() {
        println!("cargo:rerun-if-changed=kernels");
        let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
        let args = std::fs::read_to_string("kernels/args.cuh").expect("the kernels' arguments");
        std::fs::write(out.join("sizes.rs"), SIZES.map(|name| constant(&args, name)).concat())
            .expect("room in OUT_DIR");
        let nvcc = cudaforge::CudaToolkit::detect().expect("feature `cuda` needs nvcc").nvcc_path;
        let entries = std::fs::read_dir("kernels").expect("a folder of kernels").flatten();
        let mut sources: Vec<_> = entries.map(|entry| entry.path()).collect();
        sources.retain(|path| path.extension().is_some_and(|end| end == "cu"));
        sources.sort();
        let images: String = std::thread::scope(|scope| {
            let (nvcc, out) = (&nvcc, &out);
            let mut running = Vec::new();
            for source in &sources {
                running.push(scope.spawn(move || compile_one(nvcc, source, out)));
            }
            running.into_iter().map(|image| image.join().expect("nvcc compiles")).collect()
        });
        std::fs::write(out.join("images.rs"), format!("&[{images}]")).expect("room in OUT_DIR");
    }

    fn constant(source: &str, name: &str) -> String {
        let (_, rest) = source.split_once(&format!("{name} = ")).expect(name);
        let value: String = rest.chars().take_while(char::is_ascii_digit).collect();
        format!("pub const {name}: u32 = {value};")
    }

    /// Gives the expression for the file's name and its compiled bytes.
    fn compile_one(nvcc: &Path, source: &Path, out: &Path) -> String {
        let name = source.file_stem().and_then(|name| name.to_str()).expect("a file of kernels");
        let image = out.join(name).with_extension("fatbin");
        let mut command = Command::new(nvcc);
        command.args(["-O3", "-std=c++17", "-fatbin"]);
        command.args(TARGETS.iter().flat_map(|target| ["-gencode", target]));
        command.arg("-o").arg(&image).arg(source);
        let status = command.status().expect("nvcc starts");
        assert!(status.success(), "{command:?}: {status}");
        format!("({name:?}, include_bytes!({image:?})),")
    }
}
