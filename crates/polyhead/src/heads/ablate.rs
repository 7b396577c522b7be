//! `polyhead heads ablate`: what every head is needed for, by switching it off.

mod classifier;

use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::Tensor;
use clap::Args;
use polyhead_evaluation::ablation::{self, Ablation, Effect, head_counts, with_targets};
use polyhead_evaluation::head_importance::rank_correlation;
use polyhead_evaluation::head_sets::HeadOf;
use polyhead_evaluation::heads::importances;
use polyhead_models::weights::{Named, to_safetensors};
use polyhead_recipe::Problems;
use polyhead_runs::Failure;
use polyhead_runs::classifier::open_classifier;
use polyhead_training::run_folder::atomic_write;
use serde_json::{Map, json};

use super::named;
use crate::allowed::caller;
use crate::console::{progress, talk};
use crate::head_report::{Report, most};
use crate::probe::{choose, folder, open, probe};

/// Which heads, on which texts.
#[derive(Debug, Args)]
pub struct AblateArgs {
    /// A checkpoint, a run folder, or a folder in Hugging Face's format.
    checkpoint: PathBuf,
    /// The texts. Default: held-out rows (of a classifier: examples) of the data that the model learned from.
    #[arg(long, num_args = 1.., value_parser = crate::cli::typed_text)]
    text: Vec<String>,
    /// Held-out rows at most; of a classifier examples, in whole batches. Default: 8 rows, 64 examples.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..), conflicts_with = "text")]
    rows: Option<u32>,
    /// Layers, counted from 0. Default: all.
    #[arg(long, value_delimiter = ',')]
    layers: Vec<usize>,
    /// Heads of each layer, counted from 0. Default: all.
    #[arg(long, value_delimiter = ',')]
    heads: Vec<usize>,
    /// Also write the mean outputs of all heads, a safetensors file that edits of interventions take for `replace = "mean"` at z.
    #[arg(long, value_name = "FILE")]
    write_means: Option<PathBuf>,
    /// Where the result is written. Default: a folder `heads` beside the checkpoint.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Default: the recipe's.
    #[arg(long, value_parser = crate::cli::device())]
    device: Option<String>,
}

/// Rows where nothing is said; chosen by us.
const ROWS: u32 = 8;

/// Writes the table.
pub fn ablate(args: &AblateArgs) -> Result<(), Failure> {
    if let Some(classifier) = open_classifier(&args.checkpoint, args.device.as_deref(), caller())? {
        return classifier::ablate(args, &classifier);
    }
    let trained = open(&args.checkpoint, args.device.as_deref())?;
    let rows = with_targets(&probe(&trained, &args.text, args.rows.unwrap_or(ROWS))?);
    if rows.is_empty() {
        return Err(Problems::plain("no row has anything to predict: more of them (--rows), or a --text".into()).into());
    }
    let counts = head_counts(&trained.model);
    let mut heads: Vec<HeadOf> = Vec::new();
    for layer in choose("--layers", &args.layers, counts.len())? {
        let chosen = choose("--heads", &args.heads, counts[layer])?;
        heads.extend(chosen.into_iter().map(|head| (layer, head)));
    }
    let out = folder(args.out.as_deref(), &trained.path, "heads")?;
    if let Some(file) = &args.write_means {
        write_means(file, ablation::means(&trained.model, &rows))?;
    }
    let (base, effects) =
        ablation::ablate(&trained.model, &rows, &heads, &mut |done, all| progress("switching off heads", done, all));
    let device = trained.model.device().autodiff();
    let gates = importances(&trained.model.clone().fork(&device).train(), &rows, &mut |done, all| {
        progress("importance of heads", done, all)
    });
    let gate = |&(layer, head): &HeadOf| gates.get(layer).and_then(|of| of.get(head)).map(|&gate| f64::from(gate));
    let gates: Vec<Option<f64>> = heads.iter().map(gate).collect();

    let column = |kind: usize, of: fn(&Effect) -> f64| -> Vec<Option<f64>> {
        effects.iter().map(|effects| effects[kind].as_ref().map(of)).collect()
    };
    let mut columns: Vec<(&'static str, Vec<Option<f64>>)> = Vec::new();
    let mut correlations = Map::new();
    for (kind, ablation) in Ablation::ALL.into_iter().enumerate() {
        let [loss, kl, accuracy] = names(ablation);
        let of_kl = column(kind, |effect| effect.kl);
        if let (Some(kls), Some(gates)) = (all(&of_kl), all(&gates))
            && kls.len() > 1
        {
            correlations.insert(ablation.name().into(), json!(rank_correlation(&kls, &gates)));
        }
        columns.push((loss, column(kind, |effect| effect.loss)));
        columns.push((kl, of_kl));
        columns.push((accuracy, column(kind, |effect| effect.accuracy)));
    }
    columns.push(("gate", gates));
    let finding = finding(&heads, &columns[1].1, &correlations);
    let more = json!({
        "checkpoint": trained.path, "rows": rows.len(), "loss": base.loss, "accuracy": base.accuracy,
        "rank_correlation_of_gate_and_kl": correlations,
    });
    let about = format!(
        "What changes on {} texts (loss {:.4} nats per target, accuracy {:.1} %) once a head writes nothing (zero), its mean over \
         all positions (mean), or what it writes in another text (resample): loss and accuracy more than before, KL from the \
         predictions as they are. gate: |gate x gradient| of a gate of 1 on the head (Michel et al. 2019, arXiv 1905.10650), for \
         one backward pass a text.",
        rows.len(),
        base.loss,
        100.0 * base.accuracy
    );
    let more = more.as_object().cloned().unwrap_or_default();
    let title = format!("Heads switched off: {}", trained.path.display());
    Report { title, finding, about, heads, columns, more, body: String::new() }.write(&out, "ablation")
}

/// Writes the tensor `mean`, `[layers, heads, width]`, out of `[1, heads, 1, width]` of each layer.
fn write_means(file: &Path, means: Vec<Tensor<4>>) -> Result<(), Failure> {
    let shapes: Vec<[usize; 4]> = means.iter().map(Tensor::dims).collect();
    let [_, heads, _, width] = shapes[0];
    if let Some(other) = shapes.iter().position(|shape| *shape != shapes[0]) {
        let problem = format!(
            "--write-means: layer {other} has {} heads of width {}, and layer 0 has {heads} of {width}: one tensor of all layers needs \
             them alike",
            shapes[other][1], shapes[other][3]
        );
        return Err(Problems::plain(problem).into());
    }
    let values = means.iter().flat_map(|mean| mean.to_data().iter::<f32>().collect::<Vec<_>>()).collect();
    let mean = Named { name: "mean".into(), shape: vec![shapes.len(), heads, width], values };
    atomic_write(file, &to_safetensors(&[mean], &[("format", "polyhead".into())])?)?;
    talk!("mean outputs of heads: {}", file.display());
    Ok(())
}

fn names(ablation: Ablation) -> [&'static str; 3] {
    match ablation {
        Ablation::Zero => ["zero_loss", "zero_kl", "zero_accuracy"],
        Ablation::Mean => ["mean_loss", "mean_kl", "mean_accuracy"],
        Ablation::Resample => ["resample_loss", "resample_kl", "resample_accuracy"],
    }
}

fn all(values: &[Option<f64>]) -> Option<Vec<f64>> {
    values.iter().copied().collect()
}

fn finding(heads: &[HeadOf], kl: &[Option<f64>], correlations: &Map<String, serde_json::Value>) -> String {
    let largest = most(heads, kl).map_or_else(String::new, |(head, kl)| {
        format!("Head {} matters most: without it predictions move by {kl:.3} nats.", named(head))
    });
    let told = correlations.get("zero").and_then(serde_json::Value::as_f64);
    told.map_or(largest.clone(), |told| {
        format!(
            "{largest} The gradient of gates orders heads as zeroing them does with a rank correlation of {told:.2}."
        )
    })
}
