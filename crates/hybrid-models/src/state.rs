//! The state of a recurrent model as a value that can be cloned, saved and loaded.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::path::Path;

use crate::mixer::StateArray;
use crc32fast::Hasher;
use longctx_core::{Error, Footprint, Result};
use safetensors::tensor::{Dtype, SafeTensorError, SafeTensors, TensorView};

/// The name of the file format: a safetensors file with one f32 tensor `[1, …]` per array. Its
/// metadata has `format`, `version`, `family`, `batch` (1), `seen` and `check`, a CRC-32 of
/// everything else.
const FORMAT: &str = "longctx-state";
const VERSION: &str = "2";
/// The version without `check`, which can still be read.
const UNCHECKED: &str = "1";

/// The state of a sequence of a recurrent model.
///
/// A session continues from it bit for bit like the session that it was taken from, also after
/// saving and loading.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    family: String,
    seen: usize,
    /// By name ("layers.0.mixer.conv"): the shape and the elements of an array.
    arrays: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

impl State {
    pub(crate) fn new(family: &str, seen: usize) -> Self {
        Self { family: family.into(), seen, arrays: BTreeMap::new() }
    }

    /// Adds one array of a residual layer.
    pub(crate) fn insert(&mut self, block: &str, part: &StateArray, numbers: Vec<f32>) {
        self.arrays.insert(format!("{block}.{}", part.name), (part.shape.clone(), numbers));
    }

    /// Returns one array of a residual layer.
    pub(crate) fn array(&self, block: &str, part: &StateArray) -> Result<&[f32]> {
        let name = format!("{block}.{}", part.name);
        let mismatch = |got: String| {
            let expected = format!("{:?}", part.shape);
            Error::mismatch(format!("array {name:?} of the state"), expected, got)
        };
        match self.arrays.get(&name) {
            Some((shape, numbers)) if *shape == part.shape => Ok(numbers),
            Some((shape, _)) => Err(mismatch(format!("{shape:?}"))),
            None => Err(mismatch("nothing".into())),
        }
    }

    pub(crate) fn check_family(&self, family: &str) -> Result<()> {
        match self.family == family {
            true => Ok(()),
            false => Err(Error::mismatch("family of the state", family, &self.family)),
        }
    }

    /// Returns the family of its model.
    pub fn model_type(&self) -> &str {
        &self.family
    }

    /// Returns the number of tokens seen.
    pub fn seen(&self) -> usize {
        self.seen
    }

    /// Returns the bytes held.
    pub fn footprint(&self) -> Footprint {
        let bytes = |(_, numbers): &(_, Vec<f32>)| size_of_val(numbers.as_slice());
        Footprint { payload: self.arrays.values().map(bytes).sum(), ..Default::default() }
    }

    /// Writes a safetensors file.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        std::fs::write(path, self.to_bytes()?).map_err(|e| Error::file(path, e))
    }

    /// Reads a file that [`save`](Self::save) wrote.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be read, is not a saved state, has another version, or was
    /// modified.
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| Error::file(path, e))?;
        Self::decode(&bytes).map_err(|reason| Error::file(path, reason))
    }

    /// Returns the bytes of the file that [`save`](Self::save) writes.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if arrays are too large for the format.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let bytes: Vec<(&String, Vec<usize>, Vec<u8>)> = self
            .arrays
            .iter()
            .map(|(name, (shape, numbers))| {
                let shape = [&[1], shape.as_slice()].concat();
                (name, shape, numbers.iter().flat_map(|x| x.to_le_bytes()).collect())
            })
            .collect();
        let metadata = HashMap::from(
            [
                ("format", FORMAT.into()),
                ("version", VERSION.into()),
                ("family", self.family.clone()),
                ("batch", "1".into()),
                ("seen", self.seen.to_string()),
                ("check", self.check().to_string()),
            ]
            .map(|(key, value): (&str, String)| (key.to_owned(), value)),
        );
        let views = bytes.iter().map(|(name, shape, bytes)| {
            Ok((name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes)?))
        });
        let views = views.collect::<Result<Vec<_>, SafeTensorError>>();
        let file = views.and_then(|views| safetensors::serialize(views, Some(metadata)));
        file.map_err(|e| Error::Unsupported(format!("saving a state: {e}")))
    }

    /// Reads a state from the bytes of a file.
    ///
    /// # Errors
    /// [`Error::Mismatch`] as [`load`](Self::load).
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        Self::decode(bytes).map_err(|reason| Error::mismatch("saved state", "a whole file", reason))
    }

    fn decode(bytes: &[u8]) -> Result<Self, String> {
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| e.to_string())?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let field = |key: &str| {
            metadata.get(key).ok_or_else(|| format!("no saved state: no field {key:?}"))
        };
        let number = |key: &str| -> Result<usize, String> {
            field(key)?.parse().map_err(|_| format!("field {key:?} is no number"))
        };
        let is_checked = match (field("format")?.as_str(), field("version")?.as_str()) {
            (FORMAT, VERSION) => true,
            (FORMAT, UNCHECKED) => false,
            (format, version) => {
                let got = format!("got {format} version {version}");
                return Err(format!("expected {FORMAT} version {UNCHECKED} or {VERSION}, {got}"));
            }
        };
        if number("batch")? != 1 {
            return Err(format!("expected the state of 1 sequence, got {}", field("batch")?));
        }
        let mut state = Self::new(field("family")?, number("seen")?);
        let tensors = SafeTensors::deserialize(bytes).map_err(|e| e.to_string())?;
        for (name, view) in tensors.iter() {
            match view.shape() {
                [1, shape @ ..] if view.dtype() == Dtype::F32 => {
                    let (numbers, _) = view.data().as_chunks::<4>();
                    let numbers = numbers.iter().map(|&b| f32::from_le_bytes(b)).collect();
                    state.arrays.insert(name.to_owned(), (shape.to_vec(), numbers));
                }
                shape => {
                    let got = format!("{:?} {shape:?}", view.dtype());
                    return Err(format!("{name:?}: expected F32 [1, …], got {got}"));
                }
            }
        }
        match is_checked && number("check")? != state.check() as usize {
            true => Err("the checksum is another: the file was changed or damaged".into()),
            false => Ok(state),
        }
    }

    /// Returns the CRC-32 of the whole state, including names and shapes.
    fn check(&self) -> u32 {
        let mut hasher = Hasher::new();
        hasher.update(format!("{}\01 {}\0", self.family, self.seen).as_bytes());
        for (name, (shape, numbers)) in &self.arrays {
            hasher.update(name.as_bytes());
            hasher.update(format!("\0{shape:?}").as_bytes());
            numbers.iter().for_each(|x| hasher.update(&x.to_le_bytes()));
        }
        hasher.finalize()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> State {
        let mut state = State::new("mamba", 77);
        let numbers = |count: usize| (0..count).map(|i| i as f32 * 0.37 - 1.0).collect();
        state.insert("layers.0.mixer", &StateArray::new("conv", &[3]), numbers(3));
        state.insert("layers.1.mixer", &StateArray::new("ssm", &[2, 2]), numbers(4));
        state
    }

    #[test]
    fn flipped_bits_are_errors() {
        let (state, whole) = (state(), state().to_bytes().unwrap());
        let mut refused = 0;
        for bit in 0..8 * whole.len() {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            match State::from_bytes(&bytes) {
                // The bit is in the padding of the header.
                Ok(read) => assert_eq!(read, state, "bit {bit}"),
                Err(_) => refused += 1,
            }
        }
        assert!(refused > 7 * whole.len(), "{refused} of {} bits", 8 * whole.len());
    }

    #[test]
    fn version_1_is_still_read_and_others_are_named() {
        let (state, whole) = (state(), state().to_bytes().unwrap());
        let version = |digit: &str| {
            let field = b"\"version\":\"2";
            let at = whole.windows(field.len()).position(|part| part == field).unwrap();
            let mut bytes = whole.clone();
            bytes[at + field.len() - 1] = digit.as_bytes()[0];
            State::from_bytes(&bytes).map_err(|e| e.to_string())
        };
        assert_eq!(version("1").unwrap(), state);
        let error = version("3").unwrap_err();
        assert!(error.contains("version 1 or 2") && error.contains("version 3"), "{error}");
    }
}
