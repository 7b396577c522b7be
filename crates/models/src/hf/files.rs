//! The files of a folder in Hugging Face's format, by name.

use std::path::Path;

/// What the model is.
pub const CONFIG: &str = "config.json";
/// How it generates; may be missing.
pub const GENERATION_CONFIG: &str = "generation_config.json";
/// The weights, where they are one file.
pub const WEIGHTS: &str = "model.safetensors";
/// Which file has which tensor, where the weights are several.
pub const WEIGHTS_INDEX: &str = "model.safetensors.index.json";
/// The settings of an adapter of PEFT; beside or instead of the model.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";
/// The pairs of an adapter.
pub const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";
/// The tokenizer.
pub const TOKENIZER: &str = "tokenizer.json";
/// Its special tokens and chat template.
pub const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// Whether `path` is a folder in Hugging Face's format, of a model or of an adapter.
pub fn is_folder(path: &Path) -> bool {
    [CONFIG, ADAPTER_CONFIG].iter().any(|name| path.join(name).exists())
}
