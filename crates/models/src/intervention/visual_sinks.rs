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
//! are. In a row of several texts each has a span of its own.

use std::ops::Range;
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

/// What is known of the positions of a row; those behind its end are neither sinks nor of the span.
#[derive(Debug, Clone, Default)]
pub struct Marks {
    /// Whether each is a sink.
    pub sinks: Vec<bool>,
    /// Whether each is of the span.
    pub span: Vec<bool>,
    /// Which text each belongs to; empty where the row is one.
    pub documents: Vec<u32>,
}

impl Marks {
    /// The positions of the text that a position is of; what is generated is of the last.
    fn text(&self, position: usize) -> Range<usize> {
        let mut from = 0;
        for text in self.documents.chunk_by(|a, b| a == b) {
            let to = from + text.len();
            match to == self.documents.len() {
                true => return from..usize::MAX,
                false if position < to => return from..to,
                false => from = to,
            }
        }
        0..usize::MAX
    }

    /// Whether a query is behind the span of its text, and the span has a sink.
    fn qualifies(&self, query: usize) -> bool {
        let Range { start, end } = self.text(query);
        let own = start..end.min(self.span.len());
        let last = own.clone().rev().find(|&at| self.span[at]);
        last.is_some_and(|last| query > last) && own.clone().any(|at| self.sinks[at] && self.span[at])
    }
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

    /// The change of all weights of a map.
    pub(super) fn change(&self, marks: Vec<Marks>) -> Change {
        let how = self.clone();
        Change::With(Arc::new(move |weights, place| how.redistribute(weights, place, &marks).weights))
    }

    /// Redistributes weights, `[batch, heads, queries, keys]`, with the marks of every row of the batch, or of one for all.
    pub fn redistribute(&self, weights: Tensor<4>, place: Place, marks: &[Marks]) -> Redistributed {
        let (full, device, dtype) = (weights.dims(), weights.device(), weights.dtype());
        let [_, _, queries, keys] = full;
        let first_key = place.first_key.unwrap_or(0);
        // [rows or 1, 1, queries or 1, keys]; in a row of several texts, of each query's own.
        let several = marks.iter().any(|row| !row.documents.is_empty());
        let texts =
            |row: &Marks| (0..if several { queries } else { 1 }).map(|query| row.text(place.first + query)).collect();
        let texts: Vec<Vec<Range<usize>>> = marks.iter().map(texts).collect();
        let columns = |of: fn(&Marks) -> &Vec<bool>| {
            let mut flags: Vec<f32> = Vec::new();
            for (row, texts) in marks.iter().zip(&texts) {
                for text in texts {
                    let is = |key: usize| text.contains(&key) && of(row).get(key) == Some(&true);
                    flags.extend((first_key..first_key + keys).map(|key| f32::from(u8::from(is(key)))));
                }
            }
            let shape = [marks.len(), 1, texts[0].len(), keys];
            Tensor::<4>::from_data(TensorData::new(flags, shape), &device).cast(dtype)
        };
        let (is_sink, inside) = (columns(|row| &row.sinks), columns(|row| &row.span));
        let (sinks_inside, others) = (is_sink.clone() * inside.clone(), inside.clone() * (1.0 - is_sink.clone()));
        let on = |columns: &Tensor<4>| (weights.clone() * columns.clone()).sum_dim(3);
        let (on_sinks, on_others) = (on(&sinks_inside), on(&others));
        let mass = on_sinks.clone() + on_others.clone();
        let share = on_sinks / (mass.clone() + inside.sum_dim(3) * self.eps);
        // Rows of the prompt before the end of the span are never changed, and none where the span has no sink.
        let behind = marks.iter().flat_map(|row| (0..queries).map(move |query| row.qualifies(place.first + query)));
        let behind = TensorData::new(behind.collect::<Vec<bool>>(), [marks.len(), 1, queries, 1]);
        let behind = Tensor::<4, Bool>::from_data(behind, &device);
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
        let (sinks, span) = (vec![true, false, false], vec![true, true, false]);
        let place = Place { first: 1, first_key: Some(0) };
        let found = how.redistribute(weights.clone(), place, &[Marks { sinks, span, ..Marks::default() }]);
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

    #[test]
    fn texts_of_a_row_are_redistributed_each_as_if_it_were_alone() {
        let [first, second] = [[0.5, 0.25, 0.25, 0.0], [0.3, 0.4, 0.2, 0.1]];
        let how = VarConfig { rho: 1.0, least_mass: 0.0, ..VarConfig::default() };
        let row = |documents: &[u32]| {
            let times = documents.len() / 4;
            Marks {
                sinks: [true, false, false, false].repeat(times),
                span: [true, true, false, false].repeat(times),
                documents: if times == 1 { Vec::new() } else { documents.to_vec() },
            }
        };
        let run = |cells: &[f32], marks: Marks| -> Vec<f32> {
            let seq = marks.span.len();
            let weights =
                Tensor::from_data(TensorData::new(cells.to_vec(), [1, 1, cells.len() / seq, seq]), &Device::flex());
            let place = Place { first: seq - cells.len() / seq, first_key: Some(0) };
            how.redistribute(weights, place, &[marks]).weights.into_data().iter::<f32>().collect()
        };
        // The last two queries of a text of four; and of two such texts in a row, all queries from there on.
        let alone = run(&[first, second].concat(), row(&[0; 4]));
        let nothing = [0.0; 4];
        let cells =
            [first, nothing, second, nothing, nothing, nothing, nothing, nothing, nothing, first, nothing, second];
        let packed = run(&cells.concat(), row(&[0, 0, 0, 0, 1, 1, 1, 1]));
        let [a, b] = [&alone[..4], &alone[4..]];
        let nothing = &nothing[..];
        let want = [a, nothing, b, nothing, nothing, nothing, nothing, nothing, nothing, a, nothing, b].concat();
        let moved = |got: &[f32], from: &[f32]| {
            largest(0.0, got.iter().zip(from).map(|(got, from)| f64::from((got - from).abs())))
        };
        assert!(moved(&alone, &[first, second].concat()) > 0.05);
        assert!(packed.len() == want.len() && moved(&packed, &want) < 1e-6, "{packed:?} {want:?}");
    }
}
