//! Several ranks train as one process does: with threads for ranks, so that it is proved without MPI.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::Ordering;

use burn::tensor::Device;
use polyhead_kernels::comparison::{Tolerance, assert_close};
use polyhead_kernels::seed_random;
use polyhead_models::mup::Scalings;
use polyhead_models::weights::{NonFinite, from_safetensors, named};
use polyhead_models::{Batch, Decoder, DecoderConfig, Evaluated};
use serde_json::{Value, json};

use super::*;
use crate::config::{OptimizerConfig, ParallelConfig};
use crate::ranks::Ranks;
use crate::ranks::threads::on_ranks;
use crate::run_folder::files::{METRICS, OPTIMIZER, WEIGHTS};

const VOCAB: u32 = 11;

/// Rows whose numbers of targets differ from batch to batch, so that a mean over ranks is not the mean over targets.
struct Rows {
    fails_at: Option<u64>,
}

impl Batches for Rows {
    fn batch(&self, position: u64) -> Result<Batch, TrainError> {
        if self.fails_at == Some(position) {
            return Err(TrainError::Setting(format!("row {position} is torn")));
        }
        let tokens: Vec<u32> = (0..14).map(|at| (at * at + at * position as u32 + 3) % VOCAB).collect();
        let asked = |at: usize| at >= position as usize % 5;
        let target = |(at, &id): (usize, &u32)| if asked(at) { i64::from((id * 3 + 1) % VOCAB) } else { -100 };
        let targets = tokens.iter().enumerate().map(target).collect();
        Ok(Batch { batch: 2, seq: 7, tokens, targets, ..Batch::default() })
    }

    fn per_epoch(&self) -> u64 {
        5
    }
}

/// What a rank meets on its way.
#[derive(Clone, Copy, Default)]
struct Fate {
    /// The rank that a signal reaches, and after which step.
    signal: Option<(usize, u64)>,
    /// The rank whose data cannot be read, and at which position.
    torn: Option<(usize, u64)>,
}

struct Watching<'a> {
    requests: &'a Requests,
    signal_after: Option<u64>,
}

impl View for Watching<'_> {
    fn stepped(&mut self, step: &Logged) {
        if self.signal_after == Some(step.step) {
            self.requests.stop.store(15, Ordering::SeqCst);
        }
    }
    fn validated(&mut self, _step: u64, _sums: &Evaluated) {}
    fn saved(&mut self, _step: u64) {}
    fn note(&mut self, _note: &str) {}
}

fn parallel(settings: Value) -> ParallelConfig {
    let mut all = json!({ "mode": "data" });
    all.as_object_mut().unwrap().extend(settings.as_object().unwrap().clone());
    serde_json::from_value(all).unwrap()
}

fn model() -> Decoder {
    let attention = json!({ "mixture_of_head": { "n_heads": 4, "shared_heads": 1, "top_k": 2 } });
    let config = json!({ "d_model": 16, "n_layers": 2, "attention": attention });
    let config: DecoderConfig = serde_json::from_value(config).unwrap();
    seed_random(5);
    config.init(VOCAB as usize, &Device::flex().autodiff()).with_dropout(0.2)
}

/// A rank's part of a run of four passes a step; how it ended, the step it reached, and its weights.
type Ended = (Result<Option<usize>, String>, Vec<f32>);

fn train(ranks: &Ranks<'_>, folder: &Path, settings: &Value, steps: u64, fate: Fate) -> Ended {
    let checkpoint = checkpoint::newest_good(folder).unwrap().0.map(|(path, _)| path);
    let of_rank = |what: Option<(usize, u64)>| what.filter(|(rank, _)| *rank == ranks.rank()).map(|(_, at)| at);
    let (rows, requests) = (Rows { fails_at: of_rank(fate.torn) }, Requests::default());
    ranks.first_before_others(|| Ok::<_, ()>(())).unwrap(); // the checkpoint is chosen before rank 0 writes
    let job = Job {
        ranks,
        run_dir: folder.to_owned(),
        lock: None,
        resume: checkpoint,
        training: serde_json::from_value(json!({
            "steps": steps, "seq_len": 7, "batch_size": 2, "gradient_accumulation_steps": 4, "penalty_weight": 0.5,
        }))
        .unwrap(),
        procedure: settings
            .get("procedure")
            .map_or_else(Default::default, |own| serde_json::from_value(own.clone()).unwrap()),
        optimizer: serde_json::from_value::<OptimizerConfig>(settings["optimizer"].clone()).unwrap(),
        scalings: Scalings::default(),
        lr_scheduler: serde_json::from_value(json!({ "decay": "constant" })).unwrap(),
        validation: serde_json::from_value(json!({ "interval": 2, "batches": 5 })).unwrap(),
        checkpoint: serde_json::from_value(json!({ "interval": 0, "keep_latest_k": 0 })).unwrap(),
        metrics: serde_json::from_value(json!({ "log_freq": 1, "tensorboard": false })).unwrap(),
        seed: 3,
        train: &rows,
        held_out: &rows,
        probe: None,
        heads: None,
        validate_first: false,
        tracking: &[vec![3, 1, 4, 1, 5], vec![9, 2, 6], vec![2, 7, 1, 8]].map(Batch::text),
        companions: Vec::new(),
        adapter_only: false,
        recipe: String::new(),
        hyperparameters: Vec::new(),
        nonfinite: NonFinite::Refuse,
        requests: &requests,
    };
    let mut view = Watching { requests: &requests, signal_after: of_rank(fate.signal) };
    match run(model(), job, &mut view) {
        Ok(outcome) => {
            let weights = named(&outcome.model).into_iter().flat_map(|one| one.values).collect();
            (Ok(outcome.interrupted), weights)
        }
        Err(error) => (Err(error.to_string()), Vec::new()),
    }
}

/// All that must not depend on the number of ranks: the bytes of weights and optimizer after a step, and every number that was logged.
fn kept(folder: &Path, step: u64) -> [Vec<u8>; 3] {
    let checkpoint = folder.join(checkpoint::folder_name(step));
    let lines = std::fs::read_to_string(folder.join(METRICS)).unwrap();
    let timeless = |line: &str| {
        let mut values: BTreeMap<String, Value> = serde_json::from_str(line).unwrap();
        let of_a_process = ["tokens_per_second", "memory", "throughput/communication_share"];
        values.retain(|key, _| !of_a_process.contains(&&**key) && !key.starts_with("memory/"));
        serde_json::to_string(&values).unwrap()
    };
    let lines: Vec<String> = lines.lines().map(timeless).collect();
    let read = |name: &str| std::fs::read(checkpoint.join(name)).unwrap();
    [read(WEIGHTS), read(OPTIMIZER), lines.join("\n").into_bytes()]
}

fn adamw() -> Value {
    json!({ "optimizer": { "adamw": { "lr": 1e-2 } } })
}

/// Trains on one process, and on several ranks in each of these ways: all must come to the same bits, which are given.
fn same_on_ranks(settings: &Value, steps: u64, ways: &[(usize, Value)]) -> [Vec<u8>; 3] {
    let alone = tempfile::tempdir().unwrap();
    let ended = train(&Ranks::alone(parallel(json!({}))), alone.path(), settings, steps, Fate::default());
    assert_eq!(ended.0, Ok(None));
    let expected = kept(alone.path(), steps);
    for (size, way) in ways {
        let folder = tempfile::tempdir().unwrap();
        let run = |ranks: &Ranks<'_>| train(ranks, folder.path(), settings, steps, Fate::default());
        let ended = on_ranks(*size, parallel(way.clone()), run);
        let found = kept(folder.path(), steps);
        assert_eq!(String::from_utf8_lossy(&found[2]), String::from_utf8_lossy(&expected[2]), "{size} {way}");
        assert!(found == expected, "{size} ranks, {settings} {way}: weights or state differ");
        assert!(ended.iter().all(|rank| rank.0 == Ok(None) && rank.1 == ended[0].1), "{size}: ranks differ");
    }
    expected
}

/// The law, with dropout, a penalty, validation and unequal numbers of targets; three ranks have unequal numbers of passes.
#[test]
fn any_number_of_ranks_gives_the_bits_of_one() {
    let (whole, zero1) = (json!({}), json!({ "optimizer_sharding": "zero1" }));
    let ways = [1, 2, 3, 4].map(|size| (size, whole.clone())).into_iter().chain([(4, zero1.clone())]);
    let [_, _, log] = same_on_ranks(&adamw(), 2, &Vec::from_iter(ways));
    let log = String::from_utf8_lossy(&log);
    assert!(log.contains("\"penalty\":") && !log.contains("\"penalty\":null"), "{log}");
    same_on_ranks(&json!({ "optimizer": { "muon": { "lr": 1e-2 } } }), 2, &[(1, whole), (2, zero1)]);
}

/// Passes with fast weights of their own, which count when clipping, and with several backwards each.
#[test]
fn focusft_has_the_bits_of_one_process() {
    let mut settings = adamw();
    settings["procedure"] = json!({ "bilevel": {
        "rank": 2, "alpha": 4.0, "inner_lr": 0.3, "layer_fraction": 0.5, "clip_includes_fast": true, "second_order": true,
    } });
    let [_, _, log] = same_on_ranks(&settings, 2, &[(2, json!({})), (3, json!({ "optimizer_sharding": "zero1" }))]);
    assert!(String::from_utf8_lossy(&log).contains("bilevel/inner_loss_1"));
}

/// Every rank watches the same texts, and drops the same units from the third step on.
#[test]
fn send_has_the_bits_of_one_process() {
    let mut settings = adamw();
    settings["procedure"] = json!({ "neuron_dropout": { "interval": 1, "window": 2, "refresh": 2, "k": 0.25 } });
    let [_, _, log] = same_on_ranks(&settings, 3, &[(2, json!({})), (4, json!({ "optimizer_sharding": "zero1" }))]);
    assert!(String::from_utf8_lossy(&log).contains("neuron_dropout/loss_jump"));
}

#[test]
fn a_run_goes_on_on_another_number_of_ranks() {
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let ended = train(&Ranks::alone(parallel(json!({}))), whole.path(), &adamw(), 3, Fate::default());
    assert_eq!(ended.0, Ok(None));
    for (size, steps, sharding) in [(4, 1, "zero1"), (2, 2, "none"), (3, 3, "zero1")] {
        let run = |ranks: &Ranks<'_>| train(ranks, parts.path(), &adamw(), steps, Fate::default());
        on_ranks(size, parallel(json!({ "optimizer_sharding": sharding })), run);
    }
    let [weights, state, _] = kept(whole.path(), 3);
    let found = kept(parts.path(), 3);
    assert!(found[0] == weights && found[1] == state);
}

#[test]
fn adding_up_fast_differs_in_the_last_digits_alone() {
    let weights = |reduction: &str| {
        let folder = tempfile::tempdir().unwrap();
        let run = |ranks: &Ranks<'_>| train(ranks, folder.path(), &adamw(), 1, Fate::default());
        on_ranks(2, parallel(json!({ "gradient_reduction": reduction })), run);
        from_safetensors(&kept(folder.path(), 1)[1]).unwrap()
    };
    let (fast, ordered) = (weights("fast"), weights("ordered"));
    assert_ne!(fast, ordered, "sums are taken in another order");
    for (name, one) in fast {
        assert_close(&name, &one.values, &ordered[&name].values, Tolerance::absolute(1e-7));
    }
}

#[test]
fn the_log_has_the_memory_of_every_rank() {
    let folder = tempfile::tempdir().unwrap();
    on_ranks(3, parallel(json!({})), |ranks| train(ranks, folder.path(), &adamw(), 1, Fate::default()));
    let log = std::fs::read_to_string(folder.path().join(METRICS)).unwrap();
    let line: Value = serde_json::from_str(log.lines().next().unwrap()).unwrap();
    let of_rank = |rank: usize| line[format!("memory/rank_{rank}")].as_f64();
    assert_eq!(of_rank(0), line["memory"].as_f64(), "{line}");
    assert!((0..3).all(|rank| of_rank(rank) > Some(1e6)) && of_rank(3).is_none(), "{line}");
}

#[test]
fn a_signal_to_one_rank_saves_and_stops_all_after_the_step() {
    let folder = tempfile::tempdir().unwrap();
    let fate = Fate { signal: Some((1, 2)), ..Fate::default() };
    let ended = on_ranks(3, parallel(json!({})), |ranks| train(ranks, folder.path(), &adamw(), 9, fate));
    assert!(ended.iter().all(|rank| rank.0 == Ok(Some(15))), "{:?}", ended.iter().map(|e| &e.0).collect::<Vec<_>>());
    assert!(folder.path().join("step-00000002").exists() && !folder.path().join("step-00000003").exists());
}

#[test]
fn what_one_rank_cannot_read_ends_all_saved_and_names_it() {
    let folder = tempfile::tempdir().unwrap();
    // Position 6 is the third pass of the second step: that of rank 2.
    let fate = Fate { torn: Some((2, 6)), ..Fate::default() };
    let ended = on_ranks(4, parallel(json!({})), |ranks| train(ranks, folder.path(), &adamw(), 9, fate));
    let told: Vec<String> = ended.into_iter().map(|rank| rank.0.unwrap_err()).collect();
    assert_eq!(told[2], "row 6 is torn");
    for rank in [0, 1, 3] {
        assert_eq!(told[rank], "rank 2 on thread-2: row 6 is torn");
    }
    assert!(folder.path().join("step-00000001").exists());
}
