//! Gated attention (Qiu et al. 2025, arXiv 2505.06708, NeurIPS 2025): softmax attention with a sigmoid gate at one of five
//! places, computed from the layer's input.
//!
//! ```text
//! gate = σ(x W_g)
//! G1  o_proj(softmax(q kᵀ / √d) v ⊙ gate)     what heads read; the recommended place
//! G2  v ⊙ gate      G3  k ⊙ gate      G4  q ⊙ gate         projections, before norms and rotary positions
//! G5  o_proj(...) ⊙ gate                      what the layer writes
//! ```
//! A gate is a number per channel, or one per head. At G1, G4 and G5 it is the query's, at G2 and G3 the key's: it is in the
//! cache with what it has been multiplied with. The authors' code has G1 only, as rows of q_proj between those of the queries
//! (and Qwen3-Next in another order); here the gate is a projection of its own. Where the norms of G3 and G4 come is our reading.
//! Left out: gates that are added, shared by heads or independent of the input, and SiLU, which the paper finds worse.

use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::activation::sigmoid;
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::Observed;
use crate::cache::KvCache;
use crate::config::require;
use crate::observe::SCORES;
use crate::projection::{INIT_STD, linear};
use crate::settings::head_settings;
use crate::softmax::Softmax;
use crate::{Attended, Call, ConfigError, Cost, Dims, Mechanism, MechanismConfig, Wiring};

const SIGMOID_GATE: Observed = Observed::new("sigmoid_gate", "gate of a head or channel, mean over tokens", "");

head_settings! {
    /// Settings of gated attention.
    pub struct GatedAttentionConfig {
        /// Query heads.
        pub n_heads: usize,
        @n_kv_heads,
        @head_dim,
        @flag qkv_bias "Biases on the query, key, value and gate projections. Default: false.",
        @flag o_bias "A bias on the output projection. Default: false.",
        @flag qk_norm "Normalise every query and key head before it is rotated, as the authors' models do. Default: false.",
        @window,
        /// The place of the gate. Default: "heads" (G1), the paper's recommendation.
        #[serde(default)]
        pub gated: GatedPlace,
        /// A gate per channel, or one per head. Default: "elementwise", the paper's best.
        #[serde(default)]
        pub granularity: Granularity,
    } => fn plain
}

/// The place of the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum GatedPlace {
    /// G1: the output of every head, before the output projection.
    #[default]
    Heads,
    /// G2: values.
    Values,
    /// G3: keys.
    Keys,
    /// G4: queries.
    Queries,
    /// G5: the output of the layer, behind the output projection.
    Output,
}

/// The size of a gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum Granularity {
    /// One per channel.
    #[default]
    Elementwise,
    /// One per head.
    Headwise,
}

impl GatedAttentionConfig {
    /// Heads that are gated, and numbers of each gate.
    fn gates(&self, dims: &Dims) -> [usize; 2] {
        let plain = self.plain();
        let (heads, width) = match self.gated {
            GatedPlace::Heads | GatedPlace::Queries => (self.n_heads, plain.head_dim(dims)),
            GatedPlace::Values | GatedPlace::Keys => (plain.kv_heads(), plain.head_dim(dims)),
            GatedPlace::Output => (1, dims.d_model),
        };
        [heads, if self.granularity == Granularity::Headwise { 1 } else { width }]
    }
}

impl MechanismConfig for GatedAttentionConfig {
    type Layer = GatedAttention;

    fn validate(&self, dims: &Dims) -> Result<(), ConfigError> {
        self.plain().validate(dims)?;
        require(self.gated != GatedPlace::Output || self.granularity == Granularity::Elementwise, "granularity", || {
            "granularity = \"headwise\" needs heads, which the output of a layer (gated = \"output\") has none of: use \
             \"elementwise\""
                .into()
        })
    }

    fn init(&self, dims: &Dims, device: &Device) -> GatedAttention {
        let gates = self.gates(dims);
        GatedAttention {
            softmax: self.plain().init(dims, device),
            g_proj: linear(dims.d_model, gates[0] * gates[1], self.qkv_bias, INIT_STD, device),
            gated: self.gated,
            gates,
        }
    }

    fn head_dim(&self, dims: &Dims) -> usize {
        self.plain().head_dim(dims)
    }

    fn cost(&self, dims: &Dims) -> Cost {
        let plain = self.plain().cost(dims);
        let gates = self.gates(dims).map(|size| size as u64).iter().product::<u64>();
        let weights = dims.d_model as u64 * gates;
        Cost {
            parameters: plain.parameters + weights + if self.qkv_bias { gates } else { 0 },
            flops_per_token: plain.flops_per_token + 2 * weights,
            ..plain
        }
    }

    fn observes() -> &'static [Observed] {
        const ALL: [Observed; 4] = [SCORES[0], SCORES[1], SCORES[2], SIGMOID_GATE];
        &ALL
    }

    fn wiring(&self) -> Result<Vec<Wiring>, &'static str> {
        self.plain().wiring()
    }

    fn example() -> Self {
        Self {
            n_heads: 4,
            n_kv_heads: Some(2),
            head_dim: None,
            qkv_bias: true,
            o_bias: false,
            qk_norm: true,
            window: None,
            gated: GatedPlace::Heads,
            granularity: Granularity::Elementwise,
        }
    }
}

/// A layer of gated attention.
#[derive(Module, Debug)]
pub struct GatedAttention {
    /// The projections of queries, keys, values and output
    pub softmax: Softmax,
    /// `[d_model, gated heads * numbers of a gate]`
    pub g_proj: Linear,
    #[module(skip)]
    gated: GatedPlace,
    #[module(skip)]
    gates: [usize; 2],
}

impl Mechanism for GatedAttention {
    type Cache = KvCache;

    fn forward(&self, hidden: Tensor<3>, call: Call<'_, KvCache>) -> Attended {
        let ([batch, seq, _], adapters, softmax) = (hidden.dims(), call.adapters, &self.softmax);
        let ([n_gates, width], sites) = (self.gates, call.sites);
        let gate = sigmoid(adapters.project("g_proj", &self.g_proj, hidden.clone()));
        let gate = gate.reshape([batch, seq, n_gates, width]);
        // Heads of `[batch, seq, heads * head_dim]`, gated where this is the place.
        let gated = |place: GatedPlace, x: Tensor<3>| {
            if place != self.gated {
                return x;
            }
            let channels = x.dims()[2];
            let heads = x.reshape([batch, seq, n_gates, channels / n_gates]);
            (heads * gate.clone()).reshape([batch, seq, channels])
        };
        let q = gated(GatedPlace::Queries, adapters.project("q_proj", &softmax.q_proj, hidden.clone()));
        let k = gated(GatedPlace::Keys, adapters.project("k_proj", &softmax.k_proj, hidden.clone()));
        let v = gated(GatedPlace::Values, adapters.project("v_proj", &softmax.v_proj, hidden));
        let (heads, mut seen) = softmax.mix([q, k, v], call, None);
        if let Some(seen) = &mut seen {
            let mean = gate.clone().detach().mean_dim(0).mean_dim(1).mean_dim(3);
            seen.number(SIGMOID_GATE, mean.reshape([n_gates]));
        }
        let heads = gated(GatedPlace::Heads, heads);
        let on_output = (self.gated == GatedPlace::Output).then(|| gate.clone().reshape([batch, seq, n_gates * width]));
        let hidden = sites.gated_out(adapters, &softmax.o_proj, heads, softmax.query_heads(), on_output);
        Attended { hidden, penalty: None, seen }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Distribution;

    use super::*;
    use crate::{AttentionConfig, Mask};

    /// Every place keeps the laws, and gates of ½ (no weights) at a linear place halve what softmax attention writes.
    #[test]
    fn every_place_keeps_the_laws() {
        use GatedPlace::{Heads, Keys, Output, Queries, Values};
        let (dims, device) = (Dims::example(), Device::flex());
        for (gated, granularity) in [
            (Heads, Granularity::Headwise),
            (Values, Granularity::Elementwise),
            (Values, Granularity::Headwise),
            (Keys, Granularity::Elementwise),
            (Keys, Granularity::Headwise),
            (Queries, Granularity::Elementwise),
            (Queries, Granularity::Headwise),
            (Output, Granularity::Elementwise),
        ] {
            let example = GatedAttentionConfig { gated, granularity, ..GatedAttentionConfig::example() };
            // A norm takes a gate of a whole head out again, but for what its epsilon leaves.
            let example = GatedAttentionConfig { qk_norm: false, ..example };
            crate::laws::hold(&AttentionConfig::GatedAttention(example.clone()), &[]);
            let mut layer = GatedAttentionConfig { qkv_bias: false, ..example }.init(&dims, &device);
            layer.g_proj.weight = layer.g_proj.weight.map(|weight| weight * 0.0);
            let x = Tensor::<3>::random([2, 6, dims.d_model], Distribution::Normal(0.0, 1.0), &device);
            let mask = Mask::causal();
            let got = layer.forward(x.clone(), Call::new(&mask)).hidden;
            let want = layer.softmax.forward(x, Call::new(&mask)).hidden;
            if matches!(gated, Heads | Values | Output) {
                (got * 2.0)
                    .into_data()
                    .assert_approx_eq::<f32>(&want.into_data(), burn::tensor::Tolerance::absolute(1e-6));
            }
        }
        let headless = GatedAttentionConfig {
            gated: Output,
            granularity: Granularity::Headwise,
            ..GatedAttentionConfig::example()
        };
        assert_eq!(headless.validate(&dims).map_err(|error| error.field), Err("granularity".to_owned()));
    }
}
