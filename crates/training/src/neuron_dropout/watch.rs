//! The tracked texts: what a model makes of them.

use polyhead_evaluation::texts::{Texts, answer_embeddings};
use polyhead_models::{Batch, Decoder, IGNORE, Sampling};

use super::NeuronDropoutConfig;
use crate::TrainError;
use crate::image::{Options, Png, heat_map};
use polyhead_evaluation::eigenscore::matrix;

/// Mean EES over the continuations of the beginnings of the first `prompts` texts.
pub(super) fn sampled_ees(
    texts: &Texts,
    model: &Decoder,
    layer: usize,
    prompts: usize,
    config: &NeuronDropoutConfig,
    seed: u64,
) -> f64 {
    let sampling = Sampling { max_new_tokens: config.ees_new_tokens, seed, ..Sampling::eigenscore() };
    let of = |row: &Batch| {
        let rows = answer_embeddings(model, beginning(row), config.ees_samples, &sampling, &[], layer);
        config.ees.of(&matrix(&rows).transpose(), seed)
    };
    let rows = &texts.rows()[..prompts.min(texts.len())];
    rows.iter().map(of).sum::<f64>() / rows.len().max(1) as f64
}

/// What is to be continued of a row: what comes before its first target, or where that is nothing, the first half of its
/// first document.
pub(super) fn beginning(row: &Batch) -> &[u32] {
    let first = match &row.documents {
        Some(documents) => documents.iter().take_while(|&&document| document == documents[0]).count(),
        None => row.seq,
    };
    match row.targets[..first].iter().position(|&target| target != IGNORE) {
        Some(asked) if asked > 0 => &row.tokens[..asked + 1],
        _ => &row.tokens[..first.div_ceil(2)],
    }
}

/// A row per choice, a column per coordinate; what was dropped is bright.
pub(super) fn dropped_over_time(choices: &[Vec<usize>], d_model: usize) -> Result<Png, TrainError> {
    let mut cells = vec![0f32; choices.len() * d_model];
    for (row, chosen) in choices.iter().enumerate() {
        chosen.iter().for_each(|&index| cells[row * d_model + index] = 1.0);
    }
    let scale = if d_model > 1024 { 1 } else { 4 };
    Ok(heat_map(&cells, choices.len(), d_model, &Options { scale, range: Some((0.0, 1.0)) })?)
}
