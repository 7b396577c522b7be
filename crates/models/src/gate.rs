//! What is done to the residual stream between two layers, from outside the model.

use burn::tensor::{Distribution, Tensor};
use polyhead_kernels::random;

/// What is done to the residual stream between two layers: no parameter, not saved, handed in from outside.
#[derive(Debug, Clone)]
pub struct Gate {
    /// The layer, from 0, whose output it works on.
    pub after_layer: usize,
    /// What it does.
    pub kind: GateKind,
}

/// What a gate does.
// A model has one at most: boxing would buy nothing.
#[allow(clippy::large_enum_variant)]
#[derive(Debug, Clone)]
pub enum GateKind {
    /// `[d_model]` of 0 and 1, multiplied with every token; what is kept is not scaled up.
    Keep(Tensor<1>),
    /// Every number becomes 0 with this probability, anew in every pass; what is kept is divided by the probability to
    /// be kept (Srivastava et al. 2014).
    Dropout(f64),
}

impl Gate {
    /// `[batch, seq, d_model]`, gated.
    pub fn pass(&self, hidden: Tensor<3>) -> Tensor<3> {
        match &self.kind {
            GateKind::Keep(keep) => hidden * keep.clone().unsqueeze::<3>(),
            GateKind::Dropout(rate) => dropped(hidden, *rate),
        }
    }
}

/// Dropout (Srivastava et al. 2014): every number becomes 0 with the probability `rate`, the others are divided by the
/// probability to be kept. Numbers are drawn from this thread's stream.
fn dropped(hidden: Tensor<3>, rate: f64) -> Tensor<3> {
    let kept = random(hidden.dims(), Distribution::Bernoulli(1.0 - rate), &hidden.device());
    let dtype = hidden.dtype();
    hidden * kept.cast(dtype) / (1.0 - rate)
}

/// Dropout while a model trains, which is known by the tape; nothing without it, and nothing at a rate of 0.
pub(crate) fn dropout(hidden: Tensor<3>, rate: f64) -> Tensor<3> {
    match rate > 0.0 && hidden.device().is_autodiff() {
        true => dropped(hidden, rate),
        false => hidden,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::tensor::{Device, Int};
    use polyhead_attention::{Cache, Mask, Observe};
    use polyhead_kernels::seed_random;

    use super::*;
    use crate::weights::named;
    use crate::{Decoder, DecoderConfig};

    const D_MODEL: usize = 8;

    fn model() -> Decoder {
        let config = r#"{"d_model": 8, "n_layers": 3, "attention": {"softmax": {"n_heads": 2}}}"#;
        let device = Device::flex();
        seed_random(5);
        serde_json::from_str::<DecoderConfig>(config).unwrap().init(13, &device)
    }

    fn keep(after_layer: usize, dropped: &[usize]) -> Option<Gate> {
        let values = (0..D_MODEL).map(|i| f32::from(!dropped.contains(&i))).collect::<Vec<f32>>();
        let kind = GateKind::Keep(Tensor::from_floats(values.as_slice(), &Device::flex()));
        Some(Gate { after_layer, kind })
    }

    fn tokens() -> Tensor<2, Int> {
        Tensor::<1, Int>::arange(0..10, &Device::flex()).reshape([2, 5])
    }

    fn values(hidden: Tensor<3>) -> Vec<f32> {
        hidden.into_data().iter::<f32>().collect()
    }

    #[test]
    fn a_gate_works_on_what_comes_after_its_layer_and_is_no_parameter() {
        let (plain, mask) = (model(), Mask::causal());
        let forward = |model: &Decoder| values(model.forward(tokens(), &mask, None, Observe::Nothing).hidden);
        let after = |model: &Decoder, layer| values(model.hidden_after(layer, tokens(), &mask));
        assert_eq!(forward(&plain), forward(&plain.clone().gated(keep(1, &[]))), "keeping all changes nothing");
        let gated = plain.clone().gated(keep(1, &[0, 3]));
        assert_eq!(named(&plain), named(&gated));
        assert_ne!(forward(&plain), forward(&gated));
        assert_eq!(after(&plain, 1), after(&gated, 1), "what is measured at the gate is what comes into it");
        assert_ne!(after(&plain, 2), after(&gated, 2));
        let last = forward(&plain.clone().gated(keep(2, &[0, 3])));
        assert!(last.chunks(D_MODEL).all(|token| token[0] == 0.0 && token[3] == 0.0 && token[1] != 0.0));
    }

    #[test]
    fn cached_decoding_passes_the_gate_too() {
        let (gated, mask) = (model().gated(keep(1, &[2, 5])), Mask::causal());
        let whole = values(gated.forward(tokens(), &mask, None, Observe::Nothing).hidden);
        let mut cache = Cache::new(3);
        let mut step = |from, count| {
            let part = tokens().narrow(1, from, count);
            gated.forward(part, &mask, Some(&mut cache), Observe::Nothing).hidden
        };
        let parts = values(Tensor::cat(vec![step(0, 3), step(3, 1), step(4, 1)], 1));
        assert!(whole.iter().zip(parts).all(|(a, b)| (a - b).abs() < 1e-5));
    }

    #[test]
    fn dropout_drops_at_its_rate_and_scales_what_stays() {
        let device = Device::flex();
        seed_random(3);
        let gate = Gate { after_layer: 0, kind: GateKind::Dropout(0.25) };
        let out: Vec<f32> = gate.pass(Tensor::ones([8, 16, 32], &device)).into_data().iter::<f32>().collect();
        assert!(out.iter().all(|&x| x == 0.0 || (x - 4.0 / 3.0).abs() < 1e-6));
        let kept = out.iter().filter(|&&x| x > 0.0).count() as f64 / out.len() as f64;
        assert!((kept - 0.75).abs() < 0.03, "{kept}");
    }
}
