//! Compares a new cache with the dense one in the needle test, with a report in results/my_cache.
//!
//!     cargo run --release --example my_cache
//!
//! If only the selection of tokens is new, a `token_drop::EvictionPolicy` is shorter: `PolicyCache`
//! does the rest.

mod long_values;

use anyhow::Result;
use candle_core::DType;
use long_values::LongValues;
use longctx_core::DenseCache;
use longctx_eval::{
    Haystack, Limits, Methods, NeedleGrid, Plan, Setting, Shard, Task, report, run,
};
use longctx_examples::{model, subject::Models};

fn main() -> Result<()> {
    let models = Models::default();
    let mut methods = Methods::default();
    methods.register("dense", |setting| {
        Ok(Box::new(models.reader(setting, |spec| DenseCache::new(spec.clone(), DType::F16))?))
    });
    methods.register("mine", |setting| {
        // Any `KvCache` can be used here.
        Ok(Box::new(models.reader(setting, |spec| LongValues::cache(spec.clone()))?))
    });
    let model = model::embedded().display().to_string();
    let paper = NeedleGrid::paper(Haystack::generated(0), 7);
    let grid = NeedleGrid { lengths: vec![300, 600], depths: vec![0.2, 0.8], repeats: 1, ..paper };
    let tasks: [Box<dyn Task>; 1] = [Box::new(grid)];
    let plan = Plan {
        folder: "results/my_cache".into(),
        settings: ["dense", "mine"].map(|method| Setting::of(method, &model, 4000)).into(),
        tasks: &tasks,
        limits: Limits::default(),
        shard: Shard::WHOLE,
        seed: 0,
        strict: true,
        conditions: Default::default(),
    };
    run(&plan, &methods, &mut |_| {})?;
    for path in report::write(&plan.folder)? {
        println!("{}", path.display());
    }
    Ok(())
}
