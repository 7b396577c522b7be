//! What the tests of several models share.

#![allow(clippy::unwrap_used)]

use burn::module::{Module, Param};
use burn::tensor::{Device, Gradients, Tensor};
use polyhead_attention::AttentionConfig;
use polyhead_kernels::seed_random;

use crate::weights::{ParameterVisitor, load, named, visit_parameters};
use crate::{Decoder, DecoderConfig};

/// Every parameter that is learned has a finite gradient that is not all zero; how many there are.
pub(crate) fn reach_every_parameter<M: Module>(module: &M, grads: &Gradients) -> usize {
    struct Check<'a>(&'a Gradients, usize);
    impl ParameterVisitor for Check<'_> {
        fn visit<const D: usize>(&mut self, name: String, param: &Param<Tensor<D>>) {
            if !param.val().is_require_grad() {
                return;
            }
            let grad = param.val().grad(self.0).unwrap_or_else(|| panic!("{name} has no gradient"));
            let values: Vec<f32> = grad.into_data().iter::<f32>().collect();
            assert!(values.iter().all(|g| g.is_finite()), "the gradient of {name} is not finite");
            assert!(values.iter().any(|&g| g != 0.0), "the gradient of {name} is zero");
            self.1 += 1;
        }
    }
    visit_parameters(module, Check(grads, 0)).1
}

/// A decoder of every mechanism that a decoder can have, with weights that make its heads differ.
pub(crate) fn decoders() -> impl Iterator<Item = Decoder> {
    let causal = |config: &AttentionConfig| config.check_causal().is_ok();
    AttentionConfig::examples().into_iter().filter(causal).map(|attention| {
        let attention = serde_json::to_value(&attention).unwrap();
        let config = serde_json::json!({ "d_model": 24, "n_layers": 4, "attention": attention });
        let config: DecoderConfig = serde_json::from_value(config).unwrap();
        config.validate().unwrap();
        seed_random(7);
        let fresh = config.init(11, &Device::flex());
        let larger = named(&fresh).into_iter().map(|mut tensor| {
            let matrix = tensor.shape.len() == 2;
            tensor.values.iter_mut().filter(|_| matrix).for_each(|value| *value *= 10.0);
            (tensor.name.clone(), tensor)
        });
        let larger = larger.collect();
        load(fresh, larger).unwrap()
    })
}
