#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kv_quant_fuzz::file(data));
