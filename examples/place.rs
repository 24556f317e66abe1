//! Command-line options for a model's device and dtype.

use candle_core::{DType, Device};

/// The options of every command that runs a model.
#[derive(Debug, Clone, clap::Args)]
pub struct Place {
    /// The device: cpu; with the feature cuda also cuda or cuda:N
    #[arg(long, default_value = "cpu", value_parser = device)]
    device: Device,
    /// The dtype of activations: f32, f16 or bf16; by default f32 on the CPU and f16 on other
    /// devices
    #[arg(long, value_parser = dtype)]
    dtype: Option<DType>,
}

impl Default for Place {
    /// The CPU, in f32.
    fn default() -> Self {
        Self { device: Device::Cpu, dtype: None }
    }
}

impl Place {
    /// Returns whether the device is the CPU.
    pub fn is_cpu(&self) -> bool {
        self.device.is_cpu()
    }

    fn dtype(&self) -> DType {
        let default = if self.is_cpu() { DType::F32 } else { DType::F16 };
        self.dtype.unwrap_or(default)
    }

    /// Returns the options for transformers. On other devices than the CPU, quantized weights are
    /// expanded, because there are no kernels for them.
    pub fn transformer(&self) -> base_models::LoadOptions {
        base_models::LoadOptions {
            device: self.device.clone(),
            dtype: self.dtype(),
            expand: !self.is_cpu(),
            ..Default::default()
        }
    }

    /// Returns the options for recurrent and hybrid models.
    pub fn recurrent(&self) -> hybrid_models::LoadOptions {
        hybrid_models::LoadOptions { device: self.device.clone(), dtype: self.dtype() }
    }

    /// Returns a description of the device and the dtype: "cpu f32", "cuda f16".
    pub fn describe(&self) -> String {
        let device = if self.is_cpu() { "cpu" } else { "cuda" };
        format!("{device} {}", self.dtype().as_str())
    }
}

fn device(name: &str) -> Result<Device, String> {
    let number = match name.split_once(':') {
        None if name == "cpu" => return Ok(Device::Cpu),
        None if name == "cuda" => 0,
        Some(("cuda", number)) => number.parse().map_err(|_| expected(name))?,
        _ => return Err(expected(name)),
    };
    if !cfg!(feature = "cuda") {
        return Err(format!("{name}: this program was built without the feature `cuda`"));
    }
    let device = Device::new_cuda(number).map_err(|error| error.to_string())?;
    #[cfg(feature = "cuda")]
    longctx_core::cuda::keep_freed_memory(&device).map_err(|error| error.to_string())?;
    Ok(device)
}

fn expected(name: &str) -> String {
    format!("expected cpu, cuda or cuda:N, got {name}")
}

fn dtype(name: &str) -> Result<DType, String> {
    match name {
        "f32" => Ok(DType::F32),
        "f16" => Ok(DType::F16),
        "bf16" => Ok(DType::BF16),
        _ => Err(format!("expected f32, f16 or bf16, got {name}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        place: Place,
    }

    fn parse(args: &[&str]) -> Result<Place, String> {
        let command = Command::try_parse_from([&["command"], args].concat());
        command.map(|command| command.place).map_err(|error| error.to_string())
    }

    #[test]
    fn the_default_is_the_cpu_in_f32() {
        assert_eq!(parse(&[]).unwrap().describe(), "cpu f32");
        assert_eq!(parse(&["--device", "cpu", "--dtype", "bf16"]).unwrap().describe(), "cpu bf16");
    }

    #[test]
    fn errors_of_unknown_devices_and_formats_list_the_known_ones() {
        assert!(parse(&["--device", "tpu"]).unwrap_err().contains("cuda:N, got tpu"));
        assert!(parse(&["--device", "cuda:x"]).unwrap_err().contains("got cuda:x"));
        assert!(parse(&["--dtype", "u8"]).unwrap_err().contains("bf16, got u8"));
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn without_the_feature_a_gpu_is_refused() {
        assert!(parse(&["--device", "cuda:1"]).unwrap_err().contains("feature `cuda`"));
    }
}
