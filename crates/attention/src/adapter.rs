//! Low-rank additions to projections (LoRA: Hu et al. 2021, arXiv 2106.09685): `x W + bias + scale (x A) B`.
//!
//! They come from outside, call by call: a mechanism owns its projections, and hands each of them to
//! [`Adapters::project`]. Whether A and B are parameters (LoRA) or thrown away after the step (fast weights) is not known
//! here.

use std::sync::Arc;

use burn::module::Param;
use burn::nn::Linear;
use burn::tensor::Tensor;

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
        let own = polyhead_kernels::linear(x.clone(), layer.weight.val(), layer.bias.as_ref().map(Param::val));
        let add = |y: Tensor<3>, adapter: &Adapter| {
            let low = polyhead_kernels::linear(x.clone(), adapter.a.clone(), None);
            y + polyhead_kernels::linear(low * adapter.scale, adapter.b.clone(), None)
        };
        self.0.iter().filter(|adapter| &*adapter.projection == name).fold(own, add)
    }

    /// `[d_input, d_output]`: the projection's weight with the additions folded in.
    pub fn weight(&self, name: &str, layer: &Linear) -> Tensor<2> {
        let fold =
            |weight: Tensor<2>, adapter: &Adapter| weight + adapter.a.clone().matmul(adapter.b.clone()) * adapter.scale;
        self.0.iter().filter(|adapter| &*adapter.projection == name).fold(layer.weight.val(), fold)
    }
}
