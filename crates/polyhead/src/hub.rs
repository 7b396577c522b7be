//! Models of the Hugging Face hub, as the environment says where they are.

use std::path::{Path, PathBuf};

use polyhead_runs::Failure;
use polyhead_runs::hub::Reference;

/// The folder of a model that is named as on the hub, `org/name` or `org/name@revision`; `None` where it is not in the cache, or
/// the name can only be a path.
///
/// # Errors
/// If it is not whole in the cache.
pub fn locate(name: &Path) -> Result<Option<PathBuf>, Failure> {
    name.to_str().and_then(Reference::parse).map_or(Ok(None), |reference| reference.cached(&cache()))
}

/// Where the tools of Hugging Face keep what they fetch.
fn cache() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let of_home = |home: PathBuf| home.join("hub");
    let default = || {
        let cache = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")));
        cache.unwrap_or_default().join("huggingface").join("hub")
    };
    set("HF_HUB_CACHE").or_else(|| set("HF_HOME").map(of_home)).unwrap_or_else(default)
}
