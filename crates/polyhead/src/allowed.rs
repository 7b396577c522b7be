//! What this process does all the same, though it is refused otherwise: said once on the command line, for every command.

use std::path::Path;
use std::sync::OnceLock;

use polyhead_models::weights::{FrozenDtype, NonFinite};
use polyhead_runs::Caller;

use crate::console::{progress, say};

/// What is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Allowed {
    /// Weights that are NaN or infinite.
    pub nonfinite: NonFinite,
    /// Training that needs more memory than there is, by estimate.
    pub too_little_memory: bool,
    /// Fetching models of the Hugging Face hub that are not in its cache.
    pub download: bool,
    /// Where the base model is of a checkpoint that has only what LoRA learned.
    pub base: Option<&'static Path>,
}

static ALLOWED: OnceLock<Allowed> = OnceLock::new();

/// Says what is allowed, before anything else is done.
pub fn decide(allowed: Allowed) {
    // A second call would come from a second command line, which there is not.
    let _ = ALLOWED.set(allowed);
}

/// What is allowed: by default nothing.
pub fn allowed() -> Allowed {
    ALLOWED.get().copied().unwrap_or_default()
}

/// The flags that say it, for processes that do a part of this one's work.
pub fn flags() -> Vec<String> {
    let Allowed { nonfinite, too_little_memory, download, base } = allowed();
    let given = [
        ("--allow-nonfinite", nonfinite == NonFinite::Allow),
        ("--ignore-memory", too_little_memory),
        ("--download", download),
    ];
    let given = given.into_iter().filter(|(_, given)| *given).map(|(flag, _)| flag.to_owned());
    let base = base.into_iter().flat_map(|base| ["--base".to_owned(), base.display().to_string()]);
    given.chain(base).collect()
}

/// This process, as libraries know it.
pub fn caller() -> Caller {
    let Allowed { nonfinite, base, .. } = allowed();
    Caller {
        nonfinite,
        frozen: FrozenDtype::F32,
        tell: say,
        progress,
        base,
        hub: crate::hub::locate,
        hub_cache: crate::hub::cache,
    }
}

/// The same, for a model that is used alone: weights stay as its file has them.
pub fn user() -> Caller {
    Caller { frozen: FrozenDtype::File, ..caller() }
}
