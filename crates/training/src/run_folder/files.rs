//! The files of run folders and checkpoints, by name: the one place that spells them. `docs/src/internals/checkpoint-format.md` describes them.

use std::path::Path;

use polyhead_models::hf::files as hf;

/// The resolved recipe: of a run, and in a checkpoint of what led there.
pub const RECIPE: &str = "recipe.toml";
/// What was measured, a JSON object a line.
pub const METRICS: &str = "metrics.jsonl";
/// What a finished run reached and what it took.
pub const RESULT: &str = "result.json";
/// The losses as an image.
pub const CURVE: &str = "curve.svg";
/// What a network that enlarges images makes of some, as an image.
pub const IMAGES: &str = "images.png";
/// The step with the smallest validation loss.
pub const BEST: &str = "best.json";
/// Locked by the process that writes the folder.
pub const LOCK: &str = ".lock";
/// What each finished stage of a run in stages did.
pub const STAGES: &str = "stages.json";
/// What a conversion did to the model.
pub const CONVERSION: &str = "conversion.json";
/// The command that made a folder for a comparison; written last.
pub const PREPARED: &str = "prepared.json";
/// What a run of a comparison told.
pub const LOG: &str = "log.txt";

/// What makes a folder a checkpoint.
pub const MANIFEST: &str = "manifest.json";
/// The weights.
pub const WEIGHTS: &str = hf::WEIGHTS;
/// What LoRA or an intervention has learned, where the other weights are those of a base model.
pub const ADAPTER: &str = "adapter.safetensors";
/// Which base model that is.
pub const BASE: &str = "base.json";
/// The tensors that the intervention of the recipe names, of a run and in a checkpoint.
pub const INTERVENTION: &str = "intervention.safetensors";
/// The intervention that a finished run trained, beside the file of its tensors.
pub const TRAINED_INTERVENTION: &str = "trained_intervention.toml";
/// The state of the optimiser.
pub const OPTIMIZER: &str = "optimizer.safetensors";
/// The counters and the state of the procedure.
pub const STATE: &str = "state.json";
/// What the model was trained on.
pub const DATA: &str = "data.json";
/// The tokenizer, as in Hugging Face's folders.
pub const TOKENIZER: &str = hf::TOKENIZER;
/// Its special tokens and chat template.
pub const TOKENIZER_CONFIG: &str = hf::TOKENIZER_CONFIG;

/// Whether `path` is a complete checkpoint, which its manifest says.
pub fn is_checkpoint(path: &Path) -> bool {
    path.join(MANIFEST).exists()
}
