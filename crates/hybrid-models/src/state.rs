//! A recurrent model's state as a value: cloned, saved, loaded.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::path::Path;

use crate::mixer::Part;
use longctx_core::{Error, Footprint, Result};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

/// Of the file format: a safetensors file with one f32 tensor `[1, …]` per array and, in its
/// metadata, `format`, `version`, `family`, `batch` (1) and `seen`.
const FORMAT: &str = "longctx-state";
const VERSION: &str = "1";

/// All that a recurrent model remembers of a sequence.
///
/// A session goes on from it bit for bit as the session that gave it would have, also after a way through a file.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    family: String,
    seen: usize,
    /// By name ("layers.0.mixer.conv"): an array's shape and its numbers.
    arrays: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

impl State {
    pub(crate) fn new(family: &str, seen: usize) -> Self {
        Self { family: family.into(), seen, arrays: BTreeMap::new() }
    }

    /// Takes in one array of a residual block.
    pub(crate) fn insert(&mut self, block: &str, part: &Part, numbers: Vec<f32>) {
        self.arrays.insert(format!("{block}.{}", part.name), (part.shape.clone(), numbers));
    }

    /// One array of a residual block.
    pub(crate) fn array(&self, block: &str, part: &Part) -> Result<&[f32]> {
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

    /// The family of the model that it is of.
    pub fn family(&self) -> &str {
        &self.family
    }

    /// Tokens that it remembers.
    pub fn seen(&self) -> usize {
        self.seen
    }

    /// Bytes held.
    pub fn footprint(&self) -> Footprint {
        let bytes = |(_, numbers): &(_, Vec<f32>)| size_of_val(numbers.as_slice());
        Footprint { payload: self.arrays.values().map(bytes).sum(), ..Default::default() }
    }

    /// Writes a safetensors file.
    ///
    /// # Errors
    /// [`Error::File`] if it can't be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let failed = |e: safetensors::SafeTensorError| Error::file(path, e);
        let bytes: Vec<(&String, Vec<usize>, Vec<u8>)> = self
            .arrays
            .iter()
            .map(|(name, (shape, numbers))| {
                let shape = [&[1], shape.as_slice()].concat();
                (name, shape, numbers.iter().flat_map(|x| x.to_le_bytes()).collect())
            })
            .collect();
        let views = bytes
            .iter()
            .map(|(name, shape, bytes)| {
                Ok((name, TensorView::new(Dtype::F32, shape.clone(), bytes)?))
            })
            .collect::<std::result::Result<Vec<_>, _>>()
            .map_err(failed)?;
        let metadata = HashMap::from(
            [
                ("format", FORMAT.into()),
                ("version", VERSION.into()),
                ("family", self.family.clone()),
                ("batch", "1".into()),
                ("seen", self.seen.to_string()),
            ]
            .map(|(key, value): (&str, String)| (key.to_owned(), value)),
        );
        safetensors::serialize_to_file(views, Some(metadata), path).map_err(failed)
    }

    /// Reads a file that [`save`](Self::save) wrote.
    ///
    /// # Errors
    /// [`Error::File`] if it can't be read, is no saved state of one sequence, or is of another
    /// version.
    pub fn load(path: &Path) -> Result<Self> {
        let failed = |e: &dyn std::fmt::Display| Error::file(path, e);
        let buffer = std::fs::read(path).map_err(|e| failed(&e))?;
        let (_, header) = SafeTensors::read_metadata(&buffer).map_err(|e| failed(&e))?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let field = |key: &str| {
            metadata.get(key).ok_or_else(|| failed(&format!("no saved state: no field {key:?}")))
        };
        let number = |key: &str| -> Result<usize> {
            field(key)?.parse().map_err(|_| failed(&format!("field {key:?} is no number")))
        };
        if (field("format")?.as_str(), field("version")?.as_str()) != (FORMAT, VERSION) {
            let got = format!("{} version {}", field("format")?, field("version")?);
            return Err(failed(&format!("expected {FORMAT} version {VERSION}, got {got}")));
        }
        if number("batch")? != 1 {
            let got = field("batch")?;
            return Err(failed(&format!("expected the state of 1 sequence, got {got}")));
        }
        let mut state = Self::new(field("family")?, number("seen")?);
        let tensors = SafeTensors::deserialize(&buffer).map_err(|e| failed(&e))?;
        for (name, view) in tensors.iter() {
            match view.shape() {
                [1, shape @ ..] if view.dtype() == Dtype::F32 => {
                    let (numbers, _) = view.data().as_chunks::<4>();
                    let numbers = numbers.iter().map(|&b| f32::from_le_bytes(b)).collect();
                    state.arrays.insert(name.to_owned(), (shape.to_vec(), numbers));
                }
                shape => {
                    let got = format!("{:?} {shape:?}", view.dtype());
                    return Err(failed(&format!("{name:?}: expected F32 [1, …], got {got}")));
                }
            }
        }
        Ok(state)
    }
}
