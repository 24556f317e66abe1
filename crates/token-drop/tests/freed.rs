//! Memory is given back, and footprints say what is held: both by what the allocator says.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicIsize, Ordering};

use candle_core::DType;
use common::*;
use longctx_core::KvCache;
use token_drop::*;

/// The system's allocator, which counts the bytes that are allocated.
struct Counting;

static LIVE: AtomicIsize = AtomicIsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged; counting touches no memory of the caller's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size() as isize, Ordering::Relaxed);
        // SAFETY: the caller's promises are those that the system's allocator asks for.
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

type Make = Box<dyn Fn() -> Box<dyn KvCache>>;

/// Every cache of the crate, and whether it drops anything.
fn caches() -> Vec<(&'static str, bool, Make)> {
    let mut all: Vec<(_, _, Make)> = Vec::new();
    for (i, (name, _)) in policies().into_iter().enumerate() {
        let make = move || -> Box<dyn KvCache> {
            let policy = policies().remove(i).1;
            let allowed = budget(&policy, BUDGET);
            Box::new(PolicyCache::new(store(DType::F16), policy, allowed).unwrap())
        };
        all.push((name, true, Box::new(make)));
    }
    let streaming = || StreamingLlm::new(4, BUDGET - 4, store(DType::F16)).unwrap();
    all.push(("streaming-llm", true, Box::new(move || Box::new(streaming()))));
    let quest = || Quest::<f32>::new(BUDGET, shape()).unwrap();
    all.push(("quest", false, Box::new(move || Box::new(quest()))));
    let sizes = InfLlmSettings { local: 128, block: 32, chunk: 64, ..Default::default() };
    let inf_llm = move || InfLlm::<f32>::new(sizes, shape()).unwrap();
    all.push(("infllm", false, Box::new(move || Box::new(inf_llm()))));
    all
}

#[test]
fn what_is_held_is_what_is_allocated_and_no_more() {
    let prompt = Input::random(1, PROMPT);
    let decoded: Vec<_> = (0..40).map(|_| Input::random(1, 1)).collect();
    let feed = |make: &Make| {
        let mut cache = make();
        prompt.feed(&mut cache).unwrap();
        decoded.iter().for_each(|token| drop(token.feed(&mut cache).unwrap()));
        cache
    };
    // 2 x 32 channels of f16 for each of 2 kv heads.
    let dense = (PROMPT * KV_HEADS * 2 * DIM * 2) as isize;
    for (name, drops, make) in caches() {
        // Threads keep what they allocate for their work when they first do it.
        drop(feed(&make));
        let before = LIVE.load(Ordering::Relaxed);
        let cache = feed(&make);
        let allocated = LIVE.load(Ordering::Relaxed) - before;
        let said = cache.footprint().total() as isize;
        assert!(
            (allocated - said).abs() <= said / 20 + 4096,
            "{name}: {allocated} bytes allocated, the footprint says {said}"
        );
        assert!(!drops || allocated < dense / 4, "{name}: {allocated} bytes of {dense}");
    }
}
