//! What every layer of a decoder makes of a text, as one vector each: features for a classifier or for pooling.

use burn::tensor::{Bool, DType, Int, Tensor, TensorData};
use polyhead_attention::Mask;
use polyhead_kernels::in_type;

use crate::pooling::{last_token, mean_of_tokens};
use crate::{Decoder, Pass};

/// How the tokens of a text become one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenPooling {
    /// The mean over all of them.
    Mean,
    /// The last one, which has seen all others.
    Last,
}

impl Decoder {
    /// `[texts, layers, d_model]`: the residual stream behind each layer, the last one normalised, as Hugging Face's
    /// `hidden_states[1:]`; pooled over the tokens of each text.
    ///
    /// Texts may differ in length: they are padded on the right, where under a causal mask no token looks, and what is
    /// padding is left out of the mean.
    ///
    /// # Panics
    /// If there is no text, or an empty one.
    pub fn layer_features(&self, texts: &[Vec<u32>], pooling: TokenPooling) -> Tensor<3> {
        let longest = texts.iter().map(Vec::len).max().unwrap_or(0);
        assert!(texts.iter().all(|text| !text.is_empty()) && longest > 0, "layer_features: texts of one token or more");
        let shape = [texts.len(), longest];
        let padded =
            texts.iter().flat_map(|text| text.iter().map(|&id| id as i32).chain(vec![0; longest - text.len()]));
        let padding = texts.iter().flat_map(|text| (0..longest).map(|at| at >= text.len()));
        let device = self.device();
        let tokens = Tensor::<2, Int>::from_data(TensorData::new(padded.collect(), shape), &device);
        let padding = Tensor::<2, Bool>::from_data(TensorData::new(padding.collect(), shape), &device);
        let pool = |hidden: Tensor<3>| {
            let hidden = in_type(hidden, DType::F32);
            match pooling {
                TokenPooling::Mean => mean_of_tokens(hidden, Some(&padding)),
                TokenPooling::Last => last_token(hidden, Some(&padding)),
            }
        };
        let mask = Mask::causal();
        let mut hidden = self.embed(tokens);
        let mut features = Vec::with_capacity(self.layers.len());
        for layer in 0..self.layers.len() {
            hidden = self.run_layers(layer..layer + 1, hidden, Pass::new(&mask)).hidden;
            let last = layer + 1 == self.layers.len();
            features.push(pool(if last { self.normed(hidden.clone()) } else { hidden.clone() }));
        }
        Tensor::stack(features, 1)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::tensor::Device;
    use polyhead_attention::Observe;
    use polyhead_kernels::comparison::largest_difference as far;
    use polyhead_kernels::seed_random;

    use super::*;
    use crate::DecoderConfig;

    const CONFIG: &str = r#"{"d_model": 16, "n_layers": 3, "attention": {"softmax": {"n_heads": 2}}}"#;

    fn model() -> Decoder {
        let device = Device::flex();
        seed_random(2);
        serde_json::from_str::<DecoderConfig>(CONFIG).unwrap().init(20, &device)
    }

    #[test]
    fn neighbours_and_padding_leave_no_trace() {
        let (model, texts) = (model(), [vec![3, 1, 4], vec![1, 5, 9, 2, 6, 5, 3], vec![7]]);
        for pooling in [TokenPooling::Mean, TokenPooling::Last] {
            let all = model.layer_features(&texts, pooling);
            assert_eq!(all.dims(), [3, 3, 16]);
            for (index, text) in texts.iter().enumerate() {
                let alone = model.layer_features(std::slice::from_ref(text), pooling).squeeze_dim::<2>(0);
                assert!(far(all.clone().narrow(0, index, 1).squeeze_dim(0), alone) < 1e-5, "{pooling:?} {index}");
            }
        }
    }

    #[test]
    fn layers_are_those_of_the_whole_pass() {
        let (model, text) = (model(), vec![3, 1, 4, 1, 5]);
        let tokens = Tensor::<1, Int>::from_ints([3, 1, 4, 1, 5], &model.device()).unsqueeze::<2>();
        let features = model.layer_features(&[text], TokenPooling::Last).squeeze_dim::<2>(0);
        let last = model.forward(tokens.clone(), &Mask::causal(), None, Observe::Nothing).hidden;
        let at_end = |hidden: Tensor<3>| hidden.narrow(1, 4, 1).squeeze_dim::<2>(0);
        assert!(far(features.clone().narrow(0, 2, 1), at_end(last)) < 1e-6);
        for layer in 0..2 {
            let hidden = model.hidden_after(layer, tokens.clone(), &Mask::causal());
            assert!(far(features.clone().narrow(0, layer, 1), at_end(hidden)) < 1e-6, "layer {layer}");
        }
        let mean = model.layer_features(&[vec![3, 1, 4, 1, 5]], TokenPooling::Mean).squeeze_dim::<2>(0);
        let expected = model.hidden_after(0, tokens, &Mask::causal()).mean_dim(1).squeeze_dim::<2>(0);
        assert!(far(mean.narrow(0, 0, 1), expected) < 1e-6);
    }
}
