//! Low-rank pairs as an adapter of PEFT, beside a base model that is in Hugging Face's format already.

use std::collections::BTreeSet;

use burn::tensor::Tensor;
use polyhead_attention::Family;
use serde_json::json;

use super::files;
use super::names::{Layout, place};
use super::peft::PREFIX;
use crate::Decoder;
use crate::adapters::{LoraConfig, pairs_by_weight};
use crate::weights::{Named, WeightsError, to_safetensors};

/// Why pairs cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// PEFT adds to whole modules.
    #[error(
        "{parameter} is one part of {module} in the base model, and PEFT has pairs for the whole of it: export the merged model \
         instead, without --adapter"
    )]
    Part {
        /// Ours.
        parameter: String,
        /// Theirs.
        module: String,
    },
    /// A shape does not hold its values, which would be our mistake.
    #[error(transparent)]
    Weights(#[from] WeightsError),
}

/// The base model of an adapter, as PEFT finds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseName {
    /// A folder, or `org/name`.
    pub name: String,
    /// The branch, tag or commit of the latter, where it is not the main one.
    pub revision: Option<String>,
}

/// The files of an adapter: the pairs of `model`, which were made by `config` beside a base model of `family`.
///
/// # Errors
/// If a pair belongs to a part of a module.
pub fn export_adapter(
    model: &Decoder,
    config: &LoraConfig,
    family: &Family,
    base: &BaseName,
) -> Result<Vec<(String, Vec<u8>)>, AdapterError> {
    let (mut tensors, mut targets) = (Vec::new(), BTreeSet::new());
    for (parameter, pair) in pairs_by_weight(model) {
        let place = place(family, &parameter);
        let module = place.name.trim_end_matches(".weight").to_owned();
        if place.layout != Layout::Transposed {
            return Err(AdapterError::Part { parameter, module });
        }
        targets.insert(module.rsplit('.').next().unwrap_or(&module).to_owned());
        // Ours are [input, rank] and [rank, output].
        let transposed = |half: &str, x: Tensor<2>| {
            let shape = x.dims().into_iter().rev().collect();
            let values = x.transpose().into_data().iter::<f32>().collect();
            Named { name: format!("{PREFIX}{module}.{half}.weight"), shape, values }
        };
        tensors.extend([transposed("lora_A", pair.a), transposed("lora_B", pair.b)]);
    }
    let settings = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base.name, "revision": base.revision,
        "r": config.rank, "lora_alpha": config.alpha, "target_modules": targets, "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": false, "use_rslora": false, "use_dora": false, "init_lora_weights": true, "inference_mode": true,
        "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": null, "layers_to_transform": null,
    });
    Ok(vec![
        (files::ADAPTER_CONFIG.into(), format!("{settings:#}\n").into_bytes()),
        (files::ADAPTER_WEIGHTS.into(), to_safetensors(&tensors, &[("format", "pt".into())])?),
    ])
}
