//! Texts as a model reads them when it is evaluated.

use polyhead_models::{Batch, ContextMask, Decoder, Evaluated, IGNORE, Sampling, continuations};

use crate::sensitivity::{Embedding, Rows, embed};

/// Rows of one forward pass; chosen by us.
const ROWS: usize = 16;

/// Texts as a model reads them when it is evaluated: who sees whom, and what is to be predicted.
#[derive(Debug, Clone)]
pub struct Texts {
    /// One row each, without padding.
    rows: Vec<Batch>,
}

impl Texts {
    /// Batches of one row each, of at least one token; empty ones are left out.
    pub fn new(rows: &[Batch]) -> Self {
        Self { rows: rows.iter().filter(|row| row.seq > 0).cloned().collect() }
    }

    /// Plain texts as token ids, in which every token sees those before it; empty ones are left out.
    pub fn plain(texts: impl IntoIterator<Item = Vec<u32>>) -> Self {
        Self::new(&texts.into_iter().map(Batch::text).collect::<Vec<_>>())
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// One embedding per text, `[texts][d_model]`, of the output of layer `layer`. Padding takes no part. Call it on
    /// `model.valid()`.
    pub fn embeddings(&self, model: &Decoder, layer: usize, how: Embedding) -> Rows {
        let d_model = model.config().d_model;
        let mut embedded = Rows::new();
        for rows in self.rows.chunks(ROWS) {
            let batch = padded(rows);
            let mask = batch.mask(ContextMask::Causal);
            let hidden = model.hidden_after(layer, model.tokens(&batch), &mask).into_data();
            let hidden: Vec<f64> = hidden.iter::<f64>().collect();
            for (row, hidden) in rows.iter().zip(hidden.chunks(batch.seq * d_model)) {
                embedded.push(embed(&hidden[..row.seq * d_model], d_model, how));
            }
        }
        embedded
    }

    /// Mean loss over what is to be predicted in the texts, in nats per target. Call it on `model.valid()`.
    pub fn loss(&self, model: &Decoder) -> f64 {
        let mut sums = Evaluated::default();
        self.rows.chunks(ROWS).for_each(|rows| sums.add(model.evaluate(&padded(rows))));
        sums.mean_loss()
    }

    /// The texts, a row each.
    pub fn rows(&self) -> &[Batch] {
        &self.rows
    }
}

/// `count` continuations of a prompt, each as the output of layer `layer` at its last token, `[count][d_model]`.
pub fn answer_embeddings(
    model: &Decoder,
    prompt: &[u32],
    count: usize,
    sampling: &Sampling,
    stops: &[u32],
    layer: usize,
) -> Rows {
    let answers = continuations(model, &vec![prompt.to_vec(); count], sampling, stops, &|| true).unwrap_or_default();
    let whole = answers.into_iter().map(|answer| [prompt, &answer.tokens].concat());
    Texts::plain(whole).embeddings(model, layer, Embedding::Last)
}

/// Rows filled up to the longest. Where any has documents, what fills up is a document of its own.
pub(crate) fn padded(rows: &[Batch]) -> Batch {
    const PADDING: u32 = u32::MAX;
    let seq = rows.iter().map(|row| row.seq).max().unwrap_or(1);
    let mut batch = Batch { batch: rows.len(), seq, ..Batch::default() };
    let mut documents = Vec::with_capacity(rows.len() * seq);
    for row in rows {
        let filled = batch.tokens.len() + seq;
        batch.tokens.extend(&row.tokens);
        batch.tokens.resize(filled, 0);
        batch.targets.extend(&row.targets);
        batch.targets.resize(filled, IGNORE);
        match &row.documents {
            Some(own) => documents.extend(own),
            None => documents.resize(documents.len() + row.seq, 0),
        }
        documents.resize(filled, PADDING);
    }
    batch.documents = rows.iter().any(|row| row.documents.is_some()).then_some(documents);
    batch
}
