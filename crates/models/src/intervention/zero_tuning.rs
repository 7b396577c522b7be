//! ZeroTuning (Han et al. 2025, arXiv 2505.11739): the attention to the first token is scaled, and every row normalised again.
//!
//! ```text
//! a'_0 = γ a_0 / D,  a'_i = a_i / D,  D = 1 + (γ - 1) a_0      which is adding ln γ to the score of column 0
//! ```
//! With fewer key/value heads than query heads, γ belongs to the query head. The authors' code, which is followed, multiplies
//! weights and normalises them again (the same numbers), and can scale a span of columns. It cannot be trained, as it copies the
//! map; added to scores, ln γ has a gradient.

use std::ops::Range;

use burn::tensor::Tensor;
use polyhead_attention::{Amount, At, Change, Edit, Positions, QuerySite};

/// The changes that add `log_gamma`, `[layers, query heads]`, to the scores of some keys.
pub fn zero_tuning(log_gamma: &Tensor<2>, columns: Range<usize>) -> Vec<(usize, Edit)> {
    let [layers, heads] = log_gamma.dims();
    let of_layer = |layer: usize| {
        let own = log_gamma.clone().narrow(0, layer, 1).reshape([1, heads, 1, 1]);
        let change = Change::add(Amount::Each(own));
        (
            layer,
            Edit { keys: Positions::Range(columns.clone()), ..Edit::new(At::all(QuerySite::Scores.into()), change) },
        )
    };
    (0..layers).map(of_layer).collect()
}
