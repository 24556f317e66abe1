//! Random configurations against transformers: see `fixtures/make_configs.py`.

use std::fs;
use std::path::Path;

use candle_core::{DType, Device};
use hybrid_models::{LoadOptions, Model};

use crate::common::{distance, feed};

#[test]
#[ignore = "needs the folder of fixtures/make_configs.py"]
fn random_configurations_give_the_logits_of_transformers_or_are_refused() {
    let folder = std::env::var_os("LONGCTX_CONFIGS").expect("LONGCTX_CONFIGS names a folder");
    let (mut equal, mut refused, mut different, mut largest) = (0, 0, 0, 0f32);
    for entry in fs::read_dir(Path::new(&folder)).unwrap() {
        let folder = entry.unwrap().path();
        let model = match Model::from_folder(&folder, &LoadOptions::default()) {
            Ok(model) => model,
            Err(e) => {
                println!("{}: {e}", folder.display());
                refused += 1;
                continue;
            }
        };
        let file = folder.join("expected.safetensors");
        let expected = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
        let tokens = expected["tokens"].to_dtype(DType::U32).unwrap();
        for cuts in [vec![40], vec![1, 7, 13]] {
            let error = distance(&feed(&model, &tokens, &cuts), &expected["logits"]);
            largest = largest.max(error);
            if error.is_nan() || error > 1e-4 {
                println!("{} in chunks of {cuts:?}: off by {error}", folder.display());
                different += 1;
            }
        }
        equal += 1;
    }
    println!("{equal} opened (largest difference {largest:e}), {refused} refused");
    assert_eq!(different, 0);
    assert!(equal >= 100);
}
