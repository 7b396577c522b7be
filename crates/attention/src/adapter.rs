//! Low-rank additions to projections (LoRA: Hu et al. 2021, arXiv 2106.09685): `x W + bias + scale (x A) B`.
//!
//! They come from outside, call by call: a mechanism owns its projections, and hands each of them to
//! [`Adapters::project`]. Whether A and B are parameters (LoRA) or thrown away after the step (fast weights) is not known
//! here.

use std::sync::Arc;

use burn::module::Param;
use burn::nn::Linear;
use burn::tensor::Tensor;
use polyhead_kernels::{adapted_linear, in_type, linear};

/// One addition to one projection.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// The projection's name in its layer: `q_proj`, `down_proj`, ...
    pub projection: Arc<str>,
    /// `[d_input, rank]`
    pub a: Tensor<2>,
    /// `[rank, d_output]`
    pub b: Tensor<2>,
    /// alpha / rank
    pub scale: f64,
}

/// The additions to a layer's projections; by default none.
#[derive(Debug, Clone, Copy, Default)]
pub struct Adapters<'a>(pub &'a [Adapter]);

impl Adapters<'_> {
    /// Whether one of these projections is added to.
    pub fn touch(&self, names: &[&str]) -> bool {
        self.0.iter().any(|adapter| names.contains(&&*adapter.projection))
    }

    /// `x` through the projection `layer`, which is called `name`: `[batch, seq, d_input]` to `[batch, seq, d_output]`.
    pub fn project(&self, name: &str, layer: &Linear, x: Tensor<3>) -> Tensor<3> {
        let (weight, bias) = (layer.weight.val(), layer.bias.as_ref().map(Param::val));
        let mut adapters = self.0.iter().filter(|adapter| &*adapter.projection == name);
        let Some(first) = adapters.next() else { return linear(x, weight, bias) };
        let own = adapted_linear(x.clone(), weight, [first.a.clone(), first.b.clone()], first.scale);
        let own = match bias {
            Some(bias) => {
                let bias = in_type(bias, own.dtype());
                own + bias.unsqueeze()
            }
            None => own,
        };
        adapters.fold(own, |y, adapter| {
            let low = linear(x.clone(), adapter.a.clone(), None) * adapter.scale;
            y + linear(low, adapter.b.clone(), None)
        })
    }

    /// `[d_input, d_output]`: the projection's weight with the additions folded in.
    pub fn weight(&self, name: &str, layer: &Linear) -> Tensor<2> {
        let fold = |weight: Tensor<2>, Adapter { a, b, scale, .. }: &Adapter| {
            in_type(weight, a.dtype()) + a.clone().matmul(b.clone()) * *scale
        };
        self.0.iter().filter(|adapter| &*adapter.projection == name).fold(layer.weight.val(), fold)
    }
}
