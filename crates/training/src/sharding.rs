//! Parameters and their owners: each is owned by one rank as a whole, because Muon needs whole matrices. The owner adds up the gradients of
//! all ranks and hands the sum to all; with `optimizer_sharding = "zero1"` it updates the parameter instead, with the only copy of the
//! optimizer's state, and hands the new weights to all. Both ways as many bytes travel.
//!
//! Sums are taken on the host in f32, element by element, as Burn's accumulator takes them on a device: `((g0 + g1) + g2) + ...` in the
//! order of passes. A gradient that is missing is told apart from zeros, which would turn -0 into 0.
//!
//! Gradients are sent in buckets, in the same order on all ranks: those of each layer, from the last to the first, then the rest
//! (embeddings, norm, head). The buckets of layers leave while the backward pass goes on below ([`overlap`]).

use std::cmp::Reverse;

use burn::module::{Module, Param};
use burn::optim::GradientsParams;
use burn::tensor::{DType, Gradients, Tensor, TensorData};
use polyhead_models::weights::{
    Named, ParameterVisitor, from_safetensors, held, layer_of, load_with, visit_parameters, write_safetensors,
};
use polyhead_models::{Parameter, parameters};

use crate::TrainError;
use crate::gradients::{Sum, squares};
use crate::in_backward::Hooked;
use crate::optimizer::Optimizer;
use crate::ranks::{Communicator, Ranks};
use overlap::Leaving;

pub(crate) mod overlap;

/// Values of parameters on the host, in the order of the model's fields; `None` for those that are not here.
type Values = Vec<Option<Vec<f32>>>;

/// Who owns which parameter, in the order of the model's fields.
struct Shares(Vec<Share>);

/// A parameter and its owner.
struct Share {
    name: String,
    elements: usize,
    layer: Option<usize>,
    /// None where it does not learn.
    owner: Option<usize>,
}

impl Shares {
    /// The largest parameters first, each to the rank that has least.
    fn of<M: Module>(model: &M, size: usize) -> Self {
        let all = parameters(model);
        let mut order: Vec<usize> = (0..all.len()).filter(|&index| all[index].trainable).collect();
        order.sort_by_key(|&index| Reverse(all[index].elements()));
        let (mut loads, mut owners) = (vec![0; size], vec![None; all.len()]);
        for index in order {
            let least = (0..size).min_by_key(|&rank| loads[rank]).unwrap_or(0);
            owners[index] = Some(least);
            loads[least] += all[index].elements();
        }
        let share = |(one, owner): (Parameter, _)| {
            let (elements, layer) = (one.elements(), layer_of(&one.name));
            Share { name: one.name, elements, layer, owner }
        };
        Self(all.into_iter().zip(owners).map(share).collect())
    }

    /// The indices of what a rank owns.
    fn owned_by(&self, rank: usize) -> impl Iterator<Item = usize> {
        self.0.iter().enumerate().filter_map(move |(index, one)| (one.owner == Some(rank)).then_some(index))
    }

    /// What is to be sent of parameters: for each a byte that says whether it is here, and its values.
    fn pack(values: &Values, indices: impl Iterator<Item = usize>) -> Vec<u8> {
        let mut bytes = Vec::new();
        for index in indices {
            bytes.push(u8::from(values[index].is_some()));
            let values = values[index].as_deref().unwrap_or_default();
            let start = bytes.len();
            bytes.resize(start + size_of_val(values), 0);
            let (places, _) = bytes[start..].as_chunks_mut();
            places.iter_mut().zip(values).for_each(|(place, value)| *place = value.to_le_bytes());
        }
        bytes
    }

    /// Hands over what [`pack`](Self::pack) has packed, parameter by parameter.
    fn unpack(&self, mut bytes: &[u8], indices: impl Iterator<Item = usize>, mut take: impl FnMut(usize, &[[u8; 4]])) {
        for index in indices {
            let is_here = bytes[0] == 1;
            let length = if is_here { self.0[index].elements * size_of::<f32>() } else { 0 };
            let (values, rest) = bytes[1..].split_at(length);
            bytes = rest;
            if is_here {
                take(index, values.as_chunks().0);
            }
        }
    }

    /// Everybody's values, where each rank has those of its own parameters.
    fn gathered(&self, ranks: &Ranks<'_>, own: &Values) -> Values {
        let mut all = vec![None; self.0.len()];
        let gathered = ranks.gather(Self::pack(own, self.owned_by(ranks.rank())));
        for (owner, bytes) in gathered.iter().enumerate() {
            self.unpack(bytes, self.owned_by(owner), |index, values| {
                all[index] = Some(values.iter().map(|&value| f32::from_le_bytes(value)).collect());
            });
        }
        all
    }
}

/// The gradients of a step on their way to one sum over all passes of all ranks.
pub(crate) struct Reduction<'a, M> {
    ranks: &'a Ranks<'a>,
    /// How many layers have a bucket of their own.
    layers: usize,
    /// Those of the pass that is at work; of all passes where these are not kept apart.
    pass: Sum<M>,
    /// In one process, those of the passes before.
    before: Sum<M>,
    /// The sums of what this rank owns.
    owned: Values,
    /// How many times gradients were sent.
    rounds: u64,
}

/// The sum of the gradients: of one process, all of it; of several, what this rank owns.
pub(crate) struct Reduced {
    pub(crate) grads: GradientsParams,
    owned: Values,
}

impl<'a, M: Module> Reduction<'a, M> {
    pub(crate) fn new(ranks: &'a Ranks<'a>) -> Self {
        Self { ranks, layers: 0, pass: Sum::default(), before: Sum::default(), owned: Values::new(), rounds: 0 }
    }

    /// With a bucket for each of so many layers.
    pub(crate) fn in_buckets(self, layers: usize) -> Self {
        Self { layers, ..self }
    }

    /// Whether gradients leave in the backward pass of a forward pass that has no other; whether it is the last of this rank matters where
    /// they are sent once a step.
    pub(crate) fn overlaps(&self, is_last: bool) -> bool {
        self.ranks.size() > 1 && self.layers > 0 && (self.ranks.is_ordered() || is_last)
    }

    /// Adds a backward pass, of which a forward pass may have several.
    pub(crate) fn add(&mut self, grads: Gradients, model: &M) {
        self.pass.add(grads, model);
    }

    /// Runs the backward pass of a forward pass that has no other, while its gradients leave.
    pub(crate) fn send_in_backward(
        &mut self,
        model: &M,
        hooked: Hooked<Leaving<M>>,
        backward: impl FnOnce() -> Gradients,
    ) where
        M: 'static,
    {
        self.send(model, |leaving| leaving.in_backward(hooked, backward));
    }

    /// Ends this rank's first so many forward passes: what each adds up to is one term of the sum, on whichever rank it was.
    pub(crate) fn end_pass(&mut self, model: &M, passes: u64) {
        if self.ranks.size() == 1 {
            self.before.add_params(std::mem::take(&mut self.pass).finish(), model);
        } else if self.ranks.is_ordered() {
            self.send_rounds(model, passes);
        }
    }

    /// Ends the last pass of this rank in a step of so many on all ranks together: others may have had one more.
    pub(crate) fn end_passes(&mut self, model: &M, passes: u64) {
        match self.ranks.size() as u64 {
            1 => {}
            size => self.send_rounds(model, if self.ranks.is_ordered() { passes.div_ceil(size) } else { 1 }),
        }
    }

    /// Ends a step of so many passes on all ranks together.
    pub(crate) fn finish(mut self, model: &M, passes: u64) -> Reduced {
        if self.ranks.size() == 1 {
            self.end_pass(model, passes);
            return Reduced { grads: self.before.finish(), owned: Values::new() };
        }
        self.end_passes(model, passes);
        Reduced { grads: to_device(&self.owned, model), owned: self.owned }
    }

    /// Sends what was not sent by a backward pass.
    fn send_rounds(&mut self, model: &M, rounds: u64) {
        while self.rounds < rounds {
            self.send(model, |leaving| leaving);
        }
    }

    /// Sends the gradients of the pass to their owners, those that `meanwhile` adds too.
    fn send(&mut self, model: &M, meanwhile: impl FnOnce(Leaving<M>) -> Leaving<M>) {
        let shares = Shares::of(model, self.ranks.size());
        self.owned.resize(shares.0.len(), None);
        let owned = Owned {
            communicator: self.ranks.communicator(),
            shares,
            layers: self.layers,
            model: model.clone(),
            has_left: vec![false; self.owned.len()],
            sums: &mut self.owned,
        };
        let pass = std::mem::take(&mut self.pass).finish();
        overlap::send(owned, self.ranks, |to_thread| meanwhile(Leaving::new(model, pass, self.layers, to_thread)));
        self.rounds += 1;
    }
}

/// Gradients that travel together.
#[derive(Debug, Clone, Copy)]
enum Bucket {
    /// Of this layer.
    Layer(usize),
    /// Of whatever has not left before.
    Rest,
}

impl Bucket {
    /// The buckets of so many layers, in the order in which they are sent.
    fn all(layers: usize) -> impl Iterator<Item = Self> {
        (0..layers).rev().map(Self::Layer).chain([Self::Rest])
    }

    /// Whether it has a place for a parameter of this layer, or of none.
    fn has(self, layer: Option<usize>) -> bool {
        match self {
            Self::Layer(own) => layer == Some(own),
            Self::Rest => true,
        }
    }
}

/// What a rank adds up of the parameters that it owns, bucket by bucket.
struct Owned<'a, M> {
    communicator: &'a dyn Communicator,
    shares: Shares,
    layers: usize,
    model: M,
    sums: &'a mut Values,
    /// By parameter: whether its gradient of this pass has left.
    has_left: Vec<bool>,
}

impl<M: Module> Owned<'_, M> {
    /// Sends a bucket to the owners, and adds up what comes, in the order of ranks.
    fn exchange(&mut self, bucket: Bucket, grads: &GradientsParams) {
        let Self { communicator, shares, model, sums, has_left, .. } = self;
        let values = to_host(grads, model);
        for ((values, one), has_left) in values.iter().zip(&shares.0).zip(has_left) {
            assert!(values.is_none() || !*has_left, "{} had more gradient after its layer's had left", one.name);
            *has_left |= values.is_some();
        }
        let of = |owner: usize| shares.owned_by(owner).filter(|&index| bucket.has(shares.0[index].layer));
        let to_each = (0..communicator.size()).map(|owner| Shares::pack(&values, of(owner))).collect();
        for bytes in communicator.exchange(to_each) {
            shares.unpack(&bytes, of(communicator.rank()), |index, values| {
                let values = values.iter().map(|&value| f32::from_le_bytes(value));
                match &mut sums[index] {
                    Some(sum) => sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value),
                    none => *none = Some(values.collect()),
                }
            });
        }
    }
}

impl Reduced {
    /// The norm over all parameters, whoever owns them; in the order of parameters, whoever has how many.
    pub(crate) fn global_norm<M: Module>(&self, model: &M, ranks: &Ranks<'_>) -> f64 {
        let of_ranks = ranks.share(squares(&self.grads, model));
        let of_parameter = |index: usize| of_ranks.iter().find_map(|squares| squares[index]);
        (0..of_ranks[0].len()).filter_map(of_parameter).fold(0.0, |sum, square| sum + square).sqrt()
    }

    /// What this rank updates parameters by: the gradients of all of them, or where the optimizer is sharded, of its own.
    pub(crate) fn for_update<M: Module>(self, model: &M, ranks: &Ranks<'_>) -> GradientsParams {
        match ranks.size() > 1 && !ranks.shards_optimizer() {
            true => to_device(&Shares::of(model, ranks.size()).gathered(ranks, &self.owned), model),
            false => self.grads,
        }
    }
}

/// The model after every rank has updated its own parameters.
pub(crate) fn gather_weights<M: Module>(model: M, ranks: &Ranks<'_>) -> M {
    let shares = Shares::of(&model, ranks.size());
    let is_own = |index: usize| shares.0[index].owner == Some(ranks.rank());
    let own = held(&model).iter().enumerate().map(|(index, one)| is_own(index).then(|| one.values())).collect();
    let mut all = shares.gathered(ranks, &own).into_iter().enumerate();
    let others = |next: Option<(usize, Option<Vec<f32>>)>| next.filter(|(index, _)| !is_own(*index))?.1;
    load_with(model, &mut |_, shape| Ok(others(all.next()).map(|values| TensorData::new(values, shape)))).0
}

/// Gives up the state of parameters that other ranks own.
pub(crate) fn keep_own<M: Module>(optimizer: &mut Optimizer, model: &M, ranks: &Ranks<'_>) {
    let shares = Shares::of(model, ranks.size());
    let own: Vec<&str> = shares.owned_by(ranks.rank()).map(|index| shares.0[index].name.as_str()).collect();
    optimizer.retain(|name| own.contains(&name));
}

/// On rank 0, the optimizer's tensors of all ranks; elsewhere nothing.
///
/// # Errors
/// If they cannot be written to memory, which would be our mistake.
pub(crate) fn gather_state(optimizer: &Optimizer, ranks: &Ranks<'_>) -> Result<Vec<Named>, TrainError> {
    let mut own = Vec::new();
    write_safetensors(&optimizer.tensors(), &[], &mut own).map_err(|cause| TrainError::Data(Box::new(cause)))?;
    let mut to_each = vec![Vec::new(); ranks.size()];
    to_each[0] = own;
    let sent = ranks.exchange(to_each).into_iter().filter(|bytes| !bytes.is_empty());
    let mut all = Vec::new();
    for bytes in sent {
        all.extend(from_safetensors(&bytes)?.into_values());
    }
    Ok(all)
}

fn to_host<M: Module>(grads: &GradientsParams, model: &M) -> Values {
    struct Read<'a>(&'a GradientsParams, Values);
    impl ParameterVisitor for Read<'_> {
        fn visit<const D: usize>(&mut self, _name: String, param: &Param<Tensor<D>>) {
            let values = |grad: Tensor<D>| {
                let data = grad.into_data().convert_dtype(DType::F32).try_into_vec();
                data.unwrap_or_else(|error| unreachable!("converted to f32: {error:?}"))
            };
            self.1.push(self.0.get::<D>(param.id).map(values));
        }
    }
    visit_parameters(model, Read(grads, Vec::new())).1
}

fn to_device<M: Module>(values: &Values, model: &M) -> GradientsParams {
    struct Put<'a>(GradientsParams, std::slice::Iter<'a, Option<Vec<f32>>>);
    impl ParameterVisitor for Put<'_> {
        fn visit<const D: usize>(&mut self, _name: String, param: &Param<Tensor<D>>) {
            if let Some(values) = self.1.next().and_then(Option::as_ref) {
                let data = TensorData::new(values.clone(), param.dims());
                self.0.register::<D>(param.id, Tensor::from_data(data, &param.device().inner()));
            }
        }
    }
    visit_parameters(model, Put(GradientsParams::new(), values.iter())).0
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::tensor::Device;
    use polyhead_models::{Batch, Decoder, DecoderConfig, Loss, TrainBatch, Trainable, train_only};

    use super::*;
    use crate::config::{GradientReduction, OptimizerConfig, OptimizerSharding, ParallelConfig, ParallelMode};
    use crate::gradients::backward;
    use crate::optimizer::Update;
    use crate::procedure::StepContext;
    use crate::ranks::threads::{counted, on_ranks};
    use crate::update::{Step, Updater};

    fn model() -> Decoder {
        let attention = serde_json::json!({ "softmax": { "n_heads": 2 } });
        let config = serde_json::json!({ "d_model": 8, "n_layers": 2, "attention": attention });
        let config: DecoderConfig = serde_json::from_value(config).unwrap();
        polyhead_kernels::seed_random(1);
        config.init(11, &Device::flex().autodiff())
    }

    #[test]
    fn each_parameter_that_learns_has_one_owner_and_ranks_have_about_as_much() {
        let model = train_only(model(), |name| !name.starts_with("embedding"));
        let shares = Shares::of(&model, 3);
        let owned: Vec<Vec<usize>> = (0..3).map(|rank| shares.owned_by(rank).collect()).collect();
        let mut all = owned.concat();
        all.sort_unstable();
        let learning = parameters(&model).iter().filter(|one| one.trainable).count();
        all.dedup();
        assert_eq!((all.len(), owned.concat().len()), (learning, learning));
        let loads = owned.iter().map(|own| own.iter().map(|&index| shares.0[index].elements).sum::<usize>());
        let (least, most) = (loads.clone().min().unwrap(), loads.max().unwrap());
        let largest = shares.0.iter().filter(|one| one.owner.is_some()).map(|one| one.elements).max().unwrap();
        assert!(most - least <= largest, "{least} {most} {largest}");
    }

    #[test]
    fn what_is_not_there_and_a_negative_zero_arrive_as_they_are() {
        let share = |(elements, owner)| Share { name: String::new(), elements, layer: None, owner };
        let shares = Shares([(2, Some(1)), (1, None), (1, Some(1))].map(share).into());
        let values = vec![Some(vec![-0.0, f32::NAN]), None, None];
        let mut found = Vec::new();
        shares.unpack(&Shares::pack(&values, shares.owned_by(1)), shares.owned_by(1), |index, values| {
            found.push((index, values.iter().map(|&value| f32::from_le_bytes(value).to_bits()).collect::<Vec<_>>()));
        });
        assert_eq!(found, [(0, vec![(-0.0f32).to_bits(), f32::NAN.to_bits()])]);
        assert!(Shares::pack(&values, shares.owned_by(0)).is_empty());
    }

    /// What the guide says that a step costs, counted: gradients go to their owners after every pass or once, then sums or weights to
    /// all. One byte more says whether a parameter is there.
    #[test]
    fn bytes_and_memory_of_a_step_are_those_of_the_formulas() {
        const RANKS: u64 = 3;
        const PASSES: u64 = 6;
        let sizes: Vec<u64> = parameters(&model()).iter().map(|one| one.elements() as u64).collect();
        let (elements, largest) = (sizes.iter().sum::<u64>(), sizes.iter().copied().max().unwrap());
        let step = |ranks: &Ranks<'_>| {
            let (mut model, mut sum, mut optimizer) =
                (model(), Reduction::new(ranks), Optimizer::new(Default::default()));
            for pass in ranks.own(PASSES) {
                if pass >= RANKS {
                    sum.end_pass(&model, pass / RANKS);
                }
                let loss = model.loss_under(&Batch::text(vec![1, 2, 3, pass as u32]), Default::default());
                sum.add(backward(loss.cross_entropy), &model);
            }
            let mut grads = sum.finish(&model, PASSES).for_update(&model, ranks);
            model = optimizer.step(model, &mut grads, Update { lr: 0.1, scale: 1.0 });
            if ranks.shards_optimizer() {
                model = gather_weights(model, ranks);
            }
            let state: usize = optimizer.tensors().iter().map(|one| one.values().len()).sum();
            (state as u64, held(&model).iter().flat_map(|one| one.values()).collect::<Vec<f32>>())
        };
        for (gradient_reduction, exchanges) in
            [(GradientReduction::Ordered, PASSES / RANKS + 1), (GradientReduction::Fast, 2)]
        {
            for optimizer_sharding in [OptimizerSharding::None, OptimizerSharding::Zero1] {
                let config =
                    ParallelConfig { mode: ParallelMode::Data, optimizer_sharding, gradient_reduction, overlap: None };
                let at_begin = counted(RANKS as usize, config, |_| ()).1;
                let (ended, sent) = counted(RANKS as usize, config, step);
                let formula = (RANKS - 1) * exchanges * (4 * elements + sizes.len() as u64);
                assert_eq!(sent - at_begin, formula, "{config:?}");
                assert!(ended.iter().all(|rank| rank.1 == ended[0].1), "{config:?}: weights differ");
                let states = ended.iter().map(|rank| rank.0);
                match optimizer_sharding {
                    OptimizerSharding::None => assert!(states.clone().all(|state| state == 2 * elements)),
                    OptimizerSharding::Zero1 => {
                        assert_eq!(states.clone().sum::<u64>(), 2 * elements);
                        assert!(states.max().unwrap() <= 2 * (elements / RANKS + largest));
                    }
                }
            }
        }
    }

    /// One rank's loss is NaN: all leave the step out, with the weights as they were.
    #[test]
    fn a_loss_that_is_no_number_on_one_rank_skips_the_step_on_all() {
        let config = ParallelConfig { mode: ParallelMode::Data, ..ParallelConfig::default() };
        let training = serde_json::json!({ "steps": 1, "seq_len": 4, "batch_size": 1, "on_nonfinite": "skip" });
        let training = serde_json::from_value(training).unwrap();
        let reports = on_ranks(2, config, |ranks| {
            let (model, batch) = (model(), Batch::text(vec![1, 2, 3, 4]));
            let (passes, targets) = (2, 2 * batch.targets());
            let context = StepContext { step: 1, lr: 0.1, seed: 0, position: 0, passes, targets, ranks };
            let mut step = Step::new(&context);
            let loss = model.loss_under(&batch, Default::default());
            let factor = if ranks.rank() == 1 { f64::NAN } else { 1.0 };
            let loss = Loss { cross_entropy: loss.cross_entropy * factor, ..loss };
            let objective = step.objective(loss, &batch, 0.0);
            step.add(objective.backward(), &model);
            let before = held(&model).iter().map(|one| one.values()).collect::<Vec<_>>();
            let mut updater = Updater::new(Optimizer::new(OptimizerConfig::default()), &training);
            let (after, report) = updater.finish(model, step).unwrap();
            let stayed = held(&after).iter().map(|one| one.values()).collect::<Vec<_>>() == before;
            (report.skipped, report.loss.is_nan(), stayed, updater.optimizer.steps())
        });
        assert_eq!(reports, [(true, true, true, 0); 2]);
    }
}
