#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| base_models_fuzz::safetensors(data));
