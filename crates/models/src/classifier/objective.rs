//! What a classifier's scores are trained by: cross-entropy, and what others made of it.
//!
//! ```text
//! example i of class y, p = softmax(logits_i):
//! l_i = w_y (1 - p_y)^γ [ (1 - ε) (-log p_y) + ε mean over classes of (-log p_c) ]
//! loss = mean over examples of l_i,   or with t > 0   (1/t) log( mean over the groups of the batch of exp(t L_g) ),
//!        L_g the mean of l_i over the examples of group g: those of a class, or of a group that the data tells
//! ```
//! ε: label smoothing (Szegedy et al. 2016, arXiv 1512.00567). γ: focal loss (Lin et al. 2017, arXiv 1708.02002). w: class
//! weights. t: tilted towards the worst group (Li et al. 2021, arXiv 2007.01162, their group form); its gradient weighs groups
//! by softmax(t L), so that 0 would be the balanced mean and ∞ the worst group alone, without a state as group DRO needs it
//! (Sagawa et al. 2020, arXiv 1911.08731). Evaluation is plain cross-entropy always.

use std::collections::BTreeSet;

use burn::tensor::activation::log_softmax;
use burn::tensor::{Int, Tensor, TensorData};
use polyhead_attention::{ConfigError, require, require_range};
use polyhead_kernels::total;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `[loss]`: what a classifier's scores are trained by.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LossConfig {
    /// Share of the answer that is spread over all classes. Default: 0.
    pub label_smoothing: f64,
    /// Focal loss: the larger, the less examples count that are told well already. Default: 0, all the same.
    pub focal_gamma: f64,
    /// What examples of each class count: "none" (default) all the same, "balanced" as if every class were equally frequent,
    /// or a table, { listed = [..] }.
    pub class_weights: ClassWeights,
    /// Tilt towards the worst class of a batch: 0 (default) is the mean over examples, a large number the worst class alone.
    pub worst_class: f64,
    /// The same towards the worst group of a batch, where the data tells groups (data.labelled_text.group_field,
    /// data.shapes.shortcut). Default: 0.
    pub worst_group: f64,
}

/// What examples of each class count.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ClassWeights {
    /// All count 1.
    #[default]
    None,
    /// n / (classes * n of the class), so that the mean over the examples of training is 1.
    Balanced,
    /// One number per class.
    Listed(Vec<f64>),
}

impl LossConfig {
    /// Whether it is plain cross-entropy.
    pub fn is_plain(&self) -> bool {
        *self == Self::default()
    }

    /// Checks the numbers, against the number of classes where it is known.
    ///
    /// # Errors
    /// Names the field and the rule.
    pub fn validate(&self, n_classes: Option<usize>) -> Result<(), ConfigError> {
        require_range("label_smoothing", self.label_smoothing, 0.0..=0.999)?;
        require_range("focal_gamma", self.focal_gamma, 0.0..=100.0)?;
        require_range("worst_class", self.worst_class, 0.0..=1000.0)?;
        require_range("worst_group", self.worst_group, 0.0..=1000.0)?;
        require(self.worst_class == 0.0 || self.worst_group == 0.0, "worst_group", || {
            "worst_group and worst_class cannot both be set: a loss is tilted one way".into()
        })?;
        let ClassWeights::Listed(weights) = &self.class_weights else { return Ok(()) };
        for weight in weights {
            require(weight.is_finite() && *weight >= 0.0, "class_weights", || {
                format!("class_weights ({weight}) must be numbers from 0 up")
            })?;
        }
        let (listed, n) = (weights.len(), n_classes.unwrap_or(weights.len()));
        require(listed == n, "class_weights", || {
            format!("class_weights lists {listed} numbers for {n} classes: give one per class")
        })
    }

    /// The objective, for training data with so many examples of each class.
    pub fn objective(&self, counts: &[u64]) -> Objective {
        let n: u64 = counts.iter().sum();
        let weights = match &self.class_weights {
            ClassWeights::None => None,
            ClassWeights::Balanced => {
                let share = n as f64 / counts.len().max(1) as f64;
                Some(counts.iter().map(|&count| (share / count.max(1) as f64) as f32).collect())
            }
            ClassWeights::Listed(weights) => Some(weights.iter().map(|&weight| weight as f32).collect()),
        };
        let Self { label_smoothing, focal_gamma, worst_class, worst_group, .. } = *self;
        Objective { label_smoothing, focal_gamma, worst_class, worst_group, weights }
    }
}

/// What scores are trained by.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Objective {
    label_smoothing: f64,
    focal_gamma: f64,
    worst_class: f64,
    worst_group: f64,
    weights: Option<Vec<f32>>,
}

impl Objective {
    /// `[1]`: the loss of a batch, times its examples.
    ///
    /// # Shapes
    /// - logits: `[batch, classes]`; labels: `[batch]`, each below classes; groups: `[batch]`
    pub fn sum(&self, logits: Tensor<2>, labels: &[u32], groups: &[u32]) -> Tensor<1> {
        let [batch, _] = logits.dims();
        let device = logits.device();
        let ids: Vec<i32> = labels.iter().map(|&label| label as i32).collect();
        let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [batch, 1]), &device);
        let logs = log_softmax(logits, 1);
        let own = logs.clone().gather(1, ids); // [batch, 1]: log p_y
        let mut losses = own.clone().neg();
        if self.label_smoothing > 0.0 {
            let all = logs.mean_dim(1).neg();
            losses = losses * (1.0 - self.label_smoothing) + all * self.label_smoothing;
        }
        if self.focal_gamma > 0.0 {
            // Clamped before the power, whose slope at 0 is no number for exponents below 1.
            losses = losses * (own.exp().neg() + 1.0).clamp_min(1e-12).powf_scalar(self.focal_gamma);
        }
        if let Some(weights) = &self.weights {
            let each: Vec<f32> = labels.iter().map(|&label| weights[label as usize]).collect();
            losses = losses * Tensor::<2>::from_data(TensorData::new(each, [batch, 1]), &device);
        }
        match (self.worst_class > 0.0, self.worst_group > 0.0) {
            (true, _) => tilted(losses, labels, self.worst_class) * batch as f64,
            (_, true) => tilted(losses, groups, self.worst_group) * batch as f64,
            (false, false) => total(losses),
        }
    }
}

/// `[1]`: (1/t) log of the mean over the groups of the batch of exp(t L_g); losses are `[batch, 1]`.
fn tilted(losses: Tensor<2>, groups: &[u32], tilt: f64) -> Tensor<1> {
    let present: BTreeSet<u32> = groups.iter().copied().collect();
    let mut shares = Vec::with_capacity(present.len() * groups.len()); // [present, batch]: rows that take means
    for &group in &present {
        let members = groups.iter().filter(|&&other| other == group).count();
        shares.extend(groups.iter().map(|&other| if other == group { 1.0 / members as f32 } else { 0.0 }));
    }
    let shares = Tensor::<2>::from_data(TensorData::new(shares, [present.len(), groups.len()]), &losses.device());
    let scaled = shares.matmul(losses) * tilt; // [present, 1]
    let largest = scaled.clone().detach().max();
    let sum = total((scaled - largest.clone().unsqueeze::<2>()).exp());
    (sum.log() + largest - (present.len() as f64).ln()) / tilt
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    const LOGITS: [[f32; 3]; 4] = [[2.0, 0.5, -1.0], [0.1, 0.2, 0.3], [-3.0, 1.0, 4.0], [1.0, 1.5, -0.5]];
    const LABELS: [u32; 4] = [0, 2, 1, 1];
    const GROUPS: [u32; 4] = [7, 0, 0, 7];

    fn sum(config: &LossConfig) -> f64 {
        let logits = Tensor::<2>::from_data(LOGITS, &Device::flex());
        f64::from(config.objective(&[1, 2, 1]).sum(logits, &LABELS, &GROUPS).into_scalar::<f32>())
    }

    /// Log probabilities in f64.
    fn logs(row: [f32; 3]) -> [f64; 3] {
        let row = row.map(f64::from);
        let total = row.iter().map(|x| x.exp()).sum::<f64>().ln();
        row.map(|x| x - total)
    }

    fn close(config: LossConfig, each: impl Fn([f64; 3], usize) -> f64) {
        let expected: f64 = LOGITS.iter().zip(LABELS).map(|(row, label)| each(logs(*row), label as usize)).sum();
        let got = sum(&config);
        assert!((got - expected).abs() < 1e-5, "{config:?}: {got} against {expected}");
    }

    #[test]
    fn every_term_is_what_its_formula_says() {
        let mean = |logs: [f64; 3]| -logs.iter().sum::<f64>() / 3.0;
        close(LossConfig::default(), |logs, y| -logs[y]);
        let smoothed = LossConfig { label_smoothing: 0.1, ..Default::default() };
        close(smoothed, |logs, y| 0.9 * -logs[y] + 0.1 * mean(logs));
        let focal = LossConfig { focal_gamma: 2.0, ..Default::default() };
        close(focal, |logs, y| (1.0 - logs[y].exp()).powi(2) * -logs[y]);
        let balanced = LossConfig { class_weights: ClassWeights::Balanced, ..Default::default() };
        close(balanced, |logs, y| [4.0 / 3.0, 2.0 / 3.0, 4.0 / 3.0][y] * -logs[y]);
        let listed = LossConfig { class_weights: ClassWeights::Listed(vec![0.0, 1.0, 5.0]), ..Default::default() };
        close(listed, |logs, y| [0.0, 1.0, 5.0][y] * -logs[y]);
    }

    #[test]
    fn the_tilt_goes_from_the_balanced_mean_to_the_worst_class() {
        let loss = |row: usize| -logs(LOGITS[row])[LABELS[row] as usize];
        let classes = [loss(0), (loss(2) + loss(3)) / 2.0, loss(1)];
        let at = |worst_class| sum(&LossConfig { worst_class, ..Default::default() }) / 4.0;
        let mean = classes.iter().sum::<f64>() / 3.0;
        let worst = classes.iter().copied().fold(0.0, f64::max);
        assert!((at(1e-3) - mean).abs() < 2e-3 && (at(1e3) - worst).abs() < 2e-3, "{classes:?}");
        let exact = (classes.iter().map(|l| (2.0 * l).exp()).sum::<f64>() / 3.0).ln() / 2.0;
        assert!((at(2.0) - exact).abs() < 1e-5);
    }

    #[test]
    fn groups_are_those_that_the_data_tells() {
        let loss = |row: usize| -logs(LOGITS[row])[LABELS[row] as usize];
        let groups = [(loss(1) + loss(2)) / 2.0, (loss(0) + loss(3)) / 2.0];
        let expected = (groups.iter().map(|l| (3.0 * l).exp()).sum::<f64>() / 2.0).ln() / 3.0;
        let got = sum(&LossConfig { worst_group: 3.0, ..Default::default() }) / 4.0;
        assert!((got - expected).abs() < 1e-5, "{got} against {expected}");
    }

    #[test]
    fn certain_answers_leave_a_finite_gradient() {
        let logits = Tensor::<2>::from_data([[90.0, -90.0], [-90.0, 90.0]], &Device::flex().autodiff()).require_grad();
        let config = LossConfig { focal_gamma: 0.5, worst_class: 3.0, label_smoothing: 0.1, ..Default::default() };
        let grads = config.objective(&[1, 1]).sum(logits.clone(), &[0, 0], &[0, 0]).backward();
        let grad = logits.grad(&grads).expect("gradient").into_data();
        assert!(grad.iter::<f32>().all(f32::is_finite));
    }

    #[test]
    fn mistakes_are_told_by_name() {
        let field = |config: LossConfig| config.validate(Some(3)).expect_err("a mistake").field;
        assert_eq!(field(LossConfig { label_smoothing: 1.0, ..Default::default() }), "label_smoothing");
        assert_eq!(field(LossConfig { focal_gamma: -1.0, ..Default::default() }), "focal_gamma");
        assert_eq!(field(LossConfig { worst_class: 1.0, worst_group: 1.0, ..Default::default() }), "worst_group");
        let listed = |weights| LossConfig { class_weights: ClassWeights::Listed(weights), ..Default::default() };
        assert_eq!(field(listed(vec![1.0, 2.0])), "class_weights");
        assert!(listed(vec![1.0, 2.0, 0.0]).validate(Some(3)).is_ok());
    }
}
