//! The World tokenizer against that of the `rwkv` package, on 10,000 strings of random and real
//! bytes: see `fixtures/generate.py`.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use hybrid_models::World;

fn lists(flat: &Tensor, lengths: &Tensor) -> Vec<Vec<u32>> {
    let numbers = |t: &Tensor| -> Vec<i64> { t.to_dtype(DType::I64).unwrap().to_vec1().unwrap() };
    let mut flat = numbers(flat).into_iter().map(|x| x as u32);
    numbers(lengths).into_iter().map(|n| flat.by_ref().take(n as usize).collect()).collect()
}

#[test]
fn ids_equal_those_of_the_package_and_decode_to_the_string() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/world");
    let world = World::from_file(&folder.join("vocab.txt")).unwrap();
    let expected =
        candle_core::safetensors::load(folder.join("expected.safetensors"), &Device::Cpu).unwrap();
    let strings = lists(&expected["bytes"], &expected["byte_lengths"]);
    let ids = lists(&expected["ids"], &expected["id_lengths"]);
    assert_eq!(strings.len(), 10_000);
    assert!(strings.iter().any(|s| std::str::from_utf8(&bytes(s)).is_err()));
    for (string, ids) in strings.iter().zip(&ids) {
        let string = bytes(string);
        assert_eq!(world.encode(&string).unwrap(), *ids, "{string:?}");
        assert_eq!(world.decode(ids), string);
    }
}

fn bytes(string: &[u32]) -> Vec<u8> {
    string.iter().map(|&b| b as u8).collect()
}

#[test]
fn errors_name_the_damaged_line_and_the_missing_byte() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vocab.txt");
    std::fs::write(&path, "1 'a' 1\n2 'bc' 3\n").unwrap();
    assert!(World::from_file(&path).unwrap_err().to_string().contains("line 2"));
    std::fs::write(&path, "1 'a' 1\n").unwrap();
    let message = World::from_file(&path).unwrap().encode(b"ab").unwrap_err().to_string();
    assert!(message.contains("0x62"), "{message}");
}
