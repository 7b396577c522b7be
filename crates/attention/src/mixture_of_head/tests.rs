//! What mixture-of-head attention must do besides the laws.

use burn::module::Param;
use polyhead_kernels::attention;
use polyhead_kernels::comparison::{Tolerance, assert_tensors_close};

use super::*;
use crate::laws::draw;
use crate::{Mask, Observe, Rope, RopeLayout};

const SEQ: usize = 11;
/// Tolerance for rounding when the same numbers are computed in another order, as in the laws.
const ROUNDING: f64 = 2e-5;

fn dims() -> Dims {
    Dims { d_model: 24, n_layers: 1, layer: 0, ..Dims::example() }
}

fn config(shared: usize, top_k: usize, router: RouterConfig) -> MixtureOfHeadConfig {
    MixtureOfHeadConfig {
        shared_heads: PerLayerCount::Same(shared),
        top_k: PerLayerCount::Same(top_k),
        router,
        qkv_bias: false,
        ..MixtureOfHeadConfig::example()
    }
}

fn learned(gate_norm: GateNorm) -> RouterConfig {
    RouterConfig::Learned(LearnedRouterConfig { gate_norm, two_stage: true })
}

fn query_norm(straight_through: StraightThrough) -> RouterConfig {
    RouterConfig::QueryNorm(QueryNormConfig { straight_through })
}

/// A layer whose weights are large enough that heads differ.
fn layer(config: &MixtureOfHeadConfig, device: &Device) -> MixtureOfHead {
    let mut layer = config.init(&dims(), device);
    let mut spread = |projection: &mut Linear| {
        projection.weight = Param::from_tensor(draw(projection.weight.dims(), [0.0, 0.4], device));
    };
    [&mut layer.q_proj, &mut layer.k_proj, &mut layer.v_proj, &mut layer.o_proj].into_iter().for_each(&mut spread);
    layer
        .router
        .iter_mut()
        .flat_map(|router| [&mut router.routed, &mut router.kinds, &mut router.shared])
        .flatten()
        .for_each(spread);
    layer
}

fn input(device: &Device) -> Tensor<3> {
    draw([2, SEQ, 24], [0.0, 1.0], device)
}

fn run(layer: &impl Mechanism, x: &Tensor<3>, mask: &Mask, observe: Observe) -> Attended {
    let rope = Rope::new(0..SEQ, 4, 100.0, RopeLayout::RotateHalf, &x.device());
    layer.forward(x.clone(), Call { rope: Some(&rope), observe, ..Call::new(mask) })
}

fn close(a: Tensor<3>, b: Tensor<3>) {
    assert_tensors_close("outputs", a, b, Tolerance::absolute(ROUNDING));
}

/// The same projections, all heads everywhere.
fn dense(layer: &MixtureOfHead) -> crate::Softmax {
    let mut dense = layer.config.dense().init(&dims(), &layer.q_proj.weight.device());
    dense.q_proj = layer.q_proj.clone();
    dense.k_proj = layer.k_proj.clone();
    dense.v_proj = layer.v_proj.clone();
    dense.o_proj = layer.o_proj.clone();
    dense
}

#[test]
fn a_router_of_zeros_gives_exactly_multi_head_attention() {
    let device = Device::flex();
    let mut layer = layer(&config(2, 4, learned(GateNorm::Code)), &device);
    for map in layer.router.iter_mut().flat_map(|router| [&mut router.routed, &mut router.kinds, &mut router.shared]) {
        let map = map.as_mut().expect("two kinds of heads");
        map.weight = Param::from_tensor(map.weight.val().zeros_like());
    }
    let x = input(&device);
    for mask in [Mask::causal(), Mask::none()] {
        let want = run(&dense(&layer), &x, &mask, Observe::Nothing).hidden;
        close(run(&layer, &x, &mask, Observe::Nothing).hidden, want);
    }
}

#[test]
fn the_weighted_sum_of_all_heads_is_what_choosing_all_gives() {
    let device = Device::flex();
    let layer = layer(&config(2, 4, learned(GateNorm::Paper)), &device);
    let x = input(&device);
    let routing = layer.router.as_ref().expect("learned").route(x.clone(), None);
    let softmax = |map: &Option<Linear>| {
        let map = map.as_ref().expect("two kinds of heads");
        burn::tensor::activation::softmax(x.clone().matmul(map.weight.val().unsqueeze::<3>()), 2)
    };
    let router = layer.router.as_ref().expect("learned");
    let kinds = softmax(&router.kinds);
    let gates = Tensor::cat(
        vec![softmax(&router.shared) * kinds.clone().narrow(2, 0, 1), softmax(&router.routed) * kinds.narrow(2, 1, 1)],
        2,
    );
    close(routing.gates, gates);
}

#[test]
fn each_position_has_its_number_of_heads_and_counts_each_once() {
    let device = Device::flex();
    for (shared, top_k) in [(0, 1), (1, 3), (2, 2), (6, 0)] {
        for router in [learned(GateNorm::Code), query_norm(StraightThrough::Chosen)] {
            let layer = layer(&config(shared, top_k, router), &device);
            let (_, routing) = layer.route(input(&device), None, Adapters::default());
            assert_eq!(routing.selected.count(), 2 * SEQ * (shared + top_k));
            let gates: Vec<f32> = routing.gates.into_data().iter::<f32>().collect();
            for gates in gates.chunks(6) {
                assert_eq!(gates.iter().filter(|&&gate| gate != 0.0).count(), shared + top_k);
                let means = [(&gates[..shared], shared), (&gates[shared..], top_k)]
                    .map(|(gates, active)| gates.iter().sum::<f32>() / active.max(1) as f32);
                let kinds = [shared, top_k].iter().filter(|&&active| active > 0).count() as f32;
                assert!(
                    (means[0] + means[1] - kinds).abs() < 1e-5,
                    "the means of the kinds are 1 on average: {gates:?}"
                );
            }
            let load: f32 = routing.balance.iter().flat_map(|balance| &balance.load).sum();
            assert!((load - top_k as f32).abs() < 1e-5);
        }
    }
}

#[test]
fn what_is_skipped_would_have_been_multiplied_by_zero() {
    let device = Device::flex().autodiff();
    for router in [learned(GateNorm::Code), query_norm(StraightThrough::Nobody)] {
        let layer = layer(&config(1, 2, router), &device);
        let x = input(&device).require_grad();
        let cotangent = input(&device);
        let got = run(&layer, &x, &Mask::causal(), Observe::Nothing).hidden;
        let (_, routing) = layer.route(x.clone(), None, Adapters::default());
        let rope = Rope::new(0..SEQ, 4, 100.0, RopeLayout::RotateHalf, &device);
        let project =
            |map: &Linear, heads| split_heads(polyhead_kernels::linear(x.clone(), map.weight.val(), None), heads);
        let (q, k) = (rope.rotate(project(&layer.q_proj, 6)), rope.rotate(project(&layer.k_proj, 3)));
        let window = Mask::causal().with_window(5);
        let options = AttentionOptions { mask: Some(&window), ..Default::default() };
        let heads = join_heads(attention(q, k, project(&layer.v_proj, 3), &options).hidden);
        let gated = heads.reshape([2, SEQ, 6, 4]) * routing.gates.unsqueeze_dim::<4>(3);
        let want = polyhead_kernels::linear(gated.reshape([2, SEQ, 24]), layer.o_proj.weight.val(), None);
        close(got.clone(), want.clone());
        // Sums of many products: what rounding does to them is as large as their largest.
        let slope = |out: Tensor<3>| x.grad(&(out * cotangent.clone()).sum().backward()).expect("gradient");
        let (got, want) = (slope(got), slope(want));
        assert_tensors_close("gradients", got, want, Tolerance::relative(ROUNDING));
    }
}

#[test]
fn routing_by_norms_obeys_the_laws() {
    let router = query_norm(StraightThrough::Nobody);
    crate::laws::hold(
        &crate::AttentionConfig::MixtureOfHead(MixtureOfHeadConfig { router, ..MixtureOfHeadConfig::example() }),
        &[],
    );
}

#[test]
fn padding_does_not_count_in_the_balance() {
    let device = Device::flex();
    let layer = layer(&config(1, 2, learned(GateNorm::Code)), &device);
    let x = input(&device);
    let penalty = |x: &Tensor<3>, lengths: &[usize]| {
        let mask = Mask::none().with_lengths(lengths);
        run(&layer, x, &mask, Observe::Nothing).penalty.expect("routed heads").into_scalar::<f32>()
    };
    let other = Tensor::cat(vec![x.clone().narrow(1, 0, 7), input(&device).narrow(1, 7, SEQ - 7)], 1);
    assert!((penalty(&x, &[7, 5]) - penalty(&other, &[7, 5])).abs() < 1e-6);
    assert!((penalty(&x, &[SEQ, SEQ]) - penalty(&other, &[SEQ, SEQ])).abs() > 1e-4);
}

#[test]
fn even_use_gives_k_and_collapse_gives_the_number_of_heads() {
    let device = Device::flex();
    let split = HeadSplit { shared: 0, routed: 4, top_k: 2 };
    let penalty = |probabilities: [f32; 4], load: [f32; 4], norm| {
        let probabilities = Tensor::from_floats(probabilities, &device);
        Balance { probabilities, load: load.to_vec() }.penalty(split, norm).into_scalar::<f32>()
    };
    assert!((penalty([0.25; 4], [0.5; 4], GateNorm::Code) - 2.0).abs() < 1e-6);
    assert!((penalty([0.25; 4], [0.5; 4], GateNorm::Paper) - 0.5).abs() < 1e-6);
    assert!((penalty([0.5, 0.5, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], GateNorm::Code) - 4.0).abs() < 1e-6);
}

#[test]
fn what_was_chosen_can_be_seen() {
    let device = Device::flex();
    let layer = layer(&config(2, 1, learned(GateNorm::Code)), &device);
    let seen = run(&layer, &input(&device), &Mask::causal(), Observe::Maps).seen.expect("asked for");
    let number = |name: &str| {
        let (_, values) = seen.numbers.iter().find(|(found, _)| found == name).expect(name);
        values.to_data().iter::<f32>().collect::<Vec<_>>()
    };
    assert_eq!((number("load").len(), number("gate").len()), (4, 6));
    assert!((number("load").iter().sum::<f32>() - 4.0).abs() < 1e-5, "shares of an even load: 1 on average");
    assert!(number("most_load")[0] >= 1.0 && number("least_load")[0] <= 1.0);
    assert!(number("imbalance")[0] > 0.5);
    let gates = seen.gates.expect("asked for");
    assert_eq!(gates.dims(), [6, SEQ]);
    let taking_part: f32 = gates.not_equal_elem(0.0).float().sum().into_scalar();
    assert_eq!(taking_part, 3.0 * SEQ as f32);
}

#[test]
fn numbers_that_do_not_fit_are_refused_by_name() {
    let problem = |config: MixtureOfHeadConfig| config.validate(&dims()).err().map(|error| error.field);
    assert_eq!(problem(config(2, 2, learned(GateNorm::Code))), None);
    assert_eq!(problem(config(7, 0, learned(GateNorm::Code))).as_deref(), Some("shared_heads"));
    assert_eq!(problem(config(3, 4, learned(GateNorm::Code))).as_deref(), Some("top_k"));
    assert_eq!(problem(config(3, 0, learned(GateNorm::Code))).as_deref(), Some("top_k"));
    let alone = config(5, 1, query_norm(StraightThrough::Chosen));
    assert_eq!(problem(alone).as_deref(), Some("router.query_norm"));
    let lists = MixtureOfHeadConfig { top_k: PerLayerCount::Each(vec![2, 2]), ..config(2, 2, learned(GateNorm::Code)) };
    assert_eq!(problem(lists).as_deref(), Some("top_k"));
}
