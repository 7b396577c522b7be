//! Which coordinates of a layer's output move most while a model trains: the sensitive indices of SenD (Mohammadzadeh et
//! al., arXiv 2410.15460, section 3 and algorithm 2).
//!
//! ```text
//! e     = (mean over tokens of h + h of the last token) / 2              one embedding of a text, [d_model]
//! V_i   = Var(e_i) · Σ |e_i(t) - e_i(t-1)|                               over the last C measurements of one text
//! ```
//! The variance is that of the population and the sum has C - 1 terms, as in the authors' analysis. Their training script
//! does something else: it averages over the measurements first and then takes both factors across the texts, in the
//! order in which they happen to come; [`as_published`] is that.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How a text becomes one vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Embedding {
    /// Half of the mean over its tokens, half of the last one: the paper's.
    #[default]
    MeanLast,
    /// The last token.
    Last,
    /// The last but one, as the authors' scripts take it.
    SecondLast,
}

/// How the texts are put together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Pool {
    /// The mean of the texts' variabilities.
    #[default]
    MeanV,
    /// The variability of the texts' mean.
    VOfMean,
}

/// Embeddings of all texts at one measurement: one row each, all equally long.
pub type Rows = Vec<Vec<f64>>;

/// The embedding of one text.
///
/// # Shapes
/// - tokens: `[tokens, width]` row-major, at least one token
/// - output: `[width]`
pub fn embed(tokens: &[f64], width: usize, how: Embedding) -> Vec<f64> {
    let count = tokens.len() / width;
    let row = |index: usize| &tokens[index * width..(index + 1) * width];
    match how {
        Embedding::Last => row(count - 1).to_vec(),
        Embedding::SecondLast => row(count.saturating_sub(2)).to_vec(),
        Embedding::MeanLast => {
            let mean = |i: usize| (0..count).map(|token| row(token)[i]).sum::<f64>() / count as f64;
            (0..width).map(|i| 0.5 * (mean(i) + row(count - 1)[i])).collect()
        }
    }
}

/// V of one series of vectors, oldest first: `[width]`.
pub fn variability(series: &[&[f64]]) -> Vec<f64> {
    let width = series.first().map_or(0, |row| row.len());
    let of = |i: usize| {
        let values = series.iter().map(|row| row[i]);
        let moved: f64 = series.windows(2).map(|pair| (pair[1][i] - pair[0][i]).abs()).sum();
        variance(values) * moved
    };
    (0..width).map(of).collect()
}

/// V over a window of measurements, oldest first: `[width]`.
pub fn pooled(window: &[&Rows], pool: Pool) -> Vec<f64> {
    let texts = window.first().map_or(0, |rows| rows.len());
    match pool {
        Pool::MeanV => {
            let of_text = |text: usize| variability(&window.iter().map(|rows| &rows[text][..]).collect::<Vec<_>>());
            mean_rows(&(0..texts).map(of_text).collect::<Vec<_>>())
        }
        Pool::VOfMean => {
            let means: Rows = window.iter().map(|rows| mean_rows(rows)).collect();
            variability(&means.iter().map(Vec::as_slice).collect::<Vec<_>>())
        }
    }
}

/// What the authors' training script ranks by: the mean over measurements first, then variance and movement across texts.
pub fn as_published(window: &[&Rows]) -> Vec<f64> {
    let texts = window.first().map_or(0, |rows| rows.len());
    let mean_of = |text: usize| mean_rows(&window.iter().map(|rows| rows[text].clone()).collect::<Vec<_>>());
    let means: Rows = (0..texts).map(mean_of).collect();
    variability(&means.iter().map(Vec::as_slice).collect::<Vec<_>>())
}

/// The indices of the `count` largest values, descending; of equal ones the lower index first.
pub fn largest(values: &[f64], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]).then(a.cmp(&b)));
    order.truncate(count);
    order
}

/// The variance of every column, `[width]`.
pub fn column_variances(rows: &Rows) -> Vec<f64> {
    let width = rows.first().map_or(0, Vec::len);
    (0..width).map(|i| variance(rows.iter().map(|row| row[i]))).collect()
}

/// For each of `picked`, an index outside of them whose variance comes nearest, each taken once: a set of the same size
/// and nearly the same variance that was not chosen for moving. Where too few are left, picked ones fill it up.
pub fn matched(picked: &[usize], variances: &[f64]) -> Vec<usize> {
    let mut free: Vec<usize> = (0..variances.len()).filter(|index| !picked.contains(index)).collect();
    let mut twins = Vec::with_capacity(picked.len());
    for &index in picked {
        let distance = |other: usize| (variances[other] - variances[index]).abs();
        let nearest = (0..free.len()).min_by(|&a, &b| distance(free[a]).total_cmp(&distance(free[b])));
        twins.push(nearest.map_or(index, |at| free.remove(at)));
    }
    twins
}

/// The share of `a` that is in `b` too.
pub fn overlap(a: &[usize], b: &[usize]) -> f64 {
    a.iter().filter(|index| b.contains(index)).count() as f64 / a.len().max(1) as f64
}

/// The variance of the population.
pub fn variance(values: impl Iterator<Item = f64> + Clone) -> f64 {
    let count = values.clone().count().max(1) as f64;
    let mean = values.clone().sum::<f64>() / count;
    values.map(|value| (value - mean).powi(2)).sum::<f64>() / count
}

fn mean_rows(rows: &[Vec<f64>]) -> Vec<f64> {
    let width = rows.first().map_or(0, Vec::len);
    (0..width).map(|i| rows.iter().map(|row| row[i]).sum::<f64>() / rows.len() as f64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_go_to_the_lower_index() {
        assert_eq!(largest(&[1.0, 3.0, 3.0, 0.0, 3.0], 3), [1, 2, 4]);
        assert_eq!(largest(&[1.0], 3), [0]);
    }

    #[test]
    fn twins_have_the_variance_and_are_others() {
        let variances = [9.0, 8.5, 1.0, 1.2, 4.0, 0.0];
        assert_eq!(matched(&[0, 2], &variances), [1, 3]);
        assert_eq!(matched(&[0, 1, 2, 3], &variances), [4, 5, 2, 3], "filled up from the picked ones");
    }

    #[test]
    fn short_texts_embed_too() {
        assert_eq!(embed(&[1.0, 2.0], 2, Embedding::SecondLast), [1.0, 2.0]);
        assert_eq!(embed(&[1.0, 2.0, 3.0, 6.0], 2, Embedding::MeanLast), [2.5, 5.0]);
    }
}
