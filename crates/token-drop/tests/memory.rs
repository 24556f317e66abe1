//! Memory is freed, and footprints equal the held bytes: both checked against the allocator.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicIsize, Ordering};

use candle_core::DType;
use common::*;
use longctx_core::{DenseStore, KvCache};
use token_drop::*;

/// The system allocator, counting the allocated bytes.
struct Counting;

static LIVE: AtomicIsize = AtomicIsize::new(0);

// SAFETY: every call goes to the system allocator unchanged; counting touches no memory of the
// caller.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size() as isize, Ordering::Relaxed);
        // SAFETY: the caller meets the requirements of the system allocator.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size() as isize, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const PROMPT: usize = 2000;
const BUDGET: usize = 250;

type Made = Box<dyn Fn() -> Box<dyn KvCache>>;

/// Returns every cache of the crate, and whether it drops anything.
fn caches() -> Vec<(&'static str, bool, Made)> {
    let mut all: Vec<(_, _, Made)> = Vec::new();
    for (name, make) in methods::<DenseStore>() {
        let made = move || -> Box<dyn KvCache> {
            Box::new(make(spec(), store(DType::F16), Budget::Tokens(BUDGET)).unwrap())
        };
        all.push((name, true, Box::new(made)));
    }
    let streaming = || StreamingLlm::new(spec(), store(DType::F16), 4, BUDGET - 4).unwrap();
    all.push(("streaming-llm", true, Box::new(move || Box::new(streaming()))));
    let quest = || Quest::new(spec(), store(DType::F16), BUDGET).unwrap();
    all.push(("quest", false, Box::new(move || Box::new(quest()))));
    let sizes = InfLlmSettings { local: 128, block: 32, chunk: 64, ..Default::default() };
    let inf_llm = move || InfLlm::new(spec(), store(DType::F16), store(DType::F16), sizes).unwrap();
    all.push(("infllm", false, Box::new(move || Box::new(inf_llm()))));
    all
}

#[test]
fn the_footprint_equals_the_allocated_bytes() {
    let prompt = Input::random(PROMPT);
    let decoded: Vec<_> = (0..40).map(|_| Input::random(1)).collect();
    let feed = |made: &Made| {
        let mut cache = made();
        prompt.feed(&mut cache, 0).unwrap();
        decoded.iter().for_each(|token| drop(token.feed(&mut cache, 0).unwrap()));
        cache
    };
    // 2 x 32 channels of f16 for each of 2 kv heads.
    let dense = (PROMPT * KV_HEADS * 2 * DIM * 2) as isize;
    for (name, drops, made) in caches() {
        // Threads allocate memory for their work on first use and keep it.
        drop(feed(&made));
        let before = LIVE.load(Ordering::Relaxed);
        let cache = feed(&made);
        let allocated = LIVE.load(Ordering::Relaxed) - before;
        let said = cache.footprint().total() as isize;
        assert!(
            (allocated - said).abs() <= said / 20 + 4096,
            "{name}: {allocated} bytes allocated, the footprint says {said}"
        );
        // An eighth is kept. Pools hold whole slabs, and StreamingLLM's sinks have their own.
        assert!(!drops || allocated < dense / 3, "{name}: {allocated} bytes of {dense}");
    }
}
