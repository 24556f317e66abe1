//! RWKV's feed-forward layer: W_v relu(W_k x_k)², before version 7 gated by the sigmoid of W_r x_r.

use super::mix::{differences, mix};
use crate::checkpoint::Checkpoint;
use crate::matrix::{Matrix, Rows};
use crate::mixer::{Input, Recurrent, StateArray};
use crate::simd::{MulSigmoid, SquaredRelu, map, zip};
use crate::workspace::Workspace;
use longctx_core::Result;

#[derive(Debug)]
pub struct ChannelMix {
    pub hidden: usize,
    pub inner: usize,
    pub key_mix: Vec<f32>,
    pub key: Matrix,
    pub value: Matrix,
    pub receptance: Option<(Vec<f32>, Matrix)>,
}

impl ChannelMix {
    /// Loads the layer. `name` returns a tensor's full name.
    pub fn load(
        w: &Checkpoint,
        name: impl Fn(&str) -> String,
        hidden: usize,
        version: usize,
    ) -> Result<Self> {
        let key = name("key.weight");
        let [inner, _] = w.matrix_dims(&key, "[inner, hidden]")?;
        let prefix = super::mix_prefix(version);
        let mix =
            |part: &str| super::load_mix(w, &name(&format!("{prefix}{part}")), hidden, version);
        let receptance = match version {
            7 => None,
            _ => Some((mix("r")?, w.matrix(&name("receptance.weight"), hidden, hidden)?)),
        };
        Ok(Self {
            hidden,
            inner,
            key_mix: mix("k")?,
            key: w.matrix(&key, inner, hidden)?,
            value: w.matrix(&name("value.weight"), hidden, inner)?,
            receptance,
        })
    }
}

impl Recurrent for ChannelMix {
    fn state(&self) -> Vec<StateArray> {
        vec![StateArray::new("shift", &[self.hidden])]
    }

    fn forward(
        &self,
        x: Input<'_>,
        states: &mut [&mut [f32]],
        workspace: &mut Workspace,
        out: &mut [f32],
    ) {
        let (rows, hidden) = (x.rows(), self.hidden);
        let mut shift = workspace.acquire(rows * hidden);
        let mut mixed = workspace.acquire(rows * hidden);
        let mut keys = workspace.acquire(rows * self.inner);
        differences(x, hidden, states, &mut shift);
        mix(x.x, &shift, &self.key_mix, &mut mixed);
        self.key.apply(Rows::new(&mixed, hidden), &mut keys);
        map(SquaredRelu, &mut keys);
        self.value.apply(Rows::new(&keys, self.inner), out);
        if let Some((receptance_mix, receptance)) = &self.receptance {
            mix(x.x, &shift, receptance_mix, &mut mixed);
            receptance.apply(Rows::new(&mixed, hidden), &mut shift);
            zip(MulSigmoid, out, &shift);
        }
        for buffer in [keys, mixed, shift] {
            workspace.release(buffer);
        }
    }

    #[cfg(feature = "cuda")]
    fn on_device(&self, to: &crate::cuda::DeviceContext) -> Result<Box<dyn crate::cuda::Mixer>> {
        Ok(Box::new(crate::cuda::ChannelMix::new(self, to)?))
    }
}
