//! Decode steps captured in CUDA graphs.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::Arc;

use super::after_step::{Launch, SideStreams};
use super::{Scratch, address};
use crate::{Batch, Error, KvCache, PreparedDecode, PreparedStep, Result, StepLists};
use candle_core::{CudaDevice, DType, Device, Shape, Tensor};
use longctx_cuda::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use longctx_cuda::cudarc::driver::{CudaGraph, CudaSlice, CudaStream, DevicePtr, result};
use longctx_cuda::{Staging, bytes_of};

/// Graphs that are kept. The least recently used one is dropped.
const MAX_GRAPHS: usize = 64;
/// Initial size of the lists and of the workspace, in bytes.
const MEMORY: usize = 1 << 16;

/// The decode steps of a model, captured in CUDA graphs: one for each number of sequences.
///
/// The first step with a number of sequences launches its kernels one by one, which loads them. The
/// second one is captured. Later ones are replayed: the caches [prepare](crate::PreparedDecode)
/// lists, one copy brings them to the device, and one launch runs the step.
///
/// Kernels that are launched one by one start while the host makes the lists of later layers. A
/// graph starts after all lists have been made. So graphs are for few sequences, whose lists are
/// short.
///
/// candle's device has another stream on each thread. A step may run on another thread than the last
/// one: it [waits](Self::wait) for the launches that the last one left. Other calls of the caches,
/// such as forks and truncations, do not wait. Make them on the thread of the last step.
pub struct DecodeGraphs {
    device: CudaDevice,
    max_seqs: usize,
    lists: StepLists,
    staging: Staging,
    on_device: CudaSlice<u8>,
    workspace: CudaSlice<u8>,
    reserved: CudaSlice<u8>,
    side: SideStreams,
    graphs: BTreeMap<usize, Graph>,
    steps: u64,
    replayed: u64,
    incomplete: bool,
}

/// The graph of a number of sequences.
struct Graph {
    last_used: u64,
    layout: Vec<usize>,
    memory: PreparedStep,
    state: State,
}

enum State {
    /// A step with this layout has run, and had logits of this shape and so many intermediate results.
    Ready(Shape, DType, Scratch),
    Captured(Captured),
    /// The model's step cannot be captured.
    Refused,
}

struct Captured {
    graph: CudaGraph,
    /// The launches at the end of the step.
    end: Option<CudaGraph>,
    /// The graph's input, `[sequences]`, which it copies from the lists.
    _ids: Tensor,
    /// The graph's intermediate results.
    _scratch: Scratch,
    /// The graph's output, overwritten by each launch. A graph frees all memory that it allocates,
    /// so this is allocated outside.
    logits: Tensor,
}

// SAFETY: a graph is used through `&mut DecodeGraphs` only, so by one thread at a time.
unsafe impl Send for Captured {}

/// A model's layers: from token ids `[tokens]`, u32, to logits.
pub type Forward<'a> = dyn FnMut(&mut [Box<dyn KvCache>], &Batch, &Tensor) -> Result<Tensor> + 'a;

impl DecodeGraphs {
    /// Creates an empty set of graphs for steps of at most `max_seqs` sequences.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the device is not a CUDA device.
    pub fn new(device: &Device, max_seqs: usize) -> Result<Self> {
        let Device::Cuda(device) = device else {
            let got = format!("{:?}", device.location());
            return Err(Error::mismatch("device of CUDA graphs", "a CUDA device", got));
        };
        let memory = || device.cuda_stream().alloc_zeros(MEMORY);
        Ok(Self {
            device: device.clone(),
            max_seqs,
            lists: StepLists::default(),
            // A step's copy can run while the next step's lists are made.
            staging: Staging::new(2),
            on_device: memory()?,
            workspace: memory()?,
            reserved: memory()?,
            side: SideStreams::new(&device.cuda_stream())?,
            graphs: BTreeMap::new(),
            steps: 0,
            replayed: 0,
            incomplete: false,
        })
    }

    /// Returns the number of steps that were replayed.
    pub fn replayed(&self) -> u64 {
        self.replayed
    }

    /// Returns whether the last step failed after the caches had counted its tokens, and forgets
    /// it. Entries of its sequences may be missing then, so the caller must remove or poison them;
    /// truncating them does not suffice. Until this call all steps are refused.
    pub fn take_incomplete(&mut self) -> bool {
        std::mem::take(&mut self.incomplete)
    }

    /// Makes later work of this thread on the device wait for the launches that the last step left.
    /// The thread of the last step waits without this call.
    ///
    /// # Errors
    /// Errors of the driver.
    pub fn wait(&self) -> Result<()> {
        self.side.join()
    }

    /// Runs a decode step of sequences that have tokens, and returns what `read` returns for its
    /// logits. `states`: device addresses that `forward` uses besides the caches, and that can differ
    /// between steps.
    ///
    /// Launches that only the next step waits for, such as evictions, follow those of `read`. If `read`
    /// starts to [choose tokens](crate::Greedy::start), the host can wait for them while the device
    /// evicts. A panic in `read` leaves the step [incomplete](Self::take_incomplete).
    ///
    /// The step runs as usual if it has too many sequences, or several tokens of a sequence, if a
    /// cache has no [prepared steps](KvCache::prepared_decode) or no memory, or if `forward` cannot
    /// be captured.
    ///
    /// # Errors
    /// [`Error::Mismatch`] unless there is an id for each token, and after an incomplete step, as long
    /// as [`take_incomplete`](Self::take_incomplete) has not been called: nothing has changed then.
    /// Those of `forward` and of the caches: some of the caches may have advanced then, which
    /// `take_incomplete` tells.
    pub fn step<T>(
        &mut self,
        batch: &Batch,
        ids: &[u32],
        caches: &mut [Box<dyn KvCache>],
        states: &[u64],
        forward: &mut Forward<'_>,
        read: impl FnOnce(Tensor) -> T,
    ) -> Result<T> {
        if ids.len() != batch.tokens() {
            return Err(Error::mismatch("token ids of a decode step", batch.tokens(), ids.len()));
        }
        if self.incomplete {
            let expected = "a complete one, or `take_incomplete` after it";
            return Err(Error::mismatch("last decode step", expected, "an incomplete one"));
        }
        self.wait()?;
        let seqs = batch.seqs().len();
        let refused = self.graphs.get(&seqs).is_some_and(|of| matches!(of.state, State::Refused));
        let layers = match seqs > self.max_seqs || batch.max_seqlen() > 1 || refused {
            true => None,
            false => caches.iter_mut().map(|cache| prepares(cache, batch)).collect(),
        };
        let Some(layers) = layers else {
            return Ok(read(forward(caches, batch, &ids_on(&self.device, ids)?)?));
        };
        let memory = self.prepare(batch, ids, layers, states)?;
        // SAFETY: all caches have prepared this batch. The memory has the sizes of the lists, and the
        // next step reuses or frees it after the launches of this one, in the order of the stream.
        let prepared = unsafe { batch.with_prepared(memory) };
        let (logits, end) = self.run(&prepared, ids, memory, caches, forward)?;
        let out = read(logits);
        match (end, self.captured_end(seqs)) {
            (Some(launches), _) => self.side.run(launches)?,
            (None, Some(graph)) => self.side.run_graph(graph)?,
            (None, None) => {}
        }
        self.incomplete = false;
        Ok(out)
    }

    /// Runs a prepared step. Returns its logits and the launches at its end; `None` if these are
    /// captured.
    fn run(
        &mut self,
        batch: &Batch,
        ids: &[u32],
        memory: PreparedStep,
        caches: &mut [Box<dyn KvCache>],
        forward: &mut Forward<'_>,
    ) -> Result<(Tensor, Option<Vec<Launch>>)> {
        let seqs = batch.seqs().len();
        self.steps += 1;
        let known = self.graphs.get_mut(&seqs);
        let equal = |of: &&mut Graph| of.memory == memory && of.layout == self.lists.layout();
        let Some(known) = known.filter(equal) else {
            let ids = ids_on(&self.device, ids)?;
            // Shapes and strides that candle copies to the device are kept for the capture.
            let _kept = self.device.enable_cuda_graph_htod_cache();
            let counting = Scratch::default();
            let (launched, scratch) = counting.during(|| launch(batch, &ids, caches, forward));
            let (logits, end) = launched?;
            let (last_used, layout) = (self.steps, self.lists.layout().to_vec());
            let state = State::Ready(logits.shape().clone(), logits.dtype(), scratch);
            self.graphs.insert(seqs, Graph { last_used, layout, memory, state });
            self.drop_oldest();
            return Ok((logits, end));
        };
        known.last_used = self.steps;
        if let State::Ready(shape, dtype, counted) = &known.state {
            let device = Device::Cuda(self.device.clone());
            let outputs = (Tensor::zeros(shape, *dtype, &device)?, counted.allocate(&device)?);
            known.state =
                capture((&self.device, &self.side), batch, memory, caches, forward, outputs)?;
        }
        match &known.state {
            State::Captured(step) => {
                step.graph.launch()?;
                self.replayed += 1;
                Ok((step.logits.copy()?, None))
            }
            _ => launch(batch, &ids_on(&self.device, ids)?, caches, forward),
        }
    }

    /// Returns the captured launches at the end of a step of `seqs` sequences, if there are any.
    fn captured_end(&self, seqs: usize) -> Option<&CudaGraph> {
        match &self.graphs.get(&seqs)?.state {
            State::Captured(step) => step.end.as_ref(),
            _ => None,
        }
    }

    /// Prepares the caches of all layers, and copies their lists to the device.
    fn prepare(
        &mut self,
        batch: &Batch,
        ids: &[u32],
        layers: Vec<&mut dyn PreparedDecode>,
        states: &[u64],
    ) -> Result<PreparedStep> {
        self.lists.clear();
        self.lists.push(bytes_of(ids), size_of_val(ids));
        states.iter().for_each(|&address| self.lists.push_size(address as usize));
        for cache in layers {
            // A cache that fails has changed nothing, or has poisoned its sequences.
            cache.prepare_decode(batch, &mut self.lists)?;
            self.incomplete = true;
        }
        let stream = self.device.cuda_stream();
        reserve(&mut self.on_device, self.lists.bytes().len(), &stream)?;
        reserve(&mut self.workspace, self.lists.workspace(), &stream)?;
        reserve(&mut self.reserved, self.lists.reserved(), &stream)?;
        self.staging.copy(&stream, self.lists.bytes(), &mut self.on_device)?;
        Ok(PreparedStep {
            lists: self.on_device.device_ptr(&stream).0,
            workspace: self.workspace.device_ptr(&stream).0,
            reserved: self.reserved.device_ptr(&stream).0,
        })
    }

    /// Drops the least recently used graph if there are too many.
    fn drop_oldest(&mut self) {
        if self.graphs.len() <= MAX_GRAPHS {
            return;
        }
        let oldest = self.graphs.iter().min_by_key(|(_, graph)| graph.last_used);
        if let Some(seqs) = oldest.map(|(&seqs, _)| seqs) {
            self.graphs.remove(&seqs);
        }
    }
}

/// Copies token ids to the device.
fn ids_on(device: &CudaDevice, ids: &[u32]) -> Result<Tensor> {
    Ok(Tensor::new(ids, &Device::Cuda(device.clone()))?)
}

/// Returns a cache that can prepare a step of the batch.
fn prepares<'a>(
    cache: &'a mut Box<dyn KvCache>,
    batch: &Batch,
) -> Option<&'a mut dyn PreparedDecode> {
    if cache.can_append(batch) { cache.prepared_decode(batch) } else { None }
}

/// Launches the kernels of a prepared step one by one. Returns its logits and the launches at its end.
fn launch(
    batch: &Batch,
    ids: &Tensor,
    caches: &mut [Box<dyn KvCache>],
    forward: &mut Forward<'_>,
) -> Result<(Tensor, Option<Vec<Launch>>)> {
    let (logits, end) = SideStreams::collect(batch, |batch| forward(caches, batch, ids));
    Ok((logits?, Some(end)))
}

/// Captures a prepared step, which copies its output to `logits` and has its intermediate results in
/// `scratch`. The lists start with the token ids.
fn capture(
    (device, side): (&CudaDevice, &SideStreams),
    batch: &Batch,
    memory: PreparedStep,
    caches: &mut [Box<dyn KvCache>],
    forward: &mut Forward<'_>,
    (logits, scratch): (Tensor, Scratch),
) -> Result<State> {
    let (seqs, stream) = (batch.seqs().len(), device.cuda_stream());
    let ids = Tensor::zeros(seqs, DType::U32, &Device::Cuda(device.clone()))?;
    let _kept = device.enable_cuda_graph_htod_cache();
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
    let step = |batch: &Batch| -> Result<()> {
        let (to, stream) = (address(&ids)?, stream.cu_stream());
        // SAFETY: both hold an id per sequence, and the stream orders the copy.
        unsafe { result::memcpy_dtod_async(to, memory.lists, 4 * seqs, stream) }?;
        let out = forward(caches, batch, &ids)?.contiguous()?;
        Ok(logits.slice_set(&out, 0, 0)?)
    };
    let ((done, end), scratch) = scratch.during(|| SideStreams::collect(batch, step));
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags);
    match (done, graph, side.capture(end)) {
        (Ok(()), Ok(Some(graph)), Ok(end)) => {
            Ok(State::Captured(Captured { graph, end, _ids: ids, _scratch: scratch, logits }))
        }
        _ => {
            // The step runs without a graph, so the errors of the capture are of no further use.
            _ = stream.context().check_err();
            Ok(State::Refused)
        }
    }
}

/// Makes room for `bytes` bytes, and half as many more if the device has them, so that the address
/// changes rarely.
fn reserve(memory: &mut CudaSlice<u8>, bytes: usize, stream: &Arc<CudaStream>) -> Result<()> {
    if bytes > memory.len() {
        // SAFETY: lists are copied before they are read; kernels write the workspace first.
        let alloc = |bytes| unsafe { stream.alloc(bytes) };
        *memory = alloc(bytes + bytes / 2).or_else(|_| alloc(bytes))?;
    }
    Ok(())
}
