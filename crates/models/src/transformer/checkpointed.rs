//! Layers whose activations are not kept: the backward runs each of them again, from what it read.

use std::cell::Cell;
use std::slice::Iter;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Gradients, Tensor};
use polyhead_attention::sparse::Sparse;
use polyhead_attention::{Adapter, Adapters, Attended, Call, Mask, Observe, Rope, Sites};
use polyhead_kernels::{Leaf, PartGrads, RandomState, Rerun, checkpointed};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Block, Computing, TransformerConfig};

/// What the forward pass of training keeps of each layer for the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ActivationCheckpointing {
    /// All activations.
    #[default]
    None,
    /// What the layer reads: the backward pass runs the layer again.
    Block,
}

/// A pass through layers.
#[derive(Debug, Clone)]
pub(crate) struct LayerPass {
    checkpointing: ActivationCheckpointing,
    /// Whether a layer has been run.
    begun: Cell<bool>,
    /// Whether the backward pass has met an auxiliary loss.
    met_penalty: Arc<AtomicBool>,
}

impl LayerPass {
    pub(crate) fn new(checkpointing: ActivationCheckpointing) -> Self {
        Self { checkpointing, begun: Cell::default(), met_penalty: Arc::default() }
    }

    /// What a layer makes of `hidden`; the layers are to be run in their order.
    pub(crate) fn forward(
        &self,
        layer: &Block,
        hidden: Tensor<3>,
        call: Call<'_>,
        config: &TransformerConfig,
        computing: Computing,
    ) -> Attended {
        match self.checkpointing {
            ActivationCheckpointing::None => layer.forward(hidden, call, config, computing),
            ActivationCheckpointing::Block => layer.forward_checkpointed(hidden, call, config, computing, self),
        }
    }
}

impl Block {
    /// [`forward`](Self::forward) that keeps nothing but `hidden` for the backward pass. The same numbers and gradients, to the
    /// bit.
    fn forward_checkpointed(
        &self,
        hidden: Tensor<3>,
        call: Call<'_>,
        config: &TransformerConfig,
        computing: Computing,
        pass: &LayerPass,
    ) -> Attended {
        let made = |x: &Tensor<2>| x.is_tracked() && !x.is_require_grad();
        // What decodes or is looked at is not trained; what is changed may hang on other leaves; and adapters that are made of something else are no leaves.
        if !hidden.is_autodiff()
            || call.cache.is_some()
            || !matches!(call.observe, Observe::Nothing)
            || call.sites.own.is_some()
            || call.adapters.0.iter().any(|adapter| made(&adapter.a) || made(&adapter.b))
        {
            return self.forward(hidden, call, config, computing);
        }
        let mut leaves = Leaves::default();
        let part = Part {
            block: self.clone().map(&mut leaves),
            adapters: leaves.of_adapters(call.adapters),
            leaves: leaves.0,
            hidden: hidden.clone().inner(),
            rope: call.rope.cloned(),
            mask: call.mask.clone(),
            bias: call.bias.cloned(),
            grid: call.grid,
            sparse: call.sites.sparse.cloned(),
            config: config.clone(),
            computing,
            random: RandomState::now(),
            met_penalty: pass.met_penalty.clone(),
            is_first: !pass.begun.replace(true),
        };
        let attended = part.run(&part.lifted(false), Tensor::from_inner(part.hidden.clone()));
        if !hidden.is_tracked() && part.leaves.iter().all(Option::is_none) {
            return attended;
        }
        // The backward needs something to hang on, if it is for the leaves alone.
        let input = if hidden.is_tracked() { hidden } else { hidden.require_grad() };
        let (shape, has_penalty, output) = (input.dims(), attended.penalty.is_some(), flat(attended));
        let output = checkpointed(input, output, Rerun::new(move |grad, depth| part.grads(grad, depth)));
        let numbers = shape.iter().product();
        let (hidden, penalty) = match has_penalty {
            true => (output.clone().narrow(0, 0, numbers), Some(output.narrow(0, numbers, 1))),
            false => (output, None),
        };
        Attended { hidden: hidden.reshape(shape), penalty, seen: None }
    }
}

/// All that a layer gives, one behind the other.
fn flat(attended: Attended) -> Tensor<1> {
    let numbers = attended.hidden.dims().iter().product::<usize>();
    let hidden = attended.hidden.reshape([numbers]);
    match attended.penalty {
        Some(penalty) => Tensor::cat(vec![hidden, penalty], 0),
        None => hidden,
    }
}

/// Operations between parameters and what a layer reads, at most; chosen by us.
const DEEP: usize = 64;

/// A layer and all that it is told, its tensors on the inner device: none of them is on any tape.
struct Part {
    block: Block,
    adapters: Vec<Adapter>,
    /// For each parameter of the layer, then for each matrix of its adapters: where its gradient goes, if it has one.
    leaves: Vec<Option<Leaf>>,
    hidden: Tensor<3>,
    rope: Option<Rope>,
    mask: Mask,
    bias: Option<Tensor<4>>,
    grid: Option<[usize; 2]>,
    sparse: Option<Sparse>,
    config: TransformerConfig,
    computing: Computing,
    random: RandomState,
    met_penalty: Arc<AtomicBool>,
    is_first: bool,
}

impl Part {
    /// The layer and its adapters on the device with autodiff: constants, or with new leaves where there were leaves.
    fn lifted(&self, learned: bool) -> (Block, Vec<Adapter>) {
        let mut lift = Lift(self.leaves.iter(), learned);
        let block = self.block.clone().map(&mut lift);
        let adapters = self.adapters.iter().map(|adapter| {
            let [a, b] = [&adapter.a, &adapter.b].map(|x| lift.lift(x.clone()));
            Adapter { a, b, ..adapter.clone() }
        });
        (block, adapters.collect())
    }

    fn run(&self, (block, adapters): &(Block, Vec<Adapter>), hidden: Tensor<3>) -> Attended {
        let call = Call {
            rope: self.rope.as_ref(),
            bias: self.bias.as_ref(),
            grid: self.grid,
            sites: Sites { sparse: self.sparse.as_ref(), ..Sites::default() },
            adapters: Adapters(adapters),
            ..Call::new(&self.mask)
        };
        block.forward(hidden, call, &self.config, self.computing)
    }

    /// Runs the layer again; the gradients from that of its output.
    fn grads(&self, output_grad: Tensor<1>, depth: usize) -> PartGrads {
        let input = Tensor::from_inner(self.hidden.clone()).require_grad();
        let lifted = self.lifted(true);
        // Burn adds gradients up in the order of depth, so that the last bit of a sum depends on it: as deep as without
        // checkpointing, or at least deeper than anything that a layer makes of its parameters alone.
        let depth = if self.is_first { depth } else { DEEP };
        let deep = (0..depth).fold(input.clone(), |x, _| x.reshape(self.hidden.dims()));
        let again = || self.random.replay(|| self.run(&lifted, deep));
        let Attended { hidden, penalty, .. } = tracing::info_span!("layer again").in_scope(again);
        let numbers = hidden.dims().iter().product::<usize>();
        let of_hidden = output_grad.clone().narrow(0, 0, numbers);
        let hidden = (hidden.reshape([numbers]) * Tensor::from_inner(of_hidden)).sum();
        let objective = match penalty {
            Some(penalty) => self.with_penalty(hidden, penalty, output_grad.narrow(0, numbers, 1)),
            None => hidden,
        };
        let mut grads = objective.backward();
        let of_input = input.grad_remove(&mut grads).expect("a layer passes on what it reads");
        let mut collect = Collect(self.leaves.iter(), &mut grads, PartGrads::of_input(of_input));
        lifted.0.visit(&mut collect);
        for adapter in &lifted.1 {
            [&adapter.a, &adapter.b].into_iter().for_each(|x| collect.take(x));
        }
        collect.2
    }
}

impl Part {
    /// Adds the penalty, unless nobody asks for it, in the place that keeps the order in which gradients are added up: Burn walks
    /// a whole graph from the last penalty on, and through all layers below that from what they write.
    fn with_penalty(&self, hidden: Tensor<1>, penalty: Tensor<1>, grad: Tensor<1>) -> Tensor<1> {
        if grad.clone().into_scalar::<f32>() == 0.0 {
            return hidden;
        }
        let penalty = (penalty * Tensor::from_inner(grad)).sum();
        match self.met_penalty.swap(true, Ordering::Relaxed) {
            false => hidden + penalty,
            true => penalty + hidden,
        }
    }
}

/// Takes tensors off the tape and notes where their gradients go.
#[derive(Default)]
struct Leaves(Vec<Option<Leaf>>);

impl Leaves {
    fn take<const D: usize>(&mut self, x: Tensor<D>) -> Tensor<D> {
        self.0.push(Leaf::of(&x));
        x.inner()
    }

    fn of_adapters(&mut self, adapters: Adapters<'_>) -> Vec<Adapter> {
        let mut one = |adapter: &Adapter| {
            let [a, b] = [&adapter.a, &adapter.b].map(|x| self.take(x.clone()));
            Adapter { a, b, ..adapter.clone() }
        };
        adapters.0.iter().map(&mut one).collect()
    }
}

impl ModuleMapper for Leaves {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|x| self.take(x))
    }
}

/// Puts tensors on a new tape.
struct Lift<'a>(Iter<'a, Option<Leaf>>, bool);

impl Lift<'_> {
    fn lift<const D: usize>(&mut self, x: Tensor<D>) -> Tensor<D> {
        let learned = self.0.next().is_some_and(Option::is_some) && self.1;
        let x = Tensor::from_inner(x);
        if learned { x.require_grad() } else { x }
    }
}

impl ModuleMapper for Lift<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|x| self.lift(x))
    }
}

/// Takes the gradients of new leaves for the old ones.
struct Collect<'a>(Iter<'a, Option<Leaf>>, &'a mut Gradients, PartGrads);

impl Collect<'_> {
    fn take<const D: usize>(&mut self, x: &Tensor<D>) {
        if let Some(&Some(leaf)) = self.0.next()
            && let Some(grad) = x.grad_remove(self.1)
        {
            self.2.add(leaf, grad);
        }
    }
}

impl ModuleVisitor for Collect<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.take(&param.val());
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeMap;

    use burn::optim::GradientsParams;
    use burn::tensor::Device;
    use polyhead_kernels::seed_random;

    use super::*;
    use crate::adapters::LoraConfig;
    use crate::weights::{ParameterVisitor, visit_parameters};
    use crate::{
        Batch, Classifier, ClassifierConfig, ContextMask, Decoder, DecoderConfig, Examples, InputShape, Inputs, Pass,
        Sizes, Trainable, train_only,
    };

    type Grads = BTreeMap<String, Vec<f32>>;

    fn gradients<M: Module>(model: &M, objective: Tensor<1>) -> Grads {
        struct Collect(GradientsParams, Grads);
        impl ParameterVisitor for Collect {
            fn visit<const D: usize>(&mut self, name: String, param: &Param<Tensor<D>>) {
                if let Some(grad) = self.0.remove::<D>(param.id) {
                    self.1.insert(name, grad.into_data().iter::<f32>().collect());
                }
            }
        }
        let grads = GradientsParams::from_grads(objective.backward(), model);
        visit_parameters(model, Collect(grads, Grads::new())).1
    }

    fn decoder(settings: &str, attention: &str) -> Decoder {
        let json = format!(r#"{{"d_model":16,"n_layers":2{settings},"attention":{attention}}}"#);
        let config: DecoderConfig = serde_json::from_str(&json).unwrap();
        seed_random(3);
        config.init(11, &Device::flex().autodiff())
    }

    fn batch() -> Batch {
        let (tokens, targets) = ((0..14).map(|at| at % 11).collect(), (1..15).map(|at| at % 11).collect());
        Batch { batch: 2, seq: 7, tokens, targets, ..Batch::default() }
    }

    fn objective(model: &Decoder) -> Tensor<1> {
        let loss = model.loss(&batch(), Observe::Nothing);
        match loss.penalty {
            Some(penalty) => loss.cross_entropy + penalty,
            None => loss.cross_entropy,
        }
    }

    /// Gradients without and with checkpointing, to the bit; a zero may have either sign.
    fn assert_same(what: &str, model: &Decoder) {
        let kept = gradients(model, objective(model));
        let model = model.clone().with_checkpointing(ActivationCheckpointing::Block);
        let again = gradients(&model, objective(&model));
        assert_eq!(kept.keys().collect::<Vec<_>>(), again.keys().collect::<Vec<_>>(), "{what}");
        for (name, values) in &kept {
            let again = &again[name];
            assert_eq!(values.len(), again.len(), "{what}: {name}");
            let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || (*a == 0.0 && *b == 0.0);
            assert!(values.iter().zip(again).all(same), "{what}: {name}");
        }
        assert!(!kept.is_empty(), "{what}: something is learned");
    }

    #[test]
    fn decoders_get_the_same_gradients_to_the_bit() {
        for (settings, attention) in [
            ("", r#"{"softmax":{"n_heads":4,"n_kv_heads":2}}"#),
            (r#","tie_embeddings":false"#, r#"{"softmax":{"n_heads":2,"qkv_bias":true,"qk_norm":true}}"#),
            (r#","norm":"layer","mlp":"gelu","parallel_residual":true"#, r#"{"softmax":{"n_heads":2}}"#),
            ("", r#"{"grouped_differential":{"n_heads":4,"n_noise_heads":2}}"#),
            ("", r#"{"mixture_of_head":{"n_heads":4,"shared_heads":1,"top_k":2}}"#),
            ("", r#"{"gated_delta_net":{"n_heads":2}}"#),
        ] {
            let model = decoder(settings, attention);
            assert_same(attention, &model);
            let lora = LoraConfig { rank: 2, targets: vec!["q_proj".into(), "o_proj".into()], ..LoraConfig::default() };
            let Ok(adapted) = model.with_lora(&lora, 5) else { continue };
            assert_same(attention, &adapted);
            assert_same(attention, &train_only(adapted, |name| name.starts_with("lora.")));
        }
    }

    #[test]
    fn frozen_parameters_of_a_layer_leave_the_gradients_of_the_others() {
        let plain = decoder("", r#"{"softmax":{"n_heads":4,"n_kv_heads":2}}"#);
        every_subset(&plain, 9, |name| name.starts_with("layers.1."));
        // Pairs beside their projections, and what is below them. B away from zero, or A had no gradient.
        let targets = vec!["q_proj".into(), "down_proj".into()];
        let adapted = plain.with_lora(&LoraConfig { rank: 2, targets, ..LoraConfig::default() }, 5).unwrap();
        let adapted = adapted.map(&mut Move);
        every_subset(&adapted, 7, |name| {
            name.starts_with("lora.layers.1.")
                || ["layers.1.attention.q_proj.weight", "layers.1.mlp.down_proj.weight", "embedding.weight"]
                    .contains(&name)
        });
    }

    struct Move;
    impl ModuleMapper for Move {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            param.map(|x| (x + 0.02).detach().require_grad())
        }
    }

    /// Whichever of these `count` parameters are frozen, or learned alone, the gradients of the others keep their bits: all subsets of
    /// the attention's and of the MLP's, for no operation reads parameters of both.
    fn every_subset(model: &Decoder, count: usize, among: impl Fn(&str) -> bool) {
        let all = gradients(model, objective(model));
        let chosen: Vec<&String> = all.keys().filter(|name| among(name)).collect();
        assert_eq!(chosen.len(), count);
        let beside = |part: &str| (0..count).filter(|&at| !chosen[at].contains(part)).map(|at| 1 << at).sum::<u32>();
        let (all_of_them, beside) = ((1u32 << count) - 1, ["attention", "mlp"].map(beside));
        let inside = |set: u32| beside.iter().any(|others| set & others == 0);
        for frozen in (0..=all_of_them).filter(|&frozen| inside(frozen) || inside(all_of_them & !frozen)) {
            let learned =
                |name: &str| chosen.iter().position(|one| *one == name).is_none_or(|at| frozen >> at & 1 == 0);
            for checkpointing in [ActivationCheckpointing::None, ActivationCheckpointing::Block] {
                let model = train_only(model.clone(), learned).with_checkpointing(checkpointing);
                let got = gradients(&model, objective(&model));
                let want: Grads = all.clone().into_iter().filter(|(name, _)| learned(name)).collect();
                assert!(got == want, "frozen: {frozen:b}, {checkpointing:?}");
            }
        }
    }

    #[test]
    fn dropout_drops_the_same_when_a_layer_is_run_again() {
        let of = |checkpointing| {
            let model = decoder("", r#"{"softmax":{"n_heads":2}}"#).with_dropout(0.4).with_checkpointing(checkpointing);
            seed_random(8);
            gradients(&model, objective(&model))
        };
        assert_eq!(of(ActivationCheckpointing::None), of(ActivationCheckpointing::Block));
    }

    #[test]
    fn adapters_of_a_call_get_their_gradients() {
        let model = decoder("", r#"{"softmax":{"n_heads":2}}"#);
        let config = LoraConfig { rank: 2, ..LoraConfig::default() };
        let fresh = crate::adapters::draw(&model, &config, 0, (7, 0)).unwrap();
        let leaves: Vec<Vec<Adapter>> = fresh
            .into_iter()
            .map(|layer| {
                let lift = |adapter: Adapter| {
                    let [a, b] = [adapter.a, adapter.b + 0.1].map(|x| Tensor::from_inner(x).require_grad());
                    Adapter { a, b, ..adapter }
                };
                layer.into_iter().map(lift).collect()
            })
            .collect();
        let of = |model: &Decoder| {
            let mask = batch().mask(ContextMask::Causal);
            let loss = model.loss_of_pass(&batch(), Pass { adapters: &leaves, ..Pass::new(&mask) });
            let grads = loss.cross_entropy.backward();
            let grad = |x: &Tensor<2>| x.grad(&grads).unwrap().into_data().iter::<f32>().collect::<Vec<_>>();
            leaves.iter().flatten().flat_map(|adapter| [grad(&adapter.a), grad(&adapter.b)]).collect::<Vec<_>>()
        };
        assert_eq!(of(&model), of(&model.clone().with_checkpointing(ActivationCheckpointing::Block)));
    }

    #[test]
    fn classifiers_get_the_same_gradients() {
        let text = r#"{"text_encoder":{"d_model":16,"n_layers":2,"attention":{"softmax":{"n_heads":2}}}}"#;
        let config: ClassifierConfig = serde_json::from_str(text).unwrap();
        seed_random(4);
        let sizes = Sizes { input: InputShape::Tokens { seq_len: 5, vocab_size: 11 }, n_classes: 3 };
        let model = config.init(sizes, &Device::flex().autodiff());
        let inputs = Inputs::Tokens { tokens: (0..10).collect(), lengths: vec![5, 3], seq_len: 5 };
        let examples = Examples { inputs, labels: vec![0, 2], groups: vec![0, 0] };
        let of = |model: &Classifier| gradients(model, model.loss_under(&examples, ContextMask::Causal).cross_entropy);
        assert_eq!(of(&model), of(&model.clone().with_checkpointing(ActivationCheckpointing::Block)));
    }
}
