//! Which parameters a run trains: all but those that are frozen.

use glob::Pattern;
use polyhead_models::weights::layer_of;
use polyhead_models::{ConfigError, Trainable, parameters, require, train_only};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::TrainError;

/// `[freeze]`: parameters that stay as they are. They get no gradient, so no update, no decay, no state in the
/// optimiser and no share in the norm.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct FreezeConfig {
    /// So many layers, from the first on. Default: 0.
    pub layers: usize,
    /// Parameters by their names in a checkpoint, with * for any text: "embedding.*", "layers.*.attention.*".
    /// Default: none.
    pub parameters: Vec<String>,
}

impl FreezeConfig {
    /// Checks the settings for a model of `n_layers` layers.
    ///
    /// # Errors
    /// Names the field and the rule.
    pub fn validate(&self, n_layers: usize) -> Result<(), ConfigError> {
        require(self.layers <= n_layers, "layers", || {
            format!("freeze.layers ({}) must be at most n_layers ({n_layers})", self.layers)
        })?;
        let checked = NamePatterns(&self.parameters).validate();
        checked.map_err(|problem| ConfigError::new("parameters", format!("freeze.parameters: {problem}")))
    }

    /// Whether every pattern means one of these parameters.
    ///
    /// # Errors
    /// Names the first that does not, and the parameters.
    pub fn find(&self, names: &[&str]) -> Result<(), String> {
        NamePatterns(&self.parameters).find(names).map_err(|problem| format!("freeze.parameters: {problem}"))
    }

    /// Whether a parameter of this name stays as it is.
    pub fn freezes(&self, name: &str) -> bool {
        layer_of(name).is_some_and(|layer| layer < self.layers) || NamePatterns(&self.parameters).mean(name)
    }

    /// The model with these parameters frozen; those that did not learn before do not learn after.
    ///
    /// # Errors
    /// If a pattern means no parameter, or nothing is left to train.
    pub fn apply<M: Trainable>(&self, model: M) -> Result<M, TrainError> {
        if *self == Self::default() {
            return Ok(model);
        }
        self.validate(model.n_layers()).map_err(|error| TrainError::Freeze(error.problem))?;
        let all = parameters(&model);
        let names: Vec<&str> = all.iter().map(|parameter| parameter.name.as_str()).collect();
        self.find(&names).map_err(TrainError::Freeze)?;
        let left: Vec<&str> =
            all.iter().filter(|one| one.trainable && !self.freezes(&one.name)).map(|one| one.name.as_str()).collect();
        if left.is_empty() {
            return Err(TrainError::Freeze("freeze: nothing is left to train".into()));
        }
        Ok(train_only(model, |name| left.contains(&name)))
    }
}

/// Parameters by their names, with * for any text.
#[derive(Debug, Clone, Copy)]
pub struct NamePatterns<'a>(pub &'a [String]);

impl NamePatterns<'_> {
    /// Whether all of them are patterns.
    ///
    /// # Errors
    /// Names the first that is none, and why.
    pub fn validate(self) -> Result<(), String> {
        self.0.iter().try_for_each(|text| {
            Pattern::new(text).map(drop).map_err(|error| format!("\"{text}\" is no pattern: {error}"))
        })
    }

    /// Whether one of them means the parameter of this name.
    pub fn mean(self, name: &str) -> bool {
        self.0.iter().any(|text| Pattern::new(text).is_ok_and(|pattern| pattern.matches(name)))
    }

    /// Whether each of them means one of these parameters.
    ///
    /// # Errors
    /// Names the first that does not, and the parameters.
    pub fn find(self, names: &[&str]) -> Result<(), String> {
        let nothing = |text: &&String| !names.iter().any(|name| NamePatterns(std::slice::from_ref(*text)).mean(name));
        match self.0.iter().find(nothing) {
            Some(text) => Err(format!("\"{text}\" means no parameter; there are {}", names.join(", "))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeMap;

    use burn::tensor::Device;
    use polyhead_attention::Observe;
    use polyhead_kernels::seed_random;
    use polyhead_models::weights::named;
    use polyhead_models::{Batch, Decoder, DecoderConfig};

    use super::*;
    use crate::gradients::{Sum, global_norm};
    use crate::optimizer::{Optimizer, Update};

    fn model() -> Decoder {
        let attention = serde_json::json!({ "softmax": { "n_heads": 2 } });
        let config =
            serde_json::json!({ "d_model": 8, "n_layers": 3, "tie_embeddings": false, "attention": attention });
        let config: DecoderConfig = serde_json::from_value(config).unwrap();
        let device = Device::flex().autodiff();
        seed_random(1);
        config.init(11, &device)
    }

    fn batch() -> Batch {
        let (tokens, targets) = ((0..10).collect(), (1..11).collect());
        Batch { batch: 2, seq: 5, tokens, targets, ..Batch::default() }
    }

    /// The norm of the first gradients, the model after two updates, and the optimiser.
    fn train(mut model: Decoder) -> (f64, Decoder, Optimizer) {
        let mut optimizer = Optimizer::new(Default::default());
        let mut norm = 0.0;
        for step in 0..2 {
            let mut sum = Sum::default();
            sum.add(model.loss(&batch(), Observe::Nothing).cross_entropy.backward(), &model);
            let mut grads = sum.finish();
            if step == 0 {
                norm = global_norm(&grads, &model);
            }
            model = optimizer.step(model, &mut grads, Update { lr: 0.1, scale: 1.0 });
        }
        (norm, model, optimizer)
    }

    fn values(model: &Decoder) -> BTreeMap<String, Vec<f32>> {
        named(model).into_iter().map(|one| (one.name, one.values)).collect()
    }

    #[test]
    fn frozen_parameters_have_no_part_in_a_step() {
        let freeze = FreezeConfig { layers: 1, parameters: vec!["embedding.*".into(), "layers.2.*norm*".into()] };
        let frozen = |name: &str| {
            name.starts_with("layers.0.")
                || name.starts_with("embedding.")
                || name.starts_with("layers.2.") && name.contains("norm")
        };
        let before = model();
        let old = values(&before);
        let (norm, after, optimizer) = train(freeze.apply(before.clone()).unwrap());
        for (name, new) in values(&after) {
            assert_eq!(old[&name] == new, frozen(&name), "{name}");
        }
        let states: Vec<String> = optimizer.tensors().into_iter().map(|one| one.name).collect();
        assert!(states.iter().all(|name| !frozen(name.split_once('.').unwrap().1)), "{states:?}");
        assert_eq!(states.len(), 2 * old.keys().filter(|name| !frozen(name)).count());
        assert!(norm < train(before).0, "what is frozen has no share in the norm");
    }

    #[test]
    fn what_means_nothing_or_everything_is_refused() {
        let told = |layers, parameters: &[&str]| {
            let parameters = parameters.iter().map(|&text| text.into()).collect();
            FreezeConfig { layers, parameters }.apply(model()).unwrap_err().to_string()
        };
        assert!(told(0, &["layer.*"]).contains("\"layer.*\" means no parameter; there are embedding.weight, "));
        assert!(told(0, &["*"]).contains("nothing is left"));
        let wrong = FreezeConfig { layers: 4, parameters: vec![] };
        assert!(wrong.validate(3).unwrap_err().problem.contains("freeze.layers (4)"));
        let wrong = FreezeConfig { layers: 0, parameters: vec!["a***".into()] };
        assert_eq!(wrong.validate(3).unwrap_err().field, "parameters");
    }
}
