//! Decode steps replayed from CUDA graphs, compared with steps that launch their kernels one by
//! one. Skipped without a CUDA device.
#![cfg(feature = "cuda")]

use base_models::{Config, LoadOptions, RopeSettings, Session, Transformer};
use candle_core::{DType, Device, Tensor};
use longctx_core::{Batch, CausalLm, Greedy, Logits, SeqId};
use longctx_examples::methods::Method;
use longctx_examples::shapes::llama_3_8b;

/// A model with Llama's layers.
fn model(device: &Device, heads: usize, head_dim: usize, windows: &[Option<usize>]) -> Transformer {
    let shape = llama_3_8b();
    let config = Config {
        vocab_size: 512,
        hidden_size: heads * head_dim,
        intermediate_size: 512,
        layers: 3,
        heads,
        kv_heads: 2,
        head_dim,
        windows: windows.to_vec(),
        rope: RopeSettings { rotary_dims: head_dim, ..shape.rope.clone() },
        ..shape
    };
    let options =
        LoadOptions { device: device.clone(), dtype: DType::F16, ..LoadOptions::default() };
    Transformer::random(config, &options).unwrap()
}

/// Feeds both sessions the same tokens. Returns the next tokens.
fn step(both: &mut [Session; 2], tokens: &[(SeqId, usize)], ids: &[u32], what: &str) -> Vec<u32> {
    let batch = Batch::new(tokens).unwrap();
    let of = |session: &mut Session| {
        let logits: Tensor = session.forward(&batch, ids, Logits::Last).unwrap();
        logits.to_vec2::<f32>().unwrap()
    };
    let [plain, graphs] = both;
    let want = of(plain);
    // The lowest index of the largest numbers, as greedy sampling returns it.
    let largest = |row: &Vec<f32>| {
        let best = row.iter().enumerate().rev().max_by(|a, b| a.1.total_cmp(b.1));
        best.map_or(0, |(token, _)| token as u32)
    };
    let next: Vec<u32> = want.iter().map(largest).collect();
    // In every second step tokens are chosen while evictions and packing run.
    if plain.seen(tokens[0].0) % 2 == 0 {
        let chosen = graphs.forward_greedy(&batch, ids, &mut Greedy::default()).unwrap();
        let chosen: Vec<u32> = chosen.into_iter().map(Result::unwrap).collect();
        assert_eq!(chosen, next, "{what}");
    } else {
        assert_eq!(of(graphs), want, "{what}");
    }
    next
}

/// Runs sequences of unequal lengths that start, fork, go back and end, over several blocks.
fn check(model: &Transformer, method: &str) {
    let named = Method::named(method).unwrap();
    let session = || model.session(|spec| named.cache(spec)).unwrap();
    let mut both = [session(), session().with_cuda_graphs(64).unwrap()];
    // KVarN's sinks are the first 128 tokens; a step is prepared once all of them have come.
    let lens = [(0, 250), (1, 161), (2, 229)];
    let total: usize = lens.iter().map(|(_, len)| len).sum();
    let ids: Vec<u32> = (0..total as u32).map(|i| i * 37 % 512).collect();
    let mut next = step(&mut both, &lens, &ids, method);
    let mut seqs: Vec<SeqId> = vec![0, 1, 2];
    let mut decoded = 0;
    for i in 0..160 {
        match i {
            40 => {
                both.iter_mut().for_each(|session| session.fork(1, 7).unwrap());
                seqs.push(7);
                next.push(11);
            }
            80 => {
                assert!(both.iter_mut().all(|session| session.remove(0)));
                seqs.remove(0);
                next.remove(0);
            }
            100 => {
                // Impossible if the last token has evicted an entry.
                let len = both[0].seen(2) - 1;
                let [plain, graphs] = both.each_mut().map(|of| of.truncate(2, len).is_ok());
                assert_eq!(plain, graphs, "{method}");
            }
            120 => {
                let tokens: Vec<u32> = (0..133).collect();
                next.extend(step(&mut both, &[(9, 133)], &tokens, method));
                seqs.push(9);
            }
            _ => {}
        }
        let batch: Vec<_> = seqs.iter().map(|&seq| (seq, 1)).collect();
        next = step(&mut both, &batch, &next, &format!("{method}, step {i}"));
        decoded += 1;
    }
    // A step with new sizes or addresses of the lists runs without a graph.
    assert!(both[1].replayed_steps() + 8 >= decoded, "{method}: {}", both[1].replayed_steps());
}

#[test]
fn replayed_steps_equal_plain_ones() {
    let Ok(device) = Device::new_cuda(0) else {
        println!("skipped: no CUDA device");
        return;
    };
    for (heads, head_dim) in [(8, 128), (4, 64)] {
        let model = model(&device, heads, head_dim, &[]);
        let formats = [
            "kivi-4",
            "kivi-2",
            "kivi-3",
            "fp8",
            "int4-rotated",
            "turboquant-3bit-nc",
            // With sinks.
            "kvarn-k4v2",
            "kivi-4-sinks",
        ];
        // Policies that evict after the prompt only, and two that evict an entry at each token.
        let policies = [
            "snap-kv-4x",
            "ada-snap-kv-4x",
            "rerotated-snap-kv-4x",
            "expected-attention-2x",
            "h2o-4x",
            "tova-4x",
        ];
        for method in ["dense-f16"].iter().chain(&formats).chain(&policies) {
            check(&model, method);
        }
    }
    // Layers with windows drop entries.
    check(&model(&device, 8, 128, &[Some(100), None, Some(60)]), "dense-f16");
}

/// Caches without prepared steps run as usual: policies that evict by other scores than attention,
/// or select, while decoding.
#[test]
fn other_caches_are_not_captured() {
    let Ok(device) = Device::new_cuda(0) else {
        println!("skipped: no CUDA device");
        return;
    };
    let model = model(&device, 8, 128, &[]);
    for method in ["lag-kv-4x", "quest-64"] {
        let named = Method::named(method).unwrap();
        let session = || model.session(|spec| named.cache(spec)).unwrap();
        let mut both = [session(), session().with_cuda_graphs(64).unwrap()];
        let ids: Vec<u32> = (0..300).collect();
        let mut next = step(&mut both, &[(0, 300)], &ids, method);
        for i in 0..4 {
            next = step(&mut both, &[(0, 1)], &next, &format!("{method}, step {i}"));
        }
        assert_eq!(both[1].replayed_steps(), 0, "{method}");
    }
}
