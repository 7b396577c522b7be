use burn::module::Param;
use burn::tensor::{Int, TensorData};
use polyhead_kernels::comparison::{Tolerance, assert_close, assert_tensors_close, largest_difference, numbers};

use super::*;
use crate::laws::{Spread, agree_with_differences, draw, reach_every_parameter};

const SIZES: [usize; 2] = [14, 5];

fn device() -> Device {
    Device::flex().autodiff()
}

fn input() -> Tensor<3> {
    draw([3, SIZES[0], SIZES[1]], [0.5, 1.0], &device())
}

fn config(json: &str) -> GaussianGateConfig {
    let config: GaussianGateConfig = serde_json::from_str(json).expect("a gate");
    config.validate(&SIZES).expect("valid");
    config
}

/// One gate of each form, with parameters spread from where they begin.
fn gates() -> Vec<GaussianGate> {
    fresh().into_iter().map(|gate| gate.map(&mut Spread)).collect()
}

/// As gates begin, with widths of 2.
fn fresh() -> Vec<GaussianGate> {
    [
        r#"{"paper": {"n_heads": 4}}"#,
        r#"{"product": {"n_heads": 4, "n_gaussians": 3, "c_init": {"constant": 2.0}}}"#,
        r#"{"mixture": {"n_heads": 4, "n_gaussians": 3, "c_init": {"constant": 2.0}}}"#,
    ]
    .map(|json| config(json).init(&SIZES, &device()))
    .into()
}

fn close<const D: usize>(got: Tensor<D>, want: Tensor<D>) {
    assert_tensors_close("gates", got, want, Tolerance::absolute(2e-5));
}

fn matrix(values: &[f32]) -> Param<Tensor<2>> {
    Param::from_tensor(Tensor::from_data(TensorData::new(values.to_vec(), [1, values.len()]), &device()))
}

#[test]
fn a_product_of_gaussians_is_one_gaussian() {
    let (offsets, widths) = ([0.3f32, -0.7, 1.1, 0.2], [0.8f32, 1.7, 0.6, 2.4]);
    let gate = |offsets: &[f32], widths: &[f32]| {
        let gate =
            ProductGate { mean_offset: matrix(offsets), c: matrix(widths), axis: 1, eps: 1e-8, padding_value: None };
        GaussianGate::Product(gate).forward(input_of_the_test(), None).weights
    };
    let precision: f32 = widths.iter().map(|c| 1.0 / (c * c)).sum();
    let centre = offsets.iter().zip(&widths).map(|(offset, c)| offset / (c * c)).sum::<f32>() / precision;
    let several = gate(&offsets, &widths);
    close(several.clone(), gate(&[centre], &[precision.sqrt().recip()]));

    // And both are the product as it is written.
    let x = numbers(input_of_the_test());
    let (rows, columns) = (SIZES[0], SIZES[1]);
    let mut want = vec![0f64; x.len()];
    for start in (0..3).flat_map(|sample| (0..columns).map(move |column| sample * rows * columns + column)) {
        let at = |row: usize| start + row * columns;
        let values: Vec<f64> = (0..rows).map(|row| f64::from(x[at(row)])).collect();
        let mean = values.iter().sum::<f64>() / rows as f64;
        let variance = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (rows - 1) as f64;
        let density = |x: f64| {
            let one = |(offset, c): (&f32, &f32)| {
                let (y, c) = ((x - mean - f64::from(*offset)) / variance.sqrt(), f64::from(*c));
                (-y * y / (2.0 * c * c)).exp() / (std::f64::consts::TAU * c * c).sqrt()
            };
            offsets.iter().zip(&widths).map(one).product::<f64>()
        };
        let sum: f64 = values.iter().map(|&x| density(x)).sum();
        assert!(sum > 1e-6, "the lower bound must not be reached here");
        for (row, &x) in values.iter().enumerate() {
            want[at(row)] = density(x) / sum;
        }
    }
    let several: Vec<f64> = numbers(several).into_iter().map(f64::from).collect();
    assert_close("the product as it is written", &several, &want, Tolerance::absolute(1e-6));
}

/// The same numbers every time.
fn input_of_the_test() -> Tensor<3> {
    let wave = |i: usize| (i as f32 * 0.7).sin() * 1.3 + (i as f32 * 0.13).cos();
    let values: Vec<f32> = (0..3 * SIZES[0] * SIZES[1]).map(wave).collect();
    Tensor::from_data(TensorData::new(values, [3, SIZES[0], SIZES[1]]), &device())
}

#[test]
fn normalised_weights_sum_to_one_in_every_chunk() {
    // Wide ones: where all of a chunk lies far outside, its sum is below the bound of the definition, and stays there.
    for gate in &fresh()[1..] {
        let weights = gate.forward(input_of_the_test(), None).weights;
        for (start, chunk) in [(0, 3), (3, 3), (6, 3), (9, 5)] {
            let sums = weights.clone().narrow(1, start, chunk).sum_dim(1);
            close(sums.clone(), sums.ones_like());
        }
    }
}

#[test]
fn the_paper_gate_is_one_at_its_centre_and_below_elsewhere() {
    let gate = config(r#"{"paper": {"n_heads": 1}}"#).init(&SIZES, &device());
    let weights = numbers(gate.forward(input(), None).weights);
    assert!(weights.iter().all(|&g| g > 0.0 && g <= 1.0) && weights.iter().any(|&g| g < 0.9));
    // A row at the mean of the others is at the mean of all.
    let others = input().narrow(1, 0, SIZES[0] - 1);
    let x = Tensor::cat(vec![others.clone(), others.mean_dim(1)], 1);
    let last = gate.forward(x, None).weights.narrow(1, SIZES[0] - 1, 1);
    close(last.clone(), last.ones_like());
}

#[test]
fn gates_follow_shifts_and_without_offsets_scales() {
    for gate in gates() {
        let x = input();
        close(gate.forward(x.clone(), None).weights, gate.forward(x + 3.0, None).weights);
    }
    for json in [
        r#"{"paper": {"n_heads": 4}}"#,
        r#"{"product": {"n_heads": 4, "n_gaussians": 2, "c_init": {"constant": 0.7}}}"#,
        r#"{"mixture": {"n_heads": 4, "n_gaussians": 2}}"#,
    ] {
        let gate = config(json).init(&SIZES, &device());
        // Large enough that the eps beside the variance is not felt.
        let x = input() * 30.0;
        let [one, two] = [x.clone(), x * 2.0].map(|x| gate.forward(x, None).weights);
        close(one, two);
    }
}

#[test]
fn heads_are_independent() {
    for gate in gates() {
        let x = input();
        let changed = Tensor::cat(vec![x.clone().narrow(1, 0, 9), input().narrow(1, 0, 5)], 1);
        let [a, b] = [x, changed].map(|x| gate.forward(x, None).features);
        close(a.clone().narrow(1, 0, 9), b.clone().narrow(1, 0, 9));
        assert!(largest_difference(a, b) > 1e-2);
    }
}

#[test]
fn hidden_elements_leave_no_trace() {
    for json in [
        r#"{"paper": {"n_heads": 1}}"#,
        r#"{"product": {"n_heads": 1, "n_gaussians": 2, "c_init": {"constant": 1.2}}}"#,
        r#"{"mixture": {"n_heads": 1, "n_gaussians": 2}}"#,
    ] {
        let config = config(json);
        let gate = config.init(&SIZES, &device());
        let kept = input().narrow(1, 0, 9);
        let alone = gate.forward(kept.clone(), None);
        let padded = Tensor::cat(vec![kept, Tensor::full([3, 5, 5], f32::NAN, &device())], 1).require_grad();
        let hidden = Tensor::<1, Int>::arange(0..14, &device()).greater_equal_elem(9).reshape([1, 14, 1]);
        let masked = gate.forward(padded.clone(), Some(&hidden));
        close(masked.features.clone().narrow(1, 0, 9), alone.features);
        close(masked.weights.narrow(1, 9, 5), Tensor::zeros([3, 5, 5], &device()));
        let grads = masked.features.sum().backward();
        assert!(numbers(padded.grad(&grads).expect("gradient")).iter().all(|g| g.is_finite()));

        // With heads, one of which sees nothing at all; and a residual, which keeps what is hidden.
        let stack = GaussianAdaptiveConfig { gates: vec![config.clone(), config], residual: true };
        let x = input();
        let (out, _) = stack.init(&SIZES, &device()).forward(x.clone(), Some(&hidden));
        close(out.narrow(1, 9, 5), x.narrow(1, 9, 5));
    }
    for gate in gates() {
        let hidden = Tensor::<1, Int>::arange(0..14, &device()).greater_equal_elem(3).reshape([1, 14, 1]);
        let out = gate.forward(input(), Some(&hidden)).features;
        assert!(numbers(out).iter().all(|x| x.is_finite()));
    }
}

#[test]
fn padding_by_its_number_is_passed_on_and_a_residual_doubles_it() {
    for (form, more) in [("product", ""), ("mixture", r#", "n_gaussians": 2"#)] {
        let json = format!(
            r#"{{"residual": true, "gates": [{{"{form}": {{"n_heads": 2, "compat_padding_value": -1.5{more}}}}},
                {{"{form}": {{"n_heads": 2, "compat_padding_value": -1.5{more}}}}}]}}"#
        );
        let stack: GaussianAdaptiveConfig = serde_json::from_str(&json).expect("parses");
        stack.validate(&SIZES).expect("valid");
        let stack = stack.init(&SIZES, &device());
        let x = input_of_the_test().narrow(1, 0, 11);
        let x = Tensor::cat(vec![x, Tensor::full([3, 3, 5], -1.5, &device())], 1);
        let first = stack.gates[0].forward(x.clone(), None);
        close(first.features.narrow(1, 11, 3), x.clone().narrow(1, 11, 3));
        // The second gate sees -3 there, which is data to it: no element is passed on as it is.
        let (out, weights) = stack.forward(x, None);
        let weights = weights[1].clone().narrow(1, 11, 3);
        close(out.narrow(1, 11, 3), (weights + 1.0) * -3.0);
    }
}

#[test]
fn any_axis_of_any_rank() {
    let sizes = [4, 6, 5];
    let x: Tensor<4> = draw([2, 4, 6, 5], [0.0, 1.0], &device());
    for axis in [2, -2] {
        let json = format!(
            r#"{{"product": {{"axis": {axis}, "n_heads": 3, "n_gaussians": 2, "c_init": {{"constant": 1.5}}}}}}"#
        );
        let config: GaussianGateConfig = serde_json::from_str(&json).expect("a gate");
        config.validate(&sizes).expect("valid");
        let there = config.init(&sizes, &device()).forward(x.clone(), None).features;
        let GaussianGate::Product(mut first) = config.init(&sizes, &device()) else { panic!("a product") };
        first.axis = 1;
        let moved = GaussianGate::Product(first).forward(x.clone().swap_dims(1, 2), None).features;
        close(there, moved.swap_dims(1, 2));
    }
}

#[test]
fn gradients_reach_every_parameter_and_agree_with_differences() {
    for gate in gates() {
        let out = gate.forward(input(), None).features;
        let cotangent = draw(out.dims(), [0.0, 1.0], &device());
        // Offsets of a product act through the place of its centre, widths through its width: all are felt.
        let count = reach_every_parameter(&gate, &(out * cotangent).sum().backward());
        assert_eq!(count, if matches!(gate, GaussianGate::Mixture(_)) { 3 } else { 2 });
        agree_with_differences(input, |x| gate.forward(x, None).features);
        let hidden = Tensor::<1, Int>::arange(0..14, &device()).equal_elem(11).reshape([1, 14, 1]);
        agree_with_differences(input, |x| gate.forward(x, Some(&hidden)).features);
    }
}

#[test]
fn equal_gaussians_of_a_mixture_stay_equal() {
    let slopes = |json: &str| {
        let GaussianGate::Mixture(gate) = config(json).init(&SIZES, &device()) else { panic!("a mixture") };
        let grads =
            GaussianGate::Mixture(gate.clone()).forward(input_of_the_test(), None).features.square().sum().backward();
        [gate.c, gate.mean_offset].map(|parameter| numbers(parameter.val().grad(&grads).expect("gradient")))
    };
    let same = |slopes: &Vec<f32>| slopes.windows(2).all(|pair| (pair[0] - pair[1]).abs() <= 1e-5 * pair[0].abs());
    let one_head = |c_init: &str| format!(r#"{{"mixture": {{"n_heads": 1, "n_gaussians": 3{c_init}}}}}"#);
    let published = slopes(&one_head(r#", "c_init": {"constant": 2.0}"#));
    assert!(published.iter().all(|of| same(of) && of[0].abs() > 1e-3), "{published:?}");
    assert!(!slopes(&one_head("")).iter().any(same));
}

#[test]
fn widths_next_to_zero_and_outliers_stay_finite() {
    let gate = |c: f32| {
        let gate =
            ProductGate { mean_offset: matrix(&[0.0; 5]), c: matrix(&[c; 5]), axis: 1, eps: 1e-8, padding_value: None };
        let x = (input() * 100.0).require_grad();
        let out = GaussianGate::Product(gate).forward(x.clone(), None).features;
        let grads = out.clone().sum().backward();
        [out, Tensor::from_inner(x.grad(&grads).expect("gradient"))].map(numbers).concat()
    };
    for c in [1e-4, 1e-2, 1e2, 1e4] {
        assert!(gate(c).iter().all(|x| x.is_finite()), "c = {c}");
    }
}

#[test]
fn mistakes_are_told_by_name() {
    let field = |json: &str| {
        let stack: GaussianAdaptiveConfig = serde_json::from_str(json).expect("parses");
        stack.validate(&SIZES).expect_err("refused").field
    };
    let gate = |gate: &str| field(&format!(r#"{{"gates": [{{"paper": {{"n_heads": 2}}}}, {gate}]}}"#));
    assert_eq!(field(r#"{"gates": []}"#), "gates");
    assert_eq!(gate(r#"{"paper": {"n_heads": 0}}"#), "gates[1].paper.n_heads");
    assert_eq!(gate(r#"{"paper": {"n_heads": 5}}"#), "gates[1].paper.n_heads");
    assert_eq!(gate(r#"{"paper": {"n_heads": 2, "c_init": 0.0}}"#), "gates[1].paper.c_init");
    assert_eq!(gate(r#"{"product": {"n_heads": 8}}"#), "gates[1].product.n_heads");
    assert_eq!(gate(r#"{"product": {"n_heads": 1, "axis": 0}}"#), "gates[1].product.axis");
    assert_eq!(gate(r#"{"product": {"n_heads": 1, "axis": -3}}"#), "gates[1].product.axis");
    assert_eq!(gate(r#"{"mixture": {"n_heads": 1, "n_gaussians": 0}}"#), "gates[1].mixture.n_gaussians");
    assert_eq!(gate(r#"{"product": {"n_heads": 1, "eps": 0.0}}"#), "gates[1].product.eps");
    assert_eq!(gate(r#"{"mixture": {"n_heads": 1, "n_gaussians": 1, "eps": -1.0}}"#), "gates[1].mixture.eps");
    let misspelt = serde_json::from_str::<GaussianGateConfig>(r#"{"product": {"n_headz": 3}}"#);
    assert!(misspelt.expect_err("refused").to_string().contains("n_headz"));
}

#[test]
fn along_the_tokens_is_refused_where_only_channels_are_left() {
    let stack = |gate: &str| -> GaussianAdaptiveConfig {
        serde_json::from_str(&format!(r#"{{"gates": [{gate}]}}"#)).expect("parses")
    };
    let field = |gate: &str| stack(gate).validate_channels(12, "no").expect_err("refused").field;
    assert_eq!(field(r#"{"paper": {"n_heads": 2}}"#), "gates[0].paper");
    assert_eq!(field(r#"{"product": {"n_heads": 2}}"#), "gates[0].product");
    assert_eq!(field(r#"{"mixture": {"n_heads": 2, "n_gaussians": 2, "axis": -2}}"#), "gates[0].mixture");
    assert_eq!(field(r#"{"product": {"n_heads": 7, "axis": -1}}"#), "gates[0].product.n_heads");
    let channels =
        stack(r#"{"product": {"n_heads": 3, "axis": -1}}, {"mixture": {"n_heads": 2, "n_gaussians": 2, "axis": 2}}"#);
    channels.validate_channels(12, "no").expect("valid");
    // A token's output depends on its own channels alone.
    let gates = channels.init(&[1, 12], &device());
    let x: Tensor<3> = draw([2, 5, 12], [0.0, 1.0], &device());
    let one = gates.forward(x.clone().narrow(1, 3, 1), None).0;
    close(gates.forward(x, None).0.narrow(1, 3, 1), one);
}

#[test]
fn parameters_are_counted_and_the_factor_is_what_the_stack_multiplies_by() {
    for residual in [false, true] {
        let json = format!(
            r#"{{"residual": {residual}, "gates": [{{"paper": {{"n_heads": 4}}}},
            {{"product": {{"n_heads": 4, "n_gaussians": 3}}}}, {{"mixture": {{"n_heads": 2, "n_gaussians": 2}}}}]}}"#
        );
        let config: GaussianAdaptiveConfig = serde_json::from_str(&json).expect("parses");
        let stack = config.init(&SIZES, &device());
        assert_eq!(config.parameters(&SIZES), stack.num_params() as u64);
        let x = input();
        let (features, weights) = stack.forward(x.clone(), None);
        close(x * stack.factor(weights).expect("gates"), features);
    }
    let none = GaussianAdaptive { gates: Vec::new(), residual: false };
    assert!(none.factor::<3>(Vec::new()).is_none());
}

#[test]
fn importance_is_the_stretched_mean_of_the_gates() {
    let gates = |values: [f32; 6]| Tensor::from_data(TensorData::new(values.to_vec(), [1, 3, 2]), &Device::flex());
    let close = |got: &[f32], want: &[f32]| assert_close("importance", got, want, Tolerance::absolute(1e-6));
    let batches = [[0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.4, 0.2, 0.4, 0.6, 0.8, 0.6]];
    let mut mean = GateMean::default();
    assert!(mean.importance().is_none());
    batches.iter().for_each(|batch| mean.add(gates(*batch)));
    let importance = mean.importance().expect("two samples");
    close(&importance.factor, &[0.0, 0.0, 1.0 / 3.0, 2.0 / 3.0, 1.0, 1.0]);
    close(&importance.shares(), &[0.0, 1.0 / 3.0, 2.0 / 3.0]);

    let mut whole = GateMean::default();
    whole.add(Tensor::cat(batches.map(gates).to_vec(), 0));
    assert_eq!(whole, mean, "however batches are cut");
    let mut merged = GateMean::default();
    for batch in batches {
        let mut one = GateMean::default();
        one.add(gates(batch));
        merged.merge(one);
    }
    merged.merge(GateMean::default());
    assert_eq!(merged, mean);

    let mut flat = GateMean::default();
    flat.add(Tensor::full([2, 3, 2], 0.7, &Device::flex()));
    let flat = flat.importance().expect("samples");
    assert_eq!((flat.factor.clone(), flat.shares()), (vec![0.0; 6], vec![0.0; 3]));

    // A gate that is not a number is neither left out nor called unimportant.
    for values in [[f32::NAN; 6], [0.0, f32::NAN, 0.4, 0.6, 0.8, 1.0], [0.5, f32::NAN, 0.5, 0.5, 0.5, 0.5]] {
        let mut broken = GateMean::default();
        broken.add(gates(values));
        let broken = broken.importance().expect("a sample");
        assert!(broken.factor[1].is_nan() && broken.shares()[0].is_nan(), "{broken:?}");
    }
}
