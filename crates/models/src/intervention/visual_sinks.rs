//! VAR, redistribution of attention from sinks (Kang et al. 2025, arXiv 2503.03321), and the sinks that it finds by channels of the
//! residual stream. The span may be a retrieved passage instead of an image.
//!
//! ```text
//! φ(t) = max over sink channels of |x_t| / √(mean x_t² + ε);  t is a sink where φ > τ
//! share = Σ_{sinks in span} A / Σ_span A,  mass = Σ_span A
//! ```
//! Where share ≤ ρ and mass ≥ the least one, all sink columns are multiplied by p, and what they lose goes to the span's other columns
//! in proportion to their weight. The authors' code is followed: a layer whose span has no sink is left alone even if there are sinks
//! elsewhere, and the last layer is changed too (their option for it has no effect). Queries before the end of the span stay as they
//! are, so that in a row of several texts only the last one changes.

use std::sync::Arc;

use burn::tensor::{Bool, Tensor, TensorData};
use polyhead_attention::{Change, ConfigError, Place, require};
use polyhead_kernels::comparison::largest;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Span, SpanName};

/// φ of a sink is above this; the authors' number, for models of 4096 channels and more.
pub const TAU: f64 = 20.0;
/// Inside φ's square root; the authors' number.
pub const EPS_PHI: f64 = 1e-6;

/// From which tokens attention is taken, when and how much; the defaults are the authors'.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct VarConfig {
    /// The sinks, of which one at least must be in the span. Default: ["first"].
    pub sinks: Vec<Span>,
    /// The largest share of the span's weight that may be on sinks. Default: 0.5.
    pub rho: f64,
    /// The least weight on the span. Default: 0.2.
    pub least_mass: f64,
    /// What is left of sinks. Default: 0.6.
    pub p: f64,
    /// Added to each weight of the span in the share's denominator. Default: 1e-6.
    pub eps: f64,
}

impl Default for VarConfig {
    fn default() -> Self {
        Self { sinks: vec![Span::Named(SpanName::First)], rho: 0.5, least_mass: 0.2, p: 0.6, eps: 1e-6 }
    }
}

/// φ of a token by its residual stream.
pub fn phi(hidden: &[f32], sink_channels: &[usize], eps: f64) -> f64 {
    let squares: f64 = hidden.iter().map(|&value| f64::from(value).powi(2)).sum();
    let scale = (squares / hidden.len() as f64 + eps).sqrt();
    largest(0.0, sink_channels.iter().map(|&channel| f64::from(hidden[channel]).abs() / scale))
}

/// What becomes of weights.
#[derive(Debug, Clone)]
pub struct Redistributed {
    /// `[batch, heads, queries, 1]`: the share of the span's weight that is on sinks.
    pub share: Tensor<4>,
    /// `[batch, heads, queries, 1]`: the weight on the span.
    pub mass: Tensor<4>,
    /// `[batch, heads, queries, 1]`: whether the row is changed.
    pub edited: Tensor<4, Bool>,
    /// `[batch, heads, queries, keys]`
    pub weights: Tensor<4>,
}

impl VarConfig {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        require(!self.sinks.is_empty(), "sinks", || "sinks is empty: leave it out for the first token".into())?;
        self.sinks.iter().try_for_each(|span| span.validate("sinks"))?;
        for (field, value) in [("rho", self.rho), ("least_mass", self.least_mass), ("p", self.p)] {
            require((0.0..=1.0).contains(&value), field, || format!("{field} ({value}) must be 0 to 1"))?;
        }
        let eps = self.eps;
        require(eps.is_finite() && eps >= 0.0, "eps", || format!("eps ({eps}) must be a finite number from 0 on"))
    }

    /// The change of all weights of a map; `[rows or 1][positions]`: whether each is a sink, and whether it is of the span.
    pub(super) fn change(&self, sinks: Vec<Vec<bool>>, span: Vec<Vec<bool>>) -> Change {
        let how = self.clone();
        Change::With(Arc::new(move |weights, place| how.redistribute(weights, place, &sinks, &span).weights))
    }

    /// Redistributes weights, `[batch, heads, queries, keys]`. Of each position of the text, `[rows or 1][positions]`, it is told whether
    /// it is a sink, and whether it is of the span; those behind the end are neither.
    pub fn redistribute(
        &self,
        weights: Tensor<4>,
        place: Place,
        sinks: &[Vec<bool>],
        span: &[Vec<bool>],
    ) -> Redistributed {
        let (full, device, dtype) = (weights.dims(), weights.device(), weights.dtype());
        let [_, _, queries, keys] = full;
        let first_key = place.first_key.unwrap_or(0);
        let columns = |of: &[Vec<bool>]| {
            let is = |row: &Vec<bool>, key: usize| row.get(first_key + key).copied().unwrap_or(false);
            let flags: Vec<f32> =
                of.iter().flat_map(|row| (0..keys).map(move |key| f32::from(u8::from(is(row, key))))).collect();
            Tensor::<4>::from_data(TensorData::new(flags, [of.len(), 1, 1, keys]), &device).cast(dtype)
        };
        let (is_sink, inside) = (columns(sinks), columns(span));
        let (sinks_inside, others) = (is_sink.clone() * inside.clone(), inside.clone() * (1.0 - is_sink.clone()));
        let on = |columns: &Tensor<4>| (weights.clone() * columns.clone()).sum_dim(3);
        let (on_sinks, on_others) = (on(&sinks_inside), on(&others));
        let mass = on_sinks.clone() + on_others.clone();
        let share = on_sinks / (mass.clone() + inside.sum_dim(3) * self.eps);
        // Rows of the prompt before the end of the span are never changed, and none where the span has no sink.
        let qualifies = |(sinks, span): (&Vec<bool>, &Vec<bool>)| {
            let end = span.iter().rposition(|&inside| inside).map_or(0, |last| last + 1);
            let there = sinks.iter().zip(span).any(|(&sink, &inside)| sink && inside);
            (0..queries).map(move |query| there && place.first + query >= end)
        };
        let behind: Vec<bool> = sinks.iter().zip(span).flat_map(qualifies).collect();
        let behind = Tensor::<4, Bool>::from_data(TensorData::new(behind, [sinks.len(), 1, queries, 1]), &device);
        let edited =
            share.clone().lower_equal_elem(self.rho).bool_and(mass.clone().greater_equal_elem(self.least_mass));
        // Nor is a row that gives the span nothing but to its sinks.
        let given = on_others.clone().greater_equal_elem(f32::MIN_POSITIVE);
        let edited = edited.bool_and(given).bool_and(behind.expand(share.dims()));
        let freed = on(&is_sink) * (1.0 - self.p);
        // Elsewhere a quotient would be infinite, and its gradient no number, though it is not used.
        let gain = others * (freed / on_others.mask_fill(edited.clone().bool_not(), 1.0));
        let changed = weights.clone() * (1.0 - is_sink * (1.0 - self.p) + gain);
        let weights = weights.mask_where(edited.clone().expand(full), changed);
        Redistributed { share, mass, edited, weights }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use burn::tensor::Device;

    #[test]
    fn rows_that_are_left_alone_have_finite_gradients() {
        // The span is keys 0 and 1 of 3. The first query sees nothing of it but the sink, as if weights were masked; the second and the
        // third are behind it: one looks at the sink alone, one at both.
        let rows = [[[1.0, 0.0, 0.0], [0.5, 0.0, 0.5], [0.4, 0.4, 0.2]]];
        let weights = Tensor::<4>::from_floats([rows], &Device::flex().autodiff()).require_grad();
        let how = VarConfig { rho: 1.0, ..VarConfig::default() };
        let (sinks, span) = (vec![vec![true, false, false]], vec![vec![true, true, false]]);
        let place = Place { first: 1, first_key: Some(0) };
        let found = how.redistribute(weights.clone(), place, &sinks, &span);
        assert_eq!(found.edited.into_data().iter::<bool>().collect::<Vec<_>>(), [false, false, true]);
        let numbers = |x: Tensor<4>| x.into_data().iter::<f32>().collect::<Vec<_>>();
        let changed = numbers(found.weights.clone());
        assert_eq!(changed[..6], [1.0, 0.0, 0.0, 0.5, 0.0, 0.5]);
        let apart = changed[6..].iter().zip([0.24, 0.56, 0.2]).map(|(got, want)| f64::from((got - want).abs()));
        assert!(largest(0.0, apart) < 1e-6, "{changed:?}");
        let grads = found.weights.square().sum().backward();
        let slopes = numbers(weights.grad(&grads).unwrap());
        assert!(slopes.iter().all(|slope| slope.is_finite()), "{slopes:?}");
        assert_eq!(slopes[..6], [2.0, 0.0, 0.0, 1.0, 0.0, 1.0]);
    }
}
