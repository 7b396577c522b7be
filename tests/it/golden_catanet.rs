//! CATANet by its authors' code: attention by token centres in training and evaluation, local attention, the whole network.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use polyhead_attention::{Observe, PerLayerCount};
use polyhead_models::SuperResolution;
use polyhead_models::SuperResolutionConfig;
use polyhead_models::super_resolution::{
    Axis, Layer, Mixer, MixerConfig, Overlap, Phase, TokenCentres, TokenCentresConfig, order,
};
use polyhead_models::weights::{Named, load_with};

use crate::golden::{
    Golden, Layout, Names, OUTPUT, Tensors, compare, compare_gradients, files, renamed, size, tensor, values,
};

/// Relative to the largest entry.
const GRADIENT: f32 = 1e-4;
/// Of a whole network.
const NETWORK: f32 = 5e-5;

/// What mixes the whole image.
const MIXING: Names<'static> = &[
    ("norm.weight", "norm.weight", Layout::Same),
    ("norm.bias", "norm.bias", Layout::Same),
    ("irca_attn.to_k.weight", "mixer.centre_k_proj.weight", Layout::Linear),
    ("irca_attn.to_v.weight", "mixer.centre_v_proj.weight", Layout::Linear),
    ("iasa_attn.to_q.weight", "mixer.tokens.q_proj.weight", Layout::Linear),
    ("iasa_attn.to_k.weight", "mixer.tokens.k_proj.weight", Layout::Linear),
    ("iasa_attn.to_v.weight", "mixer.tokens.v_proj.weight", Layout::Linear),
    ("iasa_attn.proj.weight", "mixer.tokens.o_proj.weight", Layout::Linear),
    ("conv1x1.weight", "mixer.out_proj.weight", Layout::Linear),
    ("mlp.norm.weight", "mlp_norm.weight", Layout::Same),
    ("mlp.norm.bias", "mlp_norm.bias", Layout::Same),
    ("mlp.fn.fc1.weight", "mlp.up_proj.weight", Layout::Linear),
    ("mlp.fn.fc1.bias", "mlp.up_proj.bias", Layout::Same),
    ("mlp.fn.dwconv.depthwise_conv.0.weight", "mlp.conv.weight", Layout::Same),
    ("mlp.fn.dwconv.depthwise_conv.0.bias", "mlp.conv.bias", Layout::Same),
    ("mlp.fn.fc2.weight", "mlp.down_proj.weight", Layout::Linear),
    ("mlp.fn.fc2.bias", "mlp.down_proj.bias", Layout::Same),
];

/// What attends inside patches.
const LOCAL: Names<'static> = &[
    ("layer.0.norm.weight", "local.norm.weight", Layout::Same),
    ("layer.0.norm.bias", "local.norm.bias", Layout::Same),
    ("layer.0.fn.to_q.weight", "local.pixels.q_proj.weight", Layout::Linear),
    ("layer.0.fn.to_k.weight", "local.pixels.k_proj.weight", Layout::Linear),
    ("layer.0.fn.to_v.weight", "local.pixels.v_proj.weight", Layout::Linear),
    ("layer.0.fn.proj.weight", "local.pixels.o_proj.weight", Layout::Linear),
    ("layer.1.norm.weight", "local_mlp_norm.weight", Layout::Same),
    ("layer.1.norm.bias", "local_mlp_norm.bias", Layout::Same),
    ("layer.1.fn.fc1.weight", "local_mlp.up_proj.weight", Layout::Linear),
    ("layer.1.fn.fc1.bias", "local_mlp.up_proj.bias", Layout::Same),
    ("layer.1.fn.dwconv.depthwise_conv.0.weight", "local_mlp.conv.weight", Layout::Same),
    ("layer.1.fn.dwconv.depthwise_conv.0.bias", "local_mlp.conv.bias", Layout::Same),
    ("layer.1.fn.fc2.weight", "local_mlp.down_proj.weight", Layout::Linear),
    ("layer.1.fn.fc2.bias", "local_mlp.down_proj.bias", Layout::Same),
];

#[test]
fn golden_catanet() {
    for golden in &files("catanet") {
        golden.config.is("layer_norm_eps", 1e-5);
        golden.config.is("dwconv_kernel", 5);
        match golden.config["kind"].as_str().unwrap() {
            "tab" => check_mixing(golden),
            "lrsa" => check_local(golden),
            "network" => check_network(golden),
            other => panic!("{}: kind {other}", golden.name),
        }
    }
}

/// The settings of a network of one layer with these widths.
fn one_layer(golden: &Golden, patch: usize, mixer: TokenCentresConfig) -> SuperResolutionConfig {
    let size = |key: &str| size(&golden.config, key);
    SuperResolutionConfig {
        scale: 2,
        d_model: size("dim"),
        n_layers: 1,
        n_heads: size("heads"),
        qk_dim: size("qk_dim"),
        d_ff: size("mlp_dim"),
        mixer: MixerConfig::TokenCentres(mixer),
        local_patch: PerLayerCount::Same(patch),
        local_overlap: Overlap::Halved,
    }
}

fn centres(n_centres: usize, group_size: usize, iterations: usize, decay: f64) -> TokenCentresConfig {
    let [n_centres, group_size] = [n_centres, group_size].map(PerLayerCount::Same);
    TokenCentresConfig { n_centres, group_size, iterations, decay }
}

/// A module with the file's parameters; the others stay as they are.
fn loaded<M: Module>(module: M, mut file: BTreeMap<String, Named>) -> M {
    let (module, problems) = load_with(module, &mut |name, shape| match file.remove(name) {
        Some(named) if named.shape != shape => Err(format!("{name}: {:?}, not {shape:?}", named.shape)),
        named => Ok(named.map(|named| TensorData::new(named.values, named.shape))),
    });
    assert!(problems.is_empty() && file.is_empty(), "{problems:?}, {:?}", file.keys());
    module
}

fn vector(name: &str, values: Vec<f32>) -> (String, Named) {
    (name.to_owned(), Named { name: name.to_owned(), shape: vec![values.len()], values })
}

/// The file's images as tokens, and the gradients of its loss by what becomes of them.
struct Pass<'a> {
    golden: &'a Golden,
    x: Tensor<4>,
    grid: [usize; 2],
}

impl<'a> Pass<'a> {
    fn of(golden: &'a Golden, device: &Device) -> Self {
        let x: Tensor<4> = tensor(&golden.tensors, "x", device).require_grad();
        let [batch, channels, rows, columns] = x.dims();
        let size = |key: &str| size(&golden.config, key);
        assert_eq!([batch, channels, rows, columns], [size("batch"), size("dim"), size("height"), size("width")]);
        Self { golden, x, grid: [rows, columns] }
    }

    fn tokens(&self) -> Tensor<3> {
        self.x.clone().flatten::<3>(2, 3).swap_dims(1, 2)
    }

    /// Compares the output, tokens again, and all gradients.
    fn check(&self, layer: &Layer, out: Tensor<3>, names: Names<'_>) {
        let Golden { name, tensors: file, .. } = self.golden;
        let out = out.swap_dims(1, 2).reshape(self.x.dims());
        compare(name, "out", &file["out"].values, &values(out.clone()), OUTPUT, false);
        let cotangent: Tensor<4> = tensor(file, "cotangent", &self.x.device());
        let grads = (out * cotangent).sum().backward();
        compare_gradients(name, layer, &grads, &renamed(file, "grad.w.", names), GRADIENT);
        let of_x = values(self.x.grad(&grads).unwrap());
        compare(name, "grad.x", &file["grad.x"].values, &of_x, GRADIENT, true);
    }
}

fn check_mixing(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    let device = Device::flex().autodiff();
    let size = |key: &str| size(config, key);
    let group = size("group_size");
    let described = centres(size("num_tokens"), group, size("n_iter"), config["ema_decay"].as_f64().unwrap());
    let mut parameters = renamed(file, "w.", MIXING);
    parameters.insert("mixer.centres".into(), file["state.means_before"].clone());
    let begun = file["state.initted_before"].values.clone();
    assert_eq!(begun[0] != 0.0, config["initted"].as_bool().unwrap());
    parameters.extend([vector("mixer.begun", begun)]);
    let layer = one_layer(golden, 3, described).init(&device).layers.remove(0);
    let layer = loaded(layer, parameters);
    let Mixer::TokenCentres(mixer) = &layer.mixer else { panic!("token centres") };
    let pass = Pass::of(golden, &device);
    let training = config["training"].as_bool().unwrap();
    let phase = if training { Phase::Training } else { Phase::Evaluation };
    let mixed = layer.mix(pass.tokens(), pass.grid, phase, &Observe::Nothing);
    let (out, (found, nearest)) = (mixed.hidden, mixed.centred.unwrap());
    check_between(golden, mixer, (&pass, &layer), (&found, &nearest), phase);

    let n = pass.grid[0] * pass.grid[1];
    let whole = [size("effective_group_size"), size("num_groups"), size("pad")];
    let groups = n.div_ceil(group.min(n));
    assert_eq!(whole, [group.min(n), groups, groups * group.min(n) - n], "{name}: groups");
    let unused = (0..size("num_tokens")).filter(|centre| !nearest.contains(centre)).count();
    assert_eq!(unused, size("empty_centres"), "{name}: centres without tokens");
    pass.check(&layer, out, MIXING);

    let mut after = mixer.clone();
    if training {
        after.follow(found);
    }
    compare(name, "state.means_after", &file["state.means_after"].values, &values(after.centres.val()), OUTPUT, false);
    compare(name, "state.initted_after", &file["state.initted_after"].values, &values(after.begun.val()), 0.0, false);
}

/// What is on the way from tokens to the output.
fn check_between(
    golden: &Golden,
    mixer: &TokenCentres,
    (pass, layer): (&Pass<'_>, &Layer),
    (found, nearest): (&Tensor<2>, &[usize]),
    phase: Phase,
) {
    let Golden { name, tensors: file, .. } = golden;
    let same = |key: &str, got: Vec<f32>| compare(name, key, &file[key].values, &got, OUTPUT, false);
    same("inter.centres", values(found.clone()));
    let whole = |numbers: &mut dyn Iterator<Item = usize>| numbers.map(|number| number as f32).collect::<Vec<_>>();
    assert_eq!(whole(&mut nearest.iter().copied()), file["inter.assign"].values, "{name}: assign");
    let n = pass.grid[0] * pass.grid[1];
    let sorted = order(nearest, n);
    assert_eq!(whole(&mut sorted.iter().map(|token| token % n)), file["inter.order"].values, "{name}: order");
    for (key, x) in ["inter.k_global", "inter.v_global"].into_iter().zip(mixer.keys_and_values(found.clone())) {
        let [_, centres, width] = x.dims();
        let heads = file[key].shape[0];
        same(key, values(x.reshape([centres, heads, width / heads]).swap_dims(0, 1)));
    }
    let normed = polyhead_kernels::layer_norm(
        pass.tokens(),
        layer.norm.weight.val(),
        layer.norm.bias.as_ref().unwrap().val(),
        1e-5,
    );
    let fitted = mixer.fit(&normed, phase);
    same("inter.attn", values(mixer.attend(normed, fitted, nearest)));
}

fn check_local(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    let device = Device::flex().autodiff();
    let patch = size(config, "patch");
    config.is("step", patch as u64 - 2);
    let layer = one_layer(golden, patch, centres(1, 1, 1, 1.0)).init(&device).layers.remove(0);
    let layer = loaded(layer, renamed(file, "w.", LOCAL));
    let pass = Pass::of(golden, &device);
    for (axis, length) in ["rows", "cols"].into_iter().zip(pass.grid) {
        let cut = Axis::of(length, patch);
        let starts: Vec<u64> = cut.starts(patch).into_iter().map(|start| start as u64).collect();
        assert_eq!(config[&*format!("patch_{axis}")], serde_json::json!(starts), "{name}: {axis}");
        for (what, overlap) in [("divisor", Overlap::Halved), ("coverage", Overlap::Mean)] {
            assert_eq!(cut.divisors(patch, overlap), file[&*format!("aux.{what}_{axis}")].values, "{name}: {axis}");
        }
    }
    pass.check(&layer, layer.refine(pass.tokens(), pass.grid), LOCAL);
}

fn check_network(golden: &Golden) {
    let Golden { name, config, tensors: file, .. } = golden;
    let device = Device::flex().autodiff();
    config.is("training", false);
    config.is("initted", true);
    config.is("in_chans", 3);
    config.is("leaky_slope", 0.1);
    let list = |key: &str| -> Vec<usize> { serde_json::from_value(config[key].clone()).unwrap() };
    let mixer = TokenCentresConfig {
        n_centres: PerLayerCount::Each(list("num_tokens")),
        group_size: PerLayerCount::Each(list("group_size")),
        iterations: list("n_iters")[0], // of training alone
        decay: 1.0,
    };
    let described = SuperResolutionConfig {
        scale: size(config, "upscale"),
        n_layers: size(config, "block_num"),
        local_patch: PerLayerCount::Each(list("patch_size")),
        ..one_layer(golden, 3, mixer)
    };
    let mut parameters = network(file, "w.", described.n_layers);
    for layer in 0..described.n_layers {
        parameters
            .insert(format!("layers.{layer}.mixer.centres"), file[&*format!("state.blocks.{layer}.0.means")].clone());
        parameters.extend([vector(&format!("layers.{layer}.mixer.begun"), vec![1.0])]);
    }
    let model: SuperResolution = loaded(described.init(&device), parameters);
    let x: Tensor<4> = tensor::<4>(file, "x", &device).require_grad();
    assert_eq!(x.dims()[2..], [size(config, "height"), size(config, "width")]);
    let out = model.forward(x.clone(), Phase::Evaluation, &Observe::Nothing).image;
    compare(name, "out", &file["out"].values, &values(out.clone()), NETWORK, false);
    let cotangent: Tensor<4> = tensor(file, "cotangent", &device);
    let grads = (out * cotangent).sum().backward();
    compare_gradients(name, &model, &grads, &network(file, "grad.w.", described.n_layers), GRADIENT);
    compare(name, "grad.x", &file["grad.x"].values, &values(x.grad(&grads).unwrap()), GRADIENT, true);
}

/// All parameters of a network, or their gradients.
fn network(file: &Tensors, prefix: &str, n_layers: usize) -> BTreeMap<String, Named> {
    const OUTER: Names<'static> = &[
        ("first_conv.weight", "input.weight", Layout::Same),
        ("first_conv.bias", "input.bias", Layout::Same),
        ("upconv.weight", "enlarge.0.weight", Layout::Same),
        ("upconv.bias", "enlarge.0.bias", Layout::Same),
        ("upconv1.weight", "enlarge.0.weight", Layout::Same),
        ("upconv1.bias", "enlarge.0.bias", Layout::Same),
        ("upconv2.weight", "enlarge.1.weight", Layout::Same),
        ("upconv2.bias", "enlarge.1.bias", Layout::Same),
        ("last_conv.weight", "output.weight", Layout::Same),
        ("last_conv.bias", "output.bias", Layout::Same),
    ];
    const CONV: Names<'static> = &[("weight", "conv.weight", Layout::Same), ("bias", "conv.bias", Layout::Same)];
    let mut all = renamed(file, prefix, OUTER);
    for layer in 0..n_layers {
        for (inside, names) in [
            (format!("blocks.{layer}.0."), MIXING),
            (format!("blocks.{layer}.1."), LOCAL),
            (format!("mid_convs.{layer}."), CONV),
        ] {
            let own = renamed(file, &format!("{prefix}{inside}"), names);
            all.extend(own.into_iter().map(|(name, tensor)| (format!("layers.{layer}.{name}"), tensor)));
        }
    }
    all
}
