//! A token that a trained decoder did not know: its rows in the embedding and in the output projection are the means of all others.

use burn::module::Param;
use burn::tensor::Tensor;

use crate::Decoder;

/// A user's message for training: ended by a full stop where it ends in a letter or a digit, and marked with `indicator` where its
/// answer depends on the context (arXiv 2411.02688).
pub fn marked_message(message: &str, score: f64, beta: f64, indicator: &str) -> String {
    let stop = if message.chars().next_back().is_some_and(char::is_alphanumeric) { "." } else { "" };
    let mark = if score > beta { format!(" {indicator}") } else { String::new() };
    format!("{message}{stop}{mark}")
}

impl Decoder {
    /// The decoder with the token `id`, whatever it had there; ids between are new too.
    pub fn with_token(mut self, id: usize) -> Self {
        self.embedding.weight = with_row(self.embedding.weight, 0, id);
        self.head = self.head.map(|mut head| {
            head.weight = with_row(head.weight, 1, id);
            head.bias = head.bias.map(|bias| with_row(bias, 0, id));
            head
        });
        self
    }
}

/// The tensor with the mean of all rows of an axis in row `id`, and in all between.
fn with_row<const D: usize>(param: Param<Tensor<D>>, axis: usize, id: usize) -> Param<Tensor<D>> {
    let weight = param.val().detach();
    let known = weight.dims()[axis];
    let before = weight.clone().narrow(axis, 0, id.min(known));
    let mean = before.clone().mean_dim(axis);
    let mut parts = vec![before];
    parts.extend(vec![mean; id + 1 - id.min(known)]);
    // A row that there is already gives way; those behind it stay.
    parts.extend((known > id + 1).then(|| weight.narrow(axis, id + 1, known - id - 1)));
    Param::from_tensor(Tensor::cat(parts, axis).detach())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::tensor::Device;

    use super::*;
    use crate::DecoderConfig;

    fn values<const D: usize>(tensor: &Param<Tensor<D>>) -> Vec<f32> {
        tensor.val().into_data().iter::<f32>().collect()
    }

    #[test]
    fn new_rows_are_the_mean_of_all_others_and_the_others_stay() {
        for tied in [true, false] {
            let config: DecoderConfig = serde_json::from_value(serde_json::json!({
                "d_model": 4, "n_layers": 1, "tie_embeddings": tied, "attention": { "softmax": { "n_heads": 1 } }
            }))
            .unwrap();
            let model = config.init(6, &Device::flex());
            let old = values(&model.embedding.weight);
            let grown = model.clone().with_token(6);
            assert_eq!((grown.vocab_size(), grown.head.is_some()), (7, !tied));
            let new = values(&grown.embedding.weight);
            assert_eq!(new[..24], old[..]);
            for channel in 0..4 {
                let mean = (0..6).map(|row| old[row * 4 + channel]).sum::<f32>() / 6.0;
                assert!((new[24 + channel] - mean).abs() < 1e-6);
            }
            assert!(grown.head.as_ref().is_none_or(|head| head.weight.dims() == [4, 7]));
            // A row that fills up is made the token's.
            let same = model.clone().with_token(4);
            let new = values(&same.embedding.weight);
            assert_eq!((same.vocab_size(), &new[..16], &new[20..]), (6, &old[..16], &old[20..]));
            assert_ne!(new[16..20], old[16..20]);
        }
    }
}
