//! The tracked texts: what a model makes of them.

use burn::tensor::{Int, Tensor, TensorData};
use polyhead_attention::Mask;
use polyhead_models::{Batch, Decoder, Evaluated, IGNORE, Sampling, continuations};

use super::NeuronDropoutConfig;
use crate::TrainError;
use crate::eigenscore::matrix;
use crate::picture::{Options, Png, heat_map};
use crate::sensitivity::{Embedding, Rows, embed};

/// Rows of one forward pass; chosen by us.
const ROWS: usize = 16;

/// Texts as token ids, ready for a model.
#[derive(Debug, Clone)]
pub struct Texts {
    texts: Vec<Vec<u32>>,
}

impl Texts {
    /// Texts of at least one token each; empty ones are left out.
    pub fn new(texts: &[Vec<u32>]) -> Self {
        Self { texts: texts.iter().filter(|text| !text.is_empty()).cloned().collect() }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.texts.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.texts.is_empty()
    }

    /// One embedding per text, `[texts][d_model]`, of the output of layer `layer`. Padding takes no part. Call it on
    /// `model.valid()`.
    pub fn embeddings(&self, model: &Decoder, layer: usize, how: Embedding) -> Rows {
        let d_model = model.config().d_model;
        let mut rows = Rows::new();
        for texts in self.texts.chunks(ROWS) {
            let Batch { batch, seq, tokens, .. } = padded(texts);
            let ids: Vec<i32> = tokens.iter().map(|&id| id as i32).collect();
            let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [batch, seq]), &model.device());
            let hidden = model.hidden_after(layer, ids, &Mask::causal()).into_data();
            let hidden: Vec<f64> = hidden.iter::<f64>().collect();
            for (text, hidden) in texts.iter().zip(hidden.chunks(seq * d_model)) {
                rows.push(embed(&hidden[..text.len() * d_model], d_model, how));
            }
        }
        rows
    }

    /// Mean loss over the texts, in nats per token. Call it on `model.valid()`.
    pub fn loss(&self, model: &Decoder) -> f64 {
        let mut sums = Evaluated::default();
        self.texts.chunks(ROWS).for_each(|texts| sums.add(model.evaluate(&padded(texts))));
        sums.mean_loss()
    }

    /// Mean EES over the continuations of the first halves of the first `prompts` texts.
    pub(super) fn sampled_ees(
        &self,
        model: &Decoder,
        layer: usize,
        prompts: usize,
        config: &NeuronDropoutConfig,
        seed: u64,
    ) -> f64 {
        let sampling = Sampling { max_new_tokens: config.ees_new_tokens, seed, ..Sampling::eigenscore() };
        let of = |text: &Vec<u32>| {
            let prompt = &text[..text.len().div_ceil(2)];
            let rows = answer_embeddings(model, prompt, config.ees_samples, &sampling, None, layer);
            config.ees.of(&matrix(&rows).transpose(), seed)
        };
        let texts = &self.texts[..prompts.min(self.texts.len())];
        texts.iter().map(of).sum::<f64>() / texts.len().max(1) as f64
    }
}

/// `count` continuations of a prompt, each as the output of layer `layer` at its last token, `[count][d_model]`.
pub fn answer_embeddings(
    model: &Decoder,
    prompt: &[u32],
    count: usize,
    sampling: &Sampling,
    stop: Option<u32>,
    layer: usize,
) -> Rows {
    let answers = continuations(model, &vec![prompt.to_vec(); count], sampling, stop);
    let whole: Vec<Vec<u32>> = answers.into_iter().map(|answer| [prompt, &answer.tokens].concat()).collect();
    Texts::new(&whole).embeddings(model, layer, Embedding::Last)
}

/// Rows filled up to the longest, to be predicted one token ahead.
fn padded(texts: &[Vec<u32>]) -> Batch {
    let seq = texts.iter().map(Vec::len).max().unwrap_or(1);
    let mut batch = Batch { batch: texts.len(), seq, ..Batch::default() };
    for text in texts {
        let targets = text[1..].iter().map(|&id| i64::from(id));
        batch.targets.extend(targets.chain(std::iter::repeat(IGNORE)).take(seq));
        batch.tokens.extend(text.iter().copied().chain(std::iter::repeat(0)).take(seq));
    }
    batch
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
