//! Attention swap: the maps of one model in the place of another's, which reads with its own values (after the interventions of
//! "Towards Scaling Laws of Capability Ceilings", arXiv 2510.21866, whose text gives no more details; the definition is ours).
//!
//! ```text
//! A' = (1 - u) A + u A_donor            in the chosen layers, A from the receiver's residual stream as it is by then
//! ```

use burn::tensor::Tensor;
use polyhead_attention::{Amount, At, Change, Edit, QuerySite};

/// The changes that mix in a donor's maps, each with its layer: `[batch, query heads, queries, keys]`. None where `u` is 0.
pub fn attention_swap(donor: &[(usize, Tensor<4>)], u: f64) -> Vec<(usize, Edit)> {
    let mixed = |(layer, map): &(usize, Tensor<4>)| {
        let change = Change::Affine { gate: Amount::Number(1.0 - u), value: Amount::Each(map.clone() * u) };
        (*layer, Edit::new(At::all(QuerySite::Weights.into()), change))
    };
    if u == 0.0 { Vec::new() } else { donor.iter().map(mixed).collect() }
}
