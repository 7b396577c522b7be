//! Differential Transformer V2 (Microsoft, January 2026; no paper, unilm's code `Diff-Transformer-V2`, commit 31646c5).
//!
//! Query heads come in pairs of neighbours that read the same key and value; the second of a pair is subtracted, with a weight
//! that each position computes for itself:
//!
//! ```text
//! a   = softmax(q kᵀ / √d) v          2 n_heads query heads
//! c_i = a_2i - σ(l_i) a_2i+1          l = x W_λ, one number per position and head
//! out = o_proj(c)
//! ```
//! Unlike the first version (`grouped_differential`) there is no λ_init, no norm of the heads and no factor 1 - λ_init, values
//! are as wide as keys, and both heads of a pair share one key. Subtracting one half of the heads from the other, instead of
//! neighbours, is the mistake that the authors warn of. Fresh weights are those of the other mechanisms, N(0, 0.02²).

use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::activation::sigmoid;
use burn::tensor::{DType, Device, Tensor};
use polyhead_kernels::{AttentionOptions, Statistics, in_type};
use serde::{Deserialize, Serialize};

use crate::cache::KvCache;
use crate::observe::{NOISE, SCORES};
use crate::projection::{INIT_STD, linear, residual_std, split_heads};
use crate::settings::head_settings;
use crate::softmax::check_width;
use crate::window::{Within, window_of, within};
use crate::{
    Attended, Call, ConfigError, Cost, Dims, KvSite, Mechanism, MechanismConfig, Observation, Observed, Wiring,
};

const LAMBDA: Observed =
    Observed::new("lambda", "λ, by which the second head of a pair is multiplied, mean over tokens", "");

head_settings! {
    /// Settings of differential attention, version 2.
    #[derive(Eq)]
    pub struct DiffV2Config {
        /// Output heads: pairs of query heads, of which there are twice as many.
        pub n_heads: usize,
        @n_kv_heads "Key/value heads: n_heads gives one per pair (the default), a divisor of it shares them among pairs.",
        @head_dim,
        @window,
    } => fn single
}

impl MechanismConfig for DiffV2Config {
    type Layer = DiffV2;

    fn validate(&self, dims: &Dims) -> Result<(), ConfigError> {
        self.single().validate(dims)?;
        check_width("head_dim", self.head_dim(dims), "2 n_heads", self.n_heads.saturating_mul(2))
    }

    fn init(&self, dims: &Dims, device: &Device) -> DiffV2 {
        let (d_model, width, heads) = (dims.d_model, self.head_dim(dims), self.n_heads);
        let kv_heads = self.single().kv_heads();
        let project = |d_output| linear(d_model, d_output, false, INIT_STD, device);
        DiffV2 {
            q_proj: project(2 * heads * width),
            k_proj: project(kv_heads * width),
            v_proj: project(kv_heads * width),
            lambda_proj: project(heads),
            o_proj: linear(heads * width, d_model, false, residual_std(dims.n_layers), device),
            n_heads: heads,
            n_kv_heads: kv_heads,
            window: window_of(self.window.as_ref(), dims.layer),
        }
    }

    fn head_dim(&self, dims: &Dims) -> usize {
        self.single().head_dim(dims)
    }

    fn cost(&self, dims: &Dims) -> Cost {
        let single = self.single().cost(dims);
        let (d_model, width, heads) = (dims.d_model as u64, self.head_dim(dims) as u64, self.n_heads as u64);
        let more = d_model * heads * (width + 1);
        Cost {
            parameters: single.parameters + more,
            flops_per_token: single.flops_per_token + 2 * more,
            flops_per_pair: 2 * single.flops_per_pair,
            ..single
        }
    }

    fn observes() -> &'static [Observed] {
        const ALL: [Observed; 7] = [SCORES[0], SCORES[1], SCORES[2], NOISE[0], NOISE[1], NOISE[2], LAMBDA];
        &ALL
    }

    fn wiring(&self) -> Result<Vec<Wiring>, &'static str> {
        let kv_heads = self.n_kv_heads.unwrap_or(self.n_heads);
        let of = |(head, own): (usize, Wiring)| Wiring { outputs: head / 2..head / 2 + 1, ..own };
        Ok(Wiring::even(2 * self.n_heads, kv_heads).into_iter().enumerate().map(of).collect())
    }

    fn example() -> Self {
        Self { n_heads: 4, n_kv_heads: Some(2), head_dim: Some(6), window: None }
    }
}

/// A layer of differential attention, version 2.
#[derive(Module, Debug)]
pub struct DiffV2 {
    /// `[d_model, 2 n_heads * head_dim]`: of each pair the head that is kept, then the one that is subtracted
    pub q_proj: Linear,
    /// `[d_model, n_kv_heads * head_dim]`
    pub k_proj: Linear,
    /// `[d_model, n_kv_heads * head_dim]`
    pub v_proj: Linear,
    /// `[d_model, n_heads]`
    pub lambda_proj: Linear,
    /// `[n_heads * head_dim, d_model]`
    pub o_proj: Linear,
    n_heads: usize,
    n_kv_heads: usize,
    window: Option<usize>,
}

/// `[batch, seq, n_heads, width]`: of neighbours in `pairs`, `[batch, seq, 2 n_heads, width]`, the first minus λ times the
/// second; λ is `[batch, seq, n_heads, 1]`.
fn subtract(pairs: Tensor<4>, lambda: Tensor<4>) -> Tensor<4> {
    let [batch, seq, heads, width] = pairs.dims();
    let pairs = pairs.reshape([batch, seq, heads / 2, 2 * width]);
    pairs.clone().narrow(3, 0, width) - pairs.narrow(3, width, width) * lambda
}

impl DiffV2 {
    /// Statistics of the heads, those of the subtracted ones under names of their own.
    fn observe(&self, seen: Statistics, lambda: &Tensor<4>) -> Observation {
        // What is observed is f32, whatever the layer computes in.
        let lambda = in_type(lambda.clone().detach(), DType::F32);
        let mut observation = Observation::default();
        for (second, rows) in [&SCORES, &NOISE].into_iter().enumerate() {
            let of = |numbers: &Tensor<1>| {
                numbers.clone().reshape([self.n_heads, 2]).narrow(1, second, 1).reshape([self.n_heads])
            };
            observation.scores(rows, [&seen.entropy, &seen.first_key_mass, &seen.largest_score].map(of));
        }
        observation.number(LAMBDA, lambda.clone().mean_dim(0).mean_dim(1).reshape([self.n_heads]));
        let difference = |maps: Tensor<4>, lambda| subtract(maps.swap_dims(1, 2), lambda).swap_dims(1, 2);
        let first = lambda.clone().narrow(0, 0, 1);
        observation.maps = seen.weights.map(|maps| difference(maps.unsqueeze::<4>(), first).squeeze_dim::<3>(0));
        observation.span_mass = seen.span_mass.map(|mass| difference(mass, lambda));
        observation
    }
}

impl Mechanism for DiffV2 {
    type Cache = KvCache;

    fn forward(&self, hidden: Tensor<3>, call: Call<'_, KvCache>) -> Attended {
        let ([batch, seq, _], adapters, sites) = (hidden.dims(), call.adapters, call.sites);
        let q = adapters.project("q_proj", &self.q_proj, hidden.clone());
        let k = adapters.project("k_proj", &self.k_proj, hidden.clone());
        let v = adapters.project("v_proj", &self.v_proj, hidden.clone());
        let lambda = sigmoid(adapters.project("lambda_proj", &self.lambda_proj, hidden));
        let lambda = lambda.reshape([batch, seq, self.n_heads, 1]);
        let q = sites.query(call.rope, split_heads(q, 2 * self.n_heads));
        let k = sites.key(call.rope, split_heads(k, self.n_kv_heads));
        let v = sites.at(KvSite::V, split_heads(v, self.n_kv_heads));
        let Within { keys, values, mask, query_offset } = within(self.window, call.mask, call.cache, [k, v]);
        let options = AttentionOptions {
            mask: Some(&mask),
            query_offset,
            bias: call.bias.cloned(),
            statistics: call.observe.measure(),
            ..Default::default()
        };
        let attended = sites.attend(q, keys, values, options); // [batch, 2 n_heads, seq, head_dim]
        let seen = attended.statistics.map(|seen| self.observe(seen, &lambda));
        let heads = subtract(attended.hidden.swap_dims(1, 2), lambda);
        let channels = heads.dims()[2] * heads.dims()[3];
        let heads = heads.reshape([batch, seq, channels]);
        let hidden = sites.out(adapters, &self.o_proj, heads, self.n_heads);
        Attended { hidden, penalty: None, seen }
    }
}

#[cfg(test)]
mod tests {
    use burn::module::Param;
    use polyhead_kernels::comparison::{Tolerance, assert_tensors_close, largest_difference};

    use super::*;
    use crate::laws::{Spread, draw};
    use crate::{Mask, Mechanism, SoftmaxConfig};

    /// Without weights λ is ½ everywhere; and the heads of a pair are not alike.
    #[test]
    fn the_second_of_a_pair_is_subtracted() {
        let (device, dims, mask) = (Device::flex().autodiff(), Dims::example(), Mask::causal());
        let config = DiffV2Config::example();
        let mut layer = config.init(&dims, &device).map(&mut Spread);
        let zeros = Tensor::zeros(layer.lambda_proj.weight.dims(), &device);
        layer.lambda_proj.weight = Param::from_tensor(zeros);
        let x: Tensor<3> = draw([2, 7, dims.d_model], [0.0, 1.0], &device);

        let (heads, width) = (2 * config.n_heads, 6);
        let every_head = SoftmaxConfig { n_heads: heads, ..config.single() };
        let mut softmax = every_head.init(&dims, &device);
        softmax.q_proj = layer.q_proj.clone();
        softmax.k_proj = layer.k_proj.clone();
        softmax.v_proj = layer.v_proj.clone();
        softmax.o_proj.weight = Param::from_tensor(Tensor::eye(heads * width, &device));
        let all = softmax.forward(x.clone(), Call::new(&mask)).hidden.reshape([2, 7, heads / 2, 2 * width]);
        let want = all.clone().narrow(3, 0, width) - all.narrow(3, width, width) * 0.5;
        let want = polyhead_kernels::linear(want.reshape([2, 7, heads / 2 * width]), layer.o_proj.weight.val(), None);
        let got = layer.forward(x.clone(), Call::new(&mask)).hidden;
        assert_tensors_close("λ = ½", got.clone(), want, Tolerance::absolute(2e-5));

        let weight = layer.q_proj.weight.val().reshape([dims.d_model, heads / 2, 2, width]).flip([2]);
        layer.q_proj.weight = Param::from_tensor(weight.reshape([dims.d_model, heads * width]).detach());
        assert!(largest_difference(layer.forward(x, Call::new(&mask)).hidden, got) > 1e-2);
    }
}
