//! Settings of the loop, as recipes write them.

use polyhead_models::{ActivationCheckpointing, Precision};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `[training]`: how long, on how much at once.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TrainingConfig {
    /// Optimiser steps.
    pub steps: u64,
    /// Tokens per row; for texts with classes, tokens of a text at most. Images and features have none.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub seq_len: usize,
    /// Rows per forward pass.
    pub batch_size: usize,
    /// Forward passes per optimiser step, on all ranks together; their gradients are averaged over all their targets. Default: 1.
    #[serde(default = "one")]
    pub gradient_accumulation_steps: usize,
    /// Gradients are scaled down to this global norm; 0 switches clipping off. Default: 1.
    #[serde(default = "max_norm")]
    pub max_norm: f64,
    /// What happens when a loss or a gradient is not a number: "stop" (default) ends the run with the last good state
    /// saved, "skip" leaves the step out and counts it. The weights never see it.
    #[serde(default)]
    pub on_nonfinite: OnNonfinite,
    /// With on_nonfinite = "skip": steps in a row that may be left out before the run ends, saved; 0 sets no limit. While steps are
    /// left out the weights do not move, so that what follows such a row is more of it. Default: 10.
    #[serde(default = "max_skipped_steps", skip_serializing_if = "is_usual")]
    pub max_skipped_steps: u64,
    /// "flex" (CPU, default); or, where compiled in, "cuda" (NVIDIA), "wgpu" (GPUs of all makers), "vulkan", "metal", each with ":N"
    /// for the GPU of that number; "wgpu:cpu", a software driver for tests; "ndarray", another CPU backend.
    #[serde(default = "device")]
    pub device: String,
    /// Whether attention in bf16 may run on the tensor cores of NVIDIA's GPUs, which takes a build with `cuda-nvrtc`; false leaves it to
    /// the kernels that run on every GPU. Default: true.
    #[serde(default = "yes", skip_serializing_if = "is_true")]
    pub tensor_cores: bool,
    /// What multiplies in linear maps on NVIDIA's GPUs: "burn" (default), kernels of Burn's, or "cublaslt", NVIDIA's library, which takes a
    /// build with `cuda-nvrtc`. The head is Burn's in both.
    #[serde(default, skip_serializing_if = "is_burn")]
    pub products: Products,
    /// What products run in: "f32" (default) or "bf16". Weights and optimiser stay f32.
    #[serde(default)]
    pub precision: Precision,
    /// The rate of dropout on the embedded input and on what attention and feed-forward layers write. Default: 0.
    #[serde(default, skip_serializing_if = "is_off")]
    pub dropout: f64,
    /// The rate of dropout on a decoder's embedded input, where it is another one. Default: training.dropout.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub embedding_dropout: Option<f64>,
    /// What the forward pass keeps for the backward pass: "none" (default) keeps all activations; "block" keeps what each layer
    /// reads and runs the layer again, which takes less memory and more time, and gives the same weights to the bit.
    #[serde(default, skip_serializing_if = "keeps_all")]
    pub activation_checkpointing: ActivationCheckpointing,
    /// Update each layer of a decoder as soon as the backward pass has gone through it, and give up its gradients, so that those of one
    /// layer and of the embedding are there at once. The same weights to the bit, without clipping (max_norm = 0) and accumulation.
    /// Default: false.
    #[serde(default, skip_serializing_if = "is_false")]
    pub optimizer_in_backward: bool,
    /// Weight of a mechanism's auxiliary loss, where it has one. Default: 0.01.
    #[serde(default = "penalty_weight")]
    pub penalty_weight: f64,
    /// Weight in a decoder's loss of how much the attention maps of its heads overlap (A-STAR, arXiv 2306.14544), the mean over layers and
    /// pairs of heads: heads are made to attend to different places. Maps are made as matrices for it. Default: 0, off.
    #[serde(default, skip_serializing_if = "is_off")]
    pub head_overlap: f64,
}

fn keeps_all(checkpointing: &ActivationCheckpointing) -> bool {
    *checkpointing == ActivationCheckpointing::None
}

fn is_false(value: &bool) -> bool {
    !value
}

fn is_true(value: &bool) -> bool {
    *value
}

fn yes() -> bool {
    true
}

fn one() -> usize {
    1
}

fn is_burn(products: &Products) -> bool {
    *products == Products::Burn
}

fn is_zero(value: &usize) -> bool {
    *value == 0
}

fn is_off(rate: &f64) -> bool {
    *rate == 0.0
}

/// Chosen by us.
fn max_skipped_steps() -> u64 {
    10
}

fn is_usual(max_skipped_steps: &u64) -> bool {
    *max_skipped_steps == self::max_skipped_steps()
}

fn max_norm() -> f64 {
    1.0
}

fn device() -> String {
    "flex".into()
}

fn penalty_weight() -> f64 {
    0.01
}

/// What multiplies matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Products {
    /// Kernels of Burn's.
    #[default]
    Burn,
    /// cuBLASLt.
    Cublaslt,
}

/// What to do about a loss or gradient that is not finite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnNonfinite {
    /// End the run.
    #[default]
    Stop,
    /// Leave the step out.
    Skip,
}

/// `[optimizer]`: one of its tables.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerConfig {
    /// AdamW (arXiv 1711.05101), with PyTorch's defaults.
    Adamw(AdamwConfig),
    /// Muon for the matrices of the layers, AdamW for everything else.
    Muon(MuonConfig),
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self::Adamw(AdamwConfig::default())
    }
}

/// Settings of AdamW.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AdamwConfig {
    /// Largest learning rate of the schedule. Default: 1e-3, as PyTorch.
    pub lr: f64,
    /// Decay of the first moment. Default: 0.9.
    pub beta1: f64,
    /// Decay of the second moment. Default: 0.999.
    pub beta2: f64,
    /// Added to the root of the second moment. Default: 1e-8.
    pub eps: f64,
    /// Decoupled weight decay, multiplied by the learning rate. Default: 0.01.
    pub weight_decay: f64,
    /// Decay parameters of one dimension (norms, biases, λ) too. Default: false.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub decay_vectors: bool,
}

impl Default for AdamwConfig {
    fn default() -> Self {
        Self { lr: 1e-3, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, decay_vectors: false }
    }
}

/// Settings of Muon (Jordan et al. 2024; scaled as in arXiv 2502.16982 so that AdamW's learning rates carry over).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MuonConfig {
    /// Largest learning rate of the schedule, for Muon and AdamW alike. Default: 1e-3.
    pub lr: f64,
    /// Momentum (Nesterov). Default: 0.95.
    pub momentum: f64,
    /// Decoupled weight decay. Default: 0.1.
    pub weight_decay: f64,
    /// AdamW's first-moment decay for embeddings, head and vectors. Default: 0.9.
    pub beta1: f64,
    /// AdamW's second-moment decay for embeddings, head and vectors. Default: 0.95.
    pub beta2: f64,
    /// AdamW's epsilon. Default: 1e-8.
    pub eps: f64,
}

impl Default for MuonConfig {
    fn default() -> Self {
        Self { lr: 1e-3, momentum: 0.95, weight_decay: 0.1, beta1: 0.9, beta2: 0.95, eps: 1e-8 }
    }
}

impl OptimizerConfig {
    /// Largest learning rate of the schedule.
    pub fn lr(&self) -> f64 {
        match self {
            Self::Adamw(adamw) => adamw.lr,
            Self::Muon(muon) => muon.lr,
        }
    }
}

/// `[lr_scheduler]`: the learning rate over the steps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LrSchedulerConfig {
    /// The shape after the warm-up. Default: "cosine".
    pub decay: Decay,
    /// Steps over which the rate rises linearly from 0. Default: 0.
    pub warmup_steps: u64,
    /// The last rate as a share of the largest. Default: 0.1.
    pub min_lr_ratio: f64,
    /// Steps over which the rate is held after the warm-up; those of an epoch make the decay one by epochs, whose first goes at the
    /// full rate, as with PyTorch's schedulers. Default: 1.
    #[serde(skip_serializing_if = "is_one")]
    pub hold_steps: u64,
    /// For "wsd": steps of the final linear decay. Default: a fifth of all steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decay_steps: Option<u64>,
}

impl Default for LrSchedulerConfig {
    fn default() -> Self {
        Self { decay: Decay::Cosine, warmup_steps: 0, min_lr_ratio: 0.1, hold_steps: 1, decay_steps: None }
    }
}

fn is_one(steps: &u64) -> bool {
    *steps == 1
}

/// How the learning rate falls after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Decay {
    /// It does not.
    Constant,
    /// On a line to the last step.
    Linear,
    /// On half a cosine to the last step.
    Cosine,
    /// Warm-up, stable, then a line over the last decay_steps.
    Wsd,
}

/// `[validation]`: how well the model does on text it does not train on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ValidationConfig {
    /// Steps between two validations; 0 validates at the end only. Default: 250.
    pub interval: u64,
    /// Batches per validation at most; 0 takes all. Default: 20.
    pub batches: u64,
    /// Share of the text kept for validation. Default: 0.05.
    pub fraction: f64,
    /// End the run once a validation's accuracy is at least this. Default: never.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_accuracy: Option<f64>,
}

impl Default for ValidationConfig {
    fn default() -> Self {
        Self { interval: 250, batches: 20, fraction: 0.05, stop_accuracy: None }
    }
}

/// `[checkpoint]`: when the run is saved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CheckpointConfig {
    /// Steps between two checkpoints; 0 saves at the end (and when interrupted) only. Default: 500.
    pub interval: u64,
    /// How many of the latest to keep besides the best; 0 keeps all. Default: 2.
    pub keep_latest_k: usize,
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self { interval: 500, keep_latest_k: 2 }
    }
}

/// `[metrics]`: what is written down.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct MetricsConfig {
    /// Steps between two log lines. Default: 10.
    pub log_freq: u64,
    /// Write TensorBoard event files. Default: true.
    pub tensorboard: bool,
    /// Observe attention on a held-out row: with each validation numbers per head and histograms of weights, and every
    /// image_interval steps maps. Default: true.
    pub observe: bool,
    /// Steps between two images of the attention maps in TensorBoard; 0 draws them at the end only. Default: 250.
    pub image_interval: u64,
    /// For decoders: steps between two measurements of every head on held-out rows (importance, first key, previous, duplicate and
    /// induction scores), before the first step too; 0 (default) leaves them out.
    #[serde(skip_serializing_if = "is_never")]
    pub heads_interval: u64,
}

fn is_never(interval: &u64) -> bool {
    *interval == 0
}

impl Default for MetricsConfig {
    fn default() -> Self {
        Self { log_freq: 10, tensorboard: true, observe: true, image_interval: 250, heads_interval: 0 }
    }
}

/// `[parallel]`: several processes ("ranks"), on one machine or many, train one model together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ParallelConfig {
    /// What is divided among the ranks that a launcher such as mpirun starts: "none" (default): there is one rank; "data": every rank
    /// has the whole model and takes its share of each step's training.gradient_accumulation_steps forward passes.
    pub mode: ParallelMode,
    /// Who keeps the state of the optimizer: "none" (default): every rank all of it; "zero1": every rank that of the parameters that it
    /// updates for all (ZeRO stage 1, arXiv 1910.02054). The weights are the same to the bit.
    pub optimizer_sharding: OptimizerSharding,
    /// How gradients are added up: "ordered" (default): after every forward pass, in the order of the data, which gives the same bits
    /// for every number of ranks; "fast": each rank adds up its own first, so that they are sent once a step.
    pub gradient_reduction: GradientReduction,
    /// Whether the gradients of a decoder travel while the backward pass goes on, by a thread of their own; the bits are the same.
    /// Default: true.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overlap: Option<bool>,
}

impl ParallelConfig {
    /// Whether it says nothing.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// What is divided among ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ParallelMode {
    /// Nothing: there is one.
    #[default]
    None,
    /// The batches of a step.
    Data,
}

/// Who keeps the state of the optimizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerSharding {
    /// Every rank all of it.
    #[default]
    None,
    /// Every rank that of its own parameters.
    Zero1,
}

/// How the gradients of several ranks are added up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum GradientReduction {
    /// Pass by pass, in the order of the data.
    #[default]
    Ordered,
    /// Rank by rank, once a step.
    Fast,
}

/// `[debug]`: randomness.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct DebugConfig {
    /// Decides initial weights and the order of the data. Default: 0.
    pub seed: u64,
}
