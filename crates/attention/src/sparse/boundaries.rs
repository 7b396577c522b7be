//! Where the chunks of DHSA begin (Xiong et al. 2025, arXiv 2510.24606; the authors' code `legacy/boundary_predictor`, commit cc8e9c7).
//!
//! A boundary is a gap between two tokens at which later queries change their minds: they give much more weight to the `w` keys on
//! one side than to those on the other.
//!
//! ```text
//! ratio_i = (larger + 1e-6) / (smaller + 1e-6)    of the weight that queries from i + w on give to keys i-w+1..i and i+1..i+w
//! label   = σ(α (ln(ratio + 1e-6) - ln β)) ≥ ½
//! logit_i = MLP[l, r, |l - r|, l * r, cos(l, r)]  of keys alone: l and r are the two windows, encoded together and pooled
//! loss    = focal cross-entropy, mean over gaps that are 2 w away from the ends
//! ```
//! Boundaries are the highest logits that are more than `min_distance` apart. One predictor serves all layers, as the authors train it.
//! Windows are filled up with zeros at the ends, which take part as keys.

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::activation::{relu, sigmoid, softmax, softplus};
use burn::tensor::{Bool, Device, Tensor, TensorData};
use polyhead_kernels::{AttentionOptions, attention, layer_norm, total};
use serde::{Deserialize, Serialize};

use super::{largest, numbers};
use crate::{ConfigError, linear, require, require_positive, require_range};

/// The predictor of boundaries.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct PredictorConfig {
    /// Keys of a window on each side of a gap. Default: 4.
    pub window: usize,
    /// Channels inside the MLP. Default: 256.
    pub hidden: usize,
    /// Heads of the encoder, which must divide the channels of a layer's keys. Default: 4.
    pub n_heads: usize,
    /// Pool each window by a learned gate instead of its mean. Default: false.
    pub gated_pooling: bool,
}

impl Default for PredictorConfig {
    fn default() -> Self {
        Self { window: 4, hidden: 256, n_heads: 4, gated_pooling: false }
    }
}

impl PredictorConfig {
    /// Checks the numbers, for keys of `channels` channels in all heads where they are known.
    ///
    /// # Errors
    /// Names the field, its value and the rule.
    pub fn validate(&self, channels: Option<usize>) -> Result<(), ConfigError> {
        require_range("window", self.window, 1..=1 << 10)?;
        require_range("hidden", self.hidden, 1..=1 << 16)?;
        require_range("n_heads", self.n_heads, 1..=1 << 16)?;
        require(channels.is_none_or(|channels| channels.is_multiple_of(self.n_heads)), "n_heads", || {
            let channels = channels.unwrap_or_default();
            format!(
                "n_heads ({}) must divide the channels of a layer's keys, n_kv_heads times head_dim ({channels})",
                self.n_heads
            )
        })
    }

    /// A fresh predictor for keys of `channels` channels in all heads.
    pub fn init(&self, channels: usize, device: &Device) -> BoundaryPredictor {
        let layer =
            |d_input: usize, d_output, bias| linear(d_input, d_output, bias, (d_input as f64).powf(-0.5), device);
        BoundaryPredictor {
            qkv_proj: layer(channels, 3 * channels, true),
            out_proj: layer(channels, channels, true),
            norm_weight: Param::from_tensor(Tensor::ones([channels], device)),
            norm_bias: Param::from_tensor(Tensor::zeros([channels], device)),
            gate: self.gated_pooling.then(|| layer(channels, 1, false)),
            up_proj: layer(4 * channels + 1, self.hidden, true),
            down_proj: layer(self.hidden, 1, true),
            window: self.window,
            n_heads: self.n_heads,
        }
    }
}

/// A predictor of boundaries, from the keys of a layer.
#[derive(Module, Debug)]
pub struct BoundaryPredictor {
    /// `[channels, 3 channels]`: queries, keys and values of the encoder
    pub qkv_proj: Linear,
    /// `[channels, channels]`
    pub out_proj: Linear,
    /// `[channels]`
    pub norm_weight: Param<Tensor<1>>,
    /// `[channels]`
    pub norm_bias: Param<Tensor<1>>,
    /// `[channels, 1]`; `None` where windows are pooled by their means
    pub gate: Option<Linear>,
    /// `[4 channels + 1, hidden]`
    pub up_proj: Linear,
    /// `[hidden, 1]`
    pub down_proj: Linear,
    window: usize,
    n_heads: usize,
}

impl BoundaryPredictor {
    /// `[batch, seq]`: the logit of a boundary behind each token, from rotated keys, `[batch, kv_heads, seq, width]`.
    pub fn logits(&self, keys: Tensor<4>) -> Tensor<2> {
        let ([batch, heads, seq, width], device) = (keys.dims(), keys.device());
        let (channels, both) = (heads * width, 2 * self.window);
        let keys = keys.swap_dims(1, 2).reshape([batch, seq, channels]);
        let zeros = |rows| Tensor::<3>::zeros([batch, rows, channels], &device);
        let filled = Tensor::cat(vec![zeros(self.window - 1), keys, zeros(self.window)], 1);
        let project =
            |layer: &Linear, x| polyhead_kernels::linear(x, layer.weight.val(), layer.bias.as_ref().map(Param::val));
        // Of every gap the rows of both windows: `[batch * seq, both, ..]`.
        let qkv: Tensor<3> = project(&self.qkv_proj, filled);
        let windows = (0..both).map(|at| qkv.clone().narrow(1, at, seq).unsqueeze_dim::<4>(2)).collect();
        let windows =
            Tensor::<4>::cat(windows, 2).reshape([batch * seq, both, 3, self.n_heads, channels / self.n_heads]);
        let part = |at| windows.clone().narrow(2, at, 1).squeeze_dim::<4>(2).swap_dims(1, 2);
        let encoded = attention(part(0), part(1), part(2), &AttentionOptions::default()).hidden;
        let encoded: Tensor<3> =
            project(&self.out_proj, encoded.swap_dims(1, 2).reshape([batch * seq, both, channels]));
        let encoded = layer_norm(encoded, self.norm_weight.val(), self.norm_bias.val(), 1e-5);
        let pooled = |from| {
            let side = encoded.clone().narrow(1, from, self.window);
            let pooled = match &self.gate {
                Some(gate) => (softmax(side.clone().matmul(gate.weight.val().unsqueeze()), 1) * side).sum_dim(1),
                None => side.mean_dim(1),
            };
            pooled.squeeze_dim::<2>(1)
        };
        let (left, right) = (pooled(0), pooled(self.window));
        let length = |x: &Tensor<2>| x.clone().square().sum_dim(1).sqrt();
        let product = left.clone() * right.clone();
        let cosine = product.clone().sum_dim(1) / (length(&left) * length(&right)).clamp_min(1e-6);
        let features = Tensor::cat(vec![left.clone(), right.clone(), (left - right).abs(), product, cosine], 1);
        let hidden: Tensor<2> = relu(project_rows(&self.up_proj, features));
        project_rows(&self.down_proj, hidden).reshape([batch, seq])
    }

    /// Keys on each side of a gap.
    pub fn window(&self) -> usize {
        self.window
    }
}

fn project_rows(layer: &Linear, x: Tensor<2>) -> Tensor<2> {
    polyhead_kernels::linear(x, layer.weight.val(), layer.bias.as_ref().map(Param::val))
}

/// `[seq]`: of every gap how much more weight later queries give to one side, by `[seq, seq]` the mean of the heads' causal weights; 0
/// where it is closer than 2 `window` to an end. With `reach`, only that many later queries count.
pub fn mass_ratios(weights: &[f32], window: usize, reach: Option<usize>) -> Vec<f64> {
    const EPS: f64 = 1e-6;
    let seq = weights.len().isqrt();
    // sums[r][c]: of all rows before r and columns before c
    let mut sums = vec![0.0f64; (seq + 1) * (seq + 1)];
    for row in 0..seq {
        let mut of_row = 0.0;
        for column in 0..seq {
            of_row += f64::from(weights[row * seq + column]);
            sums[(row + 1) * (seq + 1) + column + 1] = sums[row * (seq + 1) + column + 1] + of_row;
        }
    }
    let within = |rows: [usize; 2], columns: [usize; 2]| {
        let at = |row: usize, column: usize| sums[row * (seq + 1) + column];
        at(rows[1], columns[1]) - at(rows[0], columns[1]) - at(rows[1], columns[0]) + at(rows[0], columns[0])
    };
    let labelled = labelled_gaps(seq, window);
    let ratio = |gap: usize| {
        let from = gap + window;
        let rows = [from, reach.map_or(seq, |reach| (from + reach).min(seq))];
        let (past, future) = (within(rows, [gap + 1 - window, gap + 1]), within(rows, [gap + 1, gap + 1 + window]));
        (past.max(future) + EPS) / (past.min(future) + EPS)
    };
    (0..seq).map(|gap| if labelled.contains(&gap) { ratio(gap) } else { 0.0 }).collect()
}

/// The gaps that have a label: those at least 2 `window` away from both ends.
pub fn labelled_gaps(seq: usize, window: usize) -> std::ops::Range<usize> {
    2 * window - 1..seq.saturating_sub(2 * window).max(2 * window - 1)
}

/// What labels and the loss are made with.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct LabelConfig {
    /// α, the steepness of soft labels. Default: 2.
    pub steepness: f64,
    /// β, the ratio of a soft label of ½, above which a gap is a boundary. Default: 2.
    pub ratio: f64,
    /// γ of the focal loss. Default: 2.
    pub focal_gamma: f64,
    /// Weight of boundaries in the loss. Default: 1.3.
    pub positive_weight: f64,
}

impl Default for LabelConfig {
    fn default() -> Self {
        Self { steepness: 2.0, ratio: 2.0, focal_gamma: 2.0, positive_weight: 1.3 }
    }
}

impl LabelConfig {
    /// Checks the numbers.
    ///
    /// # Errors
    /// Names the field, its value and the rule.
    pub fn validate(&self) -> Result<(), ConfigError> {
        require_positive("steepness", self.steepness)?;
        require_positive("ratio", self.ratio)?;
        require_range("focal_gamma", self.focal_gamma, 0.0..=100.0)?;
        require_positive("positive_weight", self.positive_weight)
    }

    /// The soft label of a gap, 0 to 1; a boundary from ½ on.
    pub fn soft(&self, ratio: f64) -> f64 {
        let logit = self.steepness * ((ratio.max(1.0) + 1e-6).ln() - (self.ratio + 1e-6).ln());
        1.0 / (1.0 + (-logit).exp())
    }

    /// `[1]`: the focal cross-entropy of logits, `[batch, seq]`, with labels from 0 to 1, summed over the gaps where `counted`.
    pub fn loss(&self, logits: Tensor<2>, labels: &[f32], counted: &[bool]) -> Tensor<1> {
        let (dims, device) = (logits.dims(), logits.device());
        let labels = Tensor::<2>::from_data(TensorData::new(labels.to_vec(), dims), &device);
        let left_out: Vec<bool> = counted.iter().map(|counted| !counted).collect();
        let left_out = Tensor::<2, Bool>::from_data(TensorData::new(left_out, dims), &device);
        let others = labels.clone().neg() + 1.0;
        let entropy = softplus(logits.clone().neg(), 1.0) * labels.clone() * self.positive_weight
            + softplus(logits.clone(), 1.0) * others.clone();
        let probability = sigmoid(logits);
        let wrong = (probability.clone().neg() + 1.0) * labels + probability * others;
        total((wrong.powf_scalar(self.focal_gamma) * entropy).mask_fill(left_out, 0.0))
    }
}

/// How boundaries are chosen from scores of gaps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BoundarySelection {
    /// Only scores above this.
    pub threshold: f64,
    /// Boundaries at most.
    pub most: usize,
    /// Two boundaries are farther apart than this; 0 takes neighbours too.
    pub min_distance: usize,
    /// Last tokens that are an instruction: a boundary is before them, and none inside. The authors' code sets it one token later than
    /// it splits the queries, which is kept.
    pub instruction_tokens: Option<usize>,
}

impl BoundarySelection {
    /// Where chunks begin: 0, the tokens behind the chosen gaps, and the number of tokens.
    pub fn starts(&self, scores: &[f64]) -> Vec<usize> {
        let seq = scores.len();
        let instruction = self.instruction_tokens.map(|tokens| seq.saturating_sub(tokens));
        let ranked: Vec<f32> = scores.iter().map(|&score| score as f32).collect();
        let above: Vec<usize> = largest(&ranked, seq).into_iter().filter(|&gap| scores[gap] > self.threshold).collect();
        // Without any candidate the code finds no boundary at all.
        let mut chosen: Vec<usize> = instruction.filter(|_| !above.is_empty()).into_iter().collect();
        for gap in above {
            if instruction.is_some_and(|first| gap > first) {
                continue;
            }
            let apart = |&other: &usize| gap.abs_diff(other) > self.min_distance;
            if self.min_distance == 0 || chosen.iter().all(apart) {
                chosen.push(gap);
            }
            if chosen.len() >= self.most {
                break;
            }
        }
        let mut starts: Vec<usize> = chosen.into_iter().map(|gap| gap + 1).chain([0, seq]).collect();
        starts.sort_unstable();
        starts.dedup();
        starts
    }

    /// The same of a predictor's logits, `[seq]`, without those of gaps that lack keys on one side; with `smooth` twice as many.
    pub fn starts_of_logits(&self, logits: &[f32], window: usize, smooth: bool) -> Vec<usize> {
        self.starts(&without_ends(logits, window, smooth).iter().map(|&logit| f64::from(logit)).collect::<Vec<_>>())
    }
}

/// The logits of gaps without those that lack keys on one side, or with `smooth` twice as many: these are -100.
pub fn without_ends(logits: &[f32], window: usize, smooth: bool) -> Vec<f32> {
    let (seq, edge) = (logits.len(), if smooth { 2 * window } else { window });
    let kept = edge - 1..seq.saturating_sub(edge);
    logits.iter().enumerate().map(|(gap, &logit)| if kept.contains(&gap) { logit } else { -100.0 }).collect()
}

/// `[seq]` of each row of the batch: a predictor's logits.
pub fn rows_of(logits: Tensor<2>) -> Vec<Vec<f32>> {
    let seq = logits.dims()[1];
    numbers(logits).chunks(seq.max(1)).map(<[f32]>::to_vec).collect()
}
