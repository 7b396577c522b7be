//! `polyhead doctor`.

use std::path::Path;

use polyhead_runs::data::project_root;
use polyhead_runs::{Failure, device};
use polyhead_training::available_memory_bytes;

use super::recipes::shown;
use crate::console::{bytes, put};

/// Prints what this machine and this binary can do, and what to do about the rest.
pub fn doctor() -> Result<(), Failure> {
    let slow = if cfg!(debug_assertions) { " (a debug build, which is slow: use cargo build --release)" } else { "" };
    put!("polyhead   {}{slow}", env!("CARGO_PKG_VERSION"))?;
    let devices = device::all();
    let usable = devices.iter().filter_map(|(name, found)| Some((name, found.as_ref().ok()?)));
    let usable = usable.map(|(name, product)| match product {
        Some(product) => format!("{name} ({product})"),
        None => name.clone(),
    });
    put!("devices    {}", usable.collect::<Vec<_>>().join(", "))?;
    for problem in devices.iter().filter_map(|(_, found)| found.as_ref().err()) {
        put!("           {problem}")?;
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let (threads, set) = (polyhead_kernels::threads(), polyhead_kernels::instruction_set());
    put!("CPU        {cores} cores; {threads} threads (RAYON_NUM_THREADS sets them); instruction set: {set}")?;
    if let Some(memory) = available_memory_bytes() {
        put!("memory     {} available", bytes(memory))?;
    }
    let rust_docs = polyhead_data::DataConfig::RustDocs(polyhead_data::RustDocsConfig {});
    match rust_docs.documents(&project_root()) {
        Ok(found) => put!("text       {}", found.description)?,
        Err(error) => put!("text       {error}")?,
    }
    let recipes = project_root().join("recipes");
    match recipes.is_dir() {
        true => put!("recipes    {} (`polyhead ls`)", shown(&recipes).display())?,
        false => put!("recipes    none in {}; `polyhead reference` tells what one may say", recipes.display())?,
    }
    for (name, folder, way_out) in [
        ("runs", "checkpoints", "train with --out DIR"),
        ("tokens", "datasets/cache", "text is turned into tokens anew each time"),
    ] {
        match try_writing(Path::new(folder)) {
            Ok(()) => put!("{name:<10} {folder} can be written")?,
            Err(problem) => put!("{name:<10} {folder} cannot be written ({problem}): {way_out}")?,
        }
    }
    Ok(())
}

/// Writes and removes a file in a folder, or in the nearest one above that exists.
fn try_writing(folder: &Path) -> std::io::Result<()> {
    let exists = folder.ancestors().find(|folder| folder.is_dir()).unwrap_or(Path::new("."));
    let probe = exists.join(format!(".polyhead-doctor-{}", std::process::id()));
    std::fs::write(&probe, b"")?;
    std::fs::remove_file(&probe)
}
