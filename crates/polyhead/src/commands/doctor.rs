//! `polyhead doctor`: what this machine and this binary can do, and what to do about the rest.

use std::collections::BTreeMap;
use std::path::Path;

use polyhead_runs::Failure;
use polyhead_runs::data::project_root;
use polyhead_runs::device::{self, Devices};
use polyhead_training::available_memory_bytes;
use serde_json::{Value, json};

use super::ls::shown;
use crate::console::{bytes, put, wants_json};

/// Folders that are written to, each with what to do where it cannot be.
const FOLDERS: [(&str, &str, &str); 2] = [
    ("runs", "checkpoints", "train with --out DIR"),
    ("tokens", "datasets/cache", "text is turned into tokens anew each time"),
];

/// Features of the build beside devices, each with whether this binary has it and what it is for.
const FEATURES: [(&str, bool, &str); 3] = [
    ("download", cfg!(feature = "download"), "--download"),
    ("mpi", cfg!(feature = "mpi"), "several machines"),
    ("tui", cfg!(feature = "tui"), "train --tui"),
];

/// Prints it.
pub fn doctor() -> Result<(), Failure> {
    let devices = device::all();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let (threads, set) = (polyhead_kernels::threads(), polyhead_kernels::instruction_set());
    let memory = available_memory_bytes();
    let rust_docs = polyhead_data::DataConfig::RustDocs(polyhead_data::RustDocsConfig {});
    let text = rust_docs
        .documents(&project_root())
        .and_then(|found| found.for_each(&mut |_| Ok(())))
        .map(|found| found.description)
        .map_err(|error| error.to_string());
    let recipes = project_root().join("recipes");
    if wants_json() {
        let folder = |(_, folder, _)| json!({ "folder": folder, "problem": problem(folder) });
        return put!(
            "{:#}",
            json!({
                "version": env!("CARGO_PKG_VERSION"), "debug_build": cfg!(debug_assertions),
                "devices": devices.found.iter().map(device_as_json).collect::<Value>(), "not_built_in": devices.not_built_in,
                "features": FEATURES.iter().map(|(name, built_in, _)| (*name, *built_in)).collect::<BTreeMap<_, _>>(),
                "cores": cores, "threads": threads, "instruction_set": set, "memory_bytes": memory,
                "text": text.as_ref().ok(), "text_problem": text.as_ref().err(), "recipes": recipes.is_dir().then_some(&recipes),
                "folders": FOLDERS.map(folder),
            })
        );
    }
    let slow = if cfg!(debug_assertions) { " (a debug build, which is slow: use cargo build --release)" } else { "" };
    put!("polyhead   {}{slow}", env!("CARGO_PKG_VERSION"))?;
    print_devices(&devices)?;
    put!("CPU        {cores} cores; {threads} threads (RAYON_NUM_THREADS sets them); instruction set: {set}")?;
    if let Some(memory) = memory {
        put!("memory     {} available", bytes(memory))?;
    }
    put!("text       {}", text.unwrap_or_else(|problem| problem))?;
    match recipes.is_dir() {
        true => put!("recipes    {} (`polyhead ls`)", shown(&recipes).display())?,
        false => put!("recipes    none in {}; `polyhead new NAME` makes a project with one", recipes.display())?,
    }
    for (name, folder, way_out) in FOLDERS {
        match problem(folder) {
            None => put!("{name:<10} {folder} can be written")?,
            Some(problem) => put!("{name:<10} {folder} cannot be written ({problem}): {way_out}")?,
        }
    }
    put!(
        "beside     `pip install tensorboard` shows the curves of runs, `pip install transformers torch` loads what `export` writes"
    )
}

/// What can be used, what cannot though it was built in, and together what was left out of the build.
fn print_devices(Devices { found, not_built_in }: &Devices) -> Result<(), Failure> {
    let usable = found.iter().filter_map(|(name, found)| Some((name, found.as_ref().ok()?)));
    let usable = usable.map(|(name, product)| match product {
        Some(product) => format!("{name} ({product})"),
        None => name.clone(),
    });
    put!("devices    {}", usable.collect::<Vec<_>>().join(", "))?;
    for problem in found.iter().filter_map(|(_, found)| found.as_ref().err()) {
        put!("           {problem}")?;
    }
    let features = FEATURES.iter().filter(|(_, built_in, _)| !built_in);
    let features = features.map(|(name, _, what)| format!("{name} ({what})"));
    let missing: Vec<String> = not_built_in.iter().map(|&kind| kind.to_owned()).chain(features).collect();
    if missing.is_empty() {
        return Ok(());
    }
    put!("left out   {}:", missing.join(", "))?;
    put!("           `cargo build --release --features NAME` builds one in (docs: GPUs, Several machines)")
}

fn device_as_json((name, found): &device::Found) -> Value {
    let (product, problem) = (found.as_ref().ok().and_then(Option::as_ref), found.as_ref().err());
    json!({ "device": name, "product": product, "problem": problem })
}

/// Why a folder, or the nearest one above it that exists, cannot be written to: a file is written there and removed.
fn problem(folder: &str) -> Option<String> {
    let exists = Path::new(folder).ancestors().find(|folder| folder.is_dir()).unwrap_or(Path::new("."));
    let probe = exists.join(format!(".polyhead-doctor-{}", std::process::id()));
    let written = std::fs::write(&probe, b"").and_then(|()| std::fs::remove_file(&probe));
    written.err().map(|error| error.to_string())
}
