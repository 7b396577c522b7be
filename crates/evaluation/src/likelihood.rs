//! How probable a model finds the tokens of given texts.

use burn::tensor::Tensor;
use burn::tensor::activation::log_softmax;
use polyhead_attention::{Mask, Observe};
use polyhead_models::{Batch, Decoder};

use crate::texts::padded;

/// Logits at a time (32 MiB of f32); chosen by us.
const LOGITS: usize = 1 << 23;

/// Tokens of one forward pass, padding included, where no text is longer; chosen by us.
const TOKENS: usize = 4096;

/// What a model made of one token of a text.
#[derive(Debug, Clone, PartialEq)]
pub struct Likelihood {
    /// The logarithm of its probability, given all tokens before it.
    pub log_probability: f32,
    /// The likeliest tokens in its place with the logarithms of their probabilities, best first.
    pub best: Vec<(u32, f32)>,
}

/// Of each text (ids below the vocabulary), the likelihood of every token but the first, with the `best` likeliest in each
/// place. Texts are read many at a time; padding comes behind a text, where nothing of it can look. Asks `go_on` before every
/// pass; `None` once it says no. Call it on `model.valid()`.
pub fn likelihoods(
    model: &Decoder,
    texts: &[Vec<u32>],
    best: usize,
    go_on: &dyn Fn() -> bool,
) -> Option<Vec<Vec<Likelihood>>> {
    let mut order: Vec<usize> = (0..texts.len()).filter(|&at| texts[at].len() > 1).collect();
    order.sort_by_key(|&at| texts[at].len());
    let mut found = vec![Vec::new(); texts.len()];
    // From the longest on, so that the first of a pass says how many fit.
    while let Some(&longest) = order.last() {
        if !go_on() {
            return None;
        }
        let rows = (TOKENS / texts[longest].len()).clamp(1, order.len());
        let together = order.split_off(order.len() - rows);
        let read = |&at: &usize| Batch::text(texts[at][..texts[at].len() - 1].to_vec());
        let batch = padded(&together.iter().map(read).collect::<Vec<_>>());
        let hidden = model.forward(model.tokens(&batch), &Mask::causal(), None, Observe::Nothing).hidden;
        for (row, at) in together.into_iter().enumerate() {
            found[at] = of_row(model, hidden.clone().narrow(0, row, 1), &texts[at][1..], best);
        }
    }
    Some(found)
}

/// The likelihoods of tokens, each from the place before it of `hidden`, `[1, seq, d_model]`.
fn of_row(model: &Decoder, hidden: Tensor<3>, targets: &[u32], best: usize) -> Vec<Likelihood> {
    let places = (LOGITS / model.vocab_size().max(1)).max(1);
    let of_part = |(part, targets): (usize, &[u32])| {
        let logits = model.logits(hidden.clone().narrow(1, part * places, targets.len()));
        let all: Vec<f32> = log_softmax(logits, 2).into_data().iter::<f32>().collect();
        let of = |(row, &target): (&[f32], &u32)| Likelihood {
            log_probability: row[target as usize],
            best: likeliest(row, best),
        };
        all.chunks(model.vocab_size()).zip(targets).map(of).collect::<Vec<_>>()
    };
    targets.chunks(places).enumerate().flat_map(of_part).collect()
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
        let texts = [vec![3, 1, 4, 1, 5, 8, 0, 2], vec![], vec![3], vec![7, 7, 7], vec![6, 2]];
        let found = likelihoods(&model, &texts, 9, &|| true).unwrap();
        for (text, found) in texts.iter().zip(&found) {
            assert_eq!(found.len(), text.len().saturating_sub(1));
            let sum: f64 = found.iter().map(|of| f64::from(of.log_probability)).sum();
            let loss = if found.is_empty() { 0.0 } else { model.evaluate(&Batch::text(text.clone())).loss };
            assert!((sum + loss).abs() < 1e-4, "{text:?}");
            // All of the vocabulary, best first, is a distribution in which the token itself is.
            for (of, &token) in found.iter().zip(text.iter().skip(1)) {
                assert!((of.best.iter().map(|(_, value)| value.exp()).sum::<f32>() - 1.0).abs() < 1e-5);
                assert!(of.best.is_sorted_by(|a, b| a.1 >= b.1) && of.best.contains(&(token, of.log_probability)));
            }
        }
        // More than one pass gives the same.
        let many = vec![texts[0].clone(); 3 * TOKENS / 8];
        let found_again = likelihoods(&model, &many, 9, &|| true).unwrap();
        assert!(
            found_again.iter().all(|of| {
                of.iter().zip(&found[0]).all(|(a, b)| (a.log_probability - b.log_probability).abs() < 1e-5)
            })
        );
        assert_eq!(likelihoods(&model, &texts, 1, &|| false), None);
    }

    #[test]
    fn of_equal_ones_the_smaller_id_comes_first() {
        assert_eq!(likeliest(&[1.0, 3.0, 2.0, 3.0], 3), [(1, 3.0), (3, 3.0), (2, 2.0)]);
        assert!(likeliest(&[1.0], 0).is_empty());
    }
}
