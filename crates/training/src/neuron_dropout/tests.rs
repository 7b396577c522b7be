#![allow(clippy::unwrap_used)]

use burn::tensor::Device;
use polyhead_kernels::seed_random;
use polyhead_models::weights::named;
use polyhead_models::{DecoderConfig, IGNORE};

use super::*;
use crate::config::{OptimizerConfig, ParallelConfig, TrainingConfig};
use crate::ranks::Ranks;

const LAYERS: usize = 3;

fn decoder() -> DecoderConfig {
    let text = r#"{"d_model": 16, "n_layers": 3, "attention": {"softmax": {"n_heads": 2}}}"#;
    serde_json::from_str(text).unwrap()
}

fn model() -> Decoder {
    let device = Device::flex().autodiff();
    seed_random(5);
    decoder().init(11, &device)
}

fn config() -> NeuronDropoutConfig {
    NeuronDropoutConfig { interval: 2, window: 2, refresh: 2, k: 0.25, ..Default::default() }
}

fn tracking() -> Vec<Batch> {
    (0..6).map(|text| Batch::text((0..5 + text).map(|i| (i * 3 + text) % 11).collect())).collect()
}

fn batch(step: u64) -> Batch {
    let tokens: Vec<u32> = (0..14).map(|i| (i * 5 + step as u32) % 11).collect();
    let targets = tokens.iter().map(|&id| i64::from((id + 5) % 11)).collect();
    Batch { batch: 2, seq: 7, tokens, targets, ..Batch::default() }
}

fn training() -> TrainingConfig {
    serde_json::from_str(r#"{"steps": 99, "seq_len": 7, "batch_size": 2}"#).unwrap()
}

/// A procedure and what it has trained, step by step.
struct Run {
    procedure: NeuronDropout,
    model: Decoder,
    reports: Vec<StepReport>,
}

impl Run {
    fn new(config: NeuronDropoutConfig) -> Self {
        let (training, model, tracking) = (training(), model(), tracking());
        let parts = Parts {
            optimizer: Optimizer::new(OptimizerConfig::default()),
            training: &training,
            model: &model,
            tracking: &tracking,
            batches_per_epoch: 3,
        };
        let procedure = NeuronDropout::new(config, parts, &serde_json::Value::Null).unwrap();
        Self { procedure, model, reports: Vec::new() }
    }

    fn steps(mut self, count: u64) -> Self {
        for _ in 0..count {
            let step = self.reports.len() as u64 + 1;
            let (batch, ranks) = (batch(step), Ranks::alone(ParallelConfig::default()));
            let (position, targets) = (step - 1, batch.target_tokens());
            let context = StepContext { step, lr: 1e-2, seed: 1, position, passes: 1, targets, ranks: &ranks };
            let (model, report) = self.procedure.step(self.model.clone(), &[batch], &context).unwrap();
            self.model = model;
            self.reports.push(report);
        }
        self
    }

    fn told(&self, step: usize, name: &str) -> Option<f64> {
        let name = format!("neuron_dropout/{name}");
        self.reports[step - 1].measured.iter().find(|(told, _)| *told == name).map(|(_, value)| *value)
    }
}

fn weights(model: &Decoder) -> Vec<Vec<f32>> {
    named(model).into_iter().map(|tensor| tensor.values).collect()
}

/// Three statements, none of which sees another; only their last tokens are to be predicted.
fn statements(first: u32) -> Batch {
    let tokens = vec![first, 1, 2, 3, 4, 5, 6, 7, 8];
    let targets = (0..9).map(|at| if at % 3 == 1 { at as i64 + 1 } else { IGNORE }).collect();
    Batch { batch: 1, seq: 9, tokens, targets, documents: Some(vec![0, 0, 0, 1, 1, 1, 2, 2, 2]), ..Batch::default() }
}

#[test]
fn rows_are_watched_as_evaluation_reads_them() {
    let model = model().valid();
    let short = Batch { seq: 4, ..statements(9) };
    let short = Batch { tokens: short.tokens[..4].to_vec(), targets: short.targets[..4].to_vec(), ..short };
    let short = Batch { documents: short.documents.map(|ids| ids[..4].to_vec()), ..short };
    let rows = [statements(10), short, statements(0)];
    let mut sums = polyhead_models::Evaluated::default();
    rows.iter().for_each(|row| sums.add(model.evaluate(row)));
    assert_eq!(sums.targets, 3 + 1 + 3);
    assert!((Texts::new(&rows).loss(&model) - sums.mean_loss()).abs() < 1e-6);
    let last = |row: Batch| Texts::new(&[row]).embeddings(&model, 1, polyhead_evaluation::sensitivity::Embedding::Last);
    assert_eq!(last(statements(10)), last(statements(0)), "what another document says is not seen");
    assert_ne!(last(Batch { documents: None, ..statements(10) }), last(Batch { documents: None, ..statements(0) }));
    // Plain texts are predicted token by token, whatever fills them up.
    let [a, b] = [vec![3, 1, 4, 1, 5], vec![9, 2, 6]].map(Batch::text);
    sums = model.evaluate(&a);
    sums.add(model.evaluate(&b));
    assert_eq!((sums.targets, a.targets.last()), (4 + 2, Some(&IGNORE)));
    assert!((Texts::new(&[a, b]).loss(&model) - sums.mean_loss()).abs() < 1e-6);
}

#[test]
fn what_is_continued_ends_before_the_first_answer() {
    assert_eq!(watch::beginning(&statements(10)), [10, 1]);
    assert_eq!(watch::beginning(&Batch::text(vec![3, 1, 4, 1, 5])), [3, 1, 4]);
    let learned = Batch { targets: (1..10).collect(), ..statements(10) };
    assert_eq!(watch::beginning(&learned), [10, 1], "half of the first document");
}

#[test]
fn it_measures_at_intervals_and_drops_from_the_first_choice_on() {
    let run = Run::new(config()).steps(8);
    let measured: Vec<usize> = (1..=8).filter(|&step| run.told(step, "ees").is_some()).collect();
    let chosen: Vec<usize> = (1..=8).filter(|&step| run.told(step, "v_mean").is_some()).collect();
    assert_eq!((measured, chosen), (vec![2, 4, 6, 8], vec![4, 8]));
    assert!(run.told(4, "overlap_with_previous").is_none() && run.told(8, "overlap_with_previous").is_some());
    let state = &run.procedure.state;
    assert!(state.dropped.iter().all(|dropped| dropped.len() == 4));
    assert_eq!(state.dropped.last(), state.sensitive.as_ref());
    // Up to the first choice it is plain training, afterwards it is not.
    let plain = Run::new(NeuronDropoutConfig { select: Select::None, ..config() }).steps(8);
    assert_eq!(
        run.reports[..4],
        plain.reports[..4]
            .iter()
            .cloned()
            .enumerate()
            .map(|(step, mut report)| {
                if step == 3 {
                    report.measured = run.reports[3].measured.clone(); // the jump is of another mask
                    report.shown = run.reports[3].shown.clone();
                }
                report
            })
            .collect::<Vec<_>>()[..]
    );
    assert_ne!(run.reports[4].loss, plain.reports[4].loss);
}

#[test]
fn what_is_dropped_gets_no_gradient_and_nobody_sees_the_mask_otherwise() {
    let run = Run::new(config()).steps(4);
    let gate = run.procedure.gate(&run.model).unwrap();
    assert_eq!(gate.after_layer, LAYERS - 2);
    let GateKind::Keep(keep) = gate.kind.clone() else { panic!("{gate:?}") };
    assert_eq!(keep.into_data().iter::<f32>().sum::<f32>(), 12.0);
    // The model that comes out has no gate, unless it is asked for.
    let loss = |model: &Decoder| run.procedure.texts.loss(&model.valid());
    assert_eq!(loss(&run.model), loss(&run.model.clone().gated(None)));
    let masked = Run::new(NeuronDropoutConfig { mask_at_eval: true, ..config() }).steps(4);
    assert_eq!(weights(&masked.model), weights(&run.model));
    assert_ne!(loss(&masked.model), loss(&run.model));
    assert_eq!(loss(&masked.model), loss(&run.model.clone().gated(Some(gate.clone()))));
    let at_eval = |config: NeuronDropoutConfig| config.gate_at_eval(&masked.procedure.state(), &run.model).unwrap();
    assert!(at_eval(config()).is_none());
    assert_eq!(loss(&run.model.clone().gated(at_eval(masked.procedure.config.clone()))), loss(&masked.model));
    // Measured with the mask on the model would be another embedding of later layers, but never of this one.
    let rows = |model: &Decoder| run.procedure.texts.embeddings(&model.valid(), 1, Default::default());
    assert_eq!(rows(&run.model), rows(&run.model.clone().gated(Some(gate))));
}

#[test]
fn control_arms_drop_as_much_of_something_else() {
    let dropped = |select| {
        let run = Run::new(NeuronDropoutConfig { select, ..config() }).steps(8);
        (run.procedure.state.dropped.clone(), run.procedure.state.sensitive.clone().unwrap(), run)
    };
    let (random, _, run) = dropped(Select::Random);
    assert!(random.iter().all(|dropped| dropped.len() == 4) && random[0] != random[1]);
    assert_eq!(dropped(Select::Random).0, random, "the same seed draws the same");
    drop(run);
    let (twins, sensitive, _) = dropped(Select::VarianceMatched);
    assert!(twins[1].len() == 4 && twins[1].iter().all(|index| !sensitive.contains(index)));
    let (none, _, run) = dropped(Select::Dropout);
    assert!(none.iter().all(Vec::is_empty));
    assert!(matches!(run.procedure.gate(&run.model).unwrap().kind, GateKind::Dropout(rate) if rate == 0.25));
    assert!(dropped(Select::None).2.procedure.gate(&model()).is_none());
}

#[test]
fn as_published_weights_are_zeroed_at_the_start_of_every_interval() {
    let config = NeuronDropoutConfig {
        mode: Mode::WeightsCompat,
        embedding: polyhead_evaluation::sensitivity::Embedding::SecondLast,
        ..config()
    };
    let run = Run::new(config).steps(4);
    assert!(run.procedure.gate(&run.model).is_none());
    let neurons = run.procedure.state.dropped[0].clone();
    let zeroed = without_neurons(run.model.clone(), 1, &neurons);
    let mlp = zeroed.layers[1].mlp.as_ref().unwrap();
    let column = |weight: &burn::module::Param<Tensor<2>>, neuron: usize| -> f32 {
        weight.val().narrow(1, neuron, 1).abs().sum().into_scalar::<f32>()
    };
    for neuron in 0..48 {
        let zero = neurons.contains(&neuron);
        assert_eq!(column(&mlp.gate_proj.as_ref().unwrap().weight, neuron) == 0.0, zero);
        assert_eq!(column(&mlp.up_proj.weight, neuron) == 0.0, zero);
        assert_eq!(mlp.down_proj.weight.val().narrow(0, neuron, 1).abs().sum().into_scalar::<f32>() == 0.0, zero);
    }
    // The next step starts from there; the optimiser's momentum moves them again, as it does in the published code.
    let loss = zeroed.loss(&batch(5), Default::default()).cross_entropy.into_scalar::<f32>() / 14.0;
    let run = run.steps(1);
    assert!((run.reports[4].loss - f64::from(loss)).abs() < 1e-5);
    let gate = run.model.layers[1].mlp.as_ref().and_then(|mlp| mlp.gate_proj.as_ref()).unwrap();
    assert!(neurons.iter().any(|&neuron| column(&gate.weight, neuron) > 0.0));
}

#[test]
fn it_ends_once_loss_and_score_are_low_enough() {
    let ends = |epsilon, delta| {
        let config = NeuronDropoutConfig { epsilon: Some(epsilon), delta: Some(delta), ..config() };
        let mut run = Run::new(config);
        (1..=4).find(|_| {
            run = std::mem::replace(&mut run, Run::new(super::tests::config())).steps(1);
            run.procedure.ended().is_some()
        })
    };
    assert_eq!(ends(100.0, 100.0), Some(2), "at the first measurement");
    assert_eq!(ends(100.0, -100.0), None);
    assert_eq!(ends(0.0, 100.0), None);
    let config = NeuronDropoutConfig { epsilon: Some(100.0), delta: Some(90.0), ..config() };
    let run = Run::new(config.clone()).steps(2);
    let why = run.procedure.ended().unwrap();
    let loss = (run.reports[0].loss + run.reports[1].loss) / 2.0;
    let ees = run.told(2, "ees").unwrap();
    assert_eq!(why, format!("loss {loss:.4} < epsilon (100), EES {ees:.4} < delta (90)"));
    assert_eq!(resumed(config, &run).unwrap().ended(), Some(why), "whoever goes on hears it again");
}

/// The procedure of a run that goes on.
fn resumed(config: NeuronDropoutConfig, run: &Run) -> Result<NeuronDropout, TrainError> {
    let tracking = tracking();
    let parts = Parts {
        optimizer: Optimizer::new(OptimizerConfig::default()),
        training: &training(),
        model: &run.model,
        tracking: &tracking,
        batches_per_epoch: 3,
    };
    NeuronDropout::new(config, parts, &run.procedure.state())
}

#[test]
fn only_a_mask_stays_when_nobody_trains() {
    let run = Run::new(NeuronDropoutConfig { select: Select::Dropout, ..config() }).steps(4);
    assert!(run.procedure.gate(&run.model).is_some());
    let masked = NeuronDropoutConfig { mask_at_eval: true, ..run.procedure.config.clone() };
    assert!(mask_at_eval(&masked, 1, &run.procedure.state, &run.model).is_none());
    // Two passes of it differ by chance: there is no jump to tell of.
    assert_eq!(run.told(4, "loss_jump"), None);
    assert!(run.told(4, "v_mean").is_some() && Run::new(config()).steps(4).told(4, "loss_jump").is_some());
}

#[test]
fn nothing_is_told_as_minus_zero() {
    let run = Run::new(config()).steps(4);
    for (name, value) in run.reports.iter().flat_map(|report| &report.measured) {
        assert!(*value != 0.0 || value.is_sign_positive(), "{name}");
    }
    assert_eq!(run.told(2, "ees_change_variance"), Some(0.0));
}

#[test]
fn what_never_learns_is_not_set_to_zero() {
    let run = Run::new(config());
    let config = NeuronDropoutConfig { mode: Mode::WeightsCompat, ..config() };
    assert!(resumed(config.clone(), &run).is_ok());
    let freeze = crate::FreezeConfig { layers: 2, ..Default::default() };
    let frozen = Run { model: freeze.apply(run.model.clone()).unwrap(), ..run };
    let error = resumed(config, &frozen).err().unwrap().to_string();
    assert!(error.contains("layer 1 to 0, which is frozen"), "{error}");
}

#[test]
fn epochs_are_counted_in_batches() {
    let run = Run::new(NeuronDropoutConfig { unit: Unit::Epochs, interval: 1, ..config() }).steps(7);
    let measured: Vec<usize> = (1..=7).filter(|&step| run.told(step, "ees").is_some()).collect();
    assert_eq!(measured, [3, 6], "an epoch has 3 batches");
}

#[test]
fn settings_that_do_not_fit_are_named() {
    let told = |config: NeuronDropoutConfig| config.validate(Some(&decoder()), &training());
    let compat = NeuronDropoutConfig { mode: Mode::WeightsCompat, ..config() };
    let select = |select| NeuronDropoutConfig { select, ..config() };
    for (field, wrong) in [
        ("layer", NeuronDropoutConfig { layer: 3, ..config() }),
        ("layer", NeuronDropoutConfig { layer: -4, ..config() }),
        ("k", NeuronDropoutConfig { k: 1.5, ..config() }),
        ("k", NeuronDropoutConfig { k: 0.06, ..config() }),
        ("k", NeuronDropoutConfig { k: 0.6, ..select(Select::VarianceMatched) }),
        ("epsilon", NeuronDropoutConfig { delta: Some(1.0), ..config() }),
        ("window", NeuronDropoutConfig { window: 49, ..config() }),
        ("window", NeuronDropoutConfig { refresh: 51, ..config() }),
        ("tracking_texts", NeuronDropoutConfig { tracking_texts: 1, ..config() }),
        ("tracking_texts", NeuronDropoutConfig { tracking_texts: 2, ..compat.clone() }),
        ("mask_at_eval", NeuronDropoutConfig { mask_at_eval: true, ..select(Select::Dropout) }),
        ("mask_at_eval", NeuronDropoutConfig { mask_at_eval: true, ..select(Select::None) }),
        ("mask_at_eval", NeuronDropoutConfig { mask_at_eval: true, ..compat.clone() }),
        ("select", NeuronDropoutConfig { select: Select::Dropout, ..compat.clone() }),
    ] {
        let found: Vec<String> = told(wrong.clone()).into_iter().map(|error| error.field).collect();
        assert_eq!(found, [field], "{wrong:?}");
    }
    for right in [
        compat,
        NeuronDropoutConfig { k: 0.0625, ..config() },
        NeuronDropoutConfig { window: 48, ..config() },
        NeuronDropoutConfig { window: 49, ..select(Select::None) },
        NeuronDropoutConfig { tracking_texts: 1, ees_prompts: 1, ..config() },
        NeuronDropoutConfig { mask_at_eval: true, ..select(Select::Random) },
    ] {
        assert_eq!(told(right.clone()), [], "{right:?}");
    }
    let ees = polyhead_evaluation::ees::EesConfig { terms: 0, alpha: 2.0, ..Default::default() };
    let several = told(NeuronDropoutConfig { k: 2.0, window: 1, layer: 9, ees, ..config() });
    let fields: Vec<&str> = several.iter().map(|error| &*error.field).collect();
    assert_eq!(fields, ["k", "window", "ees.terms", "ees.alpha", "layer"]);
    let epochs = NeuronDropoutConfig { unit: Unit::Epochs, ..config() };
    assert_eq!(epochs.period(1 << 40, &training()).unwrap_err().field, "unit");
    assert_eq!(epochs.period(3, &training()), Ok(6));
    assert_eq!(epochs.period(25, &training()).unwrap_err().field, "window", "4 epochs of 25 batches are more than 99");
}
