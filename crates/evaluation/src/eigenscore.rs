//! EigenScore (INSIDE, Chen et al., arXiv 2402.03744): how far apart the answers to one prompt are inside the model. Higher
//! means more spread, which the paper takes for a sign of hallucination.
//!
//! Paper and code of INSIDE, and two functions in the code of SenD, normalise differently; all four are here.

use nalgebra::DMatrix;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Whose EigenScore.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum EigenScore {
    /// INSIDE's paper: mean of `ln λ(Z J Zᵀ + α I)`, α = 1e-3; J centres each answer over its features.
    #[default]
    Inside,
    /// INSIDE's code: mean of `log10 λ(Z J Zᵀ / (d - 1) + α I)`, α = 1e-3.
    InsideCode,
    /// SenD's `regular_eigenscore`: as the paper, with α = 1e-5.
    Regular,
    /// SenD's analysis: mean of `ln(s² / (K - 1) + 1e-3)`; s are the singular values after centring each feature over the
    /// answers.
    Analysis,
}

impl EigenScore {
    /// The score of `answers`, `[K, d]`: one row each.
    pub fn of(self, answers: &DMatrix<f64>) -> f64 {
        let (count, width) = answers.shape();
        let centred = match self {
            Self::Analysis => {
                let mut centred = answers.clone();
                centred.column_iter_mut().for_each(|mut column| column.add_scalar_mut(-column.mean()));
                centred
            }
            _ => {
                let mut centred = answers.clone();
                centred.row_iter_mut().for_each(|mut row| row.add_scalar_mut(-row.mean()));
                centred
            }
        };
        let gram = &centred * centred.transpose();
        let mean = |values: &[f64], f: &dyn Fn(f64) -> f64| {
            values.iter().map(|&value| f(value)).sum::<f64>() / count.max(1) as f64
        };
        let eigenvalues = eigenvalues(gram);
        match self {
            Self::Inside => mean(&eigenvalues, &|l| (l + 1e-3).ln()),
            Self::InsideCode => mean(&eigenvalues, &|l| (l / (width as f64 - 1.0) + 1e-3).log10()),
            Self::Regular => mean(&eigenvalues, &|l| (l + 1e-5).ln()),
            Self::Analysis => {
                let kept = count.min(width);
                mean(&eigenvalues[..kept], &|l| (l / (count as f64 - 1.0) + 1e-3).ln())
            }
        }
    }
}

/// The eigenvalues of a symmetric matrix without negative ones, descending. What rounding makes negative counts as 0.
pub(crate) fn eigenvalues(matrix: DMatrix<f64>) -> Vec<f64> {
    let mut values: Vec<f64> = matrix.symmetric_eigenvalues().iter().map(|&value| value.max(0.0)).collect();
    values.sort_by(|a, b| b.total_cmp(a));
    values
}

/// A matrix from rows of equal length.
pub fn matrix(rows: &[Vec<f64>]) -> DMatrix<f64> {
    let width = rows.first().map_or(0, Vec::len);
    DMatrix::from_row_iterator(rows.len(), width, rows.iter().flatten().copied())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_that_agree_score_lower() {
        let row = |shift: f64| (0..16).map(|i| (f64::from(i) * 0.7 + shift).sin()).collect::<Vec<f64>>();
        let alike = matrix(&[row(0.0), row(0.01), row(0.02), row(0.03)]);
        let apart = matrix(&[row(0.0), row(1.0), row(2.0), row(3.0)]);
        for score in [EigenScore::Inside, EigenScore::InsideCode, EigenScore::Regular, EigenScore::Analysis] {
            assert!(score.of(&alike) < score.of(&apart), "{score:?}");
        }
    }
}
