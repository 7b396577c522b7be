//! AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with PyTorch's arithmetic, and Muon (Jordan et al. 2024) with the
//! scaling of Moonlight (arXiv 2502.16982, "match RMS": 0.2 sqrt(max(rows, columns))).
//!
//! Burn has both. They stand here because the state has to be saved by the names of the parameters: Burn's is keyed by
//! ids that change between processes, and reading it back asks for the default device, which on a binary with CUDA and
//! a machine without panics.

use std::collections::BTreeMap;

use burn::module::{Module, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor, TensorData};
use polyhead_kernels::{AdamwStep, adamw, total};
use polyhead_models::mup::Scalings;
use polyhead_models::weights::{Held, ParameterMapper, TensorFiles, WeightsError, layer_of, map_parameters};

use crate::config::{AdamwConfig, MuonConfig, OptimizerConfig};

/// Newton-Schulz coefficients of Muon's authors, and how often they are applied.
const NEWTON_SCHULZ: (f64, f64, f64, usize) = (3.4445, -4.7750, 2.0315, 5);

/// What an update is scaled by.
#[derive(Debug, Clone, Copy)]
pub struct Update {
    /// The learning rate of this step.
    pub lr: f64,
    /// What gradients are multiplied by first: the clipping factor.
    pub scale: f64,
}

/// An optimiser with its state.
#[derive(Debug)]
pub struct Optimizer {
    config: OptimizerConfig,
    steps: u64,
    moments: BTreeMap<String, Moments>,
    /// Ends of parameters' names, and what their learning rate is multiplied by.
    rates: Vec<(String, f64)>,
    /// What muP multiplies the learning rates of parameters by.
    scalings: Scalings,
}

/// Running means of a parameter's gradient, flattened.
#[derive(Debug, Clone)]
struct Moments {
    first: Tensor<1>,
    second: Option<Tensor<1>>,
}

impl Optimizer {
    /// A fresh optimiser.
    pub fn new(config: OptimizerConfig) -> Self {
        Self { config, steps: 0, moments: BTreeMap::new(), rates: Vec::new(), scalings: Scalings::default() }
    }

    /// With other learning rates for parameters whose names end so: the step's, multiplied.
    pub fn with_rates(self, rates: Vec<(String, f64)>) -> Self {
        Self { rates, ..self }
    }

    /// With learning rates that depend on the width, beside those of [`with_rates`](Self::with_rates).
    pub fn with_scalings(self, scalings: Scalings) -> Self {
        Self { scalings, ..self }
    }

    /// How many updates have been made.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The model after one update with `grads`.
    pub fn step<M: Module>(&mut self, model: M, grads: &mut GradientsParams, update: Update) -> M {
        self.begin();
        self.apply(model, grads, update)
    }

    /// Begins an update, of which parameters may get their parts at different times.
    pub(crate) fn begin(&mut self) {
        self.steps += 1;
    }

    /// The model whose parameters have got their parts of the update, where there are gradients.
    pub(crate) fn apply<M: Module>(&mut self, model: M, grads: &mut GradientsParams, update: Update) -> M {
        map_parameters(model, Step { optimizer: self, grads, update }).0
    }

    /// Gives up the state of parameters whose names are not among those that `keep` takes.
    pub(crate) fn retain(&mut self, keep: impl Fn(&str) -> bool) {
        self.moments.retain(|name, _| keep(name));
    }

    /// The state's tensors by name: `first.<parameter>` and `second.<parameter>`.
    pub fn tensors(&self) -> Vec<Held> {
        let both = |(path, moments): (&String, &Moments)| {
            let first = Held::new(format!("first.{path}"), moments.first.clone());
            let second = moments.second.as_ref().map(|second| Held::new(format!("second.{path}"), second.clone()));
            std::iter::once(first).chain(second)
        };
        self.moments.iter().flat_map(both).collect()
    }

    /// An optimiser that continues from saved tensors.
    ///
    /// # Errors
    /// Lists tensors whose names are not ours.
    pub fn restore(
        config: OptimizerConfig,
        steps: u64,
        files: &TensorFiles,
        device: &Device,
    ) -> Result<Self, WeightsError> {
        let read = |name: &str| -> Result<Tensor<1>, WeightsError> {
            let values = files.values(name)?;
            let numbers = values.len();
            Ok(Tensor::from_data(TensorData::new(values, [numbers]), device))
        };
        let (mut moments, mut unknown) = (BTreeMap::new(), Vec::new());
        for name in files.names() {
            if let Some(path) = name.strip_prefix("first.") {
                let second = format!("second.{path}");
                let second = files.shape(&second).map(|_| read(&second)).transpose()?;
                moments.insert(path.to_owned(), Moments { first: read(name)?, second });
            } else if name.strip_prefix("second.").is_none_or(|path| files.shape(&format!("first.{path}")).is_none()) {
                unknown.push(format!("{name} is no state"));
            }
        }
        if !unknown.is_empty() {
            return Err(WeightsError::Unfit(unknown));
        }
        Ok(Self { steps, moments, ..Self::new(config) })
    }

    /// Decoupled decay (of vectors only where asked for), then the step along the moments.
    fn adamw<const D: usize>(
        &mut self,
        path: String,
        value: Tensor<D>,
        grad: Tensor<D>,
        config: &AdamwConfig,
        update: Update,
    ) -> Tensor<D> {
        let shape = value.dims();
        let numbers = shape.iter().product::<usize>();
        let moments = match self.moments.remove(&path) {
            Some(Moments { first, second: Some(second) }) => [first, second],
            _ => [value.zeros_like().reshape([numbers]), value.zeros_like().reshape([numbers])],
        };
        let (steps, lr) = (self.steps as f64, update.lr);
        let step = AdamwStep {
            grad_scale: update.scale,
            rate: lr * self.scalings.get(&path).adamw / (1.0 - config.beta1.powf(steps)),
            // The decay does not depend on the width: what it balances, the size of weights, is scaled as rates are.
            keep: if D == 1 && !config.decay_vectors { 1.0 } else { 1.0 - lr * config.weight_decay },
            beta1: config.beta1,
            beta2: config.beta2,
            correction: (1.0 - config.beta2.powf(steps)).sqrt(),
            eps: config.eps,
        };
        let (value, [first, second]) = adamw(value.reshape([numbers]), grad.reshape([numbers]), moments, step);
        self.moments.insert(path, Moments { first, second: Some(second) });
        value.reshape(shape)
    }

    /// Momentum, orthogonalised.
    fn muon(&mut self, path: String, value: Tensor<2>, grad: Tensor<2>, config: &MuonConfig, lr: f64) -> Tensor<2> {
        let [rows, columns] = value.dims();
        let flat = grad.clone().reshape([rows * columns]);
        let first = match self.moments.remove(&path) {
            Some(moments) => moments.first * config.momentum + flat,
            None => flat,
        };
        let nesterov = grad + first.clone().reshape([rows, columns]) * config.momentum;
        let rate = lr * self.scalings.get(&path).muon;
        self.moments.insert(path, Moments { first, second: None });
        let step = orthogonalize(nesterov) * (rate * 0.2 * (rows.max(columns) as f64).sqrt());
        value * (1.0 - lr * config.weight_decay) - step
    }
}

/// The nearest semi-orthogonal matrix, roughly: all singular values are brought near 1.
fn orthogonalize(x: Tensor<2>) -> Tensor<2> {
    let (a, b, c, times) = NEWTON_SCHULZ;
    let [rows, columns] = x.dims();
    let tall = rows > columns;
    let mut x = if tall { x.transpose() } else { x };
    let norm = total(x.clone().square()).sqrt().clamp_min(1e-7).unsqueeze::<2>();
    x = x / norm;
    for _ in 0..times {
        let gram = x.clone().matmul(x.clone().transpose());
        let polynomial = gram.clone() * b + gram.clone().matmul(gram) * c;
        x = x.clone() * a + polynomial.matmul(x);
    }
    if tall { x.transpose() } else { x }
}

struct Step<'a> {
    optimizer: &'a mut Optimizer,
    grads: &'a mut GradientsParams,
    update: Update,
}

impl Step<'_> {
    fn updated<const D: usize>(&mut self, path: String, value: Tensor<D>, grad: Tensor<D>) -> Tensor<D> {
        let rate = self.optimizer.rates.iter().find(|(end, _)| path.ends_with(end)).map_or(1.0, |(_, rate)| *rate);
        let update = Update { lr: self.update.lr * rate, ..self.update };
        match self.optimizer.config.clone() {
            OptimizerConfig::Adamw(config) => self.optimizer.adamw(path, value, grad, &config, update),
            OptimizerConfig::Muon(muon) if D == 2 && layer_of(&path).is_some() => {
                let flat: [usize; 2] = [value.dims()[0], value.dims()[1]];
                let shape = value.dims();
                let (value, grad) = (value.reshape(flat), grad.reshape(flat));
                self.optimizer.muon(path, value, grad * update.scale, &muon, update.lr).reshape(shape)
            }
            OptimizerConfig::Muon(muon) => {
                let (beta1, beta2, eps, weight_decay) = (muon.beta1, muon.beta2, muon.eps, muon.weight_decay);
                let adamw = AdamwConfig { lr: update.lr, beta1, beta2, eps, weight_decay, decay_vectors: false };
                self.optimizer.adamw(path, value, grad, &adamw, update)
            }
        }
    }
}

impl ParameterMapper for Step<'_> {
    fn map<const D: usize>(&mut self, name: String, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(grad) = self.grads.remove::<D>(param.id) else { return param };
        param.map(|value| {
            // On the inner device: an update is no part of any tape.
            let new = self.updated(name, value.inner(), grad);
            Tensor::from_inner(new).require_grad()
        })
    }
}

#[cfg(test)]
mod coordinates;
