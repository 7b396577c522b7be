//! Models of the Hugging Face hub, as the environment says where they are.

#[cfg(feature = "download")]
mod download;

use std::path::{Path, PathBuf};

use polyhead_runs::Failure;
use polyhead_runs::hub::Reference;

use crate::allowed::allowed;
#[cfg(feature = "download")]
use download::fetch;

/// The folder of a model that is named as on the hub, `org/name` or `org/name@revision`, fetched where that is allowed; `None`
/// where it is not in the cache, or the name can only be a path.
///
/// # Errors
/// If it is not whole in the cache, or cannot be fetched.
pub fn locate(name: &Path) -> Result<Option<PathBuf>, Failure> {
    let Some(reference) = name.to_str().and_then(Reference::parse) else { return Ok(None) };
    let cache = cache();
    match reference.cached(&cache) {
        Err(_) | Ok(None) if allowed().download => fetch(&reference, &cache).map(Some),
        found => found,
    }
}

#[cfg(not(feature = "download"))]
fn fetch(reference: &Reference, _: &Path) -> Result<PathBuf, Failure> {
    let problem = "--download: this binary was built without the feature `download`";
    let hint = format!("`hf download {}` fetches it", reference.name);
    Err(polyhead_recipe::Problems::plain(format!("{problem}\n  hint: {hint}")).into())
}

/// Where the tools of Hugging Face keep what they fetch.
pub fn cache() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let of_home = |home: PathBuf| home.join("hub");
    let default = || {
        let cache = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")));
        cache.unwrap_or_default().join("huggingface").join("hub")
    };
    set("HF_HUB_CACHE").or_else(|| set("HF_HOME").map(of_home)).unwrap_or_else(default)
}
