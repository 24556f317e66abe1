//! Linear maps with dense or quantized weights.

use crate::quantized::QuantizedMatrix;
use candle_core::{D, DType, Tensor};
use longctx_core::{Result, linear};

/// A linear map `y = x Wᵀ + b`; W is `[out, in]`.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
}

/// A weight matrix `[out, in]`.
#[derive(Debug, Clone)]
pub enum Weight {
    /// A float tensor.
    Dense(Tensor),
    /// A matrix in a block format of GGUF files.
    Quantized(QuantizedMatrix),
}

impl Linear {
    pub fn new(weight: Weight, bias: Option<Tensor>) -> Self {
        Self { weight, bias }
    }

    /// Maps `x` `[…, in]` to `[…, out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.add_bias(self.weight.forward(x)?)
    }

    fn add_bias(&self, y: Tensor) -> Result<Tensor> {
        Ok(match &self.bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        })
    }

    /// Returns the matrix.
    pub fn weight(&self) -> &Weight {
        &self.weight
    }

    /// Returns the matrix if it is a float tensor and there is no bias.
    pub fn unbiased(&self) -> Option<&Tensor> {
        self.weight.dense().filter(|_| self.bias.is_none())
    }
}

impl Weight {
    /// Returns a float matrix; `None` if it is quantized.
    pub fn dense(&self) -> Option<&Tensor> {
        match self {
            Weight::Dense(matrix) => Some(matrix),
            Weight::Quantized(_) => None,
        }
    }

    fn out(&self) -> Result<usize> {
        match self {
            Weight::Dense(w) => Ok(w.dims2()?.0),
            Weight::Quantized(matrix) => Ok(matrix.dims()?.0),
        }
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Weight::Quantized(matrix) => matrix.forward(x),
            Weight::Dense(w) => {
                let (out, inner) = w.dims2()?;
                let mut dims = x.dims().to_vec();
                let rows = x.elem_count() / inner.max(1);
                if let Some(last) = dims.last_mut() {
                    *last = out;
                }
                Ok(linear(&x.reshape((rows, inner))?, w)?.reshape(dims)?)
            }
        }
    }

    /// Returns rows of the matrix as embeddings: `ids` `[…]` gives `[…, in]` in `dtype`.
    pub fn embed(&self, ids: &Tensor, dtype: DType) -> Result<Tensor> {
        let rows = match self {
            Weight::Dense(w) => w.index_select(&ids.flatten_all()?, 0)?,
            Weight::Quantized(matrix) => matrix.rows(&ids.flatten_all()?)?,
        };
        let mut dims = ids.dims().to_vec();
        dims.push(rows.dim(D::Minus1)?);
        Ok(rows.to_dtype(dtype)?.reshape(dims)?)
    }
}

/// Several linear maps of one input. If their formats allow, they are computed as a single product:
/// the threads are woken and the input is read only once.
#[derive(Debug, Clone)]
pub struct FusedLinear {
    maps: Vec<Linear>,
    /// Number of outputs of each map.
    sizes: Vec<usize>,
}

impl FusedLinear {
    /// Creates the maps from a single map with the concatenated outputs.
    pub fn from_single(map: Linear, sizes: Vec<usize>) -> Self {
        Self { maps: vec![map], sizes }
    }

    pub fn new(maps: Vec<Linear>) -> Result<Self> {
        let sizes = maps.iter().map(|map| map.weight.out()).collect::<Result<_>>()?;
        let maps = match Self::stack(&maps)? {
            Some(one) => vec![one],
            None => maps,
        };
        Ok(Self { maps, sizes })
    }

    fn stack(maps: &[Linear]) -> Result<Option<Linear>> {
        let biases: Vec<_> = maps.iter().filter_map(|map| map.bias.as_ref()).collect();
        let bias = match biases.len() {
            0 => None,
            n if n == maps.len() => Some(Tensor::cat(&biases, 0)?),
            _ => return Ok(None),
        };
        let (mut dense, mut quantized) = (Vec::new(), Vec::new());
        for map in maps {
            match &map.weight {
                Weight::Dense(w) => dense.push(w),
                Weight::Quantized(m) => quantized.push(m),
            }
        }
        let weight = if quantized.is_empty() {
            Some(Weight::Dense(Tensor::cat(&dense, 0)?))
        } else if dense.is_empty() {
            QuantizedMatrix::stack(&quantized)?.map(Weight::Quantized)
        } else {
            None
        };
        Ok(weight.map(|weight| Linear { weight, bias }))
    }

    /// Returns the map, if it is a single one.
    pub fn single(&self) -> Option<&Linear> {
        match self.maps.as_slice() {
            [one] => Some(one),
            _ => None,
        }
    }

    /// Maps `x` `[tokens, in]` to one `[tokens, heads, head_dim]` per map. With a single product
    /// these are views.
    pub fn forward_heads(&self, x: &Tensor, head_dim: usize) -> Result<Vec<Tensor>> {
        match self.single() {
            Some(one) => self.finish_heads(one.weight.forward(x)?, head_dim),
            None => self.maps.iter().map(|map| heads(map.forward(x)?, head_dim)).collect(),
        }
    }

    /// As [`forward_heads`](Self::forward_heads), from the product `[tokens, out]` of `x` with the
    /// matrix of the [single](Self::single) map.
    pub fn finish_heads(&self, product: Tensor, head_dim: usize) -> Result<Vec<Tensor>> {
        let y = match self.single() {
            Some(one) => one.add_bias(product)?,
            None => product,
        };
        self.parts(&heads(y, head_dim)?, D::Minus2, head_dim)
    }

    /// Maps `x` `[…, in]` to one `[…, out]` per map.
    pub fn forward(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        match self.single() {
            Some(one) => self.parts(&one.forward(x)?, D::Minus1, 1),
            None => self.maps.iter().map(|map| map.forward(x)).collect(),
        }
    }

    /// Returns views of the outputs of each map. An index along `dim` is `unit` outputs.
    fn parts(&self, y: &Tensor, dim: D, unit: usize) -> Result<Vec<Tensor>> {
        let mut start = 0;
        let part = |&size: &usize| -> Result<Tensor> {
            start += size / unit;
            Ok(y.narrow(dim, start - size / unit, size / unit)?)
        };
        self.sizes.iter().map(part).collect()
    }
}

/// Reshapes `[tokens, channels]` to `[tokens, heads, head_dim]`.
fn heads(y: Tensor, head_dim: usize) -> Result<Tensor> {
    let (tokens, channels) = y.dims2()?;
    Ok(y.reshape((tokens, channels / head_dim, head_dim))?)
}
