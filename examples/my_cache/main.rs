//! A cache of your own beside the dense one, on the needle test: a run, and a report of it in results/my_cache.
//!
//!     cargo run --release --example my_cache

use anyhow::Result;
use candle_core::DType;
use longctx_core::{DenseCache, DenseStore, EvictionPolicy, Held, Needs};
use longctx_eval::{
    Haystack, Limits, Methods, NeedleGrid, Plan, Setting, Shard, Task, report, run,
};
use longctx_examples::{model, subject::Models};
use token_drop::{Budget, PolicyCache};

/// Keeps the tokens with the longest values.
struct LongValues;

impl EvictionPolicy for LongValues {
    fn needs(&self) -> Needs {
        Needs { values: true, ..Needs::default() }
    }

    fn score(&self, held: &Held<'_>) -> longctx_core::Result<Vec<Vec<f32>>> {
        let length = |value: &[f32]| value.iter().map(|x| x * x).sum();
        let of_head = |values: &[f32]| values.chunks(held.shape.head_dim).map(length).collect();
        Ok(held.heads.iter().map(|head| of_head(&head.values)).collect())
    }
}

fn main() -> Result<()> {
    let models = Models::default();
    let mut methods = Methods::default();
    methods.register("dense", |setting| {
        Ok(Box::new(models.reader(setting, |l| DenseCache::new(l.attention, DType::F16))?))
    });
    methods.register("mine", |setting| {
        // Any `KvCache` can stand here.
        let cache = models.reader(setting, |l| {
            let store = DenseStore::new(l.attention, DType::F16)?;
            PolicyCache::new(store, LongValues, Budget::Ratio(0.5))
        });
        Ok(Box::new(cache?))
    });
    let model = model::smollm2()?.display().to_string();
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
