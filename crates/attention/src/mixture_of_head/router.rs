//! Routers: the heads that are selected at a position, and the weight of each.
//!
//! Learned, in two stages, with `p = softmax(x W_r)` over the `E` routed heads, `m` the `k` largest of them, and `a` the
//! weights of the two kinds:
//!
//! ```text
//!            paper (eq. 5, 6)                    the authors' code
//! shared     a_0 softmax(x W_s)                  a_0 h_s softmax(x W_s)
//! routed     a_1 p m                             a_1 k p m / Σ p m
//! a          softmax(x W_h)                      2 softmax(x W_h)
//! penalty    Σ_i P_i f_i (eq. 7, 8)              E Σ_i P_i f_i
//! ```
//!
//! `P_i` is the mean of `p_i` over positions and `f_i` the share of positions that chose head `i`, through which no
//! gradient flows. The code's form is the default: with weights of zero every gate of a head that takes part is 1, so that
//! the layer starts at the scale of multi-head attention.
//!
//! By the norms of the queries (the authors' LLaMA3, which was trained without a router and converted): `p = softmax(n /
//! std(n))` with `n` the norms before rotation; gates are 1 or 0, and the gradient of a gate goes straight through to `p`
//! (eq. 9, 10). Their training code is unpublished: whether heads that were not chosen get that gradient is a setting.
//!
//! Routers compute in f32 whatever the model does. Padding is left out of the balance, which the authors' code counts.

use std::sync::Arc;

use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::{DType, Device, Tensor, TensorData, activation};
use polyhead_kernels::{SelectedRows, in_type, total};
use serde::{Deserialize, Serialize};

use super::HeadSplit;
use crate::projection::{INIT_STD, linear};
use crate::{Observation, Observed};

/// The router: one of its tables.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum RouterConfig {
    /// Linear maps of the layer's input.
    Learned(LearnedRouterConfig),
    /// The norms of the queries, without parameters; gates are 1 or 0. For models that were trained without a router.
    QueryNorm(QueryNormConfig),
}

impl Default for RouterConfig {
    fn default() -> Self {
        Self::Learned(LearnedRouterConfig::default())
    }
}

/// Settings of the learned router.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct LearnedRouterConfig {
    /// "code" (default): gates of heads that take part are 1 on average. "paper": gates add up to at most 1.
    pub gate_norm: GateNorm,
    /// Weigh shared against routed heads at every position. Default: true.
    pub two_stage: bool,
}

impl Default for LearnedRouterConfig {
    fn default() -> Self {
        Self { gate_norm: GateNorm::Code, two_stage: true }
    }
}

/// Whose normalisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum GateNorm {
    /// The authors' code's.
    #[default]
    Code,
    /// The paper's equations.
    Paper,
}

/// Settings of routing by the norms of the queries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub struct QueryNormConfig {
    /// The gates that pass their gradient on to the norms. Default: "chosen".
    pub straight_through: StraightThrough,
}

/// The gates that pass their gradient on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum StraightThrough {
    /// Those of the chosen heads. Training saves the work of the others.
    #[default]
    Chosen,
    /// Those of all routed heads, as the paper's equation reads. Training computes all heads everywhere.
    All,
    /// None.
    Nobody,
}

impl LearnedRouterConfig {
    /// Outputs of the router's linear maps together: W_r, W_h and W_s.
    pub(super) fn outputs(self, split: HeadSplit) -> usize {
        self.kinds(split) + split.routed + self.shared(split)
    }

    /// Outputs of W_h.
    fn kinds(self, split: HeadSplit) -> usize {
        if self.two_stage && split.routed > 0 && split.shared > 0 { 2 } else { 0 }
    }

    /// Outputs of W_s: one shared head needs no weights among its kind.
    fn shared(self, split: HeadSplit) -> usize {
        if split.shared > 1 { split.shared } else { 0 }
    }
}

/// The learned router of a layer.
#[derive(Module, Debug)]
pub struct LearnedRouter {
    /// `[d_model, routed heads]`: W_r, `wg` in the authors' code; `None` without routed heads
    pub routed: Option<Linear>,
    /// `[d_model, 2]`: W_h, `wg_0`, shared against routed; `None` where there is one kind or one stage
    pub kinds: Option<Linear>,
    /// `[d_model, shared heads]`: W_s, `wg_1`; `None` below two shared heads
    pub shared: Option<Linear>,
    #[module(skip)]
    split: HeadSplit,
    #[module(skip)]
    gate_norm: GateNorm,
}

/// What is observed of gates.
pub(super) const GATE: Observed =
    Observed::new("gate", "gate of a head, mean over the positions where it is selected", "");
/// What is observed of routed heads.
pub(super) const LOAD: [Observed; 4] = [
    Observed::new("load", "share of positions that select a routed head, as a multiple of an even load", ""),
    Observed::new("least_load", "load of the routed head that is selected least", ""),
    Observed::new("most_load", "load of the routed head that is selected most", ""),
    Observed::new("imbalance", "load-balance penalty over its value for even loads: 1 where loads are even", ""),
];

/// A router's decision about one call.
#[derive(Debug, Clone)]
pub struct Routing {
    /// `[batch, seq, heads]`: what outputs of heads are multiplied by.
    pub gates: Tensor<3>,
    /// The selected queries of each head; all others have a gate of zero.
    pub selected: Arc<SelectedRows>,
    /// `None` without routed heads.
    pub balance: Option<Balance>,
}

/// The load of the routed heads in one call.
#[derive(Debug, Clone)]
pub struct Balance {
    /// `[routed heads]`: P, the mean probability of each, differentiable.
    pub probabilities: Tensor<1>,
    /// f: the share of positions that chose each.
    pub load: Vec<f32>,
}

impl LearnedRouter {
    pub(super) fn new(d_model: usize, split: HeadSplit, config: LearnedRouterConfig, device: &Device) -> Self {
        let map = |outputs| (outputs > 0).then(|| linear(d_model, outputs, false, INIT_STD, device));
        Self {
            routed: map(split.routed),
            kinds: map(config.kinds(split)),
            shared: map(config.shared(split)),
            split,
            gate_norm: config.gate_norm,
        }
    }

    /// Chooses heads for `hidden`, `[batch, seq, d_model]`. `real` says which positions are no padding, row by row.
    pub fn route(&self, hidden: Tensor<3>, real: Option<&[bool]>) -> Routing {
        let ([batch, seq, _], dtype) = (hidden.dims(), hidden.dtype());
        let HeadSplit { shared, top_k, .. } = self.split;
        let x = in_type(hidden, DType::F32);
        let softmax =
            |map: &Linear| activation::softmax(polyhead_kernels::linear(x.clone(), map.weight.val(), None), 2);
        let scaled = |weights: Tensor<3>, sum: usize| match self.gate_norm {
            GateNorm::Code => weights * sum as f64,
            GateNorm::Paper => weights,
        };
        let [of_shared, of_routed] = match &self.kinds {
            Some(map) => {
                let kinds = scaled(softmax(map), 2);
                [0, 1].map(|kind| Some(kinds.clone().narrow(2, kind, 1)))
            }
            None => [None, None],
        };
        let weighted = |gates: Tensor<3>, weight: Option<Tensor<3>>| match weight {
            Some(weight) => gates * weight,
            None => gates,
        };
        let mut gates = Vec::new();
        if shared > 0 {
            let among = match &self.shared {
                Some(map) => scaled(softmax(map), shared),
                None => Tensor::ones([batch, seq, 1], &x.device()),
            };
            gates.push(weighted(among, of_shared));
        }
        let chosen = self.routed.as_ref().map(|map| Chosen::top(softmax(map), top_k));
        if let Some(chosen) = &chosen {
            let picked = chosen.probabilities.clone() * chosen.mask();
            let among = match self.gate_norm {
                GateNorm::Code => picked.clone() / picked.sum_dim(2).clamp_min(f32::EPSILON) * top_k as f64,
                GateNorm::Paper => picked,
            };
            gates.push(weighted(among, of_routed));
        }
        Routing {
            gates: in_type(Tensor::cat(gates, 2), dtype),
            selected: selected_rows([batch, seq], shared, chosen.as_ref()),
            balance: chosen.map(|chosen| chosen.balance(real)),
        }
    }
}

/// Chooses heads by the norms of their queries, `[batch, heads, seq, head_dim]`, not yet rotated.
pub(super) fn by_query_norm(q: Tensor<4>, split: HeadSplit, config: QueryNormConfig, real: Option<&[bool]>) -> Routing {
    let ([batch, _, seq, _], dtype) = (q.dims(), q.dtype());
    let HeadSplit { shared, routed, top_k } = split;
    let ones = |heads: usize| Tensor::<3>::ones([batch, seq, heads], &q.device());
    if routed == 0 {
        let selected = selected_rows([batch, seq], shared, None);
        return Routing { gates: in_type(ones(shared), dtype), selected, balance: None };
    }
    let norms = in_type(q.clone().narrow(1, shared, routed), DType::F32).square().sum_dim(3).sqrt();
    let norms = norms.squeeze_dim::<3>(3).swap_dims(1, 2); // [batch, seq, routed]
    let spread = (norms.clone() - norms.clone().mean_dim(2)).square().sum_dim(2) / (routed - 1) as f64;
    // Equal norms have no spread: then all heads are as probable.
    let chosen = Chosen::top(activation::softmax(norms / spread.sqrt().clamp_min(1e-12), 2), top_k);
    let mask = chosen.mask();
    let through = chosen.probabilities.clone() - chosen.probabilities.clone().detach(); // zero, with p's gradient
    let gates = match config.straight_through {
        StraightThrough::Nobody => mask,
        StraightThrough::Chosen => mask.clone() + through * mask,
        StraightThrough::All => mask + through,
    };
    let gates = if shared > 0 { Tensor::cat(vec![ones(shared), gates], 2) } else { gates };
    let learns = q.device().is_autodiff();
    let selected = match config.straight_through {
        // A gate's gradient needs its head's output.
        StraightThrough::All if learns => Arc::new(SelectedRows::all([batch, seq, split.heads()])),
        _ => selected_rows([batch, seq], shared, Some(&chosen)),
    };
    Routing { gates: in_type(gates, dtype), selected, balance: Some(chosen.balance(real)) }
}

/// The routed heads that positions chose.
struct Chosen {
    /// `[batch, seq, routed heads]`
    probabilities: Tensor<3>,
    /// The same, one answer each.
    chosen: Vec<bool>,
}

impl Chosen {
    /// The `k` most probable heads of every position; of equals, the first.
    fn top(probabilities: Tensor<3>, k: usize) -> Self {
        let heads = probabilities.dims()[2];
        let values: Vec<f32> = probabilities.clone().detach().into_data().iter::<f32>().collect();
        let mut chosen = vec![false; values.len()];
        let mut order: Vec<usize> = Vec::with_capacity(heads);
        for (values, chosen) in values.chunks(heads).zip(chosen.chunks_mut(heads)) {
            order.clear();
            order.extend(0..heads);
            order.sort_by(|&a, &b| values[b].total_cmp(&values[a]).then(a.cmp(&b)));
            order[..k].iter().for_each(|&head| chosen[head] = true);
        }
        Self { probabilities, chosen }
    }

    /// 1 where chosen, else 0; without gradient.
    fn mask(&self) -> Tensor<3> {
        let ones: Vec<f32> = self.chosen.iter().map(|&chosen| f32::from(u8::from(chosen))).collect();
        Tensor::from_data(TensorData::new(ones, self.probabilities.dims()), &self.probabilities.device())
    }

    /// Over the positions that are no padding.
    fn balance(self, real: Option<&[bool]>) -> Balance {
        let [batch, seq, heads] = self.probabilities.dims();
        let tokens = batch * seq;
        let counts = |token: usize| real.is_none_or(|real| real[token]);
        let counted = (0..tokens).filter(|&token| counts(token)).count().max(1) as f32;
        let weights: Vec<f32> = (0..tokens).map(|token| if counts(token) { 1.0 / counted } else { 0.0 }).collect();
        let mut load = vec![0.0; heads];
        for (chosen, weight) in self.chosen.chunks(heads).zip(&weights) {
            load.iter_mut().zip(chosen).filter(|(_, chosen)| **chosen).for_each(|(load, _)| *load += weight);
        }
        let weights = Tensor::<2>::from_data(TensorData::new(weights, [1, tokens]), &self.probabilities.device());
        let probabilities = weights.matmul(self.probabilities.reshape([tokens, heads])).squeeze_dim::<1>(0);
        Balance { probabilities, load }
    }
}

/// Shared heads everywhere, routed ones where they were chosen.
fn selected_rows([batch, seq]: [usize; 2], shared: usize, chosen: Option<&Chosen>) -> Arc<SelectedRows> {
    let routed = chosen.map_or(0, |chosen| chosen.probabilities.dims()[2]);
    let all: Vec<bool> = (0..batch * seq)
        .flat_map(|token| {
            let of_token = chosen.map_or(&[][..], |chosen| &chosen.chosen[token * routed..(token + 1) * routed]);
            std::iter::repeat_n(true, shared).chain(of_token.iter().copied())
        })
        .collect();
    Arc::new(SelectedRows::new(&all, [batch, seq, shared + routed]))
}

impl Balance {
    /// `Σ P f`, times the number of routed heads in the code's normalisation.
    pub fn penalty(&self, split: HeadSplit, norm: GateNorm) -> Tensor<1> {
        let load = Tensor::<1>::from_floats(self.load.as_slice(), &self.probabilities.device());
        let sum = total(self.probabilities.clone() * load);
        match norm {
            GateNorm::Code => sum * split.routed as f64,
            GateNorm::Paper => sum,
        }
    }
}

impl Routing {
    /// Adds what is to be seen: each head's mean gate over the positions where it takes part, each routed head's load in
    /// shares of an even one, and the imbalance (the code's penalty / k): 1 where all heads are used alike, E / k where
    /// all positions choose the same.
    pub(super) fn observe(&self, split: HeadSplit, seen: &mut Observation) {
        let [batch, seq, heads] = self.gates.dims();
        let gates = in_type(self.gates.clone().detach(), DType::F32); // as all that is observed
        let taking_part = gates.clone().not_equal_elem(0.0).float().sum_dims_squeeze::<1, _>(&[0, 1]);
        seen.number(GATE, gates.clone().sum_dims_squeeze::<1, _>(&[0, 1]) / taking_part.clamp_min(1.0));
        debug_assert_eq!(self.selected.shape(), [batch, seq, heads]);
        if let Some(balance) = &self.balance {
            let even = split.top_k as f32 / split.routed as f32;
            let load: Vec<f32> = balance.load.iter().map(|load| load / even).collect();
            let [least, most] = [f32::min, f32::max].map(|pick| load.iter().copied().reduce(pick).unwrap_or(0.0));
            let device = gates.device();
            let number = |value: &[f32]| Tensor::<1>::from_floats(value, &device);
            seen.number(LOAD[0], number(&load));
            seen.number(LOAD[1], number(&[least]));
            seen.number(LOAD[2], number(&[most]));
            seen.number(LOAD[3], balance.penalty(split, GateNorm::Code).detach() / split.top_k as f64);
        }
        seen.gates = Some(gates.narrow(0, 0, 1).squeeze_dim::<2>(0).transpose());
    }
}
