//! What the classifier costs, computed from its settings.

use polyhead_attention::Cost;

use super::{
    FeatureAttentionConfig, FeatureMixerConfig, FeatureSizes, GaussianAdaptiveTransformerConfig, KERNEL, dims,
};
use crate::Part;

impl GaussianAdaptiveTransformerConfig {
    /// Parameters and costs by part; operations are those of a whole sample. Attention between samples counts as many of them
    /// as there are layers.
    pub fn parts(&self, sizes: FeatureSizes) -> Vec<Part> {
        let FeatureSizes { d_model, n_classes, .. } = sizes;
        let (n_layers, width) = (self.n_layers(sizes), self.width(d_model));
        let part = |name: &str, parameters: u64, flops_per_token: u64| Part {
            name: name.into(),
            cost: Cost { parameters, flops_per_token, ..Cost::default() },
        };
        let read = [n_layers, d_model];
        let (rows, name) = (n_layers as u64, format!("mixer: {}", self.mixer_name()));
        let mixer = match &self.mixer {
            FeatureMixerConfig::Identity => None,
            FeatureMixerConfig::GaussianAdaptive(gate) => Some(part(&name, gate.parameters(&read), 0)),
            FeatureMixerConfig::Attention(FeatureAttentionConfig { mechanism, .. }) => {
                let dims = dims(d_model);
                Some(part(&name, mechanism.cost(&dims).parameters, mechanism.encoder_flops(&dims, rows)))
            }
            FeatureMixerConfig::Gqdaam(config) => Some(part(&name, config.parameters(&read), config.flops(&read))),
        };
        let (weights, channels) = (n_layers * self.d_conv * KERNEL * KERNEL, self.d_conv + n_layers);
        let flat = (n_layers * width) as u64;
        let head = flat * n_classes as u64;
        let convolutions = part("convolutions", (2 * weights + channels) as u64, 4 * (weights * width) as u64);
        mixer.into_iter().chain([convolutions, part("head", head + n_classes as u64, 2 * head)]).collect()
    }

    /// Numbers that are kept of a sample for the backward pass, roughly.
    pub fn kept_numbers(&self, sizes: FeatureSizes) -> usize {
        let (n_layers, width) = (self.n_layers(sizes), self.width(sizes.d_model));
        // Around the mixer some of the size of the features; both sides of each activation.
        n_layers * (6 * sizes.d_model + 2 * width) + 2 * self.d_conv * width
    }
}
