//! Masked diffusion language models, in the form of LLaDA (Nie et al. 2025, arXiv 2502.09992): a decoder that reads its text from both
//! sides predicts tokens that are masked.
//!
//! ```text
//! training     t ~ U(0, 1) for each row, p = (1 - ε) t + ε; each token is masked with probability p
//! loss         Σ over masked tokens of -log p(token) / p,  mean over tokens: a bound of the likelihood
//! generation   a prompt and a block of masks after another; each step fills in the masks that the model is surest of
//! ```
//! The t of a batch's rows are spread evenly from a random first one, which LLaDA draws one by one: the loss varies less.
//! The mask is one id more than the data has, the last one. Tokens that are no targets are never masked: of conversations the answers
//! alone are, as in LLaDA's fine-tuning. An evaluation masks the same tokens whenever it is repeated.
//!
//! Left out: classifier-free guidance and random remasking.

use std::sync::{Arc, OnceLock};

use burn::tensor::{Int, Tensor, TensorData};
use polyhead_attention::sparse::sparsed::{SparsedConfig, SparsedSelection, mask_step};
use polyhead_attention::sparse::{KeptBlocks, Sparse, SparseConfig};
use polyhead_attention::{ConfigError, Mask, require};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::loss::mean;
use crate::{Batch, Decoder, Evaluated, IGNORE, Loss, Pass, Sampling};

/// ε, the smallest probability with which a token is masked.
const LEAST: f64 = 1e-3;

/// How a masked diffusion model generates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DiffusionSampling {
    /// Steps in which masks are filled in, over all blocks. Default: one for each new token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<usize>,
    /// Tokens of a block; blocks are filled in one after the other. Default: all new tokens are one block.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub block_length: Option<usize>,
}

impl DiffusionSampling {
    /// Whether it says nothing.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Checks the numbers.
    ///
    /// # Errors
    /// Names the field, its value and the rule.
    pub fn validate(&self) -> Result<(), ConfigError> {
        for (field, value) in [("steps", self.steps), ("block_length", self.block_length)] {
            require(value.is_none_or(|value| (1..=1 << 24).contains(&value)), field, || {
                format!("{field} ({}) must be 1 to {}", value.unwrap_or_default(), 1 << 24)
            })?;
        }
        Ok(())
    }
}

/// A batch whose tokens are masked.
struct Noised {
    batch: Batch,
    /// Of each row, the probability with which a token was masked.
    rates: Vec<f64>,
    /// Tokens that could have been masked.
    maskable: u64,
}

impl Noised {
    /// `rng` draws what is masked; of rates one for each row in even steps, beginning at `first` of one.
    fn new(batch: &Batch, mask_id: u32, rng: &mut ChaCha8Rng, first: f64) -> Self {
        let (mut tokens, mut targets) = (batch.tokens.clone(), vec![IGNORE; batch.tokens.len()]);
        let (mut rates, mut maskable) = (Vec::with_capacity(batch.batch), 0);
        for row in 0..batch.batch {
            let t = (first + row as f64 / batch.batch as f64).fract();
            let rate = (1.0 - LEAST) * t + LEAST;
            rates.push(rate);
            for at in row * batch.seq + 1..(row + 1) * batch.seq {
                // A token is a target where it is to be predicted from the one before it.
                let drawn = rng.random::<f64>();
                if batch.targets[at - 1] == IGNORE {
                    continue;
                }
                maskable += 1;
                if drawn < rate {
                    (tokens[at], targets[at]) = (mask_id, i64::from(batch.tokens[at]));
                }
            }
        }
        Self { batch: Batch { tokens, targets, ..batch.clone() }, rates, maskable }
    }
}

/// Who sees whom: everybody, within a document.
fn mask(batch: &Batch) -> Mask {
    match &batch.documents {
        Some(documents) => Mask::none().with_documents(documents),
        None => Mask::none(),
    }
}

impl Decoder {
    /// Whether it predicts masked tokens.
    pub fn is_masked_diffusion(&self) -> bool {
        self.config().masked_diffusion
    }

    /// The id of the mask.
    fn mask_id(&self) -> u32 {
        self.vocab_size() as u32
    }

    /// The training loss of a batch, in which masks are drawn from the device's stream: a sum as over its targets.
    pub(crate) fn diffusion_loss(&self, batch: &Batch) -> Loss {
        let draw = || {
            f64::from(
                polyhead_kernels::random::<1>([1], burn::tensor::Distribution::Uniform(0.0, 1.0), &self.device())
                    .into_scalar::<f32>(),
            )
        };
        let (seed, first) = ((draw() * f64::from(1u32 << 24)) as u64, draw());
        let seed = seed << 24 | (draw() * f64::from(1u32 << 24)) as u64;
        let noised = Noised::new(batch, self.mask_id(), &mut ChaCha8Rng::seed_from_u64(seed), first);
        let mask = mask(batch);
        let forward = self.training_pass(&noised.batch, Pass::new(&mask));
        let share = batch.target_tokens() as f64 / noised.maskable.max(1) as f64;
        let rows = noised.rates.iter().enumerate().map(|(row, rate)| {
            let hidden = forward.hidden.clone().narrow(0, row, 1);
            self.predict(&noised.batch.row(row), hidden).sum * (share / rate)
        });
        let cross_entropy = rows.reduce(|a, b| a + b).unwrap_or_else(|| Tensor::zeros([1], &self.device()));
        let (penalty, head_overlap) = (mean(forward.penalties), self.head_overlap(forward.taps));
        Loss { penalty, seen: forward.seen, head_overlap, ..Loss::of(cross_entropy) }
    }

    /// The sums of a batch, with masks that its tokens decide: the bound of its likelihood, and as accuracy the share of masked tokens
    /// that are the first choice.
    pub(crate) fn evaluate_diffusion(&self, batch: &Batch) -> Evaluated {
        // FNV-1a of the tokens.
        let seed = batch
            .tokens
            .iter()
            .fold(0xcbf2_9ce4_8422_2325u64, |hash, &id| (hash ^ u64::from(id)).wrapping_mul(0x0100_0000_01b3));
        let noised =
            Noised::new(batch, self.mask_id(), &mut ChaCha8Rng::seed_from_u64(seed), 0.5 / batch.batch.max(1) as f64);
        let out = self.predict(&noised.batch, self.pass(self.tokens(&noised.batch), Pass::new(&mask(batch))).hidden);
        let (targets, masked) = (batch.target_tokens(), noised.batch.target_tokens().max(1) as f64);
        let losses = out.losses.into_data();
        let losses: Vec<f64> = losses.iter::<f64>().collect();
        let weighted =
            losses.chunks(batch.seq.max(1)).zip(&noised.rates).map(|(row, rate)| row.iter().sum::<f64>() / rate);
        let share = targets as f64 / noised.maskable.max(1) as f64;
        let correct: f64 = out.correct.into_data().iter::<f64>().sum();
        Evaluated {
            loss: weighted.sum::<f64>() * share,
            correct: (correct / masked * targets as f64).round() as u64,
            targets,
            bytes: batch.target_bytes,
        }
    }

    /// The tokens that a masked diffusion model puts behind a prompt (LLaDA's low-confidence remasking): as many as `sampling` allows at
    /// most. Call it on `model.valid()`. Asks `go_on` before every step; `None` once it says no.
    pub fn diffuse(
        &self,
        prompt: &[u32],
        sampling: &Sampling,
        stream: u64,
        go_on: &dyn Fn() -> bool,
    ) -> Option<Vec<u32>> {
        let (new, mask_id) = (sampling.max_new_tokens, self.mask_id());
        if new == 0 {
            return Some(Vec::new());
        }
        let block = sampling.diffusion.block_length.unwrap_or(new).min(new);
        let blocks = new.div_ceil(block);
        let steps = sampling.diffusion.steps.unwrap_or(new).clamp(blocks, new.max(blocks));
        let mut rng = ChaCha8Rng::seed_from_u64(sampling.seed);
        rng.set_stream(stream);
        let mut text = [prompt, &vec![mask_id; new]].concat();
        let mut sparse = SparsePhase::new(self, steps, new);
        for at in 0..blocks {
            let range = prompt.len() + at * block..(prompt.len() + (at + 1) * block).min(text.len());
            // Steps are shared out over blocks, and masks over the steps of a block, the first ones getting what is left over.
            let own = steps / blocks + usize::from(at < steps % blocks);
            for step in 0..own {
                if !go_on() {
                    return None;
                }
                let masked: Vec<usize> = range.clone().filter(|&token| text[token] == mask_id).collect();
                if masked.is_empty() {
                    break;
                }
                let count = masked.len().div_ceil(own - step);
                let logits = self.masked_logits(&text, sparse.next());
                let mut choices: Vec<(usize, u32, f64)> = masked
                    .into_iter()
                    .map(|token| {
                        let (id, sure) =
                            choose(&logits[token * self.vocab_size()..][..self.vocab_size()], sampling, &mut rng);
                        (token, id, sure)
                    })
                    .collect();
                choices.sort_by(|a, b| b.2.total_cmp(&a.2).then(a.0.cmp(&b.0)));
                choices.truncate(count);
                choices.into_iter().for_each(|(token, id, _)| text[token] = id);
            }
        }
        Some(text.split_off(prompt.len()))
    }

    /// `[tokens, vocab]`
    fn masked_logits(&self, text: &[u32], sparse: &[Sparse]) -> Vec<f32> {
        let ids: Vec<i32> = text.iter().map(|&id| id as i32).collect();
        let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [1, text.len()]), &self.device());
        let hidden = self.pass(ids, Pass { sparse, ..Pass::new(&Mask::none()) }).hidden;
        self.logits(hidden).into_data().iter::<f32>().collect()
    }
}

/// The token of a mask and its probability before temperature: the largest logit, with Gumbel noise where there is a temperature
/// (in f64, as the authors: f32 makes worse text).
fn choose(logits: &[f32], sampling: &Sampling, rng: &mut ChaCha8Rng) -> (u32, f64) {
    let largest = logits.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - largest).exp()).sum();
    let noisy = |logit: f32, rng: &mut ChaCha8Rng| match sampling.temperature {
        0.0 => f64::from(logit),
        temperature => {
            let uniform = rng.random::<f64>().max(f64::MIN_POSITIVE);
            f64::from(logit) - temperature * (-uniform.ln()).ln()
        }
    };
    let (mut best, mut id) = (f64::NEG_INFINITY, 0);
    for (at, &logit) in logits.iter().enumerate() {
        let value = noisy(logit, rng);
        if value > best {
            (best, id) = (value, at);
        }
    }
    (id as u32, f64::from(logits[id] - largest).exp() / sum)
}

/// What the layers are told in each step of a generation: nothing at first; from the step on that chooses blocks, those (SparseD).
struct SparsePhase {
    layers: Vec<Sparse>,
    /// Dense steps that are left.
    dense: usize,
}

impl SparsePhase {
    fn new(model: &Decoder, steps: usize, answer: usize) -> Self {
        let config = model.intervention().and_then(|intervention| intervention.sparse_config());
        let Some(&SparseConfig::Sparsed(SparsedConfig { block_size, ratio, skip })) = config else {
            return Self { layers: Vec::new(), dense: 0 };
        };
        let selection = SparsedSelection { block_size, ratio, answer };
        let layer = |_| Sparse::Kept(Arc::new(KeptBlocks { selection, mask: OnceLock::new() }));
        Self { layers: (0..model.layers.len()).map(layer).collect(), dense: mask_step(steps, skip) }
    }

    fn next(&mut self) -> &[Sparse] {
        if self.dense > 0 {
            self.dense -= 1;
            return &[];
        }
        &self.layers
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::tensor::Device;
    use polyhead_kernels::seed_random;

    use super::*;
    use crate::DecoderConfig;

    fn model(device: &Device) -> Decoder {
        let config = serde_json::json!({
            "d_model": 16, "n_layers": 2, "masked_diffusion": true, "attention": { "softmax": { "n_heads": 2 } },
        });
        let config: DecoderConfig = serde_json::from_value(config).unwrap();
        config.validate().unwrap();
        seed_random(5);
        config.init(9, device)
    }

    fn batch() -> Batch {
        let tokens: Vec<u32> = (0..64u32).map(|at| at * 7 % 9).collect();
        let targets = tokens.iter().skip(1).chain([&0]).map(|&id| i64::from(id)).collect();
        Batch { batch: 2, seq: 32, tokens, targets, target_bytes: 64, ..Batch::default() }
    }

    #[test]
    fn fresh_weights_know_nothing_and_evaluations_repeat() {
        let model = model(&Device::flex());
        assert_eq!([model.vocab_size(), model.embedding.weight.dims()[0]], [9, 10]);
        let mut tokens = batch();
        // What is no target is never masked.
        tokens.targets[..16].fill(IGNORE);
        let noised = Noised::new(&tokens, 9, &mut ChaCha8Rng::seed_from_u64(1), 0.99);
        assert_eq!(noised.batch.tokens[..17], tokens.tokens[..17]);
        assert!(noised.batch.tokens[17..32].contains(&9) && noised.maskable == 15 + 31);
        let sums = model.evaluate(&batch());
        assert_eq!(sums, model.evaluate(&batch()));
        assert_eq!(sums.targets, 64);
        // Masks are few of 62, and their weights large: near ln 10 on average.
        assert!((sums.mean_loss() - 10f64.ln()).abs() < 1.2, "{}", sums.mean_loss());
    }

    #[test]
    fn the_overlap_of_heads_is_in_the_loss_where_it_is_asked_for() {
        let model = model(&Device::flex());
        assert!(model.diffusion_loss(&batch()).head_overlap.is_none());
        let (overlap, weight) = model.with_head_overlap(0.5).diffusion_loss(&batch()).head_overlap.unwrap();
        // Fresh heads attend to all keys nearly alike, which is one map for both: 1/2.
        let overlap: f32 = overlap.into_scalar();
        assert!(weight == 0.5 && (0.4..=0.500_001).contains(&overlap), "{overlap}");
    }

    #[test]
    fn every_token_reads_both_sides() {
        let model = model(&Device::flex());
        let logits = |last: u32| model.masked_logits(&[1, 9, 3, last], &[])[9..18].to_vec();
        assert!(logits(4).iter().zip(logits(5)).any(|(a, b)| (a - b).abs() > 1e-6));
    }

    #[test]
    fn blocks_are_filled_in_one_after_the_other_and_sparse_ones_at_full_ratio_alike() {
        let model = model(&Device::flex());
        let sampling = Sampling {
            max_new_tokens: 7,
            temperature: 0.0,
            diffusion: DiffusionSampling { steps: Some(5), block_length: Some(3) },
            ..Sampling::default()
        };
        let text = model.diffuse(&[1, 2, 3], &sampling, 0, &|| true).unwrap();
        assert!(text.len() == 7 && text.iter().all(|&id| id < 9), "{text:?}");
        assert_eq!(model.diffuse(&[1, 2, 3], &sampling, 0, &|| false), None);
        let sparse = SparsedConfig { block_size: 2, ratio: 1.0, skip: 0.2 };
        let config = crate::intervention::InterventionConfig {
            sparse: Some(SparseConfig::Sparsed(sparse)),
            ..Default::default()
        };
        let intervention = crate::intervention::Intervention::new(&config, &Default::default(), &model, None).unwrap();
        assert_eq!(
            model.clone().intervened(Some(intervention)).diffuse(&[1, 2, 3], &sampling, 0, &|| true),
            Some(text)
        );
        let mut phase = SparsePhase::new(&model, 5, 7);
        assert!(phase.next().is_empty());
    }
}
