//! Decode steps captured in CUDA graphs.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::Arc;

use super::address;
use crate::{Batch, Error, KvCache, PreparedStep, Result, StepLists};
use candle_core::{CudaDevice, DType, Device, Tensor};
use longctx_cuda::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use longctx_cuda::cudarc::driver::{CudaGraph, CudaSlice, CudaStream, DevicePtr, result};
use longctx_cuda::{bytes_of, copy_to};

/// Graphs that are kept. The least recently used one is dropped.
const MAX_GRAPHS: usize = 64;
/// Initial size of the lists and of the workspace, in bytes.
const MEMORY: usize = 1 << 16;

/// The decode steps of a model, captured in CUDA graphs: one for each number of sequences.
///
/// The first step with a number of sequences runs as usual, and loads the kernels. The second one is
/// captured. Later ones are replayed: the caches [prepare](crate::PreparedDecode) lists, one copy
/// brings them to the device, and one launch runs the step.
pub struct DecodeGraphs {
    device: CudaDevice,
    lists: StepLists,
    on_device: CudaSlice<u8>,
    workspace: CudaSlice<u8>,
    graphs: BTreeMap<usize, Graph>,
    steps: u64,
    replayed: u64,
}

struct Graph {
    last_used: u64,
    state: State,
}

enum State {
    /// One step has run.
    Warm,
    Captured(Captured),
    /// The model's step cannot be captured.
    Refused,
}

struct Captured {
    graph: CudaGraph,
    layout: Vec<usize>,
    memory: PreparedStep,
    /// The graph's input, `[sequences]`, which it copies from the lists.
    _ids: Tensor,
    /// The graph's output, overwritten by each launch.
    logits: Tensor,
}

// SAFETY: a graph is used through `&mut DecodeGraphs` only, so by one thread at a time.
unsafe impl Send for Captured {}

/// A model's layers: from token ids `[tokens]`, u32, to logits.
pub type Forward<'a> = dyn FnMut(&mut [Box<dyn KvCache>], &Batch, &Tensor) -> Result<Tensor> + 'a;

impl DecodeGraphs {
    /// Creates an empty set of graphs.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the device is not a CUDA device.
    pub fn new(device: &Device) -> Result<Self> {
        let Device::Cuda(device) = device else {
            return Err(Error::mismatch("device of CUDA graphs", "a CUDA device", "another"));
        };
        let memory = || device.cuda_stream().alloc_zeros(MEMORY);
        Ok(Self {
            device: device.clone(),
            lists: StepLists::default(),
            on_device: memory()?,
            workspace: memory()?,
            graphs: BTreeMap::new(),
            steps: 0,
            replayed: 0,
        })
    }

    /// Returns the number of steps that were replayed.
    pub fn replayed(&self) -> u64 {
        self.replayed
    }

    /// Runs a decode step of sequences that have tokens, and returns its logits.
    ///
    /// It runs as usual if a cache has no [prepared steps](KvCache::prepared_decode) or no memory,
    /// or if `forward` cannot be captured.
    ///
    /// # Errors
    /// Those of `forward` and of the caches. Some of the caches may have advanced then.
    pub fn step(
        &mut self,
        batch: &Batch,
        ids: &[u32],
        caches: &mut [Box<dyn KvCache>],
        forward: &mut Forward<'_>,
    ) -> Result<Tensor> {
        self.steps += 1;
        let (seqs, now) = (batch.seqs().len(), self.steps);
        // Shapes and strides that candle copies to the device are kept for captured kernels.
        let device = self.device.clone();
        let _kept = device.enable_cuda_graph_htod_cache();
        let known = self.graphs.get_mut(&seqs);
        let warm = known.is_some_and(|graph| {
            graph.last_used = now;
            !matches!(graph.state, State::Refused)
        });
        let prepares = |cache: &mut Box<dyn KvCache>| {
            cache.can_append(batch) && cache.prepared_decode().is_some()
        };
        if !warm || !caches.iter_mut().all(prepares) {
            self.graphs.entry(seqs).or_insert(Graph { last_used: now, state: State::Warm });
            self.drop_oldest();
            return forward(caches, batch, &Tensor::new(ids, &Device::Cuda(device))?);
        }
        let memory = self.prepare(batch, ids, caches)?;
        if !self.has_captured(seqs, memory) {
            let captured = self.capture(&batch.with_prepared(memory), caches, forward)?;
            if let Some(logits) = captured {
                return Ok(logits);
            }
        }
        let Some(State::Captured(step)) = self.graphs.get(&seqs).map(|graph| &graph.state) else {
            return Err(Error::Unsupported("a step without a graph".into()));
        };
        step.graph.launch()?;
        self.replayed += 1;
        Ok(step.logits.copy()?)
    }

    /// Returns whether there is a graph for lists with this layout in this memory.
    fn has_captured(&self, seqs: usize, memory: PreparedStep) -> bool {
        let state = self.graphs.get(&seqs).map(|graph| &graph.state);
        matches!(state, Some(State::Captured(step))
            if step.memory == memory && step.layout == self.lists.layout())
    }

    /// Prepares all caches, and copies their lists to the device.
    fn prepare(
        &mut self,
        batch: &Batch,
        ids: &[u32],
        caches: &mut [Box<dyn KvCache>],
    ) -> Result<PreparedStep> {
        self.lists.clear();
        self.lists.push(bytes_of(ids), size_of_val(ids));
        for cache in caches {
            let unprepared = || Error::Unsupported("a prepared decode step of this cache".into());
            let cache = cache.prepared_decode().ok_or_else(unprepared)?;
            cache.prepare_decode(batch, &mut self.lists)?;
        }
        let stream = self.device.cuda_stream();
        reserve(&mut self.on_device, self.lists.bytes().len(), &stream)?;
        reserve(&mut self.workspace, self.lists.workspace(), &stream)?;
        copy_to(&stream, self.lists.bytes(), &mut self.on_device)?;
        Ok(PreparedStep {
            lists: self.on_device.device_ptr(&stream).0,
            workspace: self.workspace.device_ptr(&stream).0,
        })
    }

    /// Captures a prepared step. If that is not possible, runs the step and returns its logits.
    fn capture(
        &mut self,
        batch: &Batch,
        caches: &mut [Box<dyn KvCache>],
        forward: &mut Forward<'_>,
    ) -> Result<Option<Tensor>> {
        let (seqs, stream) = (batch.seqs().len(), self.device.cuda_stream());
        let ids = Tensor::zeros(seqs, DType::U32, &Device::Cuda(self.device.clone()))?;
        let Some(memory) = batch.prepared() else {
            return Err(Error::mismatch("batch to capture", "a prepared one", "another"));
        };
        let mut run = |caches: &mut [Box<dyn KvCache>]| {
            let (to, stream) = (address(&ids)?, stream.cu_stream());
            // SAFETY: both hold an id per sequence, and the stream orders the copy.
            unsafe { result::memcpy_dtod_async(to, memory.lists, 4 * seqs, stream) }?;
            forward(caches, batch, &ids)
        };
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        let logits = run(caches);
        let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = stream.end_capture(flags);
        let now = self.steps;
        let state = match (logits, graph) {
            (Ok(logits), Ok(Some(graph))) => {
                let layout = self.lists.layout().to_vec();
                State::Captured(Captured { graph, layout, memory, _ids: ids.clone(), logits })
            }
            _ => {
                // Errors of the capture are of no further use.
                _ = stream.context().check_err();
                self.graphs.insert(seqs, Graph { last_used: now, state: State::Refused });
                return run(caches).map(Some);
            }
        };
        self.graphs.insert(seqs, Graph { last_used: now, state });
        Ok(None)
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

/// Makes room for `bytes` bytes, and half as many more, so that the address changes rarely.
fn reserve(memory: &mut CudaSlice<u8>, bytes: usize, stream: &Arc<CudaStream>) -> Result<()> {
    if bytes > memory.len() {
        // SAFETY: lists are copied before they are read; kernels write the workspace first.
        *memory = unsafe { stream.alloc(bytes + bytes / 2) }?;
    }
    Ok(())
}
