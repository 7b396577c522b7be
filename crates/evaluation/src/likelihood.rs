//! How probable a model finds the tokens of given texts.

use burn::tensor::DType;
use burn::tensor::activation::log_softmax;
use polyhead_attention::{Mask, Observe};
use polyhead_kernels::{in_type, linear};
use polyhead_models::{Batch, Decoder};

/// Logits at a time (32 MiB of f32); chosen by us.
const LOGITS: usize = 1 << 23;

/// What a model made of one token of a text.
#[derive(Debug, Clone, PartialEq)]
pub struct Likelihood {
    /// The logarithm of its probability, given all tokens before it.
    pub log_probability: f32,
    /// The likeliest tokens in its place with the logarithms of their probabilities, best first.
    pub best: Vec<(u32, f32)>,
}

/// The likelihood of every token of a text but the first (ids below the vocabulary), with the `best` likeliest in each place.
/// Call it on `model.valid()`.
pub fn likelihoods(model: &Decoder, text: &[u32], best: usize) -> Vec<Likelihood> {
    let Some(read) = text.len().checked_sub(1).filter(|&read| read > 0) else { return Vec::new() };
    let tokens = model.tokens(&Batch::text(text[..read].to_vec()));
    let hidden = model.forward(tokens, &Mask::causal(), None, Observe::Nothing).hidden;
    let hidden = hidden.reshape([read, model.config().d_model]);
    let rows = (LOGITS / model.vocab_size().max(1)).clamp(1, read);
    let mut found = Vec::with_capacity(read);
    for from in (0..read).step_by(rows) {
        let count = rows.min(read - from);
        let hidden = hidden.clone().narrow(0, from, count);
        let head = in_type(model.output_projection(), hidden.dtype());
        let logits = in_type(linear(hidden, head, None), DType::F32);
        let all: Vec<f32> = log_softmax(logits, 1).into_data().iter::<f32>().collect();
        for (row, &target) in all.chunks(model.vocab_size()).zip(&text[from + 1..]) {
            found.push(Likelihood { log_probability: row[target as usize], best: likeliest(row, best) });
        }
    }
    found
}

/// The `count` largest of a row; of equal ones, the smaller id comes first.
fn likeliest(row: &[f32], count: usize) -> Vec<(u32, f32)> {
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(count + 1);
    for (id, &value) in row.iter().enumerate() {
        let place = best.partition_point(|&(_, other)| other >= value);
        if place < count {
            best.insert(place, (id as u32, value));
            best.truncate(count);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::tensor::Device;
    use polyhead_kernels::seed_random;
    use polyhead_models::DecoderConfig;

    use super::*;

    #[test]
    fn they_add_up_to_the_loss() {
        let config = r#"{"d_model": 16, "n_layers": 2, "attention": {"softmax": {"n_heads": 2}}}"#;
        seed_random(5);
        let model = serde_json::from_str::<DecoderConfig>(config).unwrap().init(9, &Device::flex());
        let text = [3, 1, 4, 1, 5, 8, 0, 2];
        let found = likelihoods(&model, &text, 3);
        assert_eq!(found.len(), 7);
        let sum: f64 = found.iter().map(|of| f64::from(of.log_probability)).sum();
        assert!((sum + model.evaluate(&Batch::text(text.to_vec())).loss).abs() < 1e-4);
        // All of the vocabulary, best first, is a distribution that holds the token itself.
        for (of, &token) in likelihoods(&model, &text, 9).iter().zip(&text[1..]) {
            assert!((of.best.iter().map(|(_, value)| value.exp()).sum::<f32>() - 1.0).abs() < 1e-5);
            assert!(of.best.is_sorted_by(|a, b| a.1 >= b.1) && of.best.contains(&(token, of.log_probability)));
        }
        assert!(found.iter().all(|of| of.best.len() == 3));
        assert!(likelihoods(&model, &[3], 1).is_empty() && likelihoods(&model, &[], 1).is_empty());
    }

    #[test]
    fn of_equal_ones_the_smaller_id_comes_first() {
        assert_eq!(likeliest(&[1.0, 3.0, 2.0, 3.0], 3), [(1, 3.0), (3, 3.0), (2, 2.0)]);
        assert!(likeliest(&[1.0], 0).is_empty());
    }
}
