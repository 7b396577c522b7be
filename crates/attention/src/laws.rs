//! The laws that every mechanism must obey. The table in `lib.rs` runs [`hold`] for each of them.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Device, Distribution, Tensor, TensorData};
use polyhead_kernels::comparison::{Tolerance, assert_tensors_close, largest_difference};
use polyhead_kernels::random;

use crate::{
    Adapter, Adapters, Attended, Attention, AttentionConfig, Call, Dims, LayerCache, LayerSites, Mask, Observe, Rope,
    RopeLayout, Sites,
};

mod sites;

/// Tolerance for rounding when the same numbers are computed in another order.
const ROUNDING: Tolerance = Tolerance::absolute(2e-5);

/// A law: its name, for exemptions, and what must hold.
type Law = (&'static str, fn(&World));

const LAWS: &[Law] = &[
    ("awkward_shapes", awkward_shapes_work),
    ("no_look_ahead", nobody_looks_ahead),
    ("both_sides", both_sides_are_read_or_refused),
    ("cached_decoding", cached_decoding_equals_the_full_pass),
    ("padding", padding_does_not_leak),
    ("documents", documents_do_not_leak),
    ("rows", rows_are_independent),
    ("gradients", gradients_reach_every_parameter),
    ("differences", gradients_agree_with_differences),
    ("observing", observing_changes_nothing),
    ("maps", span_mass_sums_the_map),
    ("adapters", adapters_add_to_every_projection),
    ("cost", cost_counts_the_parameters),
    ("loading", loading_what_was_saved_restores_the_output),
    ("keys", misspelt_keys_are_refused),
    ("sizes", sizes_beyond_any_model_are_refused_or_counted),
];

fn all_laws() -> impl Iterator<Item = &'static Law> {
    LAWS.iter().chain(sites::LAWS)
}

/// Runs every law but those that the mechanism is exempt from. Whoever is exempt must break the law: an exemption that is no
/// longer needed is a mistake too.
pub(crate) fn hold(config: &AttentionConfig, exemptions: &[(&str, &str)]) {
    config.validate(&Dims::example()).expect("an example is valid");
    for (name, reason) in exemptions {
        let (_, law) = all_laws().find(|(law, _)| law == name).unwrap_or_else(|| panic!("there is no law {name}"));
        println!("{} is exempt from {name}: {reason}", config.name());
        let broken = std::panic::catch_unwind(|| law(&World::new(config))).is_err();
        assert!(broken, "{} keeps the law {name}, which it is exempt from", config.name());
    }
    let world = World::new(config);
    for (_, law) in all_laws().filter(|(law, _)| exemptions.iter().all(|(name, _)| name != law)) {
        law(&world);
    }
}

struct World {
    config: AttentionConfig,
    layer: Attention,
    device: Device,
}

impl World {
    fn new(config: &AttentionConfig) -> Self {
        let device = Device::flex().autodiff();
        let layer = config.init(&Dims::example(), &device);
        // Fresh weights are small enough that attention is nearly uniform: spread them, so that laws have teeth.
        Self { config: config.clone(), layer: layer.map(&mut Spread), device }
    }

    fn input(&self, batch: usize, seq: usize) -> Tensor<3> {
        draw([batch, seq, Dims::example().d_model], [0.0, 1.0], &self.device)
    }

    fn run(&self, x: Tensor<3>, mask: &Mask, cache: Option<&mut LayerCache>, observe: Observe) -> Attended {
        self.call(x, cache, Call { observe, ..Call::new(mask) })
    }

    fn run_with_sites(
        &self,
        x: Tensor<3>,
        mask: &Mask,
        cache: Option<&mut LayerCache>,
        sites: &LayerSites,
    ) -> Attended {
        self.call(x, cache, Call { sites: Sites { own: Some(sites), ..Sites::default() }, ..Call::new(mask) })
    }

    fn call(&self, x: Tensor<3>, cache: Option<&mut LayerCache>, call: Call<'_>) -> Attended {
        let start = cache.as_ref().map_or(0, |cache| cache.len());
        let seq = x.dims()[1];
        let rope = self.rope(start..start + seq);
        self.layer.forward(x, Call { rope: Some(&rope), grid: Some([1, seq]), cache, ..call })
    }

    /// The same layer whose output projections have no biases.
    fn without_output_bias(&self) -> Self {
        let layer = self.layer.clone().map(&mut Unbias(Vec::new()));
        Self { layer, device: self.device.clone(), config: self.config.clone() }
    }

    fn rope(&self, positions: std::ops::Range<usize>) -> Rope {
        Rope::new(positions, self.config.head_dim(&Dims::example()), 100.0, RopeLayout::RotateHalf, &self.device)
    }

    fn causal(&self, x: Tensor<3>) -> Tensor<3> {
        self.run(x, &Mask::causal(), None, Observe::Nothing).hidden
    }
}

/// Adds noise to every parameter.
pub(crate) struct Spread;

/// The next normal numbers, of this mean and deviation, of a test's own stream.
pub(crate) fn draw<const D: usize>(shape: [usize; D], [mean, deviation]: [f64; 2], device: &Device) -> Tensor<D> {
    random(shape, Distribution::Normal(mean, deviation), device)
}

impl ModuleMapper for Spread {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|value| {
            let noise = draw(value.dims(), [0.0, 0.3], &value.device());
            (value + noise).detach().require_grad()
        })
    }
}

fn close(got: Tensor<3>, want: Tensor<3>) {
    assert_tensors_close("outputs", got, want, ROUNDING);
}

fn awkward_shapes_work(world: &World) {
    for (batch, seq) in [(1, 1), (1, 7), (3, 13)] {
        let out = world.causal(world.input(batch, seq));
        assert_eq!(out.dims(), [batch, seq, Dims::example().d_model]);
        assert!(out.into_data().iter::<f32>().all(f32::is_finite), "batch {batch}, seq {seq}");
    }
}

fn nobody_looks_ahead(world: &World) {
    let x = world.input(2, 7);
    let other = Tensor::cat(vec![x.clone().narrow(1, 0, 4), world.input(2, 3)], 1);
    let (a, b) = (world.causal(x), world.causal(other));
    close(a.clone().narrow(1, 0, 4), b.clone().narrow(1, 0, 4));
    assert!(largest_difference(a.narrow(1, 4, 3), b.narrow(1, 4, 3)) > 1e-3, "the change must be visible behind");
}

fn both_sides_are_read_or_refused(world: &World) {
    let x = world.input(2, 7);
    let other = Tensor::cat(vec![x.clone().narrow(1, 0, 1), world.input(2, 6)], 1);
    let first = |x| world.run(x, &Mask::none(), None, Observe::Nothing).hidden.narrow(1, 0, 1);
    let apart = largest_difference(first(x), first(other));
    assert_eq!(apart > 1e-3, world.config.check_bidirectional().is_ok(), "the first position changes by {apart}");
}

fn cached_decoding_equals_the_full_pass(world: &World) {
    let x = world.input(2, 9);
    let mut cache = LayerCache::default();
    let mut parts = Vec::new();
    for (start, length) in [(0, 4), (4, 1), (5, 3), (8, 1)] {
        let part = x.clone().narrow(1, start, length);
        parts.push(world.run(part, &Mask::causal(), Some(&mut cache), Observe::Nothing).hidden);
    }
    assert_eq!(cache.len(), 9);
    close(Tensor::cat(parts, 1), world.causal(x));
}

fn padding_does_not_leak(world: &World) {
    let x = world.input(2, 6);
    let padded = Tensor::cat(vec![x.clone().narrow(1, 0, 4), world.input(2, 2)], 1);
    for mask in [Mask::none(), Mask::causal()] {
        let lengths = |n| mask.clone().with_lengths(&[n, n]);
        let long = world.run(padded.clone(), &lengths(4), None, Observe::Nothing).hidden.narrow(1, 0, 4);
        let short = world.run(x.clone().narrow(1, 0, 4), &lengths(4), None, Observe::Nothing).hidden;
        close(long, short);
    }
}

fn documents_do_not_leak(world: &World) {
    let x = world.input(1, 7);
    let other = Tensor::cat(vec![world.input(1, 3), x.clone().narrow(1, 3, 4)], 1);
    let mask = Mask::causal().with_documents(&[4, 4, 4, 9, 9, 9, 9]);
    let second = |x| world.run(x, &mask, None, Observe::Nothing).hidden.narrow(1, 3, 4);
    close(second(x.clone()), second(other.clone()));
    assert!(largest_difference(world.causal(x).narrow(1, 3, 4), world.causal(other).narrow(1, 3, 4)) > 1e-3);
}

fn rows_are_independent(world: &World) {
    let x = world.input(3, 5);
    let alone = world.causal(x.clone().narrow(0, 1, 1));
    close(world.causal(x).narrow(0, 1, 1), alone);
}

/// Every parameter of a module has a finite gradient that is not all zero; how many there are.
pub(crate) fn reach_every_parameter<M: Module>(module: &M, grads: &burn::tensor::Gradients) -> usize {
    let mut visitor = Gradients { grads, path: Vec::new(), seen: 0 };
    module.visit(&mut visitor);
    visitor.seen
}

struct Gradients<'a> {
    grads: &'a burn::tensor::Gradients,
    path: Vec<String>,
    seen: usize,
}

impl ModuleVisitor for Gradients<'_> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let name = self.path.join(".");
        let grad = param.val().grad(self.grads).unwrap_or_else(|| panic!("{name} has no gradient"));
        let values: Vec<f32> = grad.into_data().iter::<f32>().collect();
        assert!(values.iter().all(|g| g.is_finite()), "the gradient of {name} is not finite");
        assert!(values.iter().any(|&g| g != 0.0), "the gradient of {name} is zero");
        self.seen += 1;
    }
}

fn gradients_reach_every_parameter(world: &World) {
    let x = world.input(2, 7);
    let out = world.causal(x);
    let cotangent = draw(out.dims(), [0.0, 1.0], &out.device());
    let grads = (out * cotangent).sum().backward();
    assert!(reach_every_parameter(&world.layer, &grads) >= 4);
}

fn gradients_agree_with_differences(world: &World) {
    agree_with_differences(|| world.input(1, 5), |x| world.causal(x));
}

/// The slope of a random projection of `output` along a random direction is what the differences say, at a point that
/// `draw` gives.
pub(crate) fn agree_with_differences<const D: usize>(
    draw: impl Fn() -> Tensor<D>,
    output: impl Fn(Tensor<D>) -> Tensor<D>,
) {
    // A mechanism that chooses jumps where its choice changes. Near such a point differences over two steps disagree with
    // each other, whatever the gradient is; then another point is drawn.
    let agreed = (0..10).any(|_| {
        differences_at_a_point(draw(), &output).is_some_and(|[slope, difference]| {
            assert!((slope - difference).abs() <= 5e-3 * (1.0 + slope.abs()), "slope {slope}, difference {difference}");
            true
        })
    });
    assert!(agreed, "no point at which differences agree with each other");
}

/// The slope by the gradient, and by differences; `None` where the output jumps nearby.
fn differences_at_a_point<const D: usize>(x: Tensor<D>, output: &impl Fn(Tensor<D>) -> Tensor<D>) -> Option<[f32; 2]> {
    let random = || draw(x.dims(), [0.0, 1.0], &x.device());
    let (direction, cotangent) = (random(), random());
    let x = x.detach().require_grad();
    let value = |x: Tensor<D>| (output(x) * cotangent.clone()).sum();
    let grads = value(x.clone()).backward();
    let grad = x.grad(&grads).expect("the input has a gradient");
    let slope: f32 = (grad * direction.clone().inner()).sum().into_scalar();
    let step = 1e-2f32;
    let at = |t: f32| value(x.clone().detach() + direction.clone() * t).into_scalar::<f32>();
    let central = |h: f32| (at(h) - at(-h)) / (2.0 * h);
    let (wide, narrow) = (central(step), central(step / 2.0));
    // Richardson's extrapolation of the central difference: error of order step^4.
    let smooth = (wide - narrow).abs() <= 2e-2 * (1.0 + narrow.abs());
    smooth.then_some([slope, (4.0 * narrow - wide) / 3.0])
}

fn observing_changes_nothing(world: &World) {
    let x = world.input(2, 5);
    let silent = world.causal(x.clone());
    let seen = world.run(x, &Mask::causal(), None, Observe::Maps);
    seen.hidden.into_data().assert_eq(&silent.into_data(), true);
    let seen = seen.seen.expect("asked for");
    let stated = AttentionConfig::observed();
    let (_, stated) = stated.iter().find(|(name, _)| *name == world.config.name()).expect("in the table");
    for (row, values) in seen.numbers {
        assert!(stated.contains(&row), "{} is not among what {} observes", row.name, world.config.name());
        assert!(values.into_data().iter::<f32>().all(f32::is_finite), "{}", row.name);
    }
}

/// What queries give to sets of keys is the sum of their weights in the map.
fn span_mass_sums_the_map(world: &World) {
    let x = world.input(2, 5);
    let mask = Mask::causal();
    let spans = [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.0, 1.0]];
    let spans = Tensor::<2>::from_floats(spans, &x.device()).unsqueeze::<3>().expand([2, 5, 2]);
    let see = |observe| world.run(x.clone(), &mask, None, observe).seen.expect("asked for");
    assert!(!see(Observe::Numbers).numbers.is_empty());
    let mass = see(Observe::Spans(spans.clone().into())).span_mass.expect("asked for");
    let maps = see(Observe::Maps).maps.expect("asked for"); // of the first row
    close(mass.narrow(0, 0, 1).squeeze_dim::<3>(0), maps.matmul(spans.narrow(0, 0, 1)));
}

/// The projections of a layer: names and weights.
struct Projections(Vec<(String, Tensor<2>)>, Vec<String>);

impl ModuleVisitor for Projections {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.1.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.1.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let [.., name, last] = &self.1[..]
            && D == 2
            && name.ends_with("_proj")
            && last == "weight"
        {
            let sizes = param.dims();
            self.0.push((name.clone(), param.val().reshape([sizes[0], sizes[1]])));
        }
    }
}

/// Puts a weight in the place of the one of a projection.
struct Replace<'a>(&'a str, Tensor<2>, Vec<String>);

impl ModuleMapper for Replace<'_> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.2.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.2.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match &self.2[..] {
            [.., name, last] if name == self.0 && last == "weight" => {
                let new = self.1.clone();
                param.map(|old| new.reshape(old.dims()))
            }
            _ => param,
        }
    }
}

/// Biases of output projections become zero.
struct Unbias(Vec<String>);

impl ModuleMapper for Unbias {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.0.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.0.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match &self.0[..] {
            [.., projection, bias] if projection == "o_proj" && bias == "bias" => param.map(|bias| bias * 0.0),
            _ => param,
        }
    }
}

/// An adapter on a projection does what its product does when it is folded into the weight.
fn adapters_add_to_every_projection(world: &World) {
    let mut found = Projections(Vec::new(), Vec::new());
    world.layer.visit(&mut found);
    assert!(!found.0.is_empty());
    let x = world.input(2, 6);
    let rope = world.rope(0..6);
    for (name, weight) in found.0 {
        let [d_input, d_output] = weight.dims();
        let random = |shape: [usize; 2]| draw(shape, [0.0, 0.5], &world.device);
        let (a, b): (Tensor<2>, Tensor<2>) = (random([d_input, 2]), random([2, d_output]));
        let folded = weight + a.clone().matmul(b.clone()) * 0.5;
        let layer = world.layer.clone().map(&mut Replace(&name, folded, Vec::new()));
        let merged = World { layer, device: world.device.clone(), config: world.config.clone() };
        let adapter = Adapter { projection: name.as_str().into(), a, b, scale: 0.5 };
        let (mask, adapters) = (Mask::causal(), Adapters(std::slice::from_ref(&adapter)));
        let call = Call { rope: Some(&rope), grid: Some([1, 6]), adapters, ..Call::new(&mask) };
        let adapted = world.layer.forward(x.clone(), call).hidden;
        assert!(largest_difference(adapted.clone(), world.causal(x.clone())) > 1e-3, "{name} is not added to");
        close(adapted, merged.causal(x.clone()));
    }
}

fn cost_counts_the_parameters(world: &World) {
    assert_eq!(world.config.cost(&Dims::example()).parameters, world.layer.num_params() as u64);
}

struct Take(Vec<TensorData>);

impl ModuleVisitor for Take {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.0.push(param.val().into_data());
    }
}

struct Put(std::vec::IntoIter<TensorData>);

impl ModuleMapper for Put {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let data = self.0.next().expect("as many parameters as were saved");
        param.map(|old| Tensor::from_data(data, &old.device()).require_grad())
    }
}

fn loading_what_was_saved_restores_the_output(world: &World) {
    let mut saved = Take(Vec::new());
    world.layer.visit(&mut saved);
    let layer = world.config.init(&Dims::example(), &world.device).map(&mut Put(saved.0.into_iter()));
    let restored = World { layer, device: world.device.clone(), config: world.config.clone() };
    let x = world.input(2, 5);
    restored.causal(x.clone()).into_data().assert_eq(&world.causal(x).into_data(), true);
}

fn misspelt_keys_are_refused(world: &World) {
    let config = &world.config;
    let mut json = serde_json::to_value(config).expect("serialises");
    let table = json.as_object_mut().and_then(|table| table.get_mut(config.name())).expect("tagged by name");
    table.as_object_mut().expect("a table").insert("n_headz".into(), 3.into());
    let error = serde_json::from_value::<AttentionConfig>(json).expect_err("a misspelt key is refused");
    assert!(error.to_string().contains("n_headz"), "{error}");
}

/// Whole numbers that a setting may hold by mistake: whatever passes validation can be counted.
fn sizes_beyond_any_model_are_refused_or_counted(world: &World) {
    const MORE: [&str; 8] =
        ["head_dim", "head_k_dim", "head_v_dim", "n_kv_heads", "n_key_heads", "window", "conv_kernel", "q_lora_rank"];
    let config = &world.config;
    let json = serde_json::to_value(config).expect("serialises");
    let table = json[config.name()].as_object().expect("tagged by name");
    let written = table.iter().filter(|(_, value)| value.is_u64()).map(|(key, _)| key.as_str());
    for key in written.chain(MORE) {
        for value in [0, 1 << 40, u64::MAX >> 2, u64::MAX] {
            let mut changed = json.clone();
            changed[config.name()][key] = value.into();
            // A key that the mechanism does not have, or a number that it cannot hold, is refused before.
            let Ok(config) = serde_json::from_value::<AttentionConfig>(changed) else { continue };
            if config.validate(&Dims::example()).is_ok() {
                let cost = config.cost(&Dims::example());
                let _ = (cost.causal_flops(1 << 20), cost.cached_per_token(1 << 20));
            }
        }
    }
}
