#![allow(clippy::unwrap_used)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use burn::tensor::Device;
use polyhead_attention::AttentionConfig;
use polyhead_kernels::{BackwardHook, seed_random};
use polyhead_models::adapters::LoraConfig;
use polyhead_models::weights::named;
use polyhead_models::{ActivationCheckpointing, Batch, Decoder, DecoderConfig, TrainBatch, Trainable, train_only};
use serde_json::{Value, json};

use super::*;
use crate::config::{MuonConfig, OptimizerConfig, ParallelConfig, TrainingConfig};
use crate::gradients::backward;
use crate::optimizer::Optimizer;
use crate::procedure::{Procedure, StepContext, StepReport};
use crate::ranks::Communicator;
use crate::ranks::threads::on_ranks;
use crate::sharding::{Reduction, Values, to_host};
use crate::standard::{Standard, StandardConfig};

const LAYERS: usize = 4;

/// How long a test waits for what never comes where the code is wrong.
const LIMIT: Duration = Duration::from_secs(30);

fn model(more: Value) -> Decoder {
    let mut config = json!({ "d_model": 8, "n_layers": LAYERS, "attention": { "softmax": { "n_heads": 2 } } });
    config.as_object_mut().unwrap().append(&mut more.as_object().unwrap().clone());
    let config: DecoderConfig = serde_json::from_value(config).unwrap();
    seed_random(3);
    config.init(11, &Device::flex().autodiff())
}

/// Batches whose numbers of targets differ.
fn batch(pass: u64) -> Batch {
    let targets = |at: u64| if at < pass % 3 { -100 } else { ((at * 3 + pass) % 11) as i64 };
    let tokens = (0..14).map(|at| ((at * at + at * pass + 3) % 11) as u32).collect();
    Batch { batch: 2, seq: 7, tokens, targets: (0..14).map(targets).collect(), ..Batch::default() }
}

fn parallel(settings: Value) -> ParallelConfig {
    let mut all = json!({ "mode": "data" });
    all.as_object_mut().unwrap().append(&mut settings.as_object().unwrap().clone());
    serde_json::from_value(all).unwrap()
}

/// Steps of plain training, of so many passes on all ranks together: the bits of the weights, and what was told.
fn train(
    ranks: &Ranks<'_>,
    mut model: Decoder,
    optimizer: &OptimizerConfig,
    [steps, passes]: [u64; 2],
) -> (Vec<u32>, Vec<StepReport>) {
    let training = json!({ "steps": steps, "seq_len": 7, "batch_size": 2, "max_norm": 0.5, "penalty_weight": 0.5 });
    let training: TrainingConfig = serde_json::from_value(training).unwrap();
    let mut optimizer = Optimizer::new(optimizer.clone());
    if ranks.shards_optimizer() {
        super::super::keep_own(&mut optimizer, &model, ranks);
    }
    let mut procedure = Standard::new(&StandardConfig::default(), optimizer, &training);
    let mut reports = Vec::new();
    for step in 1..=steps {
        let position = (step - 1) * passes;
        let batches: Vec<Batch> = ranks.own(passes).map(|pass| batch(position + pass)).collect();
        let targets = (0..passes).map(|pass| batch(position + pass).targets()).sum();
        let context = StepContext { step, lr: 0.01, seed: 5, position, passes, targets, ranks };
        context.seed_pass(0);
        let (stepped, report) = procedure.step(model, &batches, &context).unwrap();
        model = stepped;
        reports.push(report);
    }
    (named(&model).into_iter().flat_map(|one| one.values).map(f32::to_bits).collect(), reports)
}

fn assert_same(what: &str, model: &Decoder, optimizer: &OptimizerConfig, ways: &[(usize, u64)]) {
    for &(size, passes) in ways {
        let alone = train(&Ranks::alone(parallel(json!({}))), model.clone(), optimizer, [2, passes]);
        assert!(alone.1.iter().all(|report| report.grad_norm > 0.0), "{what}: nothing learns");
        for sharding in ["none", "zero1"] {
            let config = parallel(json!({ "optimizer_sharding": sharding }));
            let all = on_ranks(size, config, |ranks| train(ranks, model.clone(), optimizer, [2, passes]));
            for (rank, found) in all.into_iter().enumerate() {
                assert_eq!(found.1, alone.1, "{what}: rank {rank} of {size}, {passes} passes, {sharding}");
                assert!(found.0 == alone.0, "{what}: weights of rank {rank} of {size}, {passes} passes, {sharding}");
            }
        }
    }
}

#[test]
fn gradients_that_leave_in_the_backward_pass_have_the_bits_of_one_process() {
    let adamw = OptimizerConfig::default();
    let tied = model(json!({}));
    assert_same("tied", &tied, &adamw, &[(1, 4), (2, 4), (4, 4), (2, 3), (3, 4)]);
    assert_same("Muon", &tied, &OptimizerConfig::Muon(MuonConfig::default()), &[(2, 4), (4, 4)]);
    assert_same("untied", &model(json!({ "tie_embeddings": false, "head_bias": true })), &adamw, &[(2, 4), (2, 3)]);
    let checkpointed = tied.clone().with_checkpointing(ActivationCheckpointing::Block);
    assert_same("checkpointing", &checkpointed.with_dropout(0.2), &adamw, &[(2, 4), (2, 3)]);
    let lora = LoraConfig { rank: 2, targets: vec!["q_proj".into(), "down_proj".into()], ..LoraConfig::default() };
    assert_same("LoRA", &tied.clone().with_lora(&lora, 5).unwrap(), &adamw, &[(2, 3)]);
    let penalty = model(json!({ "attention": { "mixture_of_head": { "n_heads": 4, "shared_heads": 1, "top_k": 2 } } }));
    assert_same("penalty", &penalty, &adamw, &[(2, 4), (2, 3)]);
    let train_what = |learns: fn(&str) -> bool| train_only(tied.clone(), learns);
    let upper = |name: &str| ["layers.2", "layers.3", "norm"].iter().any(|part| name.starts_with(part));
    assert_same("frozen below", &train_what(upper), &adamw, &[(2, 4), (2, 3)]);
    let even = |name: &str| !name.starts_with("layers.1") && !name.starts_with("layers.3");
    assert_same("frozen between", &train_what(even), &adamw, &[(2, 4), (2, 3)]);
    assert_same("frozen above", &train_what(|name| name.starts_with("embedding")), &adamw, &[(2, 4), (2, 3)]);
}

/// Weights that are read as they are not, whose gradients come late, included.
#[test]
fn gradients_of_every_mechanism_leave_as_they_are() {
    let causal = |config: &AttentionConfig| config.check_causal().is_ok();
    let examples: Vec<_> = AttentionConfig::examples().into_iter().filter(causal).collect();
    assert!(examples.len() > 8);
    for attention in examples {
        let model = model(json!({ "d_model": 24, "n_layers": 2, "attention": attention }));
        assert_same(attention.name(), &model, &OptimizerConfig::default(), &[(3, 3)]);
    }
}

/// What ranks hand over in a step whose gradients are sent once: added up pass by pass, or with the last pass in its backward.
#[test]
fn sums_that_are_sent_once_have_the_same_bits_in_the_last_backward_pass() {
    const PASSES: u64 = 5;
    let sums = |ranks: &Ranks<'_>, layers: usize| -> Values {
        let (model, mut sum) = (model(json!({})), Reduction::new(ranks).in_buckets(layers));
        let own = Vec::from_iter(ranks.own(PASSES));
        for pass in &own {
            let hooked = sum.overlaps(pass == own.last().unwrap()).then(Hooked::new);
            assert_eq!(hooked.is_some(), layers > 0 && *pass + ranks.size() as u64 >= PASSES);
            let calling = hooked.as_ref().map(|hooked| model.clone().with_hook(hooked.hook()));
            let loss = calling.as_ref().unwrap_or(&model).loss_under(&batch(*pass), Default::default());
            match hooked {
                Some(hooked) => sum.send_in_backward(&model, hooked, || backward(loss.cross_entropy)),
                None => sum.add(backward(loss.cross_entropy), &model),
            }
        }
        to_host(&sum.finish(&model, PASSES).for_update(&model, ranks), &model)
    };
    let config = parallel(json!({ "gradient_reduction": "fast" }));
    let [after, during] = [0, LAYERS].map(|layers| on_ranks(2, config, |ranks| sums(ranks, layers)));
    assert!(after[0].iter().all(Option::is_some));
    assert!(after == during, "sums differ");
}

/// A rank's way to the others that counts exchanges which have ended, and may break.
struct Watched<'a> {
    inner: &'a dyn Communicator,
    exchanges: Arc<(Mutex<usize>, Condvar)>,
    /// The exchange that panics, from 1; those after it go on.
    breaks_at: usize,
}

impl<'a> Watched<'a> {
    fn new(ranks: &Ranks<'a>, breaks_at: usize) -> Self {
        Self { inner: ranks.communicator(), exchanges: Arc::default(), breaks_at }
    }

    fn ended(&self) -> usize {
        *self.exchanges.0.lock().unwrap()
    }
}

impl Communicator for Watched<'_> {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn host(&self) -> String {
        self.inner.host()
    }

    fn exchange(&self, to_each: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
        let breaks = self.ended() + 1 == self.breaks_at;
        let received = if breaks { Vec::new() } else { self.inner.exchange(to_each) };
        *self.exchanges.0.lock().unwrap() += 1;
        self.exchanges.1.notify_all();
        assert!(!breaks, "broken");
        received
    }

    fn barrier(&self, patience: Option<Duration>) -> bool {
        self.inner.barrier(patience)
    }

    fn abort(&self, code: i32) {
        self.inner.abort(code);
    }
}

/// In the backward of the first layer every rank waits until it has the last layer's bucket from all. Nothing would come if buckets were
/// sent after the pass.
#[test]
fn the_last_layer_arrives_before_the_backward_pass_has_gone_through_the_first() {
    let config = parallel(json!({}));
    let all = on_ranks(2, config, |ranks| {
        let watched = Watched::new(ranks, usize::MAX);
        let ranks = Ranks::new(&watched, config);
        let (before, exchanges, (tell, told)) = (watched.ended(), watched.exchanges.clone(), channel());
        let waiting = BackwardHook::new(move |layer, _| {
            if layer == 0 {
                let (count, ended) = &*exchanges;
                let missing = |count: &mut usize| *count == before;
                let waited = ended.wait_timeout_while(count.lock().unwrap(), LIMIT, missing).unwrap().1;
                tell.send(!waited.timed_out()).unwrap();
            }
        });
        train(&ranks, model(json!({})).with_hook(waiting), &OptimizerConfig::default(), [1, 2]);
        told.try_iter().collect::<Vec<_>>()
    });
    assert_eq!(all, [[true], [true]]);
}

/// Whether `run` on two ranks ends, and with which words.
fn ends_with(run: impl Fn(&Ranks<'_>) + Send + Sync + 'static) -> String {
    let (tell, told) = channel();
    std::thread::spawn(move || {
        let ended = catch_unwind(AssertUnwindSafe(|| on_ranks(2, parallel(json!({})), run)));
        let words = |panic: Box<dyn std::any::Any + Send>| {
            panic.downcast_ref::<String>().cloned().or(panic.downcast_ref::<&str>().map(|words| (*words).to_owned()))
        };
        tell.send(words(ended.unwrap_err()).unwrap()).unwrap();
    });
    told.recv_timeout(LIMIT).expect("all ranks end")
}

#[test]
fn a_panic_of_the_thread_ends_its_rank() {
    let words = ends_with(|ranks| {
        let breaks_at = if ranks.rank() == 0 { 3 } else { usize::MAX };
        let watched = Watched::new(ranks, breaks_at);
        train(&Ranks::new(&watched, parallel(json!({}))), model(json!({})), &OptimizerConfig::default(), [1, 2]);
    });
    assert!(words.contains("broken"), "{words}");
}

/// The thread does not wait for buckets that nobody sends.
#[test]
fn a_panic_in_the_backward_pass_ends_its_rank() {
    let words = ends_with(|ranks| {
        let (rank, model) = (ranks.rank(), model(json!({})));
        let breaking = BackwardHook::new(move |layer, _| assert!(rank != 0 || layer != 1, "torn"));
        train(ranks, model.with_hook(breaking), &OptimizerConfig::default(), [1, 2]);
    });
    assert!(words.contains("torn"), "{words}");
}
