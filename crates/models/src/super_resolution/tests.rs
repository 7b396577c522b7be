#![allow(clippy::unwrap_used)]

use burn::module::Module;
use burn::tensor::Distribution;
use polyhead_attention::Observe;
use polyhead_kernels::comparison::{Tolerance, assert_close};
use polyhead_kernels::{random, seed_random};

use super::*;
use crate::testing::reach_every_parameter;
use crate::{ContextMask, EvalTotals, Trainable, weights};

const D_MODEL: usize = 8;

fn config(mixer: &str, scale: usize, n_layers: usize) -> SuperResolutionConfig {
    let json = format!(
        r#"{{"scale": {scale}, "d_model": {D_MODEL}, "n_layers": {n_layers}, "n_heads": 2, "qk_dim": 6, "d_ff": 10,
            "local_patch": 4, "mixer": {mixer}}}"#
    );
    serde_json::from_str(&json).unwrap()
}

fn centres(n_centres: usize, group_size: usize, decay: f64) -> String {
    format!(
        r#"{{"token_centres": {{"n_centres": {n_centres}, "group_size": {group_size}, "iterations": 2, "decay": {decay}}}}}"#
    )
}

const WINDOWS: &str = r#"{"attention": {"hilo": {"n_heads": 2, "window": 4, "alpha": 0.0}}}"#;

fn drawn<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    random(shape, Distribution::Uniform(0.0, 1.0), device)
}

fn images(n: usize, side: usize) -> Images {
    let pixels = drawn([n * COLOURS * side * side], &Device::flex()).into_data().try_to_vec().unwrap();
    Images { pixels, height: side, width: side }
}

fn mixer(n_centres: usize, group_size: usize, decay: f64, device: &Device) -> TokenCentres {
    seed_random(5);
    let widths = Widths { d_model: D_MODEL, qk_dim: 6, n_heads: 2, d_ff: 10 };
    let MixerConfig::TokenCentres(config) = config(&centres(n_centres, group_size, decay), 2, 1).mixer else {
        panic!()
    };
    config.init(0, widths, device)
}

fn same(name: &str, got: Tensor<3>, want: Tensor<3>) {
    let values = |x: Tensor<3>| x.into_data().iter::<f32>().collect::<Vec<f32>>();
    assert_close(name, &values(got), &values(want), Tolerance::absolute(1e-6));
}

#[test]
fn the_authors_sizes_have_the_authors_parameters() {
    for (scale, parameters) in [(2, 477_435), (3, 549_635), (4, 535_195)] {
        let config = SuperResolutionConfig {
            scale,
            d_model: 40,
            n_layers: 8,
            n_heads: 4,
            qk_dim: 36,
            d_ff: 96,
            mixer: MixerConfig::TokenCentres(TokenCentresConfig {
                n_centres: PerLayerCount::Each([16, 32, 64, 128].repeat(2)),
                group_size: PerLayerCount::Each([256, 128, 64, 32].repeat(2)),
                iterations: 5,
                decay: 0.999,
            }),
            local_patch: PerLayerCount::Each([16, 20, 24, 28].repeat(2)),
            local_overlap: Overlap::Halved,
        };
        config.validate(Some([60 * scale; 2])).unwrap();
        let all: u64 = config.parts([60 * scale; 2]).iter().map(|part| part.cost.parameters).sum();
        // Theirs are counted without the centres and whether there are some.
        assert_eq!(all - 40 * 2 * (16 + 32 + 64 + 128) - 8, parameters);
    }
}

#[test]
fn what_is_counted_is_what_is_made_and_gradients_reach_all_that_is_learned() {
    let device = Device::flex().autodiff();
    for (mixer, scale) in [(centres(3, 8, 0.9), 2), (WINDOWS.to_owned(), 4)] {
        let config = config(&mixer, scale, 2);
        let side = 8 * scale;
        config.validate(Some([side; 2])).unwrap();
        seed_random(1);
        let model = config.init(&device);
        let counted: u64 = config.parts([side; 2]).iter().map(|part| part.cost.parameters).sum();
        assert_eq!(counted, model.num_params() as u64, "{mixer}");
        let loss = model.loss_under(&images(2, side), ContextMask::Causal);
        assert_eq!(loss.found.len(), if mixer == WINDOWS { 0 } else { 2 });
        let parameters = crate::parameters(&model);
        let learned = parameters.iter().filter(|one| one.trainable).count();
        assert_eq!(parameters.len() - learned, 2 * loss.found.len());
        assert_eq!(reach_every_parameter(&model, &loss.cross_entropy.backward()), learned, "{mixer}");
    }
}

/// What mechanisms have besides their output counts as it does in other models.
#[test]
fn mechanisms_are_penalised_observed_and_moved_on() {
    let (device, batch) = (Device::flex().autodiff(), images(2, 16));
    let made = |mixer: &str| {
        let config = config(mixer, 2, 2);
        config.validate(Some([16; 2])).unwrap();
        seed_random(4);
        config.init(&device)
    };
    let mechanism = |attention: &str| made(&format!(r#"{{"attention": {attention}}}"#));
    let softmax = mechanism(r#"{"softmax": {"n_heads": 2}}"#);
    assert!(softmax.loss_under(&batch, ContextMask::Causal).penalty.is_none());
    let routed = mechanism(r#"{"mixture_of_head": {"n_heads": 4, "shared_heads": 1, "top_k": 2}}"#);
    let penalty: f32 = routed.loss_under(&batch, ContextMask::Causal).penalty.unwrap().into_scalar();
    assert!(penalty > 0.0, "{penalty}");

    for (model, maps) in [(softmax, [2, 64, 64]), (made(&centres(3, 8, 0.9)), [1, 8, 8])] {
        let model = model.valid();
        assert!(model.observe_layers(&batch, Observe::Nothing).is_empty());
        assert!(model.observe_layers(&batch, Observe::Numbers).iter().all(|seen| seen.maps.is_none()));
        let seen = model.observe_layers(&batch, Observe::Maps);
        assert_eq!(seen.into_iter().map(|seen| seen.maps.unwrap().dims()).collect::<Vec<_>>(), [maps; 2]);
    }

    let evolving = r#"{"key_driven": {"n_heads": 4, "n_kv_heads": 2, "allocation": {"evolving": {"window": 2}}}}"#;
    let mut model = mechanism(evolving);
    assert!(!model.is_due(1) && model.is_due(2));
    let remembered = |model: &SuperResolution| {
        let all = weights::named(model).into_iter();
        all.filter(|one| one.name.ends_with("memory.magnitudes")).map(|one| one.values).collect::<Vec<_>>()
    };
    let before = remembered(&model);
    model.before_step(&batch, 1);
    assert_eq!(remembered(&model), before, "step 1 is not due");
    model.before_step(&batch, 2);
    let after = remembered(&model);
    assert!(after.len() == 2 && after.iter().zip(&before).all(|(after, before)| after != before), "{after:?}");
}

#[test]
fn centres_are_fitted_to_the_batch_as_a_whole() {
    let device = Device::flex();
    let mut mixer = mixer(4, 5, 0.5, &device);
    let x = drawn([2, 18, D_MODEL], &device);
    let turned = x.clone().flip([0]);
    let both = |phase| {
        let [a, b] = [&x, &turned].map(|x| mixer.forward(x.clone(), phase).hidden);
        same("images may change places", b.flip([0]), a);
    };
    both(Phase::Training);
    both(Phase::Evaluation);
    // Alone, an image has other centres in training and the kept ones in evaluation.
    let alone = x.clone().narrow(0, 0, 1);
    let fitted = mixer.forward(x.clone(), Phase::Training);
    let difference = |phase, mixer: &TokenCentres| {
        let together = mixer.forward(x.clone(), phase).hidden.narrow(0, 0, 1);
        (together - mixer.forward(alone.clone(), phase).hidden).abs().max().into_scalar::<f32>()
    };
    mixer.follow(fitted.centres.clone());
    assert!(difference(Phase::Training, &mixer) > 1e-6);
    assert!(difference(Phase::Evaluation, &mixer) < 1e-9);
    same("the first time they are taken over", mixer.centres.val().unsqueeze(), fitted.centres.unsqueeze());
}

#[test]
fn kept_centres_move_by_the_decay_and_by_finite_numbers_only() {
    let device = Device::flex();
    for (decay, share) in [(1.0, 0.0), (0.75, 0.25)] {
        let mut mixer = mixer(4, 5, decay, &device);
        let [first, second] = [0, 1].map(|_| drawn([4, D_MODEL], &device));
        mixer.follow(first.clone());
        mixer.follow(second.clone());
        let want = first.clone() + (second - first.clone()) * share;
        same("moved", mixer.centres.val().unsqueeze(), want.clone().unsqueeze());
        mixer.follow(first * f32::NAN);
        same("not moved", mixer.centres.val().unsqueeze(), want.unsqueeze());
    }
}

/// One centre leaves tokens in their order; a group that holds all tokens is plain attention, with that to the centre.
#[test]
fn one_centre_and_one_group_are_plain_attention() {
    let device = Device::flex();
    let mixer = mixer(1, 100, 0.5, &device);
    let x = drawn([2, 9, D_MODEL], &device);
    let got = mixer.forward(x.clone(), Phase::Evaluation);
    assert_eq!(got.nearest, [0; 18]);
    // A run is filled up by one token, the last one, though one centre's needs none (as in the authors' code).
    let run = x.clone().sum_dim(1) + x.clone().narrow(1, 8, 1);
    let centre = (run / 10.0).mean_dim(0).expand([2, 1, D_MODEL]);
    let map = |map| parts::project(map, x.clone());
    let q = map(&mixer.tokens.q_proj);
    let plain = mixer.tokens.attend(q.clone(), map(&mixer.tokens.k_proj), map(&mixer.tokens.v_proj));
    let of_centre = parts::project(&mixer.centre_v_proj, centre).expand([2, 9, D_MODEL]);
    let want = parts::project(&mixer.out_proj, parts::project(&mixer.tokens.o_proj, plain + of_centre));
    same("plain attention and the centre's value", got.hidden, want);
    // Any number of tokens can be grouped, those too that the authors' code cannot.
    let small = self::mixer(3, 8, 0.5, &device);
    for tokens in 1..40 {
        let out = small.forward(drawn([1, tokens, D_MODEL], &device), Phase::Training).hidden;
        assert!(out.into_data().iter::<f32>().all(f32::is_finite), "{tokens} tokens");
    }
}

/// A constant image has no differences to normalise and one direction: nothing becomes NaN, forwards or backwards.
#[test]
fn a_plain_image_is_finite() {
    let device = Device::flex().autodiff();
    seed_random(2);
    let model = config(&centres(3, 8, 0.9), 2, 1).init(&device);
    let plain = Images { pixels: vec![0.5; COLOURS * 16 * 16], height: 16, width: 16 };
    let grads = model.loss_under(&plain, ContextMask::Causal).cross_entropy.backward();
    let grad = model.input.weight.val().grad(&grads).unwrap();
    assert!(grad.into_data().iter::<f32>().all(f32::is_finite));
    let sums = model.valid().totals(&plain);
    assert!(sums.named().iter().all(|(_, value)| value.is_finite()));
}

#[test]
fn evaluations_add_up_over_images() {
    let device = Device::flex();
    seed_random(3);
    let model = config(WINDOWS, 2, 1).init(&device);
    let (a, b) = (images(1, 16), images(2, 16));
    let both = Images { pixels: [a.pixels.clone(), b.pixels.clone()].concat(), ..a.clone() };
    let mut sums = model.totals(&a);
    sums.add(model.totals(&b));
    let whole = model.totals(&both);
    assert_eq!((sums.evaluated().targets, sums.evaluated().correct), (3, whole.evaluated().correct));
    for ((name, got), (_, want)) in sums.named().into_iter().zip(whole.named()) {
        assert!((got - want).abs() < 1e-9 * want.abs(), "{name}: {got}, {want}");
    }
    // Bicubic enlargement of noise is far from it, and a reduced image is what it is.
    let [_, bicubic] = whole.qualities();
    assert!(bicubic.psnr > 5.0 && bicubic.psnr < 20.0, "{bicubic:?}");
    assert_eq!(model.images(&both).unwrap().images.len(), 9);
}

#[test]
fn patches_cover_the_image_and_overlaps_are_divided() {
    for (length, patch, starts, halved) in [
        (8, 5, vec![0, 3], [1.0, 1.0, 1.0, 2.0, 2.0, 1.0, 1.0, 1.0].as_slice()),
        (9, 5, vec![0, 3, 4], &[1.0, 1.0, 1.0, 2.0, 4.0, 2.0, 2.0, 2.0, 1.0]),
        (5, 5, vec![0], &[1.0; 5]),
    ] {
        let axis = Axis::of(length, patch);
        assert_eq!(axis.starts(patch), starts);
        assert_eq!(axis.divisors(patch, Overlap::Halved), halved);
        let means = axis.divisors(patch, Overlap::Mean);
        assert_eq!(means.iter().sum::<f32>() as usize, starts.len() * patch);
        assert!(means.iter().all(|&covered| covered >= 1.0));
    }
}

#[test]
fn mistakes_are_told_by_name() {
    let field = |config: SuperResolutionConfig, size: [usize; 2]| config.validate(Some(size)).unwrap_err().field;
    let good = || config(&centres(3, 8, 0.9), 2, 2);
    good().validate(Some([16, 24])).unwrap();
    assert_eq!(field(SuperResolutionConfig { scale: 5, ..good() }, [16, 16]), "scale");
    assert_eq!(field(good(), [17, 16]), "scale");
    assert_eq!(field(good(), [14, 16]), "scale");
    assert_eq!(field(SuperResolutionConfig { n_heads: 4, ..good() }, [16, 16]), "n_heads");
    assert_eq!(field(SuperResolutionConfig { qk_dim: 0, ..good() }, [16, 16]), "qk_dim");
    let patches = |patches| SuperResolutionConfig { local_patch: PerLayerCount::Each(patches), ..good() };
    assert_eq!(field(patches(vec![4]), [16, 16]), "local_patch");
    assert_eq!(field(patches(vec![4, 2]), [16, 16]), "local_patch");
    assert_eq!(field(patches(vec![4, 9]), [16, 16]), "local_patch");
    for (mixer, wrong) in [
        (centres(0, 8, 0.9), "mixer.token_centres.n_centres"),
        (centres(3, 0, 0.9), "mixer.token_centres.group_size"),
        (centres(3, 8, 1.5), "mixer.token_centres.decay"),
        (WINDOWS.replace("\"window\": 4", "\"window\": 40"), "mixer.attention.hilo.window"),
    ] {
        assert_eq!(field(config(&mixer, 2, 2), [16, 16]), wrong);
    }
    assert!(good().check_image([3, 40]).unwrap_err().contains("local_patch (4)"));
}
