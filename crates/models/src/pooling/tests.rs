#![allow(clippy::unwrap_used)]
use burn::tensor::{Distribution, TensorData};
use polyhead_kernels::comparison::{Tolerance, assert_tensors_close, numbers};
use polyhead_kernels::random;

use super::*;
use crate::testing::reach_every_parameter;

const D_MODEL: usize = 8;
const N_LAYERS: usize = 3;
/// Padding on either side, and in the middle.
const HIDDEN: [[u8; 6]; 3] = [[0, 0, 0, 0, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 0, 1, 0, 1]];

const ALL: [&str; 10] = [
    r#""mean""#,
    r#""class_token""#,
    r#""last_token""#,
    r#"{"ggem": {}}"#,
    r#"{"ggem": {"n_groups": 4, "p_init": 2.0}}"#,
    r#"{"ggem": {"n_groups": 8, "learnable": false}}"#,
    r#"{"mltp": {"n_heads": 2}}"#,
    r#"{"mltp": {"n_heads": 2, "n_latents": 3, "head_dim": 5, "input": "last_of_each_layer"}}"#,
    r#"{"mltp": {"n_heads": 2, "input": "tokens_of_last_layer", "latent_std": 0.1}}"#,
    r#"{"mltp": {"n_heads": 2, "input": "last_of_last_layer"}}"#,
];

fn device() -> Device {
    Device::flex().autodiff()
}

fn pooling(json: &str) -> Pooling {
    let config: PoolingConfig = serde_json::from_str(json).unwrap();
    config.validate(D_MODEL).unwrap();
    config.init(D_MODEL, N_LAYERS, &device())
}

fn layers() -> Vec<Tensor<3>> {
    (0..N_LAYERS).map(|_| random([3, 6, D_MODEL], Distribution::Normal(0.3, 1.0), &device())).collect()
}

fn hidden() -> Tensor<2, Bool> {
    Tensor::<2, Int>::from_data(TensorData::from(HIDDEN.map(|row| row.map(i32::from))), &device()).equal_elem(1)
}

fn close<const D: usize>(got: Tensor<D>, want: Tensor<D>) {
    assert_tensors_close("pooled", got, want, Tolerance::absolute(2e-6));
}

#[test]
fn padding_leaves_no_trace_wherever_it_stands() {
    for json in ALL.iter().filter(|json| !json.contains("class_token")) {
        let (pooling, layers, hidden) = (pooling(json), layers(), hidden());
        let full = hidden.clone().unsqueeze_dim::<3>(2).expand([3, 6, D_MODEL]);
        let dirty: Vec<_> = layers.iter().map(|layer| layer.clone().mask_fill(full.clone(), f32::NAN)).collect();
        let out = pooling.forward(&layers, Some(&hidden));
        close(out.clone(), pooling.forward(&dirty, Some(&hidden)));
        // And it is what the row alone gives without its padding.
        for (row, pattern) in HIDDEN.iter().enumerate() {
            let kept: Vec<i32> = (0..6).filter(|&token| pattern[token as usize] == 0).collect();
            let kept = Tensor::<1, Int>::from_data(TensorData::new(kept.clone(), [kept.len()]), &device());
            let alone: Vec<_> =
                layers.iter().map(|layer| layer.clone().narrow(0, row, 1).select(1, kept.clone())).collect();
            close(out.clone().narrow(0, row, 1), pooling.forward(&alone, None));
        }
    }
}

#[test]
fn gradients_reach_every_parameter_and_the_input() {
    for json in ALL {
        let pooling = pooling(json);
        for mask in [None, Some(hidden())] {
            let layers: Vec<_> = layers().into_iter().map(Tensor::require_grad).collect();
            let out = pooling.forward(&layers, mask.as_ref());
            let cotangent = random(out.dims(), Distribution::Normal(0.0, 1.0), &out.device());
            let grads = (out * cotangent).sum().backward();
            if !json.contains("false") && !json.contains("last_of_last") {
                reach_every_parameter(&pooling, &grads);
            }
            let grad = numbers(layers[N_LAYERS - 1].grad(&grads).unwrap());
            assert!(grad.iter().all(|g| g.is_finite()) && grad.iter().any(|&g| g != 0.0), "{json}");
        }
    }
}

#[test]
fn gradients_agree_with_differences() {
    for json in ALL {
        let (pooling, hidden) = (pooling(json), hidden());
        // Away from the clamp of the generalised means, which has a corner.
        let x: Vec<_> = layers().into_iter().map(|layer| layer.abs() + 0.2).collect();
        let leaves: Vec<_> = x.iter().map(|layer| layer.clone().detach().require_grad()).collect();
        let directions: Vec<_> = layers();
        let cotangent: Tensor<2> = random([3, D_MODEL], Distribution::Normal(0.0, 1.0), &device());
        let value = |layers: &[Tensor<3>]| (pooling.forward(layers, Some(&hidden)) * cotangent.clone()).sum();
        let grads = value(&leaves).backward();
        let along = |(leaf, direction): (&Tensor<3>, &Tensor<3>)| -> f32 {
            leaf.grad(&grads).map_or(0.0, |grad| (grad * direction.clone().inner()).sum().into_scalar())
        };
        let slope: f32 = leaves.iter().zip(&directions).map(along).sum();
        let at = |t: f32| {
            let moved: Vec<_> = x.iter().zip(&directions).map(|(x, d)| x.clone().detach() + d.clone() * t).collect();
            value(&moved).into_scalar::<f32>()
        };
        let central = |h: f32| (at(h) - at(-h)) / (2.0 * h);
        let difference = (4.0 * central(5e-3) - central(1e-2)) / 3.0;
        assert!((slope - difference).abs() <= 5e-3 * (1.0 + slope.abs()), "{json}: {slope} against {difference}");
    }
}

#[test]
fn generalised_means_lie_between_mean_and_maximum() {
    // Above the clamp somewhere in every channel: where all tokens are clamped, all means are the same.
    let tokens = layers().remove(0);
    let above = Tensor::<3>::ones([3, 1, D_MODEL], &device()) * 0.5;
    let tokens = tokens.slice_assign([0..3, 0..1, 0..D_MODEL], above);
    let at = |p: f64| {
        let json = format!(r#"{{"ggem": {{"n_groups": 2, "p_init": {p}}}}}"#);
        pooling(&json).forward(std::slice::from_ref(&tokens), None)
    };
    let clamped = tokens.clone().clamp_min(1e-6);
    close(at(1.0), clamped.clone().mean_dim(1).squeeze_dim(1));
    close(at(1e4), clamped.clone().max_dim(1).squeeze_dim::<2>(1) * 6f64.powf(-1e-4));
    let [low, middle, high] = [1.0, 3.0, 10.0].map(|p| numbers(at(p)));
    assert!(low.iter().zip(&middle).zip(&high).all(|((a, b), c)| a < b && b < c));
}

#[test]
fn generalised_means_stay_finite_where_powers_vanish() {
    // eps^p is 0 in f32 for p > 6.3; a channel may be below eps on every token.
    let pooling = pooling(r#"{"ggem": {"n_groups": 4, "p_init": 40.0}}"#);
    let tokens = (layers().remove(0).abs() + 0.1).neg().require_grad();
    let out = pooling.forward(std::slice::from_ref(&tokens), None);
    close(out.clone(), Tensor::full([3, D_MODEL], 1e-6, &device()));
    let grads = out.sum().backward();
    assert!(numbers(tokens.grad(&grads).unwrap()).iter().all(|&g| g == 0.0));
    let Pooling::Ggem(pooling) = pooling else { panic!("ggem") };
    assert!(numbers(pooling.p.val().grad(&grads).unwrap()).iter().all(|g| g.is_finite()));
}

#[test]
fn exponents_that_are_not_learned_are_left_alone() {
    let learns = |json: &str| match pooling(json) {
        Pooling::Ggem(pooling) => pooling.p.val().is_require_grad(),
        _ => panic!("ggem"),
    };
    assert!(learns(r#"{"ggem": {}}"#) && !learns(r#"{"ggem": {"learnable": false}}"#));
}

#[test]
fn mistakes_are_told_by_name() {
    let field = |json: &str| serde_json::from_str::<PoolingConfig>(json).unwrap().validate(D_MODEL).unwrap_err().field;
    assert_eq!(field(r#"{"ggem": {"n_groups": 3}}"#), "ggem.n_groups");
    assert_eq!(field(r#"{"ggem": {"p_init": 0.0}}"#), "ggem.p_init");
    assert_eq!(field(r#"{"ggem": {"eps": -1.0}}"#), "ggem.eps");
    assert_eq!(field(r#"{"mltp": {"n_heads": 3}}"#), "mltp.n_heads");
    assert_eq!(field(r#"{"mltp": {"n_heads": 2, "n_latents": 0}}"#), "mltp.n_latents");
    assert!(serde_json::from_str::<PoolingConfig>(r#"{"ggem": {"groups": 3}}"#).is_err());
}
