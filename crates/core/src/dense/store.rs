use super::pages::Pages;
use super::rows::Rows;
use crate::attention::{self, Element};
use crate::{AttentionShape, Error, Footprint, KvStore, Partial, Result, Selection, Visible};
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};

/// Keys and values as they are, in f32, f16 or bf16.
///
/// On the CPU each kv head has pages of its own, so that growing moves nothing and heads may hold different entries. On
/// other devices there is one tensor for all heads, which then keep equally many entries.
#[derive(Debug)]
pub struct DenseStore {
    shape: AttentionShape,
    dtype: DType,
    batch: usize,
    held: Held,
}

#[derive(Debug)]
enum Held {
    Nothing,
    F32(Vec<Pages<f32>>),
    F16(Vec<Pages<f16>>),
    BF16(Vec<Pages<bf16>>),
    OnDevice(Rows),
}

impl DenseStore {
    /// An empty store that will hold `dtype`.
    ///
    /// # Errors
    /// [`Error::Setting`] unless `dtype` is f32, f16 or bf16.
    pub fn new(shape: AttentionShape, dtype: DType) -> Result<Self> {
        if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
            return Err(Error::setting("dtype", "f32, f16 or bf16", dtype.as_str()));
        }
        Ok(Self { shape, dtype, batch: 0, held: Held::Nothing })
    }

    /// The format of what is held.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    fn allocate(&mut self, batch: usize, k: &Tensor) -> Result<()> {
        let (heads, d) = (batch * self.shape.kv_heads, self.shape.head_dim);
        self.batch = batch;
        self.held = match (k.device(), self.dtype) {
            (Device::Cpu, DType::F16) => Held::F16(vec![Pages::new(d); heads]),
            (Device::Cpu, DType::BF16) => Held::BF16(vec![Pages::new(d); heads]),
            (Device::Cpu, _) => Held::F32(vec![Pages::new(d); heads]),
            _ => Held::OnDevice(Rows::new(&k.to_dtype(self.dtype)?)?),
        };
        Ok(())
    }

    fn check_head(&self, batch: usize, kv_head: usize) -> Result<usize> {
        if batch >= self.batch || kv_head >= self.shape.kv_heads {
            let expected = format!("one of {} x {}", self.batch, self.shape.kv_heads);
            return Err(Error::mismatch("kv head", expected, format!("{batch}, {kv_head}")));
        }
        Ok(batch * self.shape.kv_heads + kv_head)
    }
}

impl KvStore for DenseStore {
    fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<()> {
        let (batch, _) = self.shape.check_kv(k, v)?;
        if matches!(self.held, Held::Nothing) {
            self.allocate(batch, k)?;
        }
        if batch != self.batch {
            return Err(Error::mismatch("batch", self.batch, batch));
        }
        let (k, v) = (k.to_dtype(self.dtype)?.contiguous()?, v.to_dtype(self.dtype)?.contiguous()?);
        match &mut self.held {
            Held::Nothing => {}
            Held::F32(heads) => append_pages(heads, &k, &v)?,
            Held::F16(heads) => append_pages(heads, &k, &v)?,
            Held::BF16(heads) => append_pages(heads, &k, &v)?,
            Held::OnDevice(rows) => rows.append(&k, &v)?,
        }
        Ok(())
    }

    fn attend(&self, q: &Tensor, visible: Visible) -> Result<Partial> {
        match &self.held {
            Held::Nothing => Err(Error::mismatch("store", "entries to attend over", "none")),
            Held::F32(heads) => attention::attend_pages(q, &pages(heads), &self.shape, visible),
            Held::F16(heads) => attention::attend_pages(q, &pages(heads), &self.shape, visible),
            Held::BF16(heads) => attention::attend_pages(q, &pages(heads), &self.shape, visible),
            Held::OnDevice(rows) => {
                let (k, v) = rows.held()?;
                attention::attend(q, &k, &v, &self.shape, visible)
            }
        }
    }

    fn mass(&self, q: &Tensor, lse: &Tensor, visible: Visible) -> Result<Vec<Vec<f32>>> {
        match &self.held {
            Held::Nothing => Err(Error::mismatch("store", "entries to attend over", "none")),
            Held::F32(heads) => attention::mass_pages(q, lse, &pages(heads), &self.shape, visible),
            Held::F16(heads) => attention::mass_pages(q, lse, &pages(heads), &self.shape, visible),
            Held::BF16(heads) => attention::mass_pages(q, lse, &pages(heads), &self.shape, visible),
            Held::OnDevice(rows) => attention::mass(q, &rows.held()?.0, lse, &self.shape, visible),
        }
    }

    fn retain(&mut self, keep: &Selection) -> Result<()> {
        keep.check(&self.lens())?;
        match &mut self.held {
            Held::Nothing => {}
            Held::F32(heads) => retain_pages(heads, keep),
            Held::F16(heads) => retain_pages(heads, keep),
            Held::BF16(heads) => retain_pages(heads, keep),
            Held::OnDevice(rows) => {
                let (k, v) = rows.held()?;
                rows.replace(gather(&k, keep)?, gather(&v, keep)?)?;
            }
        }
        Ok(())
    }

    fn read(&self, batch: usize, kv_head: usize) -> Result<(Tensor, Tensor)> {
        let head = self.check_head(batch, kv_head)?;
        let d = self.shape.head_dim;
        match &self.held {
            Held::Nothing => Err(Error::mismatch("store", "entries to read", "none")),
            Held::F32(heads) => read_pages(&heads[head], d),
            Held::F16(heads) => read_pages(&heads[head], d),
            Held::BF16(heads) => read_pages(&heads[head], d),
            Held::OnDevice(rows) => {
                let (k, v) = rows.held()?;
                let of = |x: Tensor| x.get(batch)?.get(kv_head)?.to_dtype(DType::F32);
                Ok((of(k)?, of(v)?))
            }
        }
    }

    fn lens(&self) -> Vec<usize> {
        match &self.held {
            Held::Nothing => Vec::new(),
            Held::F32(heads) => heads.iter().map(Pages::len).collect(),
            Held::F16(heads) => heads.iter().map(Pages::len).collect(),
            Held::BF16(heads) => heads.iter().map(Pages::len).collect(),
            Held::OnDevice(rows) => vec![rows.len(); self.batch * self.shape.kv_heads],
        }
    }

    fn shape(&self) -> &AttentionShape {
        &self.shape
    }

    fn footprint(&self) -> Footprint {
        match &self.held {
            Held::Nothing => Footprint::default(),
            Held::F32(heads) => footprint(heads),
            Held::F16(heads) => footprint(heads),
            Held::BF16(heads) => footprint(heads),
            Held::OnDevice(rows) => {
                let (payload, slack) = rows.bytes();
                Footprint { payload, slack, ..Default::default() }
            }
        }
    }

    fn reset(&mut self) {
        self.batch = 0;
        self.held = Held::Nothing;
    }
}

fn append_pages<T: Element>(heads: &mut [Pages<T>], k: &Tensor, v: &Tensor) -> Result<()> {
    let size = (k.elem_count() / heads.len()).max(1);
    attention::with_slice::<T, _>(k, |k| {
        attention::with_slice::<T, _>(v, |v| {
            for ((head, k), v) in heads.iter_mut().zip(k.chunks(size)).zip(v.chunks(size)) {
                head.append(k, v);
            }
            Ok(())
        })
    })
}

fn pages<T: Element>(heads: &[Pages<T>]) -> Vec<Vec<attention::Page<'_, T>>> {
    heads.iter().map(Pages::pages).collect()
}

fn retain_pages<T: Element>(heads: &mut [Pages<T>], keep: &Selection) {
    heads.iter_mut().zip(keep.heads()).for_each(|(head, keep)| head.retain(keep));
}

fn read_pages<T: Element>(head: &Pages<T>, head_dim: usize) -> Result<(Tensor, Tensor)> {
    let (mut keys, mut values, mut scratch) = (Vec::new(), Vec::new(), Vec::new());
    for page in head.pages() {
        keys.extend_from_slice(T::widen(page.keys, &mut scratch));
        values.extend_from_slice(T::widen(page.values, &mut scratch));
    }
    let tensor = |x| Tensor::from_vec(x, (head.len(), head_dim), &Device::Cpu);
    Ok((tensor(keys)?, tensor(values)?))
}

fn footprint<T: Element>(heads: &[Pages<T>]) -> Footprint {
    let of = |head: &Pages<T>| {
        let (payload, slack) = head.bytes();
        Footprint { payload, slack, ..Default::default() }
    };
    heads.iter().map(of).sum()
}

/// The selected entries of `[batch, kv_heads, entries, head_dim]`; every head must keep equally many.
fn gather(x: &Tensor, keep: &Selection) -> Result<Tensor> {
    let (batch, kv_heads, len, d) = x.dims4()?;
    let count = keep.heads()[0].len();
    if keep.heads().iter().any(|head| head.len() != count) {
        let what = "heads that keep different numbers of entries in a dense store outside the CPU";
        return Err(Error::Unsupported(what.into()));
    }
    let rows: Vec<u32> = (0..)
        .zip(keep.heads())
        .flat_map(|(head, keep)| keep.iter().map(move |entry| head * len as u32 + entry))
        .collect();
    let rows = Tensor::new(rows, x.device())?;
    let flat = x.contiguous()?.reshape((batch * kv_heads * len, d))?;
    Ok(flat.index_select(&rows, 0)?.reshape((batch, kv_heads, count, d))?)
}
