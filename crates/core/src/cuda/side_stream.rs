//! A second stream, for work of a step that the rest of the step does not wait for.
#![allow(unsafe_code)]

use std::sync::Arc;

use crate::{PreparedStep, Result};
use longctx_cuda::cudarc::driver::result::stream::{self, StreamKind};
use longctx_cuda::cudarc::driver::sys::CUstream;
use longctx_cuda::cudarc::driver::{CudaContext, CudaStream};

/// A stream beside a main one.
///
/// cudarc does not know that it exists. Otherwise cudarc would record an event at every use of a
/// device array.
pub struct SideStream {
    main: Arc<CudaStream>,
    stream: Arc<CudaStream>,
}

impl SideStream {
    pub fn new(main: &Arc<CudaStream>) -> Result<Self> {
        main.context().bind_to_thread()?;
        let raw = stream::create(StreamKind::NonBlocking)?;
        Ok(Self { main: main.clone(), stream: borrowed(main.context(), raw) })
    }

    /// Returns the handle for a [`PreparedStep`].
    pub fn handle(&self) -> u64 {
        self.stream.cu_stream() as u64
    }

    /// Runs a step. The stream waits for the main one before it, and the main one for the stream
    /// after it.
    pub fn beside<T>(&self, step: impl FnOnce() -> Result<T>) -> Result<T> {
        self.stream.join(&self.main)?;
        let done = step();
        let joined = self.main.join(&self.stream);
        let done = done?;
        joined?;
        Ok(done)
    }
}

impl Drop for SideStream {
    fn drop(&mut self) {
        // SAFETY: `new` created the stream, and the steps that used it have returned.
        _ = unsafe { stream::destroy(self.stream.cu_stream()) };
    }
}

/// Returns the side stream of a prepared step, which waits for the work of `main` so far; `main` if
/// the step has none.
///
/// # Errors
/// Errors of the driver.
pub fn side_stream(step: PreparedStep, main: &Arc<CudaStream>) -> Result<Arc<CudaStream>> {
    if step.side_stream == 0 {
        return Ok(main.clone());
    }
    let side = borrowed(main.context(), step.side_stream as CUstream);
    side.join(main)?;
    Ok(side)
}

fn borrowed(context: &Arc<CudaContext>, raw: CUstream) -> Arc<CudaStream> {
    // SAFETY: the stream belongs to this context and lives as long as the step. Events order its
    // work.
    unsafe { context.wrap_borrowed_stream(raw) }
}
