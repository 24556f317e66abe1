//! Launches at the end of a step.
#![allow(unsafe_code)]

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::{Batch, Result};
use longctx_cuda::cudarc::driver::result::stream::{self, StreamKind};
use longctx_cuda::cudarc::driver::sys::CUgraphInstantiate_flags as InstantiateFlags;
use longctx_cuda::cudarc::driver::sys::CUstreamCaptureMode as CaptureMode;
use longctx_cuda::cudarc::driver::{CudaGraph, CudaStream};
use longctx_kernels::paged::{self, EvictArgs};

pub type Launch = Box<dyn FnOnce(&Arc<CudaStream>) -> Result<()> + Send>;

/// Launches of a [prepared step](Batch::with_prepared) that only the next step waits for, such as
/// evictions. Those of a single layer do not fill the device, so they run at the end of the step,
/// several at a time.
#[derive(Default)]
pub(crate) struct AfterStep {
    work: Mutex<Work>,
}

#[derive(Default)]
struct Work {
    launches: Vec<Launch>,
    /// Evictions of one entry per head, which share a launch.
    evictions: Vec<EvictArgs>,
}

impl AfterStep {
    fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Vec<Launch> {
        let Work { mut launches, evictions } = std::mem::take(&mut *self.work());
        if !evictions.is_empty() {
            // SAFETY: the caller of `evict_after_step` guarantees the addresses.
            let launch = move |on: &_| Ok(unsafe { paged::evict(on, &evictions) }?);
            launches.push(Box::new(launch));
        }
        launches
    }
}

impl fmt::Debug for AfterStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AfterStep").finish_non_exhaustive()
    }
}

/// Calls `launch` at the end of the batch's step, with a stream that has waited for all other work of
/// the step. If the batch is not one of [`DecodeGraphs`](super::DecodeGraphs), calls it now, with the
/// stream `main`.
///
/// The launch may use only memory that lives until the end of the step: the step's lists, its
/// reserved memory, and the cache's own memory. Tensors that are made during the step may be freed
/// before the launch, and later layers overwrite the workspace.
///
/// # Errors
/// Those of `launch`, if it is called now.
pub fn after_step(
    batch: &Batch,
    main: &Arc<CudaStream>,
    launch: impl FnOnce(&Arc<CudaStream>) -> Result<()> + Send + 'static,
) -> Result<()> {
    match batch.after_step() {
        Some(after) => {
            after.work().launches.push(Box::new(launch));
            Ok(())
        }
        None => launch(main),
    }
}

/// Like [`after_step`], for an eviction of one entry per head.
///
/// # Errors
/// Those of [`paged::evict`], if it is called now.
///
/// # Safety
/// As [`paged::evict`], at the end of the batch's step.
pub unsafe fn evict_after_step(
    batch: &Batch,
    main: &Arc<CudaStream>,
    args: EvictArgs,
) -> Result<()> {
    match batch.after_step() {
        Some(after) => after.work().evictions.push(args),
        // SAFETY: guaranteed by the caller.
        None => unsafe { paged::evict(main, &[args]) }?,
    }
    Ok(())
}

/// Launches of this many layers run at a time.
const SIDE_STREAMS: usize = 8;

/// Streams beside a main one, for the launches of [`AfterStep`].
///
/// cudarc does not know that they exist. Otherwise cudarc would record an event at every use of a
/// device array.
pub struct SideStreams {
    main: Arc<CudaStream>,
    /// The others start after the first one, and the first one waits for them.
    streams: Vec<Arc<CudaStream>>,
}

impl SideStreams {
    pub fn new(main: &Arc<CudaStream>) -> Result<Self> {
        let context = main.context();
        context.bind_to_thread()?;
        let mut side = Self { main: main.clone(), streams: Vec::new() };
        for _ in 0..SIDE_STREAMS {
            let raw = stream::create(StreamKind::NonBlocking)?;
            // SAFETY: the stream belongs to this context, and is destroyed after its last use.
            side.streams.push(unsafe { context.wrap_borrowed_stream(raw) });
        }
        Ok(side)
    }

    /// Runs a step of a batch. Returns its result and the launches that it leaves to its end.
    pub fn collect<T>(batch: &Batch, step: impl FnOnce(&Batch) -> T) -> (T, Vec<Launch>) {
        let after = Arc::new(AfterStep::default());
        let done = step(&batch.with_after_step(after.clone()));
        (done, after.take())
    }

    /// Makes launches after the main stream's work so far. Its later work waits for them. Makes every
    /// launch, also after one has failed.
    pub fn run(&self, launches: Vec<Launch>) -> Result<()> {
        if launches.is_empty() {
            return Ok(());
        }
        let begun = self.streams[0].join(&self.main);
        let launched = self.spread(launches);
        self.main.join(&self.streams[0])?;
        begun?;
        launched
    }

    /// Makes the main stream wait for all launches so far. The main stream has done so on the thread
    /// that made them. But candle's stream is another one on each thread.
    pub fn join(&self) -> Result<()> {
        Ok(self.main.join(&self.streams[0])?)
    }

    /// Like [`run`](Self::run), for captured launches.
    pub fn run_graph(&self, graph: &CudaGraph) -> Result<()> {
        self.streams[0].join(&self.main)?;
        graph.launch()?;
        Ok(self.main.join(&self.streams[0])?)
    }

    /// Captures launches for [`run_graph`](Self::run_graph); `None` if there are none.
    pub fn capture(&self, launches: Vec<Launch>) -> Result<Option<CudaGraph>> {
        if launches.is_empty() {
            return Ok(None);
        }
        self.streams[0].begin_capture(CaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        let launched = self.spread(launches);
        let flags = InstantiateFlags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = self.streams[0].end_capture(flags);
        launched?;
        Ok(graph?)
    }

    /// Distributes launches over the streams.
    fn spread(&self, launches: Vec<Launch>) -> Result<()> {
        let used = &self.streams[..launches.len().min(self.streams.len())];
        let (first, others) = (&self.streams[0], &used[1..]);
        let mut done = Ok(());
        let mut note = |result: Result<()>| {
            if done.is_ok() {
                done = result;
            }
        };
        others.iter().for_each(|stream| note(stream.join(first).map_err(Into::into)));
        launches.into_iter().zip(used.iter().cycle()).for_each(|(launch, on)| note(launch(on)));
        others.iter().for_each(|stream| note(first.join(stream).map_err(Into::into)));
        done
    }
}

impl Drop for SideStreams {
    fn drop(&mut self) {
        for stream in &self.streams {
            // SAFETY: `new` created the stream, and the steps that used it have returned.
            _ = unsafe { stream::destroy(stream.cu_stream()) };
        }
    }
}
