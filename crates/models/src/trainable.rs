//! What the loop asks of a model, whatever it learns: a loss to minimise, sums to judge it by, something to look at.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use polyhead_attention::{Observation, Observe};
use polyhead_kernels::BackwardHook;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Batch, ContextMask, Decoder, Evaluated, Loss, Pass, Precision, TokenTotals};

/// A model that can be trained.
pub trait Trainable: Module + 'static {
    /// What it learns from at once.
    type Batch: TrainBatch;
    /// What its evaluation adds up.
    type Totals: EvalTotals;

    /// The device of the weights.
    fn device(&self) -> Device;

    /// Layers.
    fn n_layers(&self) -> usize;

    /// Whether [`before_step`](Self::before_step) has something to do before the step `step`, from 0.
    fn is_due(&self, step: u64) -> bool {
        let _ = step;
        false
    }

    /// Moves on what follows the course of training without being learned, before the step `step` (from 0) that begins with
    /// `batch`. Most models have nothing of the kind.
    fn before_step(&mut self, batch: &Self::Batch, step: u64) {
        let _ = (batch, step);
    }

    /// Takes what a loss found ([`Loss::found`]): statistics that follow the course of training without being learned. Most models
    /// have none.
    fn follow(&mut self, found: Vec<Tensor<2>>) {
        let _ = found;
    }

    /// The model that calls `hook` with the number of each layer once the backward pass has gone through it, if it is of a kind that does.
    fn with_hook(self, hook: BackwardHook) -> Self {
        let _ = hook;
        self
    }

    /// Layers that call a hook when the gradients of all their parameters are there. Most kinds of models have none.
    fn hooked_layers(&self) -> usize {
        0
    }

    /// The loss of a batch, differentiable. `context` is for models whose batches are conversations: what tokens of a
    /// context see of their own turn.
    fn loss_under(&self, batch: &Self::Batch, context: ContextMask) -> Loss;

    /// The sums of a batch. Call it on `model.valid()`, whose forward pass keeps no tape.
    fn totals(&self, batch: &Self::Batch) -> Self::Totals;

    /// What each layer sees of the first row of a batch; empty where layers cannot be looked into.
    fn observe_layers(&self, batch: &Self::Batch, observe: Observe) -> Vec<Observation>;

    /// What it makes of a batch, where that is images.
    fn images(&self, batch: &Self::Batch) -> Option<ImageRows> {
        let _ = batch;
        None
    }
}

/// What a model learns from at once.
pub trait TrainBatch {
    /// How much the model reads, in what its speed is counted in: tokens, or examples.
    fn inputs(&self) -> u64;

    /// How many answers are asked for.
    fn targets(&self) -> u64;

    /// Bytes of text that the answers stand for; 0 where the data is no text.
    fn target_bytes(&self) -> u64 {
        0
    }

    /// The losses of its targets, added up for each source; empty where the data is no mixture.
    fn by_source(&self, loss: &Loss) -> BTreeMap<String, Evaluated> {
        let _ = loss;
        BTreeMap::new()
    }
}

/// What an evaluation adds up over its batches, on one rank or several.
pub trait EvalTotals: Clone + std::fmt::Debug + Default + Serialize + DeserializeOwned {
    /// Adds another batch.
    fn add(&mut self, other: Self);

    /// What every model is judged by.
    fn evaluated(&self) -> Evaluated;

    /// Further numbers, by their names in the logs.
    fn numbers(&self) -> Vec<(&'static str, f64)> {
        Vec::new()
    }

    /// Numbers of each layer or each source, by their names in the logs.
    fn of_parts(&self) -> Vec<(String, f64)> {
        Vec::new()
    }

    /// Matrices that are better seen than read, by their names in TensorBoard.
    fn matrices(&self) -> Vec<(&'static str, Matrix)> {
        Vec::new()
    }
}

/// Numbers in rows and columns.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Matrix {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// `[rows, cols]`, row by row.
    pub values: Vec<f32>,
}

/// Images in red, green and blue, of one size, in rows.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageRows {
    /// Each `[3, height, width]`.
    pub images: Vec<Vec<f32>>,
    /// Pixels down.
    pub height: usize,
    /// Pixels across.
    pub width: usize,
    /// Images in a row.
    pub across: usize,
}

impl TrainBatch for Batch {
    fn inputs(&self) -> u64 {
        self.tokens.len() as u64
    }

    fn targets(&self) -> u64 {
        self.target_tokens()
    }

    fn target_bytes(&self) -> u64 {
        self.target_bytes
    }

    fn by_source(&self, loss: &Loss) -> BTreeMap<String, Evaluated> {
        match (&self.sources, &loss.of_mixture) {
            (Some(sources), Some(losses)) => sources.sums(&self.targets, losses.to_data().iter::<f64>()),
            _ => BTreeMap::new(),
        }
    }
}

impl EvalTotals for TokenTotals {
    fn add(&mut self, other: Self) {
        self.all.add(other.all);
        for (name, sums) in other.sources {
            self.sources.entry(name).or_default().add(sums);
        }
    }

    fn evaluated(&self) -> Evaluated {
        self.all
    }

    fn of_parts(&self) -> Vec<(String, f64)> {
        self.sources.iter().map(|(name, sums)| (format!("loss/validation/{name}"), sums.mean_loss())).collect()
    }
}

impl Trainable for Decoder {
    type Batch = Batch;
    type Totals = TokenTotals;

    fn device(&self) -> Device {
        self.device()
    }

    fn n_layers(&self) -> usize {
        self.layers.len()
    }

    fn with_hook(self, hook: BackwardHook) -> Self {
        self.with_hook(hook)
    }

    /// None where products read rounded copies of the weights, whose gradients come last.
    fn hooked_layers(&self) -> usize {
        match self.computing.precision {
            Precision::F32 => self.layers.len(),
            Precision::Bf16 => 0,
        }
    }

    fn loss_under(&self, batch: &Batch, context: ContextMask) -> Loss {
        match self.is_masked_diffusion() {
            true => self.diffusion_loss(batch),
            false => self.loss_of_pass(batch, Pass::new(&batch.mask(context))),
        }
    }

    fn totals(&self, batch: &Batch) -> TokenTotals {
        self.totals(batch)
    }

    fn observe_layers(&self, batch: &Batch, observe: Observe) -> Vec<Observation> {
        self.forward(self.tokens(&batch.row(0)), &self.mask_of_text(), None, observe).seen
    }
}
