//! Training that drops sensitive indices: SenD (Mohammadzadeh et al., arXiv 2410.15460, algorithm 2).
//!
//! At the end of every interval the texts kept out of training are embedded by one layer, without any mask. Every
//! `refresh` intervals the share `k` of that layer's output coordinates that moved most over the last `window`
//! measurements ([`sensitivity`](crate::sensitivity)) is chosen, and set to 0 for every token of every step until the next
//! choice; nothing is scaled up for it. Until the first choice nothing is dropped. Inside, a step is that of the standard
//! procedure.
//!
//! The paper leaves open where exactly is dropped and how texts are pooled; here the output of the last but one layer and
//! the mean of the texts' V. The published code does other things (see [`Mode::WeightsCompat`]).

mod config;
mod state;
mod watch;

use burn::module::{Module, Param};
use burn::tensor::{Tensor, TensorData};
use polyhead_models::{Batch, ConfigError, Decoder, Gate, GateKind};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::TrainError;
use crate::optimizer::Optimizer;
use crate::procedure::{HeldOut, Parts, Procedure, Shown, StepContext, StepReport};
use crate::standard::{Standard, StandardConfig};
use polyhead_evaluation::sensitivity::{
    Pool, Rows, as_published, column_variances, largest, matched, overlap, pooled, variance,
};
use polyhead_evaluation::texts::Texts;

pub use config::{Mode, NO_EPOCHS, NeuronDropoutConfig, Select, Unit};
use state::State;

/// Training that drops sensitive indices.
pub struct NeuronDropout {
    config: NeuronDropoutConfig,
    standard: Standard,
    texts: Texts,
    layer: usize,
    d_model: usize,
    /// Steps or batches of an interval, after `config.unit`.
    period: u64,
    state: State,
}

impl NeuronDropout {
    /// The procedure, with the state of an earlier session where there is one.
    ///
    /// # Errors
    /// If settings do not fit the model or the data, or the state is not one of this procedure's.
    pub fn new(config: NeuronDropoutConfig, parts: Parts<'_>, state: &serde_json::Value) -> Result<Self, TrainError> {
        let named = |error: ConfigError| format!("procedure.neuron_dropout.{error}");
        let wrong = |error| TrainError::Procedure(named(error));
        let decoder = parts.model.config();
        let problems: Vec<String> = config.validate(Some(decoder), parts.training).into_iter().map(named).collect();
        if !problems.is_empty() {
            return Err(TrainError::Procedure(problems.join("\n")));
        }
        let period = config.period(parts.batches_per_epoch, parts.training).map_err(wrong)?;
        let texts = Texts::new(parts.tracking);
        let (least, why) = config.least_texts();
        if texts.len() < least {
            let problem = format!(
                "the data keeps {} to be tracked, and {least} are needed: {why}; give more text, or a larger tracking_fraction",
                texts.len()
            );
            return Err(wrong(ConfigError::new("tracking_texts", problem)));
        }
        let (layer, d_model) = (config.layer_of(decoder.n_layers), decoder.d_model);
        if config.mode == Mode::WeightsCompat && config.select != Select::None {
            let mlp = &parts.model.layers[layer].mlp;
            let mut linears = mlp.iter().flat_map(|mlp| mlp.gate_proj.iter().chain([&mlp.up_proj, &mlp.down_proj]));
            if !linears.all(|linear| linear.weight.is_require_grad()) {
                return Err(wrong(ConfigError::new("mode", weights_stay(layer))));
            }
        }
        let state = State::read(state, d_model, texts.len())?;
        let standard =
            Standard::new(&StandardConfig { context_mask: config.context_mask }, parts.optimizer, parts.training);
        Ok(Self { texts, config, standard, layer, d_model, period, state })
    }

    /// What stands between the layers now.
    fn gate(&self, model: &Decoder) -> Option<Gate> {
        gate(&self.config, self.layer, &self.state, model)
    }

    /// Whether an interval ends between two counts, of steps or of batches.
    fn crossed(&self, from: u64, to: u64) -> bool {
        from / self.period != to / self.period
    }

    /// Embeds the texts with the model as it is without a mask, and chooses anew where that is due.
    fn watch(&mut self, model: &Decoder, context: &StepContext<'_>, report: &mut StepReport) -> Result<(), TrainError> {
        let config = &self.config;
        let rows = self.texts.embeddings(model, self.layer, config.embedding);
        let ees = match config.ees_prompts {
            0 => config.ees.of(&polyhead_evaluation::eigenscore::matrix(&rows).transpose(), context.seed),
            prompts => watch::sampled_ees(&self.texts, model, self.layer, prompts, config, context.seed),
        };
        let state = &mut self.state;
        state.push(rows, config.window);
        state.ees.push(ees);
        let mean = state.ees.iter().sum::<f64>() / state.ees.len() as f64;
        let changes = state.ees.windows(2).map(|pair| pair[1] - pair[0]);
        let mut tell = |name: &str, value: f64| tell(report, name, value);
        tell("ees", ees);
        tell("ees_mean", mean);
        tell("ees_std", variance(state.ees.iter().copied()).sqrt());
        tell("ees_change_variance", variance(changes));
        let loss = state.interval_loss();
        if let (Some(epsilon), Some(delta)) = (config.epsilon, config.delta) {
            state.finished = loss < epsilon && ees < delta;
            state.loss_at_end = state.finished.then_some(loss);
        }
        report.log = true;
        match state.measured.is_multiple_of(config.refresh) && state.window.len() == config.window {
            true => self.choose(model, context, report),
            false => Ok(()),
        }
    }

    /// Chooses what is dropped until the next time, and tells what can be seen of the choice.
    fn choose(
        &mut self,
        model: &Decoder,
        context: &StepContext<'_>,
        report: &mut StepReport,
    ) -> Result<(), TrainError> {
        let before = self.gate(model);
        let count = self.config.count(self.d_model);
        let v = self.rank(|_| true);
        let sensitive = largest(&v, count);
        let [even, odd] = [0, 1].map(|half| largest(&self.rank(|text| text % 2 == half), count));
        let latest = self.state.window.last().map_or(Vec::new(), column_variances);
        let dropped = match self.config.select {
            Select::Sensitive => sensitive.clone(),
            Select::VarianceMatched => matched(&sensitive, &latest),
            Select::Random => drawn(self.d_model, count, context.seed, self.state.dropped.len() as u64),
            Select::Dropout | Select::None => Vec::new(),
        };
        let all: f64 = v.iter().sum();
        let share = sensitive.iter().map(|&index| v[index]).sum::<f64>() / all.max(f64::MIN_POSITIVE);
        let mut tell = |name: &str, value: f64| tell(report, name, value);
        tell("v_mean", all / v.len() as f64);
        tell("v_share_of_sensitive", share);
        if self.texts.len() > 1 {
            tell("overlap_of_halves", overlap(&even, &odd));
        }
        if let Some(previous) = &self.state.sensitive {
            tell("overlap_with_previous", overlap(&sensitive, previous));
        }
        self.state.sensitive = Some(sensitive);
        self.state.dropped.push(dropped);
        let after = self.gate(model);
        // Ordinary dropout draws anew in every pass: two of them differ by chance.
        if self.config.mode == Mode::Activation && self.config.select != Select::Dropout {
            let loss = |gate: Option<Gate>| self.texts.loss(&model.clone().gated(gate));
            tell("loss_jump", loss(after) - loss(before));
        }
        let logarithms = v.iter().map(|v| v.max(1e-30).log10() as f32).collect();
        report.shown.push(("neuron_dropout/log10_v".into(), Shown::Histogram(logarithms)));
        let image = watch::dropped_over_time(&self.state.dropped, self.d_model)?;
        report.shown.push(("neuron_dropout/dropped".into(), Shown::Image(image)));
        Ok(())
    }

    /// What indices are ranked by, over the texts that `of` picks.
    fn rank(&self, of: impl Fn(usize) -> bool) -> Vec<f64> {
        let pick =
            |rows: &Rows| rows.iter().enumerate().filter(|(text, _)| of(*text)).map(|(_, row)| row.clone()).collect();
        let window: Vec<Rows> = self.state.window.iter().map(pick).collect();
        let window: Vec<&Rows> = window.iter().collect();
        match (self.config.mode, self.config.pool) {
            (Mode::WeightsCompat, _) => as_published(&window),
            (Mode::Activation, Pool::MeanV) => pooled(&window, Pool::MeanV),
            (Mode::Activation, Pool::VOfMean) => pooled(&window, Pool::VOfMean),
        }
    }

    /// The counts before and after a step, and after the step before it: of steps, or of batches.
    fn counts(&self, context: &StepContext<'_>) -> [u64; 3] {
        let StepContext { step, position, passes, .. } = *context;
        match self.config.unit {
            Unit::Steps => [step.saturating_sub(2), step - 1, step],
            Unit::Epochs => [position.saturating_sub(passes), position, position + passes],
        }
    }
}

impl Procedure for NeuronDropout {
    fn step(
        &mut self,
        mut model: Decoder,
        batches: &[Batch],
        context: &StepContext<'_>,
    ) -> Result<(Decoder, StepReport), TrainError> {
        let [earlier, from, to] = self.counts(context);
        if self.config.mode == Mode::WeightsCompat
            && self.crossed(earlier, from)
            && let Some(dropped) = self.state.dropped.last()
        {
            model = without_neurons(model, self.layer, dropped);
        }
        let gate = self.gate(&model);
        let (mut model, mut report) = self.standard.step(model.gated(gate), batches, context)?;
        if report.refused {
            return Ok((model, report));
        }
        self.state.add_loss(report.loss);
        if self.crossed(from, to) {
            self.watch(&model.clone().gated(None).valid(), context, &mut report)?;
        }
        let gate = mask_at_eval(&self.config, self.layer, &self.state, &model);
        model = model.gated(gate);
        Ok((model, report))
    }

    fn optimizer(&self) -> &Optimizer {
        Procedure::<Decoder>::optimizer(&self.standard)
    }

    fn measure(&self, model: &Decoder, held_out: HeldOut<'_>) -> Result<Vec<(String, f64)>, TrainError> {
        self.standard.measure(model, held_out)
    }

    fn state(&self) -> serde_json::Value {
        self.state.write()
    }

    fn ended(&self) -> Option<String> {
        let (epsilon, delta) = (self.config.epsilon?, self.config.delta?);
        let ees = self.state.ees.last().filter(|_| self.state.finished)?;
        let loss = self.state.loss_at_end.map_or(String::new(), |loss| format!(" {loss:.4}"));
        Some(format!("loss{loss} < epsilon ({epsilon}), EES {ees:.4} < delta ({delta})"))
    }
}

impl NeuronDropoutConfig {
    /// What stands between the layers when a trained model is used: its last mask, where that is asked for.
    ///
    /// # Errors
    /// If the state is not one of this procedure's.
    pub fn gate_at_eval(&self, state: &serde_json::Value, model: &Decoder) -> Result<Option<Gate>, TrainError> {
        if state.is_null() {
            return Ok(None);
        }
        let (d_model, n_layers) = (model.config().d_model, model.config().n_layers);
        let state = State::read(state, d_model, 0)?;
        Ok(mask_at_eval(self, self.layer_of(n_layers), &state, model))
    }
}

/// What is wrong with setting weights of a layer to 0 that do not learn.
pub fn weights_stay(layer: usize) -> String {
    format!(
        "mode \"weights_compat\" sets weights of layer {layer} to 0, which is frozen, so that they would be lost for good: \
         do not freeze its feed-forward layer, take another layer, or set mode = \"activation\""
    )
}

fn tell(report: &mut StepReport, name: &str, value: f64) {
    // A sum of nothing is -0.0, which is no different number.
    report.measured.push((format!("neuron_dropout/{name}"), value + 0.0));
}

/// The mask that stays when nobody trains.
fn mask_at_eval(config: &NeuronDropoutConfig, layer: usize, state: &State, model: &Decoder) -> Option<Gate> {
    let gate = gate(config, layer, state, model).filter(|_| config.mask_at_eval)?;
    matches!(gate.kind, GateKind::Keep(_)).then_some(gate)
}

fn gate(config: &NeuronDropoutConfig, layer: usize, state: &State, model: &Decoder) -> Option<Gate> {
    let dropped = state.dropped.last().filter(|_| config.mode == Mode::Activation)?;
    let kind = match config.select {
        Select::None => return None,
        Select::Dropout => GateKind::Dropout(config.k),
        Select::Sensitive | Select::Random | Select::VarianceMatched => {
            let d_model = model.config().d_model;
            let mut keep = vec![1f32; d_model];
            dropped.iter().for_each(|&index| keep[index] = 0.0);
            GateKind::Keep(Tensor::from_data(TensorData::new(keep, [d_model]), &model.device().inner()))
        }
    };
    Some(Gate { after_layer: layer, kind })
}

/// `count` of `n` indices, in random order: a function of the seed and of how often was drawn before.
fn drawn(n: usize, count: usize, seed: u64, times: u64) -> Vec<usize> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(times);
    let mut all: Vec<usize> = (0..n).collect();
    all.shuffle(&mut rng);
    all.truncate(count);
    all
}

/// The model with these neurons of a feed-forward layer set to 0, as the authors' scripts do: their columns of gate and up,
/// their rows of down, and in models with biases those of up and, with the same indices, of down. Nothing keeps the
/// optimiser from moving them again.
fn without_neurons(mut model: Decoder, layer: usize, neurons: &[usize]) -> Decoder {
    let Some(mlp) = &mut model.layers[layer].mlp else { return model };
    let kept = |count: usize| {
        let mut keep = vec![1f32; count];
        neurons.iter().filter(|&&neuron| neuron < count).for_each(|&neuron| keep[neuron] = 0.0);
        TensorData::new(keep, [count])
    };
    let [d_ff, d_model] = mlp.down_proj.weight.dims();
    for linear in mlp.gate_proj.iter_mut().chain([&mut mlp.up_proj]) {
        linear.weight = times(&linear.weight, kept(d_ff), [1, d_ff]);
        linear.bias = linear.bias.as_ref().map(|bias| times(bias, kept(d_ff), [d_ff]));
    }
    let down = &mut mlp.down_proj;
    down.weight = times(&down.weight, kept(d_ff), [d_ff, 1]);
    down.bias = down.bias.as_ref().map(|bias| times(bias, kept(d_model), [d_model]));
    model
}

/// A parameter multiplied by `keep`, reshaped to spread over it.
fn times<const D: usize>(weight: &Param<Tensor<D>>, keep: TensorData, shape: [usize; D]) -> Param<Tensor<D>> {
    weight.clone().map(|value| {
        let (learned, device) = (value.is_require_grad(), value.device());
        let keep = Tensor::<1>::from_data(keep, &device.clone().inner()).reshape(shape);
        // Through the host: a leaf of its own, on the device that the model trains on.
        Tensor::from_data((value.inner() * keep).into_data(), &device).set_require_grad(learned)
    })
}

#[cfg(test)]
mod tests;
