//! A layer of attention against a file of its numbers: what it writes, its maps, all gradients, and decoding with a cache.

use std::collections::BTreeMap;
use std::ops::Range;

use burn::tensor::{Device, Tensor};
use polyhead_attention::{
    Attended, Call, Dims, Mask, Mechanism, MechanismConfig, Observation, Observe, Rope, RopeLayout,
};
use polyhead_models::weights::{self, Named};

use crate::golden::{GRADIENT, Golden, OUTPUT, compare, compare_gradients, size, tensor, values};

/// A layer with the weights of a file.
pub struct Case<'a, L> {
    golden: &'a Golden,
    pub layer: L,
    /// How rotary positions turn the pairs of a head, and in which layout; `None` without.
    rope: Option<(Vec<f64>, RopeLayout)>,
}

impl<'a, L: Mechanism> Case<'a, L> {
    /// The layer that `described` makes; `rotated` channels of its heads have rotary positions.
    pub fn new<C>(golden: &'a Golden, described: &C, rotated: usize, weights: BTreeMap<String, Named>) -> Self
    where
        C: MechanismConfig<Layer = L>,
    {
        let (name, config) = (&golden.name, &golden.config);
        config.is("causal", true);
        let rope = config.get("rope").is_none_or(|rope| rope.as_bool().unwrap());
        let layout = match config["rope_layout"].as_str() {
            Some("interleaved") => RopeLayout::Interleaved,
            Some("neox") => RopeLayout::RotateHalf,
            other => panic!("{name}: rope_layout {other:?}"),
        };
        let frequencies = polyhead_attention::frequencies(rotated, config["rope_theta"].as_f64().unwrap());
        let dims = Dims { d_model: size(config, "d_model"), n_layers: 1, layer: 0, rope, norm_eps: 1e-6, grid: None };
        described.validate(&dims).unwrap_or_else(|error| panic!("{name}: {error}"));
        let layer = weights::load(described.init(&dims, &Device::flex().autodiff()), weights);
        let layer = layer.unwrap_or_else(|error| panic!("{name}: {error}"));
        let counted: usize = weights::named(&layer).iter().map(|named| named.values.len()).sum();
        assert_eq!(described.cost(&dims).parameters, counted as u64, "{name}: parameters");
        Self { golden, layer, rope: rope.then_some((frequencies, layout)) }
    }

    /// The layer's answer to some of the tokens.
    pub fn run(&self, x: Tensor<3>, tokens: Range<usize>, cache: Option<&mut L::Cache>, observe: Observe) -> Attended {
        let rope = self
            .rope
            .as_ref()
            .map(|(frequencies, layout)| Rope::with_frequencies(tokens.clone(), frequencies, *layout, &x.device()));
        let mask = Mask::causal();
        self.layer.forward(x, Call { rope: rope.as_ref(), cache, observe, ..Call::new(&mask) })
    }

    /// Compares `out` and the gradients, of the input and of all parameters (`want`).
    pub fn check(&self, want: &BTreeMap<String, Named>) {
        let Golden { name, tensors: file, config, .. } = self.golden;
        let device = Device::flex().autodiff();
        let x = tensor::<3>(file, "x", &device).require_grad();
        assert_eq!(x.dims(), ["batch", "seq", "d_model"].map(|key| size(config, key)), "{name}: sizes of x");
        let out = self.run(x.clone(), 0..x.dims()[1], None, Observe::Nothing).hidden;
        compare(name, "out", &file["out"].values, &values(out.clone()), OUTPUT, false);
        let grads = (out * tensor(file, "cotangent", &device)).sum().backward();
        compare(name, "grad.x", &file["grad.x"].values, &values(x.grad(&grads).unwrap()), GRADIENT, true);
        compare_gradients(name, &self.layer, &grads, want, GRADIENT);
    }

    /// Compares the maps of all rows of the batch, and gives back what was observed of each.
    pub fn check_weights(&self) -> Vec<Observation> {
        let Golden { name, tensors: file, .. } = self.golden;
        let x = tensor::<3>(file, "x", &Device::flex().autodiff());
        let [batch, seq, _] = x.dims();
        let seen = |row| self.run(x.clone().narrow(0, row, 1), 0..seq, None, Observe::Maps).seen.unwrap();
        let seen: Vec<Observation> = (0..batch).map(seen).collect();
        let maps: Vec<f32> = seen.iter().flat_map(|seen| values(seen.maps.clone().unwrap())).collect();
        compare(name, "inter.weights", &file["inter.weights"].values, &maps, OUTPUT, false);
        seen
    }

    /// Compares decoding, the first tokens at once and the others one by one, and gives the cache back.
    pub fn decode(&self, expected: &str, prefill: usize) -> L::Cache {
        let Golden { name, tensors: file, .. } = self.golden;
        let x = tensor::<3>(file, "x", &Device::flex().autodiff());
        let seq = x.dims()[1];
        let mut cache = L::Cache::default();
        let mut parts = Vec::new();
        let mut at = 0;
        while at < seq {
            let tokens = if at == 0 && prefill > 0 { 0..prefill } else { at..at + 1 };
            let part = x.clone().narrow(1, at, tokens.len());
            at = tokens.end;
            parts.push(self.run(part, tokens, Some(&mut cache), Observe::Nothing).hidden);
        }
        compare(name, expected, &file[expected].values, &values(Tensor::cat(parts, 1)), OUTPUT, false);
        cache
    }
}

/// The factor of the scores of heads of so many channels is the file's.
pub fn assert_scale(golden: &Golden, width: usize) {
    let scale = golden.config["scale"].as_f64().unwrap();
    assert!((scale - (width as f64).powf(-0.5)).abs() < 1e-12, "{}: scale {scale}", golden.name);
}
