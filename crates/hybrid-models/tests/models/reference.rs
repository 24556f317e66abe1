//! Logits against those of public implementations: see `fixtures/generate.py`.

use crate::common::{Fixture, distance, feed};
use candle_core::DType;

/// Checks a prompt fed whole, in uneven chunks, and token by token.
fn check(name: &str) {
    let fixture = Fixture::open(name);
    let model = fixture.model(DType::F32);
    let length = fixture.tokens.dim(1).unwrap();
    for cuts in [vec![length], vec![1, 30, 2, 33], vec![1; length]] {
        let error = distance(&feed(&model, &fixture.tokens, &cuts), &fixture.logits);
        assert!(error <= 1e-4, "{name} in chunks of {cuts:?}: off by {error}");
        println!("{name} in {} chunks: off by {error}", cuts.len());
    }
    check_half(&fixture, &[length]);
    check_half(&fixture, &[1; 200]);
}

/// Checks a bf16 checkpoint against the public implementation on the same weights, and an f16
/// checkpoint, whose weights f32 represents exactly, against the same in f32.
fn check_half(fixture: &Fixture, cuts: &[usize]) {
    let run = |stored, held| feed(&fixture.rounded(stored, held), &fixture.tokens, cuts);
    let error = distance(&run(DType::BF16, DType::BF16), &fixture.logits_of_bf16);
    assert!(error <= 1e-4, "bf16: off by {error}");
    let error = distance(&run(DType::F16, DType::F16), &run(DType::F16, DType::F32));
    assert!(error <= 1e-4, "f16: off by {error}");
}

#[test]
fn mamba() {
    check("mamba");
}

#[test]
fn mamba_with_biases() {
    check("mamba_biases");
}

#[test]
fn mamba2() {
    check("mamba2");
}

#[test]
fn mamba2_with_groups() {
    check("mamba2_groups");
}

#[test]
fn mamba2_with_biases() {
    check("mamba2_biases");
}

#[test]
fn recurrent_gemma() {
    check("recurrent_gemma");
}

#[test]
fn rwkv4() {
    check("rwkv4");
}

/// The last norm's epsilon is not that of the configuration.
#[test]
fn rwkv4_with_another_epsilon() {
    check("rwkv4_epsilon");
}

#[test]
fn rwkv5() {
    check("rwkv5");
}

#[test]
fn rwkv6() {
    check("rwkv6");
}

#[test]
fn rwkv7() {
    check("rwkv7");
}
