//! Compiles kernels/*.cu if the feature `cuda` is enabled.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    {
        sizes::write();
        longctx_cuda::build::compile(&["conv", "rg_lru", "rows", "selective_scan", "ssd", "wkv"]);
    }
}

#[cfg(feature = "cuda")]
mod sizes {
    /// Constants of kernels/args.cuh: bytes of shared memory and of scratch.
    const NAMES: [&str; 12] = [
        "SCAN_SHARED",
        "SCAN_FEW_SHARED",
        "SSD_SHARED_64",
        "SSD_SHARED_128",
        "SSD_WGMMA_SHARED_64",
        "SSD_WGMMA_SHARED_128",
        "SSD_GROUP_TILES_64",
        "SSD_GROUP_TILES_128",
        "WKV_SHARED",
        "WKV_PRODUCER_SHARED",
        "WKV7_SHARED",
        "WKV7_HALF_SHARED",
    ];

    /// Writes `sizes.rs`, the constants of [`NAMES`], to cargo's output folder.
    pub fn write() {
        let args = std::fs::read_to_string("kernels/args.cuh").expect("the kernels' arguments");
        let out = std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR");
        let out = std::path::Path::new(&out).join("sizes.rs");
        let sizes = NAMES.map(|name| constant(&args, name)).concat();
        std::fs::write(out, sizes).expect("room in OUT_DIR");
    }

    fn constant(source: &str, name: &str) -> String {
        let (_, rest) = source.split_once(&format!("{name} = ")).expect(name);
        let value: String = rest.chars().take_while(char::is_ascii_digit).collect();
        format!("pub const {name}: u32 = {value};")
    }
}
