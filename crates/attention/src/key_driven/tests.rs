#![allow(clippy::unwrap_used)]
use burn::module::Module;
use polyhead_kernels::comparison::{Tolerance, assert_tensors_close, largest_difference};
use polyhead_kernels::seed_random;

use super::*;
use crate::laws::{Spread, draw};
use crate::{Attention, Observe};

const DIMS: Dims = Dims { d_model: 24, n_layers: 4, layer: 1, rope: false, norm_eps: 1e-5, grid: None };

fn config(allocation: AllocationConfig) -> KeyDrivenConfig {
    KeyDrivenConfig { n_heads: 6, n_kv_heads: 3, allocation, ..KeyDrivenConfig::example() }
}

fn layer(allocation: AllocationConfig) -> KeyDriven {
    let config = config(allocation);
    config.validate(&DIMS).unwrap();
    let device = Device::flex().autodiff();
    seed_random(3);
    config.init(&DIMS, &device)
}

fn input(batch: usize, seq: usize, device: &Device) -> Tensor<3> {
    draw([batch, seq, 24], [0.0, 1.0], device)
}

fn call<C>(mask: &Mask) -> Call<'_, C> {
    Call { observe: Observe::Numbers, ..Call::new(mask) }
}

/// How many query heads read each key/value head, as the layer tells.
fn counts_of(attended: &Attended) -> Vec<usize> {
    let (_, counts) =
        attended.seen.as_ref().unwrap().numbers.iter().find(|(name, _)| name == "query_heads").unwrap().clone();
    counts.into_data().iter::<f32>().map(|count| count as usize).collect()
}

#[test]
fn keys_of_the_call_decide_and_padding_does_not() {
    let layer = layer(AllocationConfig::PerCall(PerCallConfig {})).map(&mut Spread);
    let device = Device::flex().autodiff();
    let x = input(2, 5, &device);
    let short = layer.forward(x.clone(), call(&Mask::none()));
    let counts = counts_of(&short);
    assert!(counts.iter().sum::<usize>() == 6 && counts.contains(&0), "{counts:?}");
    let padded = Tensor::cat(vec![x, input(2, 3, &device) * 100.0], 1);
    let padded = layer.forward(padded, call(&Mask::none().with_lengths(&[5, 5])));
    assert_eq!(counts_of(&padded), counts);
    assert_tensors_close("padding", padded.hidden.narrow(1, 0, 5), short.hidden, Tolerance::absolute(2e-5));
}

#[test]
fn what_looks_ahead_is_refused_in_a_decoder() {
    let check = |config: &KeyDrivenConfig| config.check_causal().map_err(|error| error.field);
    assert_eq!(check(&config(AllocationConfig::PerCall(PerCallConfig {}))), Err("allocation".into()));
    assert_eq!(check(&config(AllocationConfig::Evolving(EvolvingConfig::default()))), Err("allocation".into()));
    let even = config(AllocationConfig::Even(EvenConfig {}));
    assert_eq!(check(&even), Ok(()));
    assert_eq!(check(&KeyDrivenConfig { perturb: true, ..even }), Err("perturb".into()));
    assert_eq!(check(&KeyDrivenConfig::example()), Ok(()));
}

#[test]
fn a_frozen_allocation_gives_all_query_heads_away() {
    let refused =
        |query_heads| config(AllocationConfig::Fixed(FixedConfig { query_heads })).validate(&DIMS).unwrap_err();
    for wrong in [vec![3, 3], vec![3, 3, 1]] {
        assert_eq!(refused(wrong).field, "allocation.fixed.query_heads");
    }
    assert!(config(AllocationConfig::Fixed(FixedConfig { query_heads: vec![0, 6, 0] })).validate(&DIMS).is_ok());
}

/// Training moves the memory on every `window` steps; evaluation never does, and its form decides what it sees.
#[test]
fn training_remembers_and_evaluation_does_not() {
    for form in [Form::Code, Form::Paper] {
        for by in [Measured::Average, Measured::Difference] {
            let evolving = EvolvingConfig { by, form, window: 2 };
            let mut layer = layer(AllocationConfig::Evolving(evolving)).map(&mut Loud);
            let device = Device::flex().autodiff();
            let x = input(2, 5, &device);
            assert_eq!(counts_of(&layer.forward(x.clone(), call(&Mask::none()))), [2, 2, 2], "{form:?} {by:?}");
            assert!(!layer.is_due(1) && layer.is_due(2));
            layer.before_step(x.clone(), &Mask::none(), 2);
            let learned = layer.memory.as_ref().unwrap().query_heads();
            assert_eq!(learned, [1, 4, 1], "the second head's keys are large");
            assert_eq!(counts_of(&layer.forward(x.clone(), call(&Mask::none()))), learned);

            // Keys of the third head grow: evaluation in the code's form sees it, in the paper's form it does not.
            let eval = layer.valid();
            let loud = Tensor::cat(vec![x.clone().narrow(2, 0, 23), x.narrow(2, 23, 1) * 50.0], 2).inner();
            let seen = counts_of(&eval.forward(loud.clone(), call(&Mask::none())));
            assert_eq!(seen == learned, form == Form::Paper, "{seen:?}");
            assert_eq!(counts_of(&eval.forward(loud, call(&Mask::none()))), seen, "nothing was remembered");
        }
    }
}

/// Keys of the second head four times as large as the others'; those of the third come from the last two channels only.
struct Loud;

impl burn::module::ModuleMapper for Loud {
    fn map_float<const D: usize>(&mut self, param: burn::module::Param<Tensor<D>>) -> burn::module::Param<Tensor<D>> {
        let dims = param.dims();
        if D != 2 || dims[1] != 12 {
            return param;
        }
        let entry = |row: usize, column: usize| match (row, column / 4) {
            (row, 0) if row % 4 == column % 4 => 1.0,
            (row, 1) if row % 4 == column % 4 => 4.0,
            (22 | 23, 2) => 3f32.sqrt(),
            _ => 0.0,
        };
        let values: Vec<f32> = (0..24 * 12).map(|at| entry(at / 12, at % 12)).collect();
        param.map(|old| Tensor::from_data(TensorData::new(values, old.dims()), &old.device()).require_grad())
    }
}

#[test]
fn noise_leaves_rows_without_a_mean_and_passes_gradients() {
    let device = Device::flex().autodiff();
    let config = KeyDrivenConfig { perturb: true, ..config(AllocationConfig::Even(EvenConfig {})) };
    let layer = Attention::KeyDriven(config.init(&DIMS, &device)).map(&mut Spread);
    let x = input(2, 5, &device).require_grad();
    let out = layer.forward(x.clone(), call(&Mask::none())).hidden;
    let again = layer.forward(x.clone(), call(&Mask::none())).hidden;
    assert!(largest_difference(out.clone(), again) > 1e-3, "noise is drawn anew");
    let grads = out.square().sum().backward();
    assert!(x.grad(&grads).unwrap().into_data().iter::<f32>().all(|grad| grad.is_finite() && grad != 0.0));

    let heads = draw([2, 6, 5, 4], [1.0, 1.0], &device);
    let uniform = draw([6, 20], [0.5, 0.15], &device);
    let means = perturbed(heads, &[1, 4, 1], uniform).reshape([2, 6, 20]).mean_dim(2);
    assert_tensors_close("means", means.clone(), means.zeros_like(), Tolerance::absolute(1e-6));
    let flat = perturbed(Tensor::ones([1, 1, 1, 1], &device), &[1], Tensor::ones([1, 1], &device));
    assert_eq!(flat.into_scalar::<f32>(), 0.0);
}
