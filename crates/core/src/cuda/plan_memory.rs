//! The device memory of attention's plans.
#![allow(unsafe_code)]

use std::sync::{Arc, OnceLock};

use crate::{PreparedStep, Result};
use longctx_cuda::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DeviceRepr};
use longctx_cuda::{Uploaded, upload};

/// A plan's work list and workspace on a device, which the first launch creates.
#[derive(Debug, Default)]
pub struct PlanMemory(OnceLock<Memory>);

#[derive(Debug)]
struct Memory {
    work: Uploaded,
    parts: CudaSlice<f32>,
    arrived: CudaSlice<u32>,
}

/// The work list and the workspace of a launch, by device addresses.
#[derive(Debug, Clone, Copy)]
pub struct PlanLaunch {
    /// The work items.
    pub work: u64,
    /// Their number.
    pub items: usize,
    /// Counters of the merges, u32.
    pub arrived: u64,
    /// Workspace of the partial results, f32.
    pub parts: u64,
    /// Partial results that the workspace has room for.
    pub max_parts: usize,
}

impl PlanMemory {
    /// Returns the addresses for a plan with these work items. `parts` is the number of partial
    /// results, each of `part_len` elements.
    ///
    /// # Errors
    /// Errors of the driver.
    pub fn launch<T: DeviceRepr + Copy>(
        &self,
        stream: &Arc<CudaStream>,
        work: &[T],
        (parts, part_len): (usize, usize),
        merges: usize,
    ) -> Result<PlanLaunch> {
        let memory = match self.0.get() {
            Some(memory) => memory,
            None => {
                let work = upload(stream, work)?;
                // SAFETY: kernels write every element that they read.
                let parts = unsafe { stream.alloc::<f32>(parts * part_len) }?;
                let arrived = stream.alloc_zeros::<u32>(merges)?;
                self.0.get_or_init(|| Memory { work, parts, arrived })
            }
        };
        Ok(PlanLaunch {
            work: memory.work.address(),
            items: work.len(),
            arrived: memory.arrived.device_ptr(stream).0,
            parts: memory.parts.device_ptr(stream).0,
            max_parts: parts,
        })
    }
}

impl PlanLaunch {
    /// Returns the addresses of a prepared step, from offsets in its lists and its workspace.
    #[must_use]
    pub fn at(self, step: PreparedStep) -> Self {
        Self {
            work: self.work + step.lists,
            arrived: self.arrived + step.lists,
            parts: self.parts + step.workspace,
            ..self
        }
    }
}
