//! Models on a CUDA device against public implementations and against the CPU. Skipped, with a
//! message, if there is no device.

#[allow(dead_code)]
#[path = "models/common.rs"]
mod common;
#[path = "models/mixed.rs"]
mod mixed;

use candle_core::{DType, Device, Tensor};
use common::{Fixture, advance, distance, feed, feed_on, relative_distance, session};
use hybrid_models::{LoadOptions, Model};
use longctx_core::{CausalLm, Logits};
use mixed::mixed;

const FAMILIES: [&str; 8] =
    ["mamba", "mamba2", "mamba2_groups", "recurrent_gemma", "rwkv4", "rwkv5", "rwkv6", "rwkv7"];

fn device() -> Option<Device> {
    match Device::new_cuda(0) {
        Ok(device) => Some(device),
        Err(error) => {
            println!("skipped: no CUDA device ({error})");
            None
        }
    }
}

fn on(device: &Device, dtype: DType) -> LoadOptions {
    LoadOptions { device: device.clone(), dtype }
}

/// Returns ways to split a prompt: whole, unevenly, into single tokens.
fn cuts(length: usize) -> [Vec<usize>; 3] {
    [vec![length], vec![1, 30, 2, 33], vec![1]]
}

fn on_host(logits: Tensor) -> Tensor {
    logits.to_device(&Device::Cpu).unwrap()
}

#[test]
fn logits_equal_public_implementations() {
    let Some(device) = device() else { return };
    for name in FAMILIES {
        let fixture = Fixture::open(name);
        let model = Model::from_folder(&fixture.folder, &on(&device, DType::F32)).unwrap();
        for cuts in cuts(fixture.tokens.dim(1).unwrap()) {
            let logits = on_host(feed(&model, &fixture.tokens, &cuts));
            let error = distance(&logits, &fixture.logits);
            println!("{name}, f32, cut at {cuts:?}: off by {error:.1e}");
            assert!(error <= 1e-4, "{name} in chunks of {cuts:?}: off by {error}");
        }
    }
}

/// Returns the bounds of a family's logits in f16 and bf16: the norm of the difference divided by
/// the norm of the logits. Seen on an H100: Mamba 5.4e-3 and 4.4e-2, Mamba-2 2.9e-3 and 2.5e-2, the
/// others up to 1.9e-3 and 1.6e-2. If a layer's output nearly cancels before a norm, as in the tiny
/// Mamba, rounding errors grow: rounding only the inputs of its products to bf16 already costs
/// 2.7e-2.
fn bounds(family: &str) -> [(DType, f32); 2] {
    let (f16, bf16) = match family {
        "mamba" => (7e-3, 5.5e-2),
        "mamba2" | "mamba2_groups" => (4e-3, 3e-2),
        _ => (2.5e-3, 2e-2),
    };
    [(DType::F16, f16), (DType::BF16, bf16)]
}

/// Products and their inputs are in half precision here; the references are computed in f32.
#[test]
fn logits_in_half_precision_are_near() {
    let Some(device) = device() else { return };
    let norm = |x: &Tensor| x.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
    let mut far = Vec::new();
    for name in FAMILIES {
        let fixture = Fixture::open(name);
        for (dtype, bound) in bounds(name) {
            let expected = match dtype {
                DType::BF16 => &fixture.logits_of_bf16,
                _ => &fixture.logits,
            };
            let model = Model::from_folder(&fixture.folder, &on(&device, dtype)).unwrap();
            for cuts in cuts(fixture.tokens.dim(1).unwrap()) {
                let logits = on_host(feed(&model, &fixture.tokens, &cuts));
                let error = norm(&(&logits - expected).unwrap()) / norm(expected);
                let largest = distance(&logits, expected);
                let line = format!(
                    "{name}, {dtype:?}, cut at {cuts:?}: off by {error:.1e}, at most {largest:.1e}"
                );
                println!("{line}");
                if error.is_nan() || error > bound {
                    far.push(line);
                }
            }
        }
    }
    assert!(far.is_empty(), "{far:#?}");
}

/// With the head and state sizes of published models, which have their own kernels.
#[test]
fn a_stack_of_all_mixers_equals_the_host() {
    let Some(device) = device() else { return };
    let (config, tensors) = mixed(256, 64);
    let load = |options: &LoadOptions| {
        Model::from_tensors(Some(&config.to_string()), tensors.clone(), options).unwrap()
    };
    let ids: Vec<u32> = (0..2 * 700).map(|i| (i * i * 7 + i * 3) % 50).collect();
    let ids = Tensor::from_vec(ids, (2, 700), &Device::Cpu).unwrap();
    for (dtype, bound) in [(DType::F32, 1e-4), (DType::F16, 1e-3), (DType::BF16, 1e-2)] {
        let want = feed(&load(&on(&Device::Cpu, dtype)), &ids, &[700]);
        let model = load(&on(&device, dtype));
        for cuts in [&[700][..], &[500, 1, 40]] {
            let error = relative_distance(&on_host(feed(&model, &ids, cuts)), &want);
            println!(
                "all mixers, {dtype:?}, cut at {cuts:?}: off by {error:.1e} of the largest logit"
            );
            assert!(error <= bound, "{dtype:?}, cut at {cuts:?}: off by {error}");
        }
    }
}

#[test]
fn a_state_moves_between_the_host_and_the_device() {
    let Some(device) = device() else { return };
    for name in FAMILIES.into_iter().filter(|&name| name != "recurrent_gemma") {
        let fixture = Fixture::open(name);
        let length = fixture.tokens.dim(1).unwrap();
        let places = [Device::Cpu, device.clone()];
        let models =
            places.map(|to| Model::from_folder(&fixture.folder, &on(&to, DType::F32)).unwrap());
        for (from, to) in [(0, 1), (1, 0)] {
            let (mut first, mut second) = (session(&models[from]), session(&models[to]));
            feed_on(&mut first, &fixture.tokens.narrow(1, 0, 40).unwrap(), &[37, 1]);
            for seq in 0..fixture.tokens.dim(0).unwrap() as u64 {
                let state = first.state(seq).unwrap();
                second.restore(seq, &state).unwrap();
                assert_eq!(second.state(seq).unwrap(), state);
            }
            assert_eq!(second.footprint(), first.footprint());
            let rest = fixture.tokens.narrow(1, 40, length - 40).unwrap();
            let logits = on_host(feed_on(&mut second, &rest, &[7]));
            let want = fixture.logits.narrow(1, 40, length - 40).unwrap();
            let error = distance(&logits, &want);
            assert!(error <= 1e-4, "{name}, from place {from} to {to}: off by {error}");
        }
    }
}

/// On a device, recurrent layers process a prompt in blocks of 4,096 rows; here with two sequences.
#[test]
fn long_prompts_and_their_pieces_leave_the_same_state() {
    let Some(device) = device() else { return };
    for name in FAMILIES.into_iter().filter(|&name| name != "mamba2_groups") {
        let fixture = Fixture::open(name);
        let ids: Vec<u32> = (0..2 * 5000).map(|i| i * 7 % 96).collect();
        let rows: Vec<&[u32]> = ids.chunks(5000).collect();
        let last = |place: &Device, cut: usize| {
            let model = Model::from_folder(&fixture.folder, &on(place, DType::F32)).unwrap();
            let mut session = session(&model);
            let mut logits = None;
            for start in (0..5000).step_by(cut) {
                let piece = start..5000.min(start + cut);
                let parts = [(0, &rows[0][piece.clone()]), (1, &rows[1][piece])];
                logits = Some(advance(&mut session, &parts, Logits::Last).unwrap());
            }
            on_host(logits.unwrap())
        };
        let want = last(&Device::Cpu, 5000);
        for cut in [5000, 333] {
            let error = relative_distance(&last(&device, cut), &want);
            println!(
                "{name}, 5,000 tokens in pieces of {cut}: off by {error:.1e} of the largest logit"
            );
            assert!(error <= common::SAME, "{name}, pieces of {cut}: off by {error}");
        }
    }
}

/// Prompts and single tokens in one batch, forks, and snapshots, against the same on the host.
#[test]
fn many_sequences_equal_the_host() {
    let Some(device) = device() else { return };
    let (config, tensors) = mixed(256, 64);
    let stack = |place: &Device| {
        let options = on(place, DType::F32);
        Model::from_tensors(Some(&config.to_string()), tensors.clone(), &options).unwrap()
    };
    let family = |name: &str, place: &Device| {
        Model::from_folder(&Fixture::open(name).folder, &on(place, DType::F32)).unwrap()
    };
    let ids: Vec<u32> = (0..300).map(|i| (i * i * 7 + i * 3) % 50).collect();
    let run = |model: &Model| {
        let mut session = session(model).with_snapshots(32, 4).unwrap();
        let mut logits = Vec::new();
        let mut step = |session: &mut hybrid_models::Session, parts: &[(u64, &[u32])]| {
            logits.push(on_host(advance(session, parts, Logits::All).unwrap()));
        };
        step(&mut session, &[(0, &ids[..100]), (1, &ids[100..101]), (2, &ids[..7])]);
        step(&mut session, &[(1, &ids[101..102]), (3, &ids[200..]), (2, &ids[7..8])]);
        session.fork(0, 4).unwrap();
        for i in 0..4 {
            let token = &ids[100 + i..101 + i];
            step(&mut session, &[(0, token), (1, token), (2, token), (4, &ids[i..i + 1])]);
        }
        session.remove(1);
        session.truncate(0, 96).unwrap();
        step(&mut session, &[(4, &ids[..1]), (0, &ids[96..97]), (2, &ids[5..6])]);
        Tensor::cat(&logits, 0).unwrap()
    };
    for name in FAMILIES.into_iter().chain(["mixed"]) {
        let [host, other] = [&Device::Cpu, &device].map(|place| match name {
            "mixed" => run(&stack(place)),
            _ => run(&family(name, place)),
        });
        let error = relative_distance(&other, &host);
        println!("{name}: off by {error:.1e} of the largest logit");
        assert!(error <= common::SAME, "{name}: off by {error}");
    }
}

/// Decode steps replayed from CUDA graphs have the logits of plain ones, bit for bit.
#[test]
fn replayed_steps_equal_plain_ones() {
    let Some(device) = device() else { return };
    let ids: Vec<u32> = (0..60).map(|i| (i * i * 7 + i * 3) % 50).collect();
    for name in FAMILIES {
        let options = on(&device, DType::F16);
        let model = Model::from_folder(&Fixture::open(name).folder, &options).unwrap();
        let run = |mut session: hybrid_models::Session| {
            let mut logits = Vec::new();
            let mut step = |session: &mut hybrid_models::Session, parts: &[(u64, &[u32])]| {
                let rows = on_host(advance(session, parts, Logits::Last).unwrap());
                logits.push(rows.to_vec2::<f32>().unwrap());
            };
            step(&mut session, &[(0, &ids[..40]), (1, &ids[7..24])]);
            for i in 0..12 {
                step(&mut session, &[(0, &ids[i..i + 1]), (1, &ids[40 - i..41 - i])]);
            }
            session.fork(0, 2).unwrap();
            for i in 0..6 {
                let token = &ids[20 + i..21 + i];
                step(&mut session, &[(0, token), (1, &ids[i..i + 1]), (2, token)]);
            }
            (logits, session.replayed_steps())
        };
        let (want, _) = run(session(&model));
        let (got, replayed) = run(session(&model).with_cuda_graphs(64).unwrap());
        println!("{name}: {replayed} of 18 steps replayed");
        assert!(got == want, "{name}");
    }
}

#[test]
fn wrong_tokens_are_named_on_the_device_too() {
    let Some(device) = device() else { return };
    let fixture = Fixture::open("mamba");
    let model = Model::from_folder(&fixture.folder, &on(&device, DType::F16)).unwrap();
    let mut session = session(&model);
    assert!(session.device().is_cuda());
    let message = advance(&mut session, &[(0, &[1, 96])], Logits::Last).unwrap_err().to_string();
    assert!(message.contains("token id 1 of the batch"), "{message}");
    let refused = Model::from_folder(&fixture.folder, &on(&device, DType::U8)).unwrap_err();
    assert!(refused.to_string().contains("dtype"), "{refused}");
}
