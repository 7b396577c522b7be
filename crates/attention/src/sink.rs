//! Softmax attention with learnable sinks, as in GPT-OSS (arXiv 2508.10925; Xiao et al. 2023, arXiv 2309.17453, for what sinks
//! do).
//!
//! Every query head h has a logit s_h that takes part in its softmax and has no value, so that a head can attend to nothing:
//!
//! ```text
//! p_j = e^(z_j) / (e^(s_h) + Σ_i e^(z_i))        over the keys i that the query sees; s_h is not scaled
//! ```
//! s = 0 is "softmax off by one", and towards -∞ it is plain softmax. Transformers' GPT-OSS is followed: windows on the even
//! layers are `window = [128, 0, 128, 0, ...]`. What is on a sink is the metric `sink_mass`.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::Observed;
use crate::config::{PerLayerCount, require};
use crate::observe::{SCORES, SINK_MASS};
use crate::settings::head_settings;
use crate::softmax::Softmax;
use crate::{Attended, Call, ConfigError, Cost, Dims, KvCache, Mechanism, MechanismConfig, Wiring};

head_settings! {
    /// Settings of softmax attention with sinks.
    pub struct SinkConfig {
        /// Query heads, each with a sink of its own.
        pub n_heads: usize,
        @n_kv_heads,
        @head_dim,
        @flag qkv_bias "Biases on the query, key and value projections, as in GPT-OSS. Default: false.",
        @flag o_bias "A bias on the output projection, as in GPT-OSS. Default: false.",
        @flag qk_norm "Normalise every query and key head before it is rotated. Default: false.",
        @window,
        /// Fresh logits of the sinks. Default: 0, as much as one key of score 0.
        #[serde(default)]
        pub sink_init: f64,
    } => fn plain
}

impl MechanismConfig for SinkConfig {
    type Layer = Sink;

    fn validate(&self, dims: &Dims) -> Result<(), ConfigError> {
        self.plain().validate(dims)?;
        require(self.sink_init.is_finite(), "sink_init", || {
            format!("sink_init ({}) must be a finite number", self.sink_init)
        })
    }

    fn init(&self, dims: &Dims, device: &Device) -> Sink {
        let sinks = Tensor::full([self.n_heads], self.sink_init, device);
        Sink { softmax: self.plain().init(dims, device), sinks: Param::from_tensor(sinks) }
    }

    fn head_dim(&self, dims: &Dims) -> usize {
        self.plain().head_dim(dims)
    }

    fn cost(&self, dims: &Dims) -> Cost {
        let plain = self.plain().cost(dims);
        Cost { parameters: plain.parameters + self.n_heads as u64, ..plain }
    }

    fn observes() -> &'static [Observed] {
        const ALL: [Observed; 4] = [SCORES[0], SCORES[1], SCORES[2], SINK_MASS];
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
            o_bias: true,
            qk_norm: false,
            window: Some(PerLayerCount::Each(vec![0, 5, 0, 5])),
            sink_init: 0.0,
        }
    }
}

/// A layer of softmax attention with sinks.
#[derive(Module, Debug)]
pub struct Sink {
    /// The projections, and attention without sinks
    pub softmax: Softmax,
    /// `[n_heads]`
    pub sinks: Param<Tensor<1>>,
}

impl Mechanism for Sink {
    type Cache = KvCache;

    fn forward(&self, hidden: Tensor<3>, call: Call<'_, KvCache>) -> Attended {
        self.softmax.attend(hidden, call, Some(self.sinks.val()))
    }
}

#[cfg(test)]
mod tests {
    use polyhead_kernels::comparison::{Tolerance, assert_tensors_close, numbers};

    use super::*;
    use crate::Mask;
    use crate::laws::draw;

    #[test]
    fn far_logits_are_plain_attention_or_nothing() {
        let (device, mask) = (Device::flex().autodiff(), Mask::causal());
        let mut layer = SinkConfig { o_bias: false, ..SinkConfig::example() }.init(&Dims::example(), &device);
        let x: Tensor<3> = draw([2, 6, Dims::example().d_model], [0.0, 1.0], &device);
        let plain = layer.softmax.forward(x.clone(), Call::new(&mask)).hidden;
        let mut run = |logit: f64| {
            layer.sinks = Param::from_tensor(Tensor::full([4], logit, &device)).set_require_grad(true);
            layer.forward(x.clone(), Call::new(&mask)).hidden
        };
        assert_tensors_close("far below the scores", run(-1e4), plain, Tolerance::absolute(1e-6));
        let silent = run(1e4);
        assert!(numbers(silent.clone()).iter().all(|value| value.abs() < 1e-6));
        let grads = silent.sum().backward();
        let of_queries = layer.softmax.q_proj.weight.val().grad(&grads).expect("a gradient");
        let of_sinks = layer.sinks.val().grad(&grads).expect("a gradient");
        assert!(numbers(of_queries).into_iter().chain(numbers(of_sinks)).all(f32::is_finite));
    }
}
