//! Attention by token centres (CATANet: Liu et al., CVPR 2025, arXiv 2503.06896; code of EquationWalker/CATANet, commit fd2222f):
//! every token attends to tokens that resemble the same centre, wherever they are, and to all centres.
//!
//! ```text
//! u = x / max(|x|, 1e-12)
//! training    m = the centres that are kept, then `iterations` times:
//!             a = argmax_c u · unit(m_c),   m_c = unit(sum of all u of the batch with a = c), unit(m_c) where there is none
//! evaluation  m = the centres that are kept, as they are
//! tokens sorted by argmax_c u · unit(m_c), cut into groups of `group_size`:
//! out = softmax(q kᵀ / √d) v over the own group and the next  +  softmax(q k(m)ᵀ / √d) v(m) over the centres
//! after a pass of training   kept := decay kept + (1 - decay) m;   m, the first time
//! ```
//! Gradients reach x through the last step of the iterations; none flows through which centre is nearest. In a pass of
//! training one image of a batch changes what becomes of another, because centres are fitted to all; in evaluation it does
//! not. Before the first pass of training centres are means of runs of the batch's tokens. What is sorted and filled up is as in
//! the authors' code, but that the sort is stable (theirs is not) and that so few tokens that mirroring them once does not fill
//! up the last group are mirrored again (theirs fails).
//!
//! **State.** `centres` and `begun` are parameters that are not learned, so that checkpoints hold them. A forward pass
//! changes nothing: it gives back the centres it fitted, and whoever trains hands them to [`TokenCentres::follow`].

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{Device, Distribution, Int, Tensor, TensorData};
use polyhead_attention::{INIT_STD, PerLayerCount, linear};
use polyhead_kernels::random;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::parts::{Projections, Widths, project};
use crate::pooling::unit;

/// `mixer.token_centres`: tokens attend to those that resemble the same centre, and to all centres.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenCentresConfig {
    /// Centres: a number for all layers, or a list with one per layer. The authors': 16, 32, 64, 128, and again.
    pub n_centres: PerLayerCount,
    /// Tokens of a group, as n_centres. The authors': 256, 128, 64, 32, and again.
    pub group_size: PerLayerCount,
    /// Steps by which centres are fitted to a batch in training. Default: 5, the authors'.
    #[serde(default = "iterations")]
    pub iterations: usize,
    /// Share of the kept centres that a pass of training leaves, from 0 to 1. Default: 0.999, the authors'.
    #[serde(default = "decay")]
    pub decay: f64,
}

fn iterations() -> usize {
    5
}

fn decay() -> f64 {
    0.999
}

/// What a pass is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Centres are fitted to the batch.
    Training,
    /// Centres are those that were kept.
    Evaluation,
}

/// Attention by token centres.
#[derive(Module, Debug)]
pub struct TokenCentres {
    /// `[d_model, qk_dim]`: from centres to keys
    pub centre_k_proj: Linear,
    /// `[d_model, d_model]`: from centres to values
    pub centre_v_proj: Linear,
    /// Of tokens
    pub tokens: Projections,
    /// `[d_model, d_model]`: behind both; the authors' 1 x 1 convolution
    pub out_proj: Linear,
    /// `[n_centres, d_model]`: the centres that are kept; not learned
    pub centres: Param<Tensor<2>>,
    /// `[1]`: 1 once training has moved the centres, 0 before; not learned
    pub begun: Param<Tensor<1>>,
    group_size: usize,
    iterations: usize,
    decay: f64,
}

/// What a pass made of tokens.
#[derive(Debug)]
pub struct Grouped {
    /// `[batch, tokens, d_model]`
    pub hidden: Tensor<3>,
    /// `[n_centres, d_model]`: the centres of the pass, without gradients
    pub centres: Tensor<2>,
    /// `[batch * tokens]`: the nearest centre of each token
    pub nearest: Vec<usize>,
}

impl TokenCentresConfig {
    /// Fresh weights of a layer. Cannot fail after its rules have been checked.
    pub(super) fn init(&self, layer: usize, widths: Widths, device: &Device) -> TokenCentres {
        let [n_centres, group_size] =
            [&self.n_centres, &self.group_size].map(|each| each.of_layer(layer).expect("validate: one per layer"));
        let Widths { d_model, qk_dim, .. } = widths;
        let to = |d_output| linear(d_model, d_output, false, INIT_STD, device);
        let bound = (d_model as f64).powf(-0.5); // of a convolution, as PyTorch's begin
        let out = random([d_model, d_model], Distribution::Uniform(-bound, bound), device);
        TokenCentres {
            centre_k_proj: to(qk_dim),
            centre_v_proj: to(d_model),
            tokens: Projections::init(widths, device),
            out_proj: Linear { weight: Param::from_tensor(out), bias: None },
            centres: kept(Tensor::zeros([n_centres, d_model], device)),
            begun: kept(Tensor::zeros([1], device)),
            group_size,
            iterations: self.iterations,
            decay: self.decay,
        }
    }
}

impl TokenCentres {
    /// What becomes of normalised tokens.
    ///
    /// # Shapes
    /// - x: `[batch, tokens, d_model]`
    pub fn forward(&self, x: Tensor<3>, phase: Phase) -> Grouped {
        let fitted = self.fit(&x, phase);
        let centres = fitted.clone().detach();
        let nearest = nearest(flat(x.clone().detach()), unit(centres.clone()));
        let nearest: Vec<usize> = nearest.into_data().iter::<i64>().map(|centre| centre as usize).collect();
        let hidden = project(&self.out_proj, self.attend(x, fitted, &nearest));
        Grouped { hidden, centres, nearest }
    }

    /// The centres that tokens are grouped around, differentiable: `[n_centres, d_model]`.
    pub fn fit(&self, x: &Tensor<3>, phase: Phase) -> Tensor<2> {
        let begin = if self.has_begun() { self.centres.val() } else { self.run_means(x.clone().detach()) };
        if phase == Phase::Evaluation {
            return begin;
        }
        let units = flat(x.clone());
        let constant = units.clone().detach();
        step(units, (1..self.iterations).fold(begin, |centres, _| step(constant.clone(), centres)))
    }

    /// Whether training has moved the centres.
    pub fn has_begun(&self) -> bool {
        self.begun.val().into_scalar::<f32>() > 0.0
    }

    /// What tokens attend to in their groups and among the centres, mapped and in their own order: `[batch, tokens, d_model]`.
    ///
    /// # Shapes
    /// - x: `[batch, tokens, d_model]`; centres: `[n_centres, d_model]`; nearest: `[batch * tokens]`
    pub fn attend(&self, x: Tensor<3>, centres: Tensor<2>, nearest: &[usize]) -> Tensor<3> {
        let [batch, n, d_model] = x.dims();
        let device = x.device();
        let group = self.group_size.min(n);
        let groups = n.div_ceil(group);
        // Every group reads the next one too, so that one more has to be there.
        let (read, asked) = ((groups + 1) * group, groups * group);
        let order = order(nearest, n);
        let rows = order.chunks(n).flat_map(|row| (0..read).map(|at| row[mirrored(at, n)]));
        let x = x.reshape([batch * n, d_model]).select(0, indices(rows, &device)).reshape([batch, read, d_model]);
        let map = |layer| project(layer, x.clone());
        let windows = |x: Tensor<3>| {
            let [_, _, width] = x.dims();
            let cut = |first| x.clone().narrow(1, first, asked).reshape([batch * groups, group, width]);
            Tensor::cat(vec![cut(0), cut(group)], 1)
        };
        let q = map(&self.tokens.q_proj).narrow(1, 0, asked);
        let [k, v] = [&self.tokens.k_proj, &self.tokens.v_proj].map(|layer| windows(map(layer)));
        let of_group = self.tokens.attend(q.clone().reshape([batch * groups, group, q.dims()[2]]), k, v);
        let [k, v] = self.keys_and_values(centres).map(|x| {
            let [_, n_centres, width] = x.dims();
            x.expand([batch, n_centres, width])
        });
        let attended = of_group.reshape([batch, asked, d_model]) + self.tokens.attend(q, k, v);
        let mut places = vec![0; batch * n];
        for (at, &token) in order.iter().enumerate() {
            places[token] = at / n * asked + at % n;
        }
        let back = attended.reshape([batch * asked, d_model]).select(0, indices(places.into_iter(), &device));
        project(&self.tokens.o_proj, back.reshape([batch, n, d_model]))
    }

    /// Keys `[1, n_centres, qk_dim]` and values `[1, n_centres, d_model]` of centres.
    pub fn keys_and_values(&self, centres: Tensor<2>) -> [Tensor<3>; 2] {
        [&self.centre_k_proj, &self.centre_v_proj].map(|map| project(map, centres.clone().unsqueeze()))
    }

    /// Moves the kept centres towards those of a pass of training. What is not finite moves nothing, as such a step updates nothing.
    pub fn follow(&mut self, centres: Tensor<2>) {
        if centres.clone().into_data().iter::<f32>().any(|value| !value.is_finite()) {
            return;
        }
        let moved = match self.has_begun() {
            true => self.centres.val() * self.decay + centres * (1.0 - self.decay),
            false => centres,
        };
        self.begun = self.begun.clone().map(|begun| begun.ones_like());
        self.centres = self.centres.clone().map(|_| moved.detach());
    }

    /// Means of runs of tokens, each over the whole batch: `[n_centres, d_model]`.
    fn run_means(&self, x: Tensor<3>) -> Tensor<2> {
        let ([batch, n, d_model], [n_centres, _]) = (x.dims(), self.centres.dims());
        let all = n + n_centres - n % n_centres; // what divides evenly is filled up by a run, as in the authors' code
        let rows = (0..all).map(|at| mirrored(at, n));
        let filled = x.clone().select(1, indices(rows, &x.device()));
        let runs = filled.reshape([batch, n_centres, all / n_centres, d_model]);
        runs.mean_dim(2).mean_dim(0).reshape([n_centres, d_model])
    }
}

/// `[batch * tokens, d_model]`: the directions of tokens.
fn flat(x: Tensor<3>) -> Tensor<2> {
    unit(x.flatten(0, 1))
}

/// Centres fitted once more: `[n_centres, d_model]`, from directions `[tokens, d_model]`.
fn step(units: Tensor<2>, centres: Tensor<2>) -> Tensor<2> {
    let centres = unit(centres);
    let dims = centres.dims();
    let members = nearest(units.clone().detach(), centres.clone()).one_hot::<2>(dims[0]).float(); // [tokens, n_centres]
    let empty = members.clone().sum_dim(0).equal_elem(0.0).swap_dims(0, 1).expand(dims);
    unit(members.swap_dims(0, 1).matmul(units)).mask_where(empty, centres)
}

/// The centre that each direction is nearest to, of equally near ones the first: `[tokens]`.
fn nearest(units: Tensor<2>, centres: Tensor<2>) -> Tensor<1, Int> {
    units.matmul(centres.swap_dims(0, 1)).argmax(1).squeeze_dim(1)
}

/// The tokens of each row of `n`, counted through all rows, by their centres; those of one centre as they were.
pub fn order(nearest: &[usize], n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..nearest.len()).collect();
    order.chunks_mut(n).for_each(|row| row.sort_by_key(|&token| nearest[token]));
    order
}

/// Which of `n` is at a place beyond the end, where they are mirrored again and again.
fn mirrored(at: usize, n: usize) -> usize {
    match at % (2 * n) {
        at if at < n => at,
        at => 2 * n - 1 - at,
    }
}

fn indices(rows: impl Iterator<Item = usize>, device: &Device) -> Tensor<1, Int> {
    let rows: Vec<i32> = rows.map(|row| row as i32).collect();
    let count = rows.len();
    Tensor::from_data(TensorData::new(rows, [count]), device)
}

fn kept<const D: usize>(values: Tensor<D>) -> Param<Tensor<D>> {
    Param::from_tensor(values).set_require_grad(false)
}
