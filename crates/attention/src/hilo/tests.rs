use burn::tensor::Int;
use polyhead_kernels::comparison::{Tolerance, assert_tensors_close, largest_difference};

use super::*;
use crate::SoftmaxConfig;
use crate::laws::{Spread, agree_with_differences, draw, reach_every_parameter};

const D_MODEL: usize = 12;

fn dims() -> Dims {
    Dims { d_model: D_MODEL, rope: false, grid: Some([4, 6]), ..Dims::example() }
}

fn device() -> Device {
    Device::flex().autodiff()
}

fn config(window: usize, alpha: f64) -> HiloConfig {
    HiloConfig { n_heads: 4, window, alpha, qkv_bias: true, compat_padding: false }
}

fn layer(window: usize, alpha: f64) -> Hilo {
    config(window, alpha).init(&dims(), &device()).map(&mut Spread)
}

fn input(batch: usize, tokens: usize) -> Tensor<3> {
    draw([batch, tokens, D_MODEL], [0.0, 1.0], &device())
}

fn close(got: Tensor<3>, want: Tensor<3>) {
    assert_tensors_close("outputs", got, want, Tolerance::absolute(2e-5));
}

fn largest(x: Tensor<3>) -> f64 {
    largest_difference(x.clone(), x.zeros_like())
}

#[test]
fn windows_of_one_token_are_ordinary_attention() {
    let hilo = layer(1, 0.3);
    assert!(hilo.hifi.is_none(), "alpha is overridden");
    let LoFi { q_proj, kv_proj, o_proj, .. } = hilo.lofi.clone().expect("all heads");
    let half = |part: usize| Linear {
        weight: kv_proj.weight.clone().map(|w| w.narrow(1, part * D_MODEL, D_MODEL)),
        bias: kv_proj.bias.clone().map(|b| b.map(|b| b.narrow(0, part * D_MODEL, D_MODEL))),
    };
    let settings: SoftmaxConfig =
        serde_json::from_str(r#"{"n_heads": 4, "qkv_bias": true, "o_bias": true}"#).expect("settings");
    let mut softmax = settings.init(&dims(), &device());
    softmax.q_proj = q_proj;
    (softmax.k_proj, softmax.v_proj, softmax.o_proj) = (half(0), half(1), o_proj);
    let x = input(2, 15);
    let mask = Mask::none();
    close(hilo.mix(x.clone(), [3, 5], None, Sites::default()), softmax.forward(x, Call::new(&mask)).hidden);
}

#[test]
fn windows_of_high_frequencies_do_not_see_each_other() {
    let (hilo, x) = (layer(2, 0.0), input(1, 24)); // 4 x 6: windows of the first column are tokens 0, 1, 6, 7, ...
    let changed = x.clone().slice_assign([0..1, 7..8, 0..D_MODEL], input(1, 1));
    let difference = hilo.mix(x, [4, 6], None, Sites::default()) - hilo.mix(changed, [4, 6], None, Sites::default());
    for token in 0..24 {
        let own = largest(difference.clone().narrow(1, token, 1));
        assert_eq!(own > 1e-4, [0, 1, 6, 7].contains(&token), "token {token}: {own}");
    }
}

#[test]
fn low_frequencies_of_constant_windows_are_attention_to_the_windows() {
    // 2 x 2 windows of one value each: the means are the values, and the tokens of a window get the same.
    let (hilo, values) = (layer(2, 1.0), input(2, 6));
    let big = values.clone().reshape([2, 2, 3, D_MODEL]);
    let big = big.reshape([2, 2, 1, 3, 1, D_MODEL]).expand([2, 2, 2, 3, 2, D_MODEL]).reshape([2, 24, D_MODEL]);
    let out = hilo.mix(big, [4, 6], None, Sites::default()).reshape([2, 2, 2, 3, 2, D_MODEL]);
    let each = out.narrow(2, 1, 1).narrow(4, 0, 1).reshape([2, 6, D_MODEL]);
    let mut small = hilo;
    small.window = 1;
    close(each, small.mix(values, [2, 3], None, Sites::default()));
}

#[test]
fn what_fills_the_last_windows_is_hidden_unless_asked_for() {
    for alpha in [0.0, 0.5, 1.0] {
        let mut hilo = layer(3, alpha);
        let x = input(2, 20); // 4 x 5: filled up to 6 x 6
        let filled = fill(fill(x.clone().reshape([2, 4, 5, D_MODEL]), 1, 3, 7.0), 2, 3, 7.0).reshape([2, 36, D_MODEL]);
        let position = Tensor::<1, Int>::arange(0..36, &device()).reshape([1, 36]);
        let column = position.clone().remainder_scalar(6);
        let hidden = position.greater_equal_elem(24).bool_or(column.greater_equal_elem(5)).expand([2, 36]);
        let whole = hilo.mix(filled, [6, 6], Some(&hidden), Sites::default()).reshape([2, 6, 6, D_MODEL]);
        let cut = whole.narrow(1, 0, 4).narrow(2, 0, 5).reshape([2, 20, D_MODEL]);
        let out = hilo.mix(x.clone(), [4, 5], None, Sites::default());
        close(out.clone(), cut);
        hilo.compat_padding = true;
        assert!(largest(hilo.mix(x, [4, 5], None, Sites::default()) - out) > 1e-3, "the zeros are seen, alpha {alpha}");
    }
}

#[test]
fn hidden_tokens_leave_no_trace_even_where_they_fill_windows() {
    let hilo = layer(2, 0.5);
    let x = input(2, 24);
    let row = Tensor::<1, Int>::arange(0..24, &device()).reshape([1, 24]);
    let hidden = row.greater_equal_elem(11).expand([2, 24]); // rows 2 and 3, and one token of row 1
    let other = Tensor::cat(vec![x.clone().narrow(1, 0, 11), Tensor::full([2, 13, D_MODEL], f32::NAN, &device())], 1);
    let [a, b] = [x.clone(), other].map(|x| hilo.mix(x, [4, 6], Some(&hidden), Sites::default()));
    close(a.clone().narrow(1, 0, 11), b.narrow(1, 0, 11));
    assert!(
        largest((hilo.mix(x, [4, 6], None, Sites::default()) - a).narrow(1, 0, 11)) > 1e-3,
        "what is hidden would be seen"
    );
}

#[test]
fn gradients_reach_every_parameter_and_agree_with_differences() {
    for (alpha, grid) in [(0.5, [2, 4]), (0.5, [3, 3]), (0.0, [2, 2]), (1.0, [3, 2])] {
        let (hilo, tokens) = (layer(2, alpha), grid[0] * grid[1]);
        let out = hilo.mix(input(2, tokens), grid, None, Sites::default());
        let cotangent = draw(out.dims(), [0.0, 1.0], &device());
        assert!(reach_every_parameter(&hilo, &(out * cotangent).sum().backward()) >= 4);
        agree_with_differences(|| input(1, tokens), |x| hilo.mix(x, grid, None, Sites::default()));
    }
}

#[test]
fn head_counts_round_as_the_authors_do() {
    let low = |n_heads, alpha| HiloConfig { n_heads, ..config(2, alpha) }.lofi_heads();
    assert_eq!(
        [low(12, 0.9), low(6, 0.9), low(12, 0.2), low(12, 0.7), low(12, 0.0), low(12, 1.0)],
        [10, 5, 2, 8, 0, 12]
    );
    assert_eq!(HiloConfig { n_heads: 12, ..config(1, 0.5) }.lofi_heads(), 12);
}

#[test]
fn costs_are_those_of_the_authors() {
    // The number of the code's README for 14 x 14 tokens, and that of ordinary attention.
    let cost = |window, alpha| HiloConfig { n_heads: 12, ..config(window, alpha) }.multiply_adds(384, 196);
    assert_eq!(cost(2, 0.5), 83_467_776);
    assert_eq!(cost(1, 0.5), 145_108_992);
    assert!(cost(2, 0.0) > cost(2, 0.5) && cost(2, 0.5) > cost(2, 1.0));
}

#[test]
fn mistakes_are_told_by_name() {
    let field = |config: HiloConfig| config.validate(&dims()).expect_err("refused").field;
    assert!(config(2, 0.9).validate(&dims()).is_ok());
    assert_eq!(field(HiloConfig { n_heads: 5, ..config(2, 0.9) }), "n_heads");
    assert_eq!(field(config(0, 0.9)), "window");
    assert_eq!(field(config(2, 1.5)), "alpha");
    assert_eq!(field(config(7, 0.5)), "window");
    let sequence = Dims { grid: None, ..dims() };
    assert!(config(2, 0.9).validate(&sequence).expect_err("refused").problem.contains("grid"));
    assert!(config(2, 0.9).check_causal().is_err());
    assert_eq!(field(config(2, f64::NAN)), "alpha");
    let misspelt = serde_json::from_str::<HiloConfig>(r#"{"n_heads": 4, "alfa": 0.9}"#);
    assert!(misspelt.expect_err("refused").to_string().contains("alfa"));
}
