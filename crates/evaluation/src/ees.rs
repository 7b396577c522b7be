//! EES, the efficient EigenScore of SenD (Mohammadzadeh et al., arXiv 2410.15460, algorithm 1): the mean logarithm of the
//! eigenvalues of a Gram matrix, by Chebyshev moments and random probes, without eigenvalues.
//!
//! ```text
//! X     [n, K], a column per answer, each standardised over its n features, divided by its largest singular value σ
//! C     = Xᵀ X, spectrum in [0, 1]; never formed: C z = Xᵀ (X z)
//! d_m   ≈ tr T_m(C) / K  from probes z: T_0 z = z, T_1 z = C z, T_m z = 2 C T_{m-1} z - T_{m-2} z
//! EES   = Σ c_m d_m
//! ```
//! Four readings of it:
//! - `shifted` (default, ours): the logarithm of λ + α on `[α, 1 + α]`, the operator 2C - I. It converges as
//!   ((√κ - 1)/(√κ + 1))^M with κ = (1 + α)/α, because the singularity at 0 is out of the way.
//! - `dual`: the paper's formula taken at its word, with the dual basis on `[0, 1]` and no α. It converges badly.
//! - `exact`: mean of ln(λ + α) from the eigenvalues themselves.
//! - `official`: the authors' code as published. Its coefficients use cos(m x) where T_m(x) is meant, m = 0 is missing and
//!   the power method stops after about two steps. **The result does not approximate the mean logarithm**; for a single
//!   column, which is what their training scripts hand it, it does not depend on the input at all. For comparing with
//!   their figures only.

mod coefficients;

use nalgebra::{DMatrix, DVector};
use polyhead_models::{ConfigError, require, require_range};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::eigenscore::eigenvalues;

pub use coefficients::{dual, official, shifted};

/// How EES is computed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct EesConfig {
    /// "shifted" (default), "dual", "exact", or "official" (as published, which approximates nothing).
    pub mode: EesMode,
    /// Chebyshev terms besides the constant. Default: 20, as published.
    pub terms: usize,
    /// "exact" (default: unit vectors, no noise), "rademacher" or "gaussian" (the paper's).
    pub probes: Probes,
    /// Random probes. Default: 20, as published.
    pub n_probes: usize,
    /// Added to every eigenvalue, in "shifted" and "exact". Default: 1e-3.
    pub alpha: f64,
}

impl Default for EesConfig {
    fn default() -> Self {
        Self { mode: EesMode::Shifted, terms: 20, probes: Probes::Exact, n_probes: 20, alpha: 1e-3 }
    }
}

/// Which reading of EES.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum EesMode {
    /// Chebyshev series of ln(λ + α).
    #[default]
    Shifted,
    /// The dual basis on `[0, 1]`.
    Dual,
    /// From the eigenvalues.
    Exact,
    /// The authors' code.
    Official,
}

/// What the trace is estimated with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Probes {
    /// All unit vectors: the trace itself, with as many probes as answers.
    #[default]
    Exact,
    /// Random signs, whose estimate varies least.
    Rademacher,
    /// Standard normal numbers.
    Gaussian,
}

impl EesConfig {
    /// Checks the settings: the fields that break a rule, with the rules.
    pub fn validate(&self) -> Vec<ConfigError> {
        let Self { terms, n_probes, alpha, .. } = *self;
        let rules = [
            require_range("terms", terms, 1..=1000),
            require_range("n_probes", n_probes, 1..=100_000),
            require((1e-12..=1.0).contains(&alpha), "alpha", || format!("alpha ({alpha}) must be 1e-12 to 1")),
        ];
        rules.into_iter().filter_map(Result::err).collect()
    }

    /// EES of `answers`, `[n, K]`: a column per answer. Random numbers are a function of `seed`.
    pub fn of(&self, answers: &DMatrix<f64>, seed: u64) -> f64 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let x = standardized(answers);
        let columns = x.ncols();
        let official_start = |rng: &mut ChaCha8Rng| DVector::from_fn(columns, |_, _| rng.random::<f64>());
        let sigma = match self.mode {
            EesMode::Official => power_method(&x, official_start(&mut rng), 1.0, 500),
            _ => {
                let start = DVector::from_fn(columns, |_, _| rng.random::<f64>() - 0.5);
                power_method(&x, start.normalize(), 1e-9, 5000)
            }
        };
        if sigma == 0.0 {
            return self.alpha.ln(); // all answers are constant: every eigenvalue is 0
        }
        let x = x / sigma;
        if self.mode == EesMode::Exact {
            let gram = x.transpose() * &x;
            return eigenvalues(gram).iter().map(|l| (l + self.alpha).ln()).sum::<f64>() / columns as f64;
        }
        let probes = self.draw(columns, &mut rng);
        let d = moments(&x, &probes, self.terms, self.mode == EesMode::Shifted);
        let c = match self.mode {
            EesMode::Shifted => shifted(self.terms, self.alpha),
            EesMode::Official => std::iter::once(0.0).chain(official(self.terms)).collect(),
            EesMode::Dual | EesMode::Exact => dual(self.terms),
        };
        c.iter().zip(&d).map(|(c, d)| c * d).sum()
    }

    /// `[K, probes]`.
    fn draw(&self, columns: usize, rng: &mut ChaCha8Rng) -> DMatrix<f64> {
        match self.probes {
            // Scaled as random probes are, whose squares sum up to K on average.
            Probes::Exact => DMatrix::identity(columns, columns) * (columns as f64).sqrt(),
            Probes::Rademacher => {
                DMatrix::from_fn(columns, self.n_probes, |_, _| if rng.random::<bool>() { 1.0 } else { -1.0 })
            }
            Probes::Gaussian => DMatrix::from_fn(columns, self.n_probes, |_, _| normal(rng)),
        }
    }
}

/// Every column with mean 0 and variance 1; constant ones become 0.
pub fn standardized(answers: &DMatrix<f64>) -> DMatrix<f64> {
    let mut x = answers.clone();
    for mut column in x.column_iter_mut() {
        let (mean, deviation) = (column.mean(), column.variance().sqrt());
        column.iter_mut().for_each(|value| *value = if deviation > 0.0 { (*value - mean) / deviation } else { 0.0 });
    }
    x
}

/// The largest singular value of `x`, from `start`, until a step moves the vector by less than `tolerance`. The authors
/// start anywhere and stop at 1.
pub fn power_method(x: &DMatrix<f64>, start: DVector<f64>, tolerance: f64, most: usize) -> f64 {
    let mut vector = start;
    for _ in 0..most {
        let next = x.tr_mul(&(x * &vector));
        let length = next.norm();
        if length == 0.0 {
            return 0.0;
        }
        let next = next / length;
        let moved = (&next - &vector).norm();
        vector = next;
        if moved < tolerance {
            break;
        }
    }
    (x * vector).norm()
}

/// d_0 to d_M: `z ᵀ T_m(C) z` over all probes (columns of `probes`), divided by K and their number. With `shifted`, T_m is
/// taken of 2C - I.
pub fn moments(x: &DMatrix<f64>, probes: &DMatrix<f64>, terms: usize, shifted: bool) -> Vec<f64> {
    let (columns, count) = probes.shape();
    let apply = |z: &DMatrix<f64>| {
        let product = x.tr_mul(&(x * z));
        if shifted { product * 2.0 - z } else { product }
    };
    let moment = |t: &DMatrix<f64>| probes.dot(t) / (columns * count) as f64;
    let mut before = probes.clone();
    let mut now = apply(&before);
    let mut d = vec![moment(&before), moment(&now)];
    for _ in 2..=terms {
        let next = apply(&now) * 2.0 - before;
        before = std::mem::replace(&mut now, next);
        d.push(moment(&now));
    }
    d
}

/// A standard normal number (Box and Muller 1958).
fn normal(rng: &mut ChaCha8Rng) -> f64 {
    let (radius, angle) = (1.0 - rng.random::<f64>(), rng.random::<f64>());
    (-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(columns: usize, seed: u64) -> DMatrix<f64> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        DMatrix::from_fn(64, columns, |_, _| normal(&mut rng))
    }

    fn score(mode: EesMode, probes: Probes, n_probes: usize, columns: usize) -> f64 {
        EesConfig { mode, terms: 40, probes, n_probes, alpha: 1e-3 }.of(&answers(columns, 3), 5)
    }

    #[test]
    fn shifted_is_the_mean_logarithm_and_probes_estimate_it() {
        let exact = score(EesMode::Exact, Probes::Exact, 1, 10);
        assert!((score(EesMode::Shifted, Probes::Exact, 1, 10) - exact).abs() < 1e-3, "{exact}");
        for probes in [Probes::Rademacher, Probes::Gaussian] {
            assert!((score(EesMode::Shifted, probes, 4000, 10) - exact).abs() < 0.05, "{probes:?}");
        }
    }

    #[test]
    fn the_official_score_of_one_column_does_not_depend_on_it() {
        let official = EesConfig { mode: EesMode::Official, ..EesConfig::default() };
        let values: Vec<f64> = (1..4).map(|seed| official.of(&answers(1, seed), 7)).collect();
        assert!(values.iter().all(|value| (value - values[0]).abs() < 1e-12), "{values:?}");
    }

    #[test]
    fn constant_answers_are_no_division_by_zero() {
        assert_eq!(EesConfig::default().of(&DMatrix::from_element(8, 3, 2.0), 1), 1e-3f64.ln());
    }
}
