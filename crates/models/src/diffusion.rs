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
//! alone are, as in LLaDA's fine-tuning. An evaluation masks the same tokens whenever it is repeated; under SparseD it reads each row as
//! a generation would that has come as far.
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
#[derive(Debug, Clone)]
pub struct MaskedBatch {
    batch: Batch,
    /// Of each row, the probability with which a token was masked.
    rates: Vec<f64>,
    /// Tokens that could have been masked.
    maskable: u64,
    /// Targets of the batch before.
    targets: u64,
}

impl MaskedBatch {
    /// From the probability with which tokens of each row were masked, and what says of each token that can be masked, by its place in
    /// `[batch, seq]` and its row's probability, whether it is. A token can be where it is to be predicted from the one before it.
    ///
    /// # Panics
    /// If there are not as many rates as rows.
    pub fn new(batch: &Batch, mask_id: u32, rates: Vec<f64>, mut masked: impl FnMut(usize, f64) -> bool) -> Self {
        assert!(rates.len() == batch.batch, "masked batch: {} rates for {} rows", rates.len(), batch.batch);
        let (mut tokens, mut targets, mut maskable) = (batch.tokens.clone(), vec![IGNORE; batch.tokens.len()], 0);
        for (row, &rate) in rates.iter().enumerate() {
            for at in row * batch.seq + 1..(row + 1) * batch.seq {
                if batch.targets[at - 1] == IGNORE {
                    continue;
                }
                maskable += 1;
                if masked(at, rate) {
                    (tokens[at], targets[at]) = (mask_id, i64::from(batch.tokens[at]));
                }
            }
        }
        Self { batch: Batch { tokens, targets, ..batch.clone() }, rates, maskable, targets: batch.target_tokens() }
    }

    /// `draws` say what is masked; of rates one for each row in even steps, beginning at `first` of one.
    fn drawn(batch: &Batch, mask_id: u32, draws: &[f64], first: f64) -> Self {
        let rate = |row: usize| (1.0 - LEAST) * (first + row as f64 / batch.batch as f64).fract() + LEAST;
        Self::new(batch, mask_id, (0..batch.batch).map(rate).collect(), |at, rate| draws[at] < rate)
    }

    /// Targets of the batch for each token that could have been masked: what makes a mean over those a sum over these.
    fn share(&self) -> f64 {
        self.targets as f64 / self.maskable.max(1) as f64
    }
}

/// `[batch, seq]`: the rate from which on each token is masked; the first of a row, which is predicted from nothing, never.
fn draws(batch: &Batch, seed: u64) -> Vec<f64> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let draw = |at: usize| if at.is_multiple_of(batch.seq) { 1.0 } else { rng.random() };
    (0..batch.tokens.len()).map(draw).collect()
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

    /// Who sees whom in a text: everybody, or every token those before it.
    pub fn mask_of_text(&self) -> Mask {
        if self.is_masked_diffusion() { Mask::none() } else { Mask::causal() }
    }

    /// The id of the mask: one behind those of the data.
    pub fn mask_id(&self) -> u32 {
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
        self.loss_of_masked(&MaskedBatch::drawn(batch, self.mask_id(), &draws(batch, seed), first))
    }

    /// The training loss of a batch with these masks: a sum as over the targets of the batch, so that its mean over them is the bound of
    /// the likelihood, in nats per token that can be masked.
    pub fn loss_of_masked(&self, masked: &MaskedBatch) -> Loss {
        let mask = mask(&masked.batch);
        let forward = self.training_pass(&masked.batch, Pass::new(&mask));
        let rows = masked.rates.iter().enumerate().map(|(row, rate)| {
            let hidden = forward.hidden.clone().narrow(0, row, 1);
            self.predict(&masked.batch.row(row), hidden).sum * (masked.share() / rate)
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
        let draws = draws(batch, seed);
        let masked = MaskedBatch::drawn(batch, self.mask_id(), &draws, 0.5 / batch.batch.max(1) as f64);
        let hidden = match self.sparsed() {
            None => self.hidden_of(&masked.batch, &[]),
            Some(config) => {
                let row = |row| self.hidden_of_row(batch, &masked, row, &draws, config);
                Tensor::cat((0..batch.batch).map(row).collect(), 0)
            }
        };
        let out = self.predict(&masked.batch, hidden);
        let losses = out.losses.into_data();
        let losses: Vec<f64> = losses.iter::<f64>().collect();
        let weighted =
            losses.chunks(batch.seq.max(1)).zip(&masked.rates).map(|(row, rate)| row.iter().sum::<f64>() / rate);
        let correct: f64 = out.correct.into_data().iter::<f64>().sum();
        Evaluated {
            loss: weighted.sum::<f64>() * masked.share(),
            correct: (correct / masked.batch.target_tokens().max(1) as f64 * masked.targets as f64).round() as u64,
            targets: masked.targets,
            bytes: batch.target_bytes,
        }
    }

    /// `[batch, seq, d_model]`
    fn hidden_of(&self, batch: &Batch, sparse: &[Sparse]) -> Tensor<3> {
        self.pass(self.tokens(batch), Pass { sparse, ..Pass::new(&mask(batch)) }).hidden
    }

    /// `[1, seq, d_model]`: a masked row as a generation would read it that has come as far: while its first steps last, in which more
    /// than 1 - `skip` is masked, all of it; later the blocks that the last of those has chosen.
    fn hidden_of_row(
        &self,
        batch: &Batch,
        masked: &MaskedBatch,
        row: usize,
        draws: &[f64],
        config: SparsedConfig,
    ) -> Tensor<3> {
        let (own, earlier) = (masked.batch.row(row), 1.0 - config.skip);
        if masked.rates[row] > earlier {
            return self.hidden_of(&own, &[]);
        }
        let (whole, draws) = (batch.row(row), &draws[row * batch.seq..]);
        let prompt = whole.targets.iter().take_while(|&&target| target == IGNORE).count();
        let layers = self.kept_blocks(config, whole.seq - prompt);
        let chosen_on = MaskedBatch::new(&whole, self.mask_id(), vec![earlier], |at, rate| draws[at] < rate);
        let _ = self.hidden_of(&chosen_on.batch, &layers);
        self.hidden_of(&own, &layers)
    }

    /// The settings of SparseD, where this model reads by it.
    fn sparsed(&self) -> Option<SparsedConfig> {
        match self.intervention()?.sparse_config()? {
            SparseConfig::Sparsed(config) => Some(*config),
            _ => None,
        }
    }

    /// What layers are told whose next pass is to choose blocks, for itself and all later ones; the answer is the end of the text.
    fn kept_blocks(&self, SparsedConfig { block_size, ratio, .. }: SparsedConfig, answer: usize) -> Vec<Sparse> {
        let selection = SparsedSelection { block_size, ratio, answer };
        let layer = |_| Sparse::Kept(Arc::new(KeptBlocks { selection, mask: OnceLock::new() }));
        self.layers.iter().map(layer).collect()
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
        match model.sparsed() {
            Some(config) => Self { layers: model.kept_blocks(config, answer), dense: mask_step(steps, config.skip) },
            None => Self { layers: Vec::new(), dense: 0 },
        }
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
    use polyhead_attention::AttentionConfig;
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
        let masked = MaskedBatch::drawn(&tokens, 9, &draws(&tokens, 1), 0.99);
        assert_eq!(masked.batch.tokens[..17], tokens.tokens[..17]);
        assert!(masked.batch.tokens[17..32].contains(&9) && masked.maskable == 15 + 31);
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

    /// Every mechanism of the table reads tokens behind a mask, or is refused by name.
    #[test]
    fn every_token_reads_both_sides_whatever_the_mechanism() {
        let mut refused = Vec::new();
        for mechanism in AttentionConfig::examples() {
            let name = mechanism.name();
            let config =
                serde_json::json!({ "d_model": 24, "n_layers": 4, "masked_diffusion": true, "attention": mechanism });
            let config: DecoderConfig = serde_json::from_value(config).unwrap();
            if let Err(error) = config.validate() {
                assert!(error.to_string().contains(name), "{name}: {error}");
                refused.push(name);
                continue;
            }
            seed_random(5);
            let model = config.init(9, &Device::flex());
            let logits = |last: u32| model.masked_logits(&[1, 9, 3, last], &[])[9..18].to_vec();
            assert!(logits(4).iter().zip(logits(5)).any(|(a, b)| (a - b).abs() > 1e-6), "{name}");
        }
        assert_eq!(refused, ["hilo", "gated_delta_net"]);
    }

    fn reading_blocks(model: &Decoder, config: SparsedConfig) -> Decoder {
        let config = crate::intervention::InterventionConfig {
            sparse: Some(SparseConfig::Sparsed(config)),
            ..Default::default()
        };
        let intervention = crate::intervention::Intervention::new(&config, &Default::default(), model, None).unwrap();
        model.clone().intervened(Some(intervention))
    }

    /// Rows are masked at 0.25 and 0.75: of a generation whose dense steps end at 0.5 the first would read blocks, the second all.
    #[test]
    fn an_evaluation_reads_blocks_where_a_generation_would() {
        let (model, batch) = (model(&Device::flex()), batch());
        let loss = |ratio, skip, batch: &Batch| {
            reading_blocks(&model, SparsedConfig { block_size: 4, ratio, skip }).evaluate(batch).loss
        };
        let dense = model.evaluate(&batch).loss;
        assert!((loss(1.0, 0.0, &batch) - dense).abs() < 1e-5 * dense);
        let [all, most, some, none] = [0.0, 0.2, 0.5, 1.0].map(|skip| loss(0.1, skip, &batch));
        assert!((none - dense).abs() < 1e-6 * dense, "{none} {dense}");
        assert!(
            (all - dense).abs() > 1e-5 * dense && (some - dense).abs() > 1e-5 * dense && some != all && most != some
        );
        let halves = Batch { documents: Some([vec![0; 16], vec![1; 16]].concat().repeat(2)), ..batch };
        let dense = model.evaluate(&halves).loss;
        assert!((loss(1.0, 0.0, &halves) - dense).abs() < 1e-5 * dense);
        assert!((loss(0.1, 0.0, &halves) - dense).abs() > 1e-5 * dense);
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
        let sparse = reading_blocks(&model, SparsedConfig { block_size: 2, ratio: 1.0, skip: 0.2 });
        assert_eq!(sparse.diffuse(&[1, 2, 3], &sampling, 0, &|| true), Some(text));
        let mut phase = SparsePhase::new(&model, 5, 7);
        assert!(phase.next().is_empty());
    }
}
